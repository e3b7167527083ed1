"""OpenAI's HTTP interface over a Service: completions, chat completions, models; at once or as server-sent events.

Only surviving text is sent. A standard delta can only append, so streams hold back what may still be taken back (SettledStream);
with `retract: {"raw": true}` in the body (`extra_body` of OpenAI's client) everything comes at once, and a chunk whose choice has
`retract: {"deleted": n}` takes the last n characters back. `actors.serve` starts it.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from actors.saved import InputError, SavedModel, answer_settings, explain
from actors.service import EngineDied, Service
from actors.streaming import Appended, SettledStream, TextStream, text_of
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding

_BODY_BYTES = 16 << 20
_CHOICES = 128  # of one request, prompts x n
_UNDO = ("threshold", "mode", "max_undos", "max_undos_per_state", "ban_tried", "undo_bias")  # settings that a request may change
# What OpenAI's clients may send and is not done here, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1), "echo": (None, False), "frequency_penalty": (None, 0), "functions": (None, []),
    "logit_bias": (None, {}), "logprobs": (None, False, 0), "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}), "stop": (None, []), "suffix": (None, ""), "tools": (None, []),
    "top_logprobs": (None, 0),
}  # fmt: skip


class _Retract(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    raw: bool = False
    """Show what is deleted."""
    escape: bool = False
    """An undo token in the prompt is text, not an error."""


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Body(BaseModel):
    """What both kinds of completions share. Types are strict: a number is no text."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    n: int = Field(1, ge=1, le=_CHOICES)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    retract: _Retract = _Retract()


class _Completion(_Body):
    prompt: str | list[str] | list[int] | list[list[int]]


class _Part(BaseModel):
    type: str
    text: str | None = None


class _Message(BaseModel):
    role: str
    content: str | list[_Part]


class _Chat(_Body):
    messages: list[_Message] = Field(min_length=1)


@dataclass(frozen=True)
class _Question:
    """A request understood."""

    chat: bool
    decodes: list[tuple[DecodeRequest, Decoding]]
    """One for each choice."""
    raw: bool
    stream: bool
    usage: bool
    """Whether a stream ends with the usage."""
    prompt_tokens: int


