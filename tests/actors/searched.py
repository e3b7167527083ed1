"""A language of a few ids with known probabilities, as an engine for tests of search; and obvious slow versions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from actors.engines import Completion, Request, Sampling
from actors.mcts import Made, Tree, Vocabulary, Wanted
from pipeline.search_config import SearchSettings
from pipeline.tasks.problem import Problem

END, STOP, UNDO = 0, 1, 2
LETTERS = (3, 4, 5, 6)
WORDS = Vocabulary(frozenset({END}), STOP, UNDO)
PROMPT = (9, 9)


def settings(**more: Any) -> SearchSettings:
    return SearchSettings.model_validate({"max_tokens": 24, "simulations": 40, "after_right": 100, "floor": 0.0} | more)


def problem(name: str = "p") -> Problem:
    return Problem(name, "train", "none", False, "?", "#### 1", "1")


class Language:
    """Steps of two letters and a step end; after three steps the stop id. Which letter is likely depends on what stands there."""

    def __init__(self, seed: int = 0, p_undo: float = 0.0) -> None:
        self.seed, self.p_undo = seed, p_undo
        self.calls: list[int] = []

    def logprobs(self, ids: Sequence[int]) -> dict[int, float]:
        """Of every id that can follow these."""
        if len(ids) == 9:
            return {STOP: 0.0}
        if len(ids) % 3 == 2:
            return {END: 0.0}
        rng = random.Random(f"{self.seed}/{tuple(ids)}")
        weights = [rng.random() ** 3 + 1e-3 for _ in LETTERS]
        share = (1 - self.p_undo) / sum(weights)
        found = {token: math.log(weight * share) for token, weight in zip(LETTERS, weights, strict=True)}
        return found | ({UNDO: math.log(self.p_undo)} if self.p_undo else {})

    def generate(self, requests: Sequence[Request], sampling: Sampling, batch: int = 0) -> tuple[list[Completion], str]:
        self.calls.append(len(requests))
        return [self.one(request.prompt_ids[len(PROMPT) :], request.seed, sampling) for request in requests], "v"

    def one(self, given: Sequence[int], seed: int, sampling: Sampling) -> Completion:
        rng, ids = random.Random(seed), list(given)
        emitted: list[int] = []
        chosen: list[float] = []
        top: list[tuple[tuple[int, float], ...]] = []
        while len(emitted) < sampling.max_tokens:
            every = self.logprobs(ids)
            allowed = {token: logprob for token, logprob in every.items() if token not in sampling.forbidden_ids}
            if sampling.temperature:
                token = rng.choices(list(allowed), [math.exp(one) for one in allowed.values()])[0]
            else:
                token = max(allowed, key=lambda one: allowed[one])
            ranked = sorted(every.items(), key=lambda item: -item[1])[: sampling.top]
            emitted.append(token)
            chosen.append(every[token])
            top.append(tuple(ranked))
            ids.append(token)
            if token in (sampling.stop_id, *sampling.also_stop):
                return Completion(tuple(emitted), tuple(chosen), "stop", tuple(top))
        return Completion(tuple(emitted), tuple(chosen), "length", tuple(top))


def sampling_of(how: SearchSettings) -> Sampling:
    barred = (UNDO,) if how.undo == "forbidden" else ()
    stops = [*([UNDO] if how.undo == "model" else []), *([END] if how.rollout == "step" else [])]
    return Sampling(how.temperature, 1.0, how.max_tokens, STOP, barred, True, 16, tuple(stops))


Settled = tuple[tuple[int, ...], float, bool | None]
"""(surviving ids at the end, value backed up, verdict) of one simulation."""


def grow(
    tree: Tree, how: SearchSettings, language: Language, right: Callable[[tuple[int, ...]], bool], rounds: int = 10_000
) -> tuple[list[Settled], list[Wanted]]:
    """Run a search without an engine, one round after the other; every simulation of it."""
    settled, asked = [], []
    for _ in range(rounds):
        wants = tree.wants()
        if not wants:
            break
        for wanted in wants:
            asked.append(wanted)
            row = language.one(wanted.ids, wanted.seed, sampling_of(how)) if not wanted.finished else Completion((), (), "stop")
            nodes, ending = tree.observe(wanted, Made(row.token_ids, row.logprobs, row.top))
            ids = tree.surviving(nodes[-1])
            verdict = None if ending == "open" else ending == "stop" and right(ids)
            settled.append((ids, tree.settle(wanted, nodes[-1], verdict), verdict))
    return settled, asked


def slow_values(settled: Sequence[Settled], how: SearchSettings, step: Callable[[tuple[int, ...]], int]) -> dict[Any, Any]:
    """What every state must be worth, recomputed from the list of simulations.

    Returns:
        surviving ids -> (visits, total, best, ends, rights)
    """
    found: dict[Any, Any] = {}
    for ids, value, right in settled:
        states = [ids[:end] for end in range(len(ids) + 1) if end in (0, len(ids)) or step(ids[:end])]
        for state in states:
            behind = len([other for other in states if len(other) > len(state)])
            backed = value * how.discount**behind
            visits, total, best, ends, rights = found.get(state, (0, 0.0, 0.0, 0, 0))
            judged = right is not None
            found[state] = (visits + 1, total + backed, max(best, backed), ends + judged, rights + bool(right))
    return found
