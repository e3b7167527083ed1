"""Decoding with undo on vLLM: a request ends at U, is cut back, and comes again with the shorter ids, which prefix caching helps.

Between two undos vLLM decodes as ever: a logits processor asks each row's cursor what is forbidden and whether U is due. It finds
the cursors by number in this process, so the engine has to run in this process too, as actors.engines.VllmEngine has it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from actors.decode import alike, restrict
from actors.live import Live, Step, check_room
from actors.signals import ask_chosen, detector_of
from pipeline.backtrack.cursor import Cursor, Decoded, DecodeRequest, Decoding

_KEY = "retract_cursor"


class _Live:
    """A cursor and the row of logits that its next id is drawn from."""

    def __init__(self, request: DecodeRequest, decoding: Decoding, vocab_size: int) -> None:
        if decoding.signal is not None and decoding.mode == "guided" and decoding.signal.kind == "score":
            raise ValueError("signal kind score reads hidden states, which vLLM keeps to itself: decode with transformers")
        self.cursor, self.decoding, self._detector = Cursor(request, decoding, vocab_size), decoding, detector_of(decoding)
        self._logprobs_V: Tensor | None = None
        self._taken = 0  # ids of the present vLLM request that the cursor knows

    def expect(self, logprobs_V: Tensor) -> None:
        self._logprobs_V = logprobs_V

    def submit(self) -> None:
        """A new vLLM request begins behind what is visible."""
        self._taken = 0

    def catch_up(self, emitted: Sequence[int]) -> None:
        """Tell the cursor what has been drawn since; `emitted` is all that the present request has."""
        for token in emitted[self._taken :]:
            assert self._logprobs_V is not None  # no id is drawn before its logits came by
            logprob, alternative = float(self._logprobs_V[token]), float("-inf")
            if self.decoding.weighs_paths:
                others_V = self._logprobs_V.clone()
                others_V[[token, self.decoding.rule.undo_id]] = -torch.inf
                alternative = float(others_V.max())
            self.cursor.take(int(token), logprob, alternative)
            self._taken += 1
            if self._detector is not None:
                ids_B, logprobs_BV = torch.tensor([token], device=self._logprobs_V.device), self._logprobs_V[None].clone()
                ask_chosen(self._detector, [self.cursor], ids_B, logprobs_BV, self.decoding.rule.undo_id)


_running: dict[int, _Live] = {}


class UndoProcessor(LogitsProcessor):
    """Holds every row that has a cursor to what the cursor allows; other rows of the batch are left alone."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[_Live, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, self._new_row)

    @staticmethod
    def _new_row(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> tuple[_Live, list[int]] | None:
        key = (params.extra_args or {}).get(_KEY)
        return None if key is None else (_running[key], output_ids)  # the list grows as the row does

    def apply(self, logits: Tensor) -> Tensor:
        if not self._rows:
            return logits
        places = sorted(self._rows)
        lives = [self._rows[place][0] for place in places]
        for live, emitted in (self._rows[place] for place in places):
            live.catch_up(emitted)
        for group in alike([live.cursor for live in lives]):
            self._hold(logits, [places[one] for one in group], [lives[one] for one in group])
        return logits

    @staticmethod
    def _hold(logits: Tensor, places: list[int], lives: list[_Live]) -> None:
        """Rows that decode in the same way."""
        allowed_BV, picked = restrict(logits[places], [live.cursor for live in lives], lives[0].decoding)
        logprobs_BV = allowed_BV.log_softmax(-1)
        for live, logprobs_V in zip(lives, logprobs_BV, strict=True):
            live.expect(logprobs_V)
        for row, token in enumerate(picked):
            if token >= 0:
                allowed_BV[row] = -torch.inf
                allowed_BV[row, token] = 0.0
        logits[places] = allowed_BV.to(logits.dtype)


@dataclass
class PrefixHits:
    """Tokens of requests that came again behind an undo."""

    asked: int = 0
    cached: int = 0
    """Of them, what vLLM took from its prefix cache; whole blocks alone are cached."""

    @property
    def rate(self) -> float | None:
        """None before any request came again."""
        return self.cached / self.asked if self.asked else None


class VllmDecoder:
    """Decodes with an `LLM` that was made with UndoProcessor among its `logits_processors`, in this process."""

    def __init__(self, llm: Any, vocab_size: int) -> None:
        self._llm, self._vocab_size = llm, vocab_size
        self.prefix_hits = PrefixHits()
        """Of all decodes so far."""

    def decode(self, requests: Sequence[DecodeRequest], decoding: Decoding) -> list[Decoded]:
        """One result a request, in the order of the requests. All rewinds of a round go into one call.

        Raises:
            ValueError: a request that `Cursor` refuses; a signal of kind `score`.
        """
        lives = {number: _Live(request, decoding, self._vocab_size) for number, request in enumerate(requests)}
        ends = _ends(decoding)
        _running.update(lives)
        round = 0
        try:
            while waiting := [number for number, live in lives.items() if live.cursor.finish is None]:
                prompts = [{"prompt_token_ids": list(lives[number].cursor.visible)} for number in waiting]
                params = [self._params(requests[number], lives[number], number, ends, round) for number in waiting]
                outputs = self._llm.generate(prompts, params, use_tqdm=False)
                for number, output in zip(waiting, outputs, strict=True):
                    lives[number].catch_up(output.outputs[0].token_ids)
                    if round:
                        self.prefix_hits.asked += len(output.prompt_token_ids)
                        self.prefix_hits.cached += output.num_cached_tokens or 0
                round += 1
        finally:
            for number in lives:
                del _running[number]
        return [live.cursor.result() for live in lives.values()]

    @staticmethod
    def _params(request: DecodeRequest, live: _Live, number: int, ends: list[int], round: int) -> SamplingParams:
        decoding, cursor = live.decoding, live.cursor
        live.submit()
        greedy = decoding.temperature == 0
        return SamplingParams(
            temperature=decoding.temperature,
            top_p=1.0 if greedy else decoding.top_p,
            # What ends a run of U's is not emitted: the next id is drawn in the state to which the run returns.
            max_tokens=1 if cursor.in_run else decoding.max_tokens - cursor.emitted,
            stop_token_ids=ends,
            ignore_eos=True,
            seed=None if greedy else (request.seed + 1_000_003 * round) % 2**63,
            detokenize=False,
            extra_args={_KEY: number},
        )


@dataclass
class _Joined:
    """A request of VllmLive."""

    request: DecodeRequest
    live: _Live
    number: int  # in _running
    round: int = 0  # of vLLM requests so far
    reported: int = 0  # emitted ids that the caller knows


class VllmLive(Live):
    """Requests that come and go, on an `LLMEngine` made with UndoProcessor, in this process.

    A rewound request joins the next step, where vLLM batches it with whatever else runs.
    """

    _numbers = itertools.count(2**32)  # VllmDecoder's begin at 0

    def __init__(self, engine: Any, vocab_size: int, row_tokens: int) -> None:
        self._engine, self._vocab_size, self._row_tokens = engine, vocab_size, row_tokens
        self._joined: dict[int, _Joined] = {}

    @property
    def running(self) -> int:
        return len(self._joined)

    def add(self, key: int, request: DecodeRequest, decoding: Decoding) -> None:
        live = _Live(request, decoding, self._vocab_size)
        check_room(live.cursor, decoding, self._row_tokens)
        one = self._joined[key] = _Joined(request, live, next(self._numbers))
        _running[one.number] = live
        self._submit(key, one)

    def abort(self, key: int) -> None:
        if key in self._joined:
            self._engine.abort_request([_request_id(key, self._joined[key])])
            self._forget(key)

    def step(self) -> list[Step]:
        steps = []
        for output in self._engine.step() if self._joined else ():
            key = int(output.request_id.split("/")[0])
            one = self._joined.get(key)
            if one is None:
                continue  # it was aborted in the meantime
            cursor = one.live.cursor
            one.live.catch_up(output.outputs[0].token_ids)
            ids, one.reported = cursor.emitted_since(one.reported), cursor.emitted
            steps.append(Step(key, ids, cursor.result() if cursor.finish else None))
            if cursor.finish:
                self._forget(key)
            elif output.finished:
                one.round += 1
                self._submit(key, one)
        return steps

    def _submit(self, key: int, one: _Joined) -> None:
        cursor, decoding = one.live.cursor, one.live.decoding
        params = VllmDecoder._params(one.request, one.live, one.number, _ends(decoding), one.round)
        prompt = {"type": "token", "prompt_token_ids": list(cursor.visible)}
        self._engine.add_request(_request_id(key, one), prompt, params)

    def _forget(self, key: int) -> None:
        del _running[self._joined.pop(key).number]


def _request_id(key: int, one: _Joined) -> str:
    return f"{key}/{one.round}"


def _ends(decoding: Decoding) -> list[int]:
    """Ids at which a vLLM request ends."""
    return [decoding.stop_id] if decoding.mode == "soft" else [decoding.stop_id, decoding.rule.undo_id]
