"""OpenAI's own client against the server: texts, streams that take back, errors, clients that go, many at a time."""

from __future__ import annotations

import asyncio
import io
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from actors.decode import HfDecoder, HfLive
from actors.live import Live, Step
from actors.openai_api import application
from actors.saved import SavedModel
from actors.serve import main
from actors.service import EngineDied, Service
from actors.streaming import text_of
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.config import SignalSettings
from tests.actors.readers import CONTEXT, UNDO, save_model
from tests.pipeline.tiny import rule, tiny_model

ROOT = Path(__file__).resolve().parents[2]
OFTEN: dict[str, Any] = {"threshold": 0.01}
PLAIN = Decoding("rewind", 0.0, 1.0, 5, 1, rule("token"))
CHATTY = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


class Running:
    """A server in a thread of the test, on a free port."""

    def __init__(self, folder: Path, slots: int = 8) -> None:
        self.saved = SavedModel.load(folder, {"max_tokens": 60})
        self.decoder = HfDecoder.from_folder(folder, slots, CONTEXT)
        self.service = Service(lambda: HfLive(self.decoder))
        self.service.start()
        config = uvicorn.Config(application(self.saved, self.service, "tiny", CONTEXT), port=0, log_level="critical")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()
        self.service.stop()

    def expected(self, ids: tuple[int, ...], seed: int = 0, **how: Any) -> Decoded:
        settings = self.saved.settings.model_copy(update=OFTEN | how)
        decoding = self.saved.decoding(settings, settings.max_tokens)
        return self.decoder.decode([DecodeRequest(ids, seed)], decoding)[0]

    def text(self, one: Decoded) -> str:
        return text_of(self.saved.tokenizer, one.ids, self.saved.rule, self.saved.stop_id)

    def idle(self) -> bool:
        return _until(lambda: self.service.running == 0)


def _until(is_so: Any) -> bool:
    for _ in range(20_000):
        if is_so():
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    server = Running(folder)
    yield server
    server.stop()


def body(**more: Any) -> dict[str, Any]:
    retract = OFTEN | more.pop("retract", {})
    return {"model": "tiny", "max_tokens": 60, "temperature": 0, "extra_body": {"retract": retract}} | more


def test_completions_are_the_decoder_s(running: Running) -> None:
    one = running.expected(running.saved.prompt_ids("a b\n"))
    assert one.undos > 0
    done = running.client.completions.create(prompt="a b\n", **body(retract={"raw": True}))
    choice: Any = done.choices[0]
    assert choice.text == running.text(one) and choice.finish_reason == one.finish
    assert choice.retract["undos"] == one.undos == choice.retract["raw"].count(UNDO)
    assert done.usage is not None and done.usage.completion_tokens == len(one.ids)
    several = running.client.completions.create(prompt=["a b\n", "ab\n"], n=2, **body())
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[1].text == running.text(one) != several.choices[2].text
    ids = list(running.saved.prompt_ids("a b\n"))
    assert running.client.completions.create(prompt=ids, **body()).choices[0].text == running.text(one)


def test_settings_of_a_request_are_its_own(running: Running) -> None:
    ids = running.saved.prompt_ids("a b\n")
    for how in ({"mode": "forbidden"}, {"mode": "soft"}, {"max_undos": 1}, {"threshold": None, "undo_bias": 2.0}):
        found = running.client.completions.create(prompt="a b\n", seed=5, **body(retract=how, temperature=1.1))
        assert found.choices[0].text == running.text(running.expected(ids, 5, temperature=1.1, **how)), how


@pytest.mark.parametrize("how", [{}, {"max_undos": 2}, {"mode": "forbidden"}], ids=str)
def test_a_standard_stream_only_appends_and_ends_with_the_surviving_text(running: Running, how: dict[str, Any]) -> None:
    one = running.expected(running.saved.prompt_ids("a b\n"), **how)
    stream = running.client.completions.create(
        prompt="a b\n", stream=True, stream_options={"include_usage": True}, **body(retract=how)
    )
    chunks = list(stream)
    texts = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(texts) == running.text(one)
    if how:
        assert sum(map(bool, texts)) > 2  # it did not wait for the end
    assert chunks[-2].choices[0].finish_reason == one.finish
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(one.ids)


