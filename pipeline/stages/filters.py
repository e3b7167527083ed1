"""Which candidates become training traces: nothing held out, no duplicates, nothing too long or unseen, and only undos that help.

Called by the traces stage; every candidate that is left out is counted under the filter that did it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from actors.probe import ProbeRow
from pipeline.backtrack.trace import Role
from pipeline.backtrack.undo import apply_undo
from pipeline.config import LossFilter, TraceFilters
from pipeline.stages.io import Codec
from pipeline.stages.sources import Candidate
from pipeline.stages.stage import StageError
from pipeline.tasks.problem import Problem

UNNAMED = {"random", "aligned", "search"}
"""Kinds of errors that no judge has named; a searched error has this one where its task does not decide errors exactly."""


@dataclass
class Removed:
    """How many candidates of each source each filter has left out."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (filter, source)."""

    def by_filter(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for (name, _), count in self.counts.items():
            found[name] += count
        return dict(sorted(found.items()))


def question_hash(question: str) -> str:
    """SHA-256 of a question without regard to case and spacing."""
    return hashlib.sha256(" ".join(question.casefold().split()).encode()).hexdigest()


class HeldOut:
    """The questions that no training row may ask."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self._by_hash = {question_hash(problem.question): problem.id for problem in problems if problem.split != "train"}

    def check(self, problem: Problem) -> None:
        """Raises:
        StageError: the problem is held out, or asks what a held-out one asks.
        """
        twin = self._by_hash.get(question_hash(problem.question))
        if problem.split != "train" or twin is not None:
            raise StageError(f"traces: {problem.id} is no training problem" + (f": {twin} asks the same question" if twin else ""))


def keep(
    candidates: Iterable[Candidate], settings: TraceFilters, most_tokens: int, held_out: HeldOut, removed: Removed
) -> Iterator[Candidate]:
    """Candidates that pass every filter that needs no model.

    Args:
        most_tokens: longest trace; `settings.max_tokens` may ask for less.
    """
    longest = min(most_tokens, settings.max_tokens or most_tokens)
    seen: set[tuple[int, ...]] = set()
    checks: tuple[tuple[str, Callable[[Candidate], bool]], ...] = (
        ("length", lambda one: len(one.trace.ids) <= longest),
        ("most_undos", lambda one: settings.most_undos is None or one.trace.roles.count(Role.UNDO) <= settings.most_undos),
        ("kinds", lambda one: settings.kinds is None or {*one.kinds} <= {*settings.kinds} | UNNAMED),
        ("late_evidence", lambda one: not settings.late_evidence or has_late_evidence(one)),
        ("duplicates", lambda one: not settings.duplicates or one.trace.ids not in seen),
    )
    for one in candidates:
        held_out.check(one.problem)
        failed = next((name for name, passes in checks if not passes(one)), None)
        if failed:
            removed.counts[failed, one.source] += 1
            continue
        seen.add(one.trace.ids)
        yield one


def has_late_evidence(one: Candidate) -> bool:
    """Whether a right inference stands between the last wrong decision and the undo, for every error of the trace."""
    ends = (before for before, after in itertools.pairwise(one.trace.roles) if after == Role.UNDO != before)
    return all(role == Role.CONSEQUENCE for role in ends)


def undo_helps(
    candidates: Sequence[Candidate],
    settings: LossFilter,
    rewinds: bool,
    codec: Codec,
    probe: Callable[[Sequence[ProbeRow]], Sequence[tuple[float, ...]]],
    removed: Removed,
) -> list[Candidate]:
    """Candidates whose last undo lowers the model's loss by `margin` (Schick et al. 2023, Toolformer, equation 2).

    Compared are mean losses in nats over the first `window` tokens: of what follows the undo, given the undo; of the same tokens
    behind the error without an undo; and, where it is known, of what the model wrote instead behind the error. The first must be
    lower than the least of the others by the margin.

    Args:
        rewinds: what follows is predicted from what survives the undo instead of from the whole row.
    """
    asked: list[ProbeRow] = []
    for one in candidates:
        asked += _questions(one, settings.window, rewinds, codec)
    answers = iter(probe(asked))
    kept = []
    for one in candidates:
        losses = [-sum(answer) / len(answer) for answer in itertools.islice(answers, 3 if one.continued else 2)]
        if settings.margin is None or min(losses[1:]) - losses[0] >= settings.margin:
            kept.append(one)
        else:
            removed.counts["loss", one.source] += 1
    return kept


def _questions(one: Candidate, window: int, rewinds: bool, codec: Codec) -> list[ProbeRow]:
    """What is asked of the model: the continuation with the undo, without it, and its own other one."""
    trace = one.trace
    after = len(trace.roles) - trace.roles[::-1].index(Role.UNDO)
    before = after
    while trace.roles[before - 1] == Role.UNDO:
        before -= 1
    following, error = trace.ids[after : after + window], trace.ids[:before]
    undone = trace.ids[:after]
    if rewinds:
        start = trace.prompt_length
        undone = trace.ids[:start] + apply_undo(trace.ids[start:after], codec.rule).surviving
    rows = [(undone, following), (error, following)]
    if one.continued:
        rows.append((error, one.continued[:window]))
    return [ProbeRow(context + tokens, tuple(range(len(context), len(context) + len(tokens))), tokens) for context, tokens in rows]