class _Problem(Exception):
    """What is answered instead: an HTTP status, the message, and OpenAI's code for it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


_SAID = (_Problem, HTTPException, ClientDisconnect, EngineDied, Exception)


def application(saved: SavedModel, service: Service, name: str, row_tokens: int) -> Starlette:
    """The server of one model, called `name`, whose rows have `row_tokens` tokens at most."""
    api = _Api(saved, service, name, row_tokens)
    routes = [
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.models),
        Route("/health", api.health),
    ]
    return Starlette(routes=routes, exception_handlers=dict.fromkeys(_SAID, _say))


class _Api:
    def __init__(self, saved: SavedModel, service: Service, name: str, row_tokens: int) -> None:
        self._saved, self._service, self._name, self._row_tokens = saved, service, name, row_tokens
        self._started = int(time.time())

    async def health(self, request: Request) -> Response:
        """200 while the engine lives; how many decodes it has."""
        return JSONResponse({"running": self._service.running}, 503 if self._service.error else 200)

    async def models(self, request: Request) -> Response:
        card = {"id": self._name, "object": "model", "created": self._started, "owned_by": "retract"}
        if "model" in request.path_params:
            self._check_name(request.path_params["model"])
            return JSONResponse(card)
        return JSONResponse({"object": "list", "data": [card]})

    async def completions(self, request: Request) -> Response:
        body = await _read(request, _Completion)
        assert isinstance(body, _Completion)
        prompt: Any = body.prompt
        prompts = [prompt] if isinstance(prompt, str) or prompt and isinstance(prompt[0], int) else prompt
        try:
            ids = [self._ids(one, body.retract.escape) for one in prompts]
        except InputError as error:
            raise _Problem(400, str(error)) from error
        return await self._answer(request, self._understood(body, ids, chat=False))

    async def chat(self, request: Request) -> Response:
        body = await _read(request, _Chat)
        assert isinstance(body, _Chat)
        messages = [{"role": one.role, "content": _content(one)} for one in body.messages]
        try:
            ids = self._saved.chat_ids(messages, body.retract.escape)
        except InputError as error:
            raise _Problem(400, str(error)) from error
        return await self._answer(request, self._understood(body, [ids], chat=True))

    def _ids(self, prompt: str | list[int], escape: bool) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self._saved.prompt_ids(prompt, escape)
        size = len(self._saved.tokenizer)
        if not prompt or not all(0 <= token < size for token in prompt):
            raise InputError(f"a prompt of ids needs at least one, all in 0 .. {size - 1}")
        if self._saved.rule.undo_id in prompt:
            raise InputError("the prompt contains the undo token, which only the model may write")
        return tuple(prompt)

    def _check_name(self, name: str | None) -> None:
        if name not in (None, self._name):
            raise _Problem(404, f"there is no model {name!r}; this server has {self._name!r}", "model_not_found")

    def _understood(self, body: _Body, prompts: Sequence[tuple[int, ...]], chat: bool) -> _Question:
        self._check_name(body.model)
        for key, neutral in _NEUTRAL.items():
            if (body.model_extra or {}).get(key) not in neutral:
                raise _Problem(400, f"{key} is not supported here")
        if not 1 <= len(prompts) * body.n <= _CHOICES:
            raise _Problem(400, f"prompts x n must be 1 to {_CHOICES}, is {len(prompts) * body.n}")
        wanted = body.max_completion_tokens or body.max_tokens
        changed = {"temperature": body.temperature, "top_p": body.top_p, "max_tokens": wanted}
        asked = {key: value for key, value in changed.items() if value is not None}
        undo = body.retract.model_extra or {}
        if unknown := sorted(set(undo) - set(_UNDO)):
            raise _Problem(400, f"retract.{unknown[0]}: no such field; known are {', '.join(('raw', 'escape', *_UNDO))}")
        try:
            settings = answer_settings(
                self._saved.settings.model_dump() | asked | undo | ({"max_tokens": wanted} if wanted else {})
            )
            decodes = []
            for index, ids in enumerate(ids for ids in prompts for _ in range(body.n)):
                room = self._saved.room(ids, self._row_tokens)
                if wanted and wanted > room:
                    raise InputError(f"max_tokens is {wanted}, but behind a prompt of {len(ids)} tokens only {room} fit")
                seed = secrets.randbelow(2**31) if body.seed is None else (body.seed + index) % 2**63
                decodes.append((DecodeRequest(ids, seed), self._saved.decoding(settings, room)))
        except InputError as error:
            raise _Problem(400, str(error)) from error
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return _Question(chat, decodes, body.retract.raw, body.stream, usage, sum(map(len, prompts)))

    async def _answer(self, request: Request, question: _Question) -> Response:
        if self._service.error:
            raise _Problem(503, f"the engine has failed: {self._service.error}")
        head = {"id": f"{'chatcmpl' if question.chat else 'cmpl'}-{secrets.token_hex(12)}", "created": int(time.time())}
        if question.stream:
            kind = "chat.completion.chunk" if question.chat else "text_completion"
            return _EventStream(self._chunks(question, {**head, "object": kind, "model": self._name}))
        kind = "chat.completion" if question.chat else "text_completion"
        body: dict[str, Any] = {**head, "object": kind, "model": self._name}

        async def work() -> None:
            body.update(await self._whole(question))

        if not await _while_connected(request.receive, work):
            raise ClientDisconnect
        return JSONResponse(body)

    async def _whole(self, question: _Question) -> dict[str, Any]:
        done: dict[int, Decoded] = {}
        try:
            async with aclosing(self._service.decode(question.decodes)) as steps:
                async for place, step in steps:
                    if step.decoded:
                        done[place] = step.decoded
        except ValueError as error:  # what only the engine can refuse
            raise _Problem(400, str(error)) from error
        choices = []
        for index in range(len(question.decodes)):
            one = done[index]
            text = text_of(self._saved.tokenizer, one.ids, self._saved.rule, self._saved.stop_id)
            choice: dict[str, Any] = {
                "index": index,
                "finish_reason": one.finish,
                "logprobs": None,
                "retract": {"undos": one.undos},
            }
            choice |= {"message": {"role": "assistant", "content": text}} if question.chat else {"text": text}
            if question.raw:
                raw = TextStream(self._saved.tokenizer, self._saved.rule, self._saved.stop_id, raw=True)
                raw.feed(one.ids)
                choice["retract"]["raw"] = raw.text
            choices.append(choice)
        return {"choices": choices, "usage": _usage(question, sum(len(one.ids) for one in done.values()))}

    async def _chunks(self, question: _Question, head: dict[str, Any]) -> AsyncGenerator[str, None]:
        """The lines of a stream."""
        pages = [_Page(self._saved, decoding, question.raw) for _, decoding in question.decodes]

        def chunk(index: int, text: str | None, **more: Any) -> str:
            choice: dict[str, Any] = {"index": index, "finish_reason": None, "logprobs": None}
            if question.chat:
                choice["delta"] = {} if text is None else {"content": text}
            else:
                choice["text"] = text or ""
            return _event({**head, "choices": [choice | more]})

        if question.chat:
            for index in range(len(pages)):
                yield chunk(index, "", delta={"role": "assistant", "content": ""})
        tokens = 0
        try:
            async with aclosing(self._service.decode(question.decodes)) as steps:
                async for index, step in steps:
                    tokens += len(step.ids)
                    for text, deleted in pages[index].feed(step.ids, step.decoded is not None):
                        yield chunk(index, text, **({"retract": {"deleted": deleted}} if deleted else {}))
                    if step.decoded:
                        yield chunk(index, None, finish_reason=step.decoded.finish, retract={"undos": step.decoded.undos})
        except (EngineDied, ValueError) as error:
            yield _event(_error(400 if isinstance(error, ValueError) else 500, str(error)))
            return
        if question.usage:
            yield _event({**head, "choices": [], "usage": _usage(question, tokens)})
        yield "data: [DONE]\n\n"


class _Page:
    """One choice of a stream: (text to append, characters to take back before) of each change."""

    def __init__(self, saved: SavedModel, decoding: Decoding, raw: bool) -> None:
        self._raw = TextStream(saved.tokenizer, saved.rule, saved.stop_id) if raw else None
        self._settled = SettledStream(saved.tokenizer, decoding)

    def feed(self, ids: Sequence[int], last: bool) -> list[tuple[str, int]]:
        if self._raw:
            events = self._raw.feed(ids)
            return [(one.text, 0) if isinstance(one, Appended) else ("", one.chars) for one in events]
        text = self._settled.feed(ids) + (self._settled.finish() if last else "")
        return [(text, 0)] if text else []


class _EventStream(Response):
    """Sends events until there are no more or the client has gone, and closes their source in any case."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self._events) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        await _while_connected(receive, work)


