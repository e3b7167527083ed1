"""Search from undo points equals a slow version that decodes every branch alone by plain forwards, and keeps to its budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from actors.decode import HfDecoder
from actors.search_decode import Found, Search, best, majority, mean_logprob, search_decode, undo_points
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.backtrack.undo import apply_undo
from tests.actors.test_decode import GUIDED, SIGNALS, WAYS, decoding_of, model_of, requests, slow_logits
from tests.pipeline.slow_decode import slow_decode
from tests.pipeline.tiny import VOCABULARY, U

LOGITS = slow_logits("llama", torch.float64)
SEARCH = Search(token_budget=70, branches=3, temperature=1.2)


class SlowDecoder:
    """One row at a time, a plain forward for every id."""

    def decode(self, requests: Sequence[DecodeRequest], decoding: Decoding) -> list[Decoded]:
        return [slow_decode(LOGITS, VOCABULARY, request, decoding) for request in requests]


def slow_search(request: DecodeRequest, decoding: Decoding, search: Search) -> tuple[list[Decoded], int]:
    """The same search said once more for a single request, with every place found again from the ids."""
    one_by_one, done, spent, tried = SlowDecoder(), list[Decoded](), 0, list[tuple[int, ...]]()
    done += one_by_one.decode([request], decoding)
    spent = len(done[0].ids)

    def survivors(ids: tuple[int, ...]) -> list[int]:
        return [i for i, token in enumerate(ids) if token != U and apply_undo(ids, decoding.rule).deleted_by[i] < 0]

    def quality(number: int) -> tuple[float, int]:
        alive = survivors(done[number].ids)
        return (sum(done[number].logprobs[i] for i in alive) / len(alive) if alive else -9e99, -number)

    while True:
        choice = None
        for number in sorted(range(len(done)), key=quality, reverse=True):
            ids, logprobs = done[number].ids, done[number].logprobs
            free = range(len(request.forced_ids), len(ids))
            cuts = [i for i in free if ids[i] == U and (i + 1 == len(ids) or ids[i + 1] != U)]
            places = [ids[: i + 1] for i in cuts[::-1]]
            alive = [i for i in survivors(ids) if i in free and ids[i] != decoding.stop_id]
            if not cuts and alive:
                lowest = sorted(alive, key=lambda i: (logprobs[i], i))[0]
                places = [(*ids[: lowest + 1], U)]
            for place in places:
                room = decoding.max_tokens - len(place)
                if choice is None and room > 0 and place not in tried and search.token_budget - spent >= room:
                    choice = place, min(search.branches, (search.token_budget - spent) // room)
        if choice is None:
            return done, spent
        place, count = choice
        tried.append(place)
        seeds = [request.seed + 1_000_003 * (len(done) + i) for i in range(count)]
        new = [one_by_one.decode([replace(request, seed=s, forced_ids=place)], replace(decoding, temperature=search.temperature))[0]
               for s in seeds]  # fmt: skip
        done += new
        spent += sum(len(one.ids) - len(place) for one in new)


@pytest.mark.parametrize("way", [WAYS[0], WAYS[1], WAYS[2], GUIDED[1]], ids=" ".join)
def test_equals_the_slow_search(way: Any) -> None:
    more = {"signal": SIGNALS[0]} if way[0] == "guided" else {"threshold": 0.1}
    decoding = decoding_of(*way, max_tokens=16, **more)
    some = requests()[:7]
    found = search_decode(HfDecoder(model_of("llama"), 5, 64), some, decoding, SEARCH)
    for request, one in zip(some, found, strict=True):
        wanted, spent = slow_search(request, decoding, SEARCH)
        assert [each.ids for each in one.candidates] == [each.ids for each in wanted]
        assert one.spent == spent <= SEARCH.token_budget
    assert sum(len(one.candidates) for one in found) > 3 * len(some)
    again = search_decode(HfDecoder(model_of("llama"), 2, 64), some, decoding, SEARCH)
    assert [[each.ids for each in one.candidates] for one in again] == [[each.ids for each in one.candidates] for one in found]
    assert search_decode(HfDecoder(model_of("llama"), 2, 64), [], decoding, SEARCH) == []


def decoded(ids: tuple[int, ...], logprobs: tuple[float, ...]) -> Decoded:
    decoding = decoding_of(*WAYS[0])
    return Decoded(ids, apply_undo(ids, decoding.rule).surviving, logprobs, (frozenset(),) * len(ids), ids.count(U), 0, "length")


def test_where_branches_begin() -> None:
    decoding = decoding_of(*WAYS[0], max_tokens=8)
    twice = decoded((1, 2, U, 3, 4, U, U, 5), (-1.0,) * 8)
    assert undo_points(twice, decoding, 0) == [(1, 2, U, 3, 4, U, U), (1, 2, U)]
    assert undo_points(twice, decoding, 3) == [(1, 2, U, 3, 4, U, U)]  # what was forced stays
    plain = decoded((1, 2, 3, 0), (-1.0, -3.0, -2.0, -9.0))
    assert undo_points(plain, decoding, 0) == [(1, 2, U)]
    assert undo_points(plain, decoding, 2) == [(1, 2, 3, U)]
    assert undo_points(plain, decoding, 3) == []  # the end alone is left
    assert undo_points(decoded((1,) * 8, (*(-1.0,) * 7, -2.0)), decoding, 0) == []  # no room behind the undo


def test_what_is_best() -> None:
    decoding = decoding_of(*WAYS[0])
    sure, common, other = decoded((1, 2), (-0.1, -0.1)), decoded((3, 6, U, 3), (-1.0, -9.0, 0.0, -2.0)), decoded((3,), (-1.2,))
    empty = decoded((3, U), (-1.0, 0.0))
    found = Found([empty, common, sure, other], 9)

    def score(one: Decoded) -> float:
        return mean_logprob(one, decoding)

    assert (score(common), score(empty)) == (-1.5, float("-inf"))
    assert best(found, score) is sure
    assert majority(found, lambda one: one.surviving[:1] or None, score) is other  # 3 twice, 1 once
    assert majority(found, lambda one: None, score) is sure


def test_what_cannot_be_searched_is_refused() -> None:
    decoder, decoding = HfDecoder(model_of("llama"), 2, 64), decoding_of(*WAYS[0])
    with pytest.raises(ValueError, match="mode forbidden leaves no undo points"):
        search_decode(decoder, [], replace(decoding, mode="forbidden"), SEARCH)
    with pytest.raises(ValueError, match="token_budget 23 is below max_tokens 24"):
        search_decode(decoder, [], decoding, Search(23))
    for wrong, message in (
        ({"branches": 0}, "branches must be"),
        ({"token_budget": 0}, "token_budget"),
        ({"temperature": 0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Search(**{"token_budget": 9} | wrong)