def test_a_raw_stream_takes_back(running: Running) -> None:
    one = running.expected(running.saved.prompt_ids("a b\n"))
    page, deletions = "", 0
    for chunk in running.client.completions.create(prompt="a b\n", stream=True, **body(retract={"raw": True})):
        choice: Any = chunk.choices[0]
        if deleted := (getattr(choice, "retract", None) or {}).get("deleted"):
            page, deletions = page[:-deleted], deletions + 1
        page += choice.text
    assert page == running.text(one) and deletions > 0


def test_chat_asks_the_last_question_or_fills_the_template(running: Running) -> None:
    messages: Any = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "no"},
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
    ]
    one = running.expected(running.saved.question_ids("a b"))
    found = running.client.chat.completions.create(messages=messages, **body())
    assert found.choices[0].message.content == running.text(one)
    streamed = list(running.client.chat.completions.create(messages=messages, stream=True, **body()))
    assert streamed[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == running.text(one)
    running.saved.tokenizer.chat_template = CHATTY
    try:
        found = running.client.chat.completions.create(messages=messages, **body())
        one = running.expected(running.saved.prompt_ids("system: x\nuser: no\nuser: a b\n"))
        assert found.choices[0].message.content == running.text(one)
        with pytest.raises(openai.BadRequestError, match="contains the undo token"):
            running.client.chat.completions.create(messages=[{"role": "user", "content": f"a{UNDO}"}], **body())
    finally:
        running.saved.tokenizer.chat_template = None


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"prompt": ""}, 400, "the prompt is empty"),
    ({"prompt": []}, 400, "prompts x n must be 1 to 128"),
    ({"prompt": f"a{UNDO}"}, 400, "contains the undo token"),
    ({"prompt": [3, 99999]}, 400, "ids needs at least one, all in 0 .."),
    ({"prompt": 7}, 400, "prompt"),
    ({}, 400, "prompt: Field required"),
    ({"prompt": "a" * 600}, 400, "the prompt is too long: it has"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1, not 0"),
    ({"prompt": "a", "max_tokens": 5000}, 400, "max_tokens is 5000, but behind a prompt of 1 tokens only 511 fit"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature"),
    ({"prompt": "a", "n": 0}, 400, "n: "),
    ({"prompt": "a", "stop": "x"}, 400, "stop is not supported"),
    ({"prompt": "a", "retract": {"mode": "x"}}, 400, "mode"),
    ({"prompt": "a", "retract": {"unit": "all"}}, 400, "retract.unit: no such field"),
    ({"prompt": "a", "retract": {"max_undos": 0}}, 400, "max_undos"),
    ({"prompt": "a", "retract": {"undo_bias": 1.0}}, 400, "undo_bias has no effect beside a threshold"),
    ({"prompt": "a\ud800"}, 400, "no valid Unicode text"),
    ({"prompt": "a", "model": "other"}, 404, "there is no model 'other'"),
]


@pytest.mark.parametrize(("bad", "status", "said"), BAD, ids=[said for _, _, said in BAD])
def test_bad_requests_get_openai_s_errors(running: Running, bad: dict[str, Any], status: int, said: str) -> None:
    answer = httpx.post(f"{running.url}/completions", content=json.dumps(bad))
    error = answer.json()["error"]
    assert answer.status_code == status and said in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_other_bad_requests(running: Running) -> None:
    for content in (b"{", b"[]", b"\xff", b"[" * 100_000):
        answer = httpx.post(f"{running.url}/completions", content=content)
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("the body is no JSON")
    assert httpx.post(f"{running.url}/completions", content=b" " * (17 << 20)).status_code == 413
    assert httpx.get(f"{running.url}/nothing").json()["error"]["message"] == "Not Found"
    with pytest.raises(openai.BadRequestError, match="no message has the role user"):
        running.client.chat.completions.create(messages=[{"role": "assistant", "content": "x"}], **body())
    assert running.client.completions.create(prompt=f"a{UNDO}", **body(retract={"escape": True})).choices
    assert [card.id for card in running.client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        running.client.models.retrieve("other")


def test_what_the_engine_alone_can_refuse_is_a_bad_request(running: Running) -> None:
    """Guided by a verifier that the model's folder names and does not have."""
    settings = running.saved.settings.model_copy(update={"signal": SignalSettings(kind="score", threshold=0.5)})
    app = application(replace(running.saved, settings=settings), running.service, "tiny", CONTEXT)
    asked = {"prompt": "a", "retract": {"mode": "guided"}}

    async def ask(**more: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.post("/v1/completions", json=asked | more, timeout=60)

    whole, streamed = asyncio.run(ask()), asyncio.run(ask(stream=True))
    assert whole.status_code == 400 and "has no verifier_head" in whole.json()["error"]["message"]
    assert json.loads(streamed.text.removeprefix("data: ")) == whole.json()
    assert running.idle()


def test_who_goes_is_not_decoded_for(running: Running) -> None:
    slow = {"temperature": 1.0, "max_tokens": 500}
    assert running.idle()
    stream = running.client.completions.create(prompt="a\n", stream=True, n=60, **body(**slow, retract={"raw": True}))
    next(iter(stream))
    assert running.service.running > 0
    stream.close()
    assert running.idle()
    quiet = {"prompt": "a\n", "n": 60, "stream": False, **slow}
    for more in ({}, {"stream": True}):  # nothing is sent before the end, so nothing but the closed connection says it
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/completions", json=quiet | more, timeout=httpx.Timeout(30, read=0.05)).read()
        assert running.idle()


def test_many_clients_at_a_time_get_what_each_gets_alone(running: Running) -> None:
    rng = random.Random(0)
    prompts = ["ab "[rng.randrange(3)] * rng.randrange(1, 40) + "x\n" for _ in range(150)]
    asked = [(prompt, rng.randrange(1, 40), rng.random() < 0.5) for prompt in prompts]
    most = 0

    async def ask(client: openai.AsyncOpenAI, prompt: str, max_tokens: int, streams: bool) -> str:
        nonlocal most
        how = body(max_tokens=max_tokens)
        if streams:
            parts = [chunk.choices[0].text async for chunk in await client.completions.create(prompt=prompt, stream=True, **how)]
            text = "".join(parts)
        else:
            text = (await client.completions.create(prompt=prompt, **how)).choices[0].text
        most = max(most, running.service.running)
        return text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=300) as client:
            return list(await asyncio.gather(*(ask(client, *one) for one in asked)))

    found = asyncio.run(all_of_them())
    assert most > 8  # more than there are slots
    for (prompt, max_tokens, _), text in list(zip(asked, found, strict=True))[::7]:
        assert text == running.text(running.expected(running.saved.prompt_ids(prompt), max_tokens=max_tokens))
    assert running.idle()


def test_thousands_of_decodes_of_unlike_length() -> None:
    """Without HTTP: the engine's queue and the way back, with some that leave."""
    decoder = HfDecoder(tiny_model("llama"), 64, 64)
    service = Service(lambda: HfLive(decoder))
    service.start()
    rng = random.Random(0)
    asked = [
        (DecodeRequest((1,) * rng.randrange(1, 30), seed), Decoding("rewind", 1.0, 1.0, rng.randrange(1, 8), 0, rule("step")))
        for seed in range(2000)
    ]

    async def one(index: int) -> int:
        count = 0
        steps = service.decode([asked[index]])
        async for _, step in steps:
            count += len(step.ids)
            if index % 10 == 0:
                await steps.aclose()
        return count

    async def all_of_them() -> list[int]:
        return list(await asyncio.gather(*(one(index) for index in range(len(asked)))))

    counts = asyncio.run(all_of_them())
    assert all(1 <= count <= decoding.max_tokens for count, (_, decoding) in zip(counts, asked, strict=True))
    assert _until(lambda: service.running == 0)
    service.stop()


class Broken(Live):
    """An engine that fails at its second step."""

    running, steps = 0, 0

    def add(self, key: int, request: DecodeRequest, decoding: Decoding) -> None:
        self.running += 1

    def abort(self, key: int) -> None:
        self.running = 0

    def step(self) -> list[Step]:
        self.steps += 1
        if self.steps > 1:
            raise MemoryError("no memory")
        return []


def test_an_engine_that_fails_leaves_nobody_waiting(folder: Path) -> None:
    saved = SavedModel.load(folder, {})
    service = Service(Broken)
    service.start()
    app = application(saved, service, "tiny", CONTEXT)

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app, raise_app_exceptions=False), base_url="http://server"
        ) as client:
            first = await client.post("/v1/completions", json={"prompt": "a"})
            return [first, await client.post("/v1/completions", json={"prompt": "a"}), await client.get("/health")]

    first, second, health = asyncio.run(ask())
    assert first.status_code == 500 and "the engine has failed: no memory" in first.json()["error"]["message"]
    assert second.status_code == health.status_code == 503

    async def too_late() -> None:
        request = DecodeRequest((1,), 0)
        async for _ in service.decode([(request, saved.decoding(saved.settings, 5))]):
            pass

    with pytest.raises(EngineDied):
        asyncio.run(too_late())
    service.stop()

    def fails() -> Live:
        raise OSError("no weights")

    with pytest.raises(OSError, match="no weights"):
        Service(fails).start()