async def _while_connected(receive: Receive, work: Callable[[], Awaitable[None]]) -> bool:
    """Do the work, but stop it when the client goes; whether it was done."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        finished = tasks[0].done()
        for task in tasks:
            task.cancel()
        outcome = (await asyncio.gather(*tasks, return_exceptions=True))[0]
    if finished and isinstance(outcome, BaseException):
        raise outcome
    return finished


async def _read(request: Request, model: type[_Body]) -> _Body:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > _BODY_BYTES:
            raise _Problem(413, f"the body has more than {_BODY_BYTES} bytes")
        parts.append(part)
    try:
        values = json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise _Problem(400, "the body is no JSON") from error
    if not isinstance(values, dict):
        raise _Problem(400, "the body is no JSON object")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _Problem(400, explain(error)) from error


def _content(message: _Message) -> str:
    if isinstance(message.content, str):
        return message.content
    if any(part.type != "text" or part.text is None for part in message.content):
        raise _Problem(400, "messages may hold parts of type text only")
    return "".join(part.text or "" for part in message.content)


def _usage(question: _Question, tokens: int) -> dict[str, int]:
    """Tokens emitted cost, whether they survive or not."""
    return {"prompt_tokens": question.prompt_tokens, "completion_tokens": tokens, "total_tokens": question.prompt_tokens + tokens}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _error(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def _say(request: Request, error: Exception) -> Response:
    if isinstance(error, _Problem):
        return JSONResponse(_error(error.status, error.message, error.code), error.status)
    if isinstance(error, HTTPException):
        return JSONResponse(_error(error.status_code, str(error.detail)), error.status_code)
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(_error(500, str(error)), 500)
