"""Requests that join, leave and decode in unlike ways get what each of them gets alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from actors.decode import HfDecoder, HfLive
from actors.live import Step
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from tests.actors.test_decode import WAYS, decoding_of
from tests.pipeline.tiny import VOCABULARY, U, tiny_model

model_of = functools.cache(tiny_model)
WAYS_OF: list[Decoding] = [
    *(decoding_of(*way, threshold=0.05) for way in WAYS),
    *(decoding_of(*way, temperature=1.3, undo_bias=1.0, max_tokens=9 + i) for i, way in enumerate(WAYS)),
]


def requests() -> list[tuple[DecodeRequest, Decoding]]:
    prompts = [tuple((length + seed) % (VOCABULARY - 1) for _ in range(length)) for seed, length in enumerate([3, 1, 20, 7] * 4)]
    return [(DecodeRequest(prompt, seed), WAYS_OF[seed % len(WAYS_OF)]) for seed, prompt in enumerate(prompts)]


@functools.cache
def alone() -> list[Decoded]:
    decoder = HfDecoder(model_of("llama"), 1, 64)
    return [decoder.decode([request], decoding)[0] for request, decoding in requests()]


def drive(live: Any, asked: list[tuple[DecodeRequest, Decoding]], join: int, aborted: frozenset[int] = frozenset()) -> Any:
    """Two requests join every `join` steps; `aborted` ones leave after a few steps of their own."""
    waiting = dict(enumerate(asked))
    emitted: dict[int, list[int]] = {key: [] for key in waiting}
    seen = dict.fromkeys(waiting, 0)
    done: dict[int, Decoded] = {}
    count = 0
    while waiting or live.running:
        if count % join == 0:
            for key in list(waiting)[:2]:
                live.add(key, *waiting.pop(key))
        count += 1
        steps: list[Step] = live.step()
        for step in steps:
            assert step.key not in done
            emitted[step.key] += step.ids
            seen[step.key] += 1
            if step.decoded:
                done[step.key] = step.decoded
        for key in aborted:
            if seen[key] == 3:
                live.abort(key)
                seen[key] = -(10**9)
    return emitted, done


@pytest.mark.parametrize(("slots", "join"), [(3, 1), (40, 4), (1, 2)])
def test_each_gets_what_it_gets_alone(slots: int, join: int) -> None:
    decoder = HfDecoder(model_of("llama"), slots, 64)
    emitted, done = drive(HfLive(decoder), requests(), join)
    for key, one in enumerate(alone()):
        assert tuple(emitted[key]) == one.ids == done[key].ids
        assert (done[key].surviving, done[key].banned, done[key].finish) == (one.surviving, one.banned, one.finish)
        assert done[key].logprobs == pytest.approx(one.logprobs, abs=1e-9)
    assert sum(one.undos for one in alone()) > 10


def test_who_leaves_disturbs_nobody() -> None:
    decoder = HfDecoder(model_of("llama"), 4, 64)
    aborted = frozenset({2, 5, 11, 13})
    live = HfLive(decoder)
    emitted, done = drive(live, requests(), 1, aborted)
    assert live.running == 0
    for key, one in enumerate(alone()):
        if key in done:
            assert tuple(emitted[key]) == one.ids
        else:
            assert key in aborted and tuple(emitted[key]) == one.ids[: len(emitted[key])]
    assert len(done) < len(requests())


def test_who_waits_can_leave_and_bad_requests_do_not_join() -> None:
    live = HfLive(HfDecoder(model_of("llama"), 1, 40))
    request, decoding = requests()[0]
    live.add(0, request, decoding)
    live.add(1, request, decoding)
    live.step()
    live.abort(1)
    assert live.running == 1
    with pytest.raises(ValueError, match="prompt and max_tokens need 54 tokens, rows have room for 40"):
        live.add(2, DecodeRequest((1,) * 30, 0), WAYS_OF[0])
    with pytest.raises(ValueError, match="prompt_ids contains the undo token"):
        live.add(2, DecodeRequest((U,), 0), WAYS_OF[0])
    live.abort(0)
    live.abort(7)
    assert live.running == 0 and live.step() == []
