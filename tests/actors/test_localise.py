"""First errors by rollouts with a scripted engine: the right step, few calls, and right completions kept as corrections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from actors.engines import Completion, Request, Sampling
from actors.localise import Case, Localiser
from verifiers.localise import BinarySearch, PosteriorSearch, Search

RIGHT, WRONG, STOP = 7, 8, 1


class ScriptedPool:
    """A model that goes on rightly from a prefix without an error. A case's prompt is its index and the step of its error."""

    def __init__(self, finish: str = "stop") -> None:
        self.calls: list[int] = []
        self.seeds: list[int] = []
        self._finish = finish

    def generate(self, requests: Sequence[Request], sampling: Sampling, batch: int) -> tuple[list[Completion], str]:
        self.calls.append(len(requests))
        self.seeds += [request.seed for request in requests]
        made = []
        for request in requests:
            _, error, *prefix = request.prompt_ids
            ids = (RIGHT if len(prefix) <= error else WRONG, STOP)
            made.append(Completion(ids, (), self._finish))
        return made, "v"


def case(index: int, steps: int, error: int) -> Case:
    """Each step is one token, its number."""
    return Case(f"case{index}", (index, error), tuple(tuple(range(100, 100 + kept)) for kept in range(steps)))


def localiser(pool: Any, samples: int = 3) -> Localiser:
    sampling = Sampling(1.0, 1.0, 16, STOP, ())
    return Localiser(pool, sampling, samples, 256, 0, lambda index, ids: RIGHT in ids)


CASES = [(steps, error) for steps in (1, 2, 5, 9) for error in range(steps)]


@pytest.mark.parametrize("kind", ["rollouts", "combined"])
def test_every_error_is_found_with_one_call_a_round(kind: str) -> None:
    pool = ScriptedPool()
    cases = [case(i, steps, error) for i, (steps, error) in enumerate(CASES)]
    searches: list[Search] = [
        BinarySearch(steps) if kind == "rollouts" else PosteriorSearch([1.0] * steps, 0.9, sure=0.97) for steps, _ in CASES
    ]
    found = localiser(pool).locate(cases, searches)
    assert [one.step for one in found] == [error for _, error in CASES]
    for one, (_, error) in zip(found, CASES, strict=True):
        assert one.right == ((RIGHT, STOP),) * 3, error  # the prefix before the error was sampled, if only for its correction
    rounds = max(len(search.asked) for search in searches)
    assert len(pool.calls) <= rounds + 1
    assert all(size % 3 == 0 for size in pool.calls)


def test_samples_differ_and_are_the_same_next_time() -> None:
    first, second = ScriptedPool(), ScriptedPool()
    for pool in (first, second):
        localiser(pool, 8).locate([case(0, 4, 2)], [BinarySearch(4)])
    assert first.seeds == second.seeds and len(set(first.seeds)) == len(first.seeds)


def test_a_completion_that_was_cut_is_no_right_one() -> None:
    pool = ScriptedPool(finish="length")
    (found,) = localiser(pool).locate([case(0, 5, 3)], [BinarySearch(5)])
    assert found.step == 0 and found.right == ()
    assert "0 of 3 completions of the first 1 steps end right" in found.evidence


def test_nothing_to_locate_asks_nothing() -> None:
    pool = ScriptedPool()
    assert localiser(pool).locate([], []) == [] and pool.calls == []