def test_who_asks_while_an_engine_is_dying_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(Broken)
    closing, asked = threading.Event(), threading.Event()
    deliver = service._deliver

    def slowly(found: Sequence[Any]) -> None:
        if service.error:  # the last words: the queue is drained, the thread still lives
            closing.set()
            asked.wait(20)
        deliver(found)

    monkeypatch.setattr(service, "_deliver", slowly)
    service.start()

    async def one() -> None:
        async for _ in service.decode([(DecodeRequest((1,), 0), PLAIN)]):
            pass

    async def both() -> None:
        first = asyncio.create_task(one())
        await asyncio.to_thread(closing.wait, 20)
        with pytest.raises(EngineDied, match="no memory"):
            await asyncio.wait_for(one(), 20)
        asked.set()
        with pytest.raises(EngineDied, match="no memory"):
            await asyncio.wait_for(first, 20)

    asyncio.run(both())
    service.stop()


def test_a_request_that_kills_the_engine_is_answered() -> None:
    class Fragile(Broken):
        def add(self, key: int, request: DecodeRequest, decoding: Decoding) -> None:
            raise RuntimeError("a broken pipe")

    service = Service(Fragile)
    service.start()

    async def ask() -> None:
        async for _ in service.decode([(DecodeRequest((1,), 0), PLAIN)]):
            pass

    with pytest.raises(EngineDied, match="a broken pipe"):
        asyncio.run(asyncio.wait_for(ask(), 20))
    service.stop()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model", "/nowhere"], "/nowhere is no model folder"),
        (["--undo-token", "<no>"], "lacks the undo token"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--port", "99999"], "cannot listen at 127.0.0.1:99999"),
    ],
)
def test_what_cannot_be_served_is_one_line(folder: Path, more: list[str], said: str) -> None:
    err = io.StringIO()
    assert main(["--model", str(folder), "--engine", "hf", "--port", "0", *more], io.StringIO(), err) == 2
    assert err.getvalue().count("\n") == 1 and said in err.getvalue()


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_the_command_serves_and_stops(folder: Path, engine: str) -> None:
    """The real thing, as a process: several clients' requests, one that goes, Ctrl-C."""
    if engine == "vllm":
        pytest.importorskip("vllm")
    command = [sys.executable, "-m", "actors.serve", "--model", str(folder), "--engine", engine, "--port", "0", "--name", "tiny"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        line = next((line for line in lines if " at http" in line), "")
        assert line, "it did not start"
        client = openai.OpenAI(base_url=line.split(" at ")[1].strip(), api_key="none", max_retries=0)
        saved = SavedModel.load(folder, {})
        decoder = HfDecoder.from_folder(folder, 4, CONTEXT)
        prompts = ["a b\n", "ab\n", "b b b\n", "a\n"]
        found = client.completions.create(prompt=prompts, **body())
        settings = saved.settings.model_copy(update=OFTEN | {"max_tokens": 60})
        requests = [DecodeRequest(saved.prompt_ids(prompt), 0) for prompt in prompts]
        wanted = decoder.decode(requests, saved.decoding(settings, 60))
        assert sum(one.undos for one in wanted) > 0
        texts = [text_of(saved.tokenizer, one.ids, saved.rule, saved.stop_id) for one in wanted]
        assert [choice.text for choice in found.choices] == texts
        slow = body(temperature=1.0, max_tokens=500, retract={"raw": True})
        stream = client.completions.create(prompt="a\n", stream=True, n=8, **slow)
        next(iter(stream))
        stream.close()
        health = str(client.base_url).removesuffix("/v1/") + "/health"
        assert _until(lambda: httpx.get(health).json()["running"] == 0)
        assert client.completions.create(prompt=prompts, **body()).choices[0].text == texts[0]
        client.close()
        process.send_signal(2)
        assert process.wait(60) in (0, 130)
    finally:
        process.kill()
        process.wait()
