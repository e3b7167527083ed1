"""A rollout as the rewards see it: what survived, whether that is right, and what each run of undos did.

Made from token ids once, by `judged`; a pure function, so that it can run anywhere. The judge decides, nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from pipeline.backtrack.undo import UndoRule, UndoStream, apply_undo
from pipeline.tasks.problem import Problem
from verifiers.judge import Verdict
from verifiers.steps import token_span
from verifiers.tasks import judge_of

Decode = Callable[[Sequence[int]], str]
"""Text of token ids, without the stop id."""


@dataclass(frozen=True)
class UndoRun:
    """Undo tokens that follow one another.

    Example: with unit step, `right line, wrong line, U` has UndoRun(start, start + 1, before=False, after=True, 0, 0).
    """

    start: int
    """Index of the first of them among the emitted ids."""
    end: int
    """One past the last."""
    before: bool
    """Whether the state was right where the run begins. The empty state is right."""
    after: bool
    """Whether it was right behind the run."""
    unnecessary: int
    """Undo tokens that deleted something while nothing wrong stood there."""
    noops: int
    """Undo tokens that met an empty stack."""
    seen: bool = True
    """Where the state was wrong: whether what stood there showed it."""

    @property
    def improvement(self) -> int:
        """Judged state after minus before: 1, 0 or -1."""
        return self.after - self.before


@dataclass(frozen=True)
class JudgedRollout:
    """One completion of a problem. Nothing but the `finish` and the ids is taken on trust from whoever sampled it."""

    problem: Problem
    token_ids: tuple[int, ...]
    """[n] Emitted ids: undo tokens, what they deleted and the stop id included, the prompt not."""
    finish: str
    """`stop` or `length`."""
    surviving: tuple[int, ...]
    """Ids on the stack at the end."""
    text: str
    """Their text."""
    correct: bool
    """Whether that ends right."""
    undos: int
    """Undo tokens, no-ops included."""
    noops: int
    """Undo tokens that met an empty stack."""
    undo_runs: tuple[UndoRun, ...]
    """Runs of undo tokens in their order; where there were too many undos, those of the first ones."""

    @property
    def unnecessary(self) -> int:
        """Undo tokens that deleted something right, of the runs that were judged."""
        return sum(run.unnecessary for run in self.undo_runs)

    @property
    def deleted(self) -> int:
        """Tokens that were taken back, undo tokens not counted."""
        return len(self.token_ids) - self.undos - len(self.surviving)

    @property
    def verdict(self) -> Verdict:
        """The judge's verdict on the surviving text; computed when first asked for."""
        return verdict_of(self.problem, self.text)


def judged(
    problem: Problem, token_ids: Sequence[int], finish: str, rule: UndoRule, decode: Decode, max_undos: int | None = None
) -> JudgedRollout:
    """Judge one completion.

    Args:
        max_undos: where there are more undo tokens, states are judged up to the first of those above it: a rollout with too
            many is rewarded by their number alone. None judges all.

    Raises:
        ValueError: ids that are missing, or a finish that is neither stop nor length.
    """
    if token_ids is None:
        raise ValueError(f"{problem.id}: the rollout has no token ids")
    if finish not in ("stop", "length"):
        raise ValueError(f"{problem.id}: finish must be stop or length, is {finish!r}")
    ids = tuple(token_ids)
    undone = apply_undo(ids, rule)
    text = decode(undone.surviving)
    runs = undo_runs(problem, ids, rule, decode, None if max_undos is None else max_undos + 1)
    correct = judge_of(problem).correct(problem, text)
    return JudgedRollout(problem, ids, finish, undone.surviving, text, correct, undone.undos, undone.noops, runs)


def undo_runs(problem: Problem, ids: Sequence[int], rule: UndoRule, decode: Decode, most: int | None = None) -> tuple[UndoRun, ...]:
    """The runs of undo tokens of a completion, up to its first `most` undo tokens. Each distinct state is judged once.

    One pass: a state is decoded and judged only where an undo token stands before or behind it.
    """
    places = list(islice((index for index, token in enumerate(ids) if token == rule.undo_id), most))
    stream = UndoStream(rule)
    known: dict[tuple[int, ...], bool] = {(): True}
    judge = judge_of(problem)

    def is_right() -> bool:
        state = stream.surviving
        if state not in known:
            known[state] = not state_is_wrong(problem, decode(state))
        return known[state]

    runs = []
    at = index = 0
    while index < len(places):
        start = end = places[index]
        stream.feed(ids[at:start])
        before = right = is_right()
        seen = before or judge.evidence_seen(problem, decode(stream.surviving))
        unnecessary = noops = 0
        while index < len(places) and places[index] == end:
            deleted = stream.take(ids[end])
            noops += deleted == 0
            unnecessary += deleted > 0 and right
            right = is_right()
            index, end = index + 1, end + 1
        runs.append(UndoRun(start, end, before, right, unnecessary, noops, seen))
        at = end
    return tuple(runs)


def wrong_ids(rollout: JudgedRollout, offsets: Sequence[tuple[int, int]], rule: UndoRule) -> tuple[int, ...]:
    """Indices among the emitted ids of what the judge finds wrong in the surviving text: the first error and the false results
    behind it. What follows rightly from the error is not of it.

    Args:
        offsets: [surviving ids, without the stop id] characters of each in `rollout.text`.
    """
    verdict = rollout.verdict
    spans = [(verdict.error.start, verdict.error.end), *verdict.later] if verdict.error else []
    source = apply_undo(rollout.token_ids, rule).source
    return tuple(sorted({source[at] for span in spans for at in range(*token_span(offsets, *span))}))


# The rollouts of a group pass through the same states and often end alike. Texts are short and few: a few MB at most.
@lru_cache(maxsize=2**12)
def state_is_wrong(problem: Problem, text: str) -> bool:
    """Whether an unfinished solution holds an error already, by the judge of the problem."""
    return judge_of(problem).state_is_wrong(problem, text)


@lru_cache(maxsize=2**12)
def verdict_of(problem: Problem, text: str) -> Verdict:
    """The verdict of the problem's judge on a whole solution."""
    return judge_of(problem).judge(problem, text)
