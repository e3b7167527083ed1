"""Search at inference: go back to where a decode was undone, try again in several ways, keep the best. Deterministic.

After Self-Backtracking (Yang et al. 2025), whose undo points are states to expand: here a branch is an ordinary request that
replays what was emitted up to and with the undo (`forced_ids`), so its bans stand, and samples from there. All branches of a
round decode in one batch. It knows no problems: what is best is a callable's word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.backtrack.undo import apply_undo

Scorer = Callable[[Decoded], float]
"""How good a decode is; the best one is branched from next."""


class Decoder(Protocol):
    def decode(self, requests: Sequence[DecodeRequest], decoding: Decoding) -> list[Decoded]: ...


@dataclass(frozen=True)
class Search:
    """How far to look.

    Raises:
        ValueError: a value out of its bounds.
    """

    token_budget: int
    """Most ids emitted for one request, the first decode included and replayed ones not: never exceeded."""
    branches: int = 4
    """Ways tried from one undo point."""
    temperature: float = 1.0
    """At which branches are sampled, above 0: greedy ones would all be alike."""

    def __post_init__(self) -> None:
        for name in ("token_budget", "branches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, is {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature of branches must be above 0, is {self.temperature}")


@dataclass
class Found:
    """What a search has decoded for one request, the first decode first."""

    candidates: list[Decoded]
    spent: int
    """Ids emitted, replayed ones not."""
    tried: set[tuple[int, ...]] = field(default_factory=set)
    """Beginnings that were branched from."""


def mean_logprob(one: Decoded, decoding: Decoding) -> float:
    """Of the surviving ids, in nats, as they were chosen: at temperature 1, bans renormalised. -inf where nothing survives."""
    source = apply_undo(one.ids, decoding.rule).source
    return sum(one.logprobs[index] for index in source) / len(source) if source else float("-inf")


def search_decode(
    decoder: Decoder, requests: Sequence[DecodeRequest], decoding: Decoding, search: Search, scorer: Scorer | None = None
) -> list[Found]:
    """Decode each request as `decoding` says, then branch from the best decode so far until the budget of the request is spent.

    Args:
        scorer: mean log-probability of what survives, where none is given.

    Raises:
        ValueError: a mode that forbids undos, or a budget below `decoding.max_tokens`, which the first decode may need.
    """
    if decoding.mode == "forbidden":
        raise ValueError("mode forbidden leaves no undo points to branch from")
    if search.token_budget < decoding.max_tokens:
        raise ValueError(f"token_budget {search.token_budget} is below max_tokens {decoding.max_tokens}")
    score = scorer or (lambda one: mean_logprob(one, decoding))
    found = [Found([one], len(one.ids)) for one in decoder.decode(requests, decoding)]
    sampled = replace(decoding, temperature=search.temperature)
    while True:
        asked: list[DecodeRequest] = []
        owner: list[Found] = []
        for request, one in zip(requests, found, strict=True):
            new = _branches(request, one, decoding, search, score)
            asked += new
            owner += [one] * len(new)
        if not asked:
            return found
        for request, one, done in zip(asked, owner, decoder.decode(asked, sampled), strict=True):
            one.candidates.append(done)
            one.spent += len(done.ids) - len(request.forced_ids)


def _branches(request: DecodeRequest, found: Found, decoding: Decoding, search: Search, score: Scorer) -> list[DecodeRequest]:
    """Requests from the first undo point, of the best candidate that has one, that was not tried and that the budget allows."""
    for candidate in sorted(found.candidates, key=score, reverse=True):
        for beginning in undo_points(candidate, decoding, len(request.forced_ids)):
            longest = decoding.max_tokens - len(beginning)
            count = min(search.branches, (search.token_budget - found.spent) // longest)
            if beginning in found.tried or count < 1:
                continue
            found.tried.add(beginning)
            number = len(found.candidates)
            seeds = [(request.seed + 1_000_003 * (number + branch)) % 2**63 for branch in range(count)]
            return [replace(request, seed=seed, forced_ids=beginning) for seed in seeds]
    return []


def undo_points(one: Decoded, decoding: Decoding, forced: int) -> list[tuple[int, ...]]:
    """Beginnings of a decode that end with an undo, the latest first; a decode without any, but for the ids that were `forced`,
    is taken back behind the least certain id that survives. Each leaves room for an id.
    """
    undo_id = decoding.rule.undo_id
    ends = [
        index + 1
        for index, token in enumerate(one.ids)
        if index >= forced and token == undo_id and one.ids[index + 1 : index + 2] != (undo_id,)
    ]
    found = [one.ids[:end] for end in reversed(ends)]
    if not found:
        open_ids = [index for index in apply_undo(one.ids, decoding.rule).source if index >= forced]
        open_ids = [index for index in open_ids if one.ids[index] != decoding.stop_id]
        if open_ids:
            least = min(open_ids, key=lambda index: one.logprobs[index])
            found = [(*one.ids[: least + 1], undo_id)]
    return [ids for ids in found if len(ids) < decoding.max_tokens]


def best(found: Found, score: Scorer) -> Decoded:
    """The candidate with the highest score, the earliest among equals."""
    return max(found.candidates, key=score)


def majority(found: Found, answer_of: Callable[[Decoded], Hashable | None], score: Scorer) -> Decoded:
    """The best candidate among those with the most frequent answer; None is no answer. Ties go to the better candidate."""
    answers = [answer_of(one) for one in found.candidates]
    counts = Counter(answer for answer in answers if answer is not None)
    voted = [(counts[answer], score(one)) for answer, one in zip(answers, found.candidates, strict=True)]
    return found.candidates[max(range(len(voted)), key=lambda index: voted[index])]
