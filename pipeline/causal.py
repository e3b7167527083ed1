"""What planted errors and forced undos show: does the model notice an error, how soon, does its undo take back just that, and does
it help. Outcomes of single decodes in, records for metrics.json out. pipeline/stages/planted.py makes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.metrics import KIND_GROUPS, groups
from pipeline.statistics import Share, share

WRONG = ("random", "arithmetic", "own")
"""Kinds of planted errors: random tokens, a false result of an equation, and an error that the start model has made itself."""
RIGHT = ("paraphrase", "right")
"""What an undo would be a false alarm for: an equation worded otherwise than in training, and the gold solution's own words."""
ARMS = ("free", "forced", "forbidden")
"""What is done with U behind the planted text: nothing, it is written there, it is forbidden."""
WITHIN = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""The j's of P(U within j ids)."""


@dataclass(frozen=True)
class Outcome:
    """What one model made of one planted text."""

    model: str
    problem: str
    family: str
    hindsight: bool
    kind: str
    """One of WRONG and RIGHT."""
    arm: str
    """One of ARMS."""
    delay: int
    """How many ids after the planted text the first U came, 1 being the next one; 0 where none came or it was forced."""
    exact: bool
    """Whether what the first undos left is what stood before the error, no more and no less."""
    spurious: bool
    """Whether that first undo deleted something while nothing wrong stood there."""
    correct: bool
    """Whether what survived in the end is right."""
    planted: int
    """Ids that were given: right ones before, the planted ones, forced U's."""
    token_ids: Sequence[int]
    """All ids, the given ones included."""


def hazards(outcomes: Sequence[Outcome], round: int) -> Iterator[dict[str, Any]]:
    """One record for each model, kind of planted text and kind of problems, U left to the model: P(U within j), the share of exact
    spans among the undos that came, the share that ended right, and that of false alarms. Shares with 95 % Wilson intervals."""
    free = [one for one in outcomes if one.arm == "free"]
    for model in dict.fromkeys(one.model for one in free):
        mine = [one for one in free if one.model == model]
        for group, belongs in _groups(mine):
            for kind in (*WRONG, *RIGHT):
                some = [one for one in mine if one.kind == kind and belongs(one)]
                undone = [one for one in some if one.delay]
                yield {
                    "round": round,
                    "model": model,
                    "group": group,
                    "kind": kind,
                    "n": len(some),
                    "within": [[j, *_ends(share(sum(one.delay <= j for one in undone), len(some)))] for j in WITHIN if some],
                    "undone": _told(undone, some),
                    "exact": _told([one for one in undone if one.exact], undone),
                    "right": _told([one for one in some if one.correct], some),
                    "false_alarms": _told([one for one in some if one.spurious], some) if kind in RIGHT else None,
                }


def interventions(outcomes: Sequence[Outcome], round: int) -> Iterator[dict[str, Any]]:
    """How often the same planted texts end right with U left to the model, forced, and forbidden: the difference that U makes."""
    kinds = dict.fromkeys(one.kind for one in outcomes if one.arm != "free")
    for model in dict.fromkeys(one.model for one in outcomes):
        for kind in kinds:
            mine = [one for one in outcomes if (one.model, one.kind) == (model, kind)]
            for group, belongs in _groups(mine):
                record: dict[str, Any] = {"round": round, "model": model, "kind": kind, "group": group}
                for arm in ARMS:
                    some = [one for one in mine if one.arm == arm and belongs(one)]
                    record[arm] = _told([one for one in some if one.correct], some)
                yield record


def _groups(some: Sequence[Outcome]) -> Iterator[tuple[str, Any]]:
    return ((name, belongs) for name, belongs in groups(some) if name in KIND_GROUPS)


def _told(hits: Sequence[Outcome], some: Sequence[Outcome]) -> dict[str, Any]:
    found = share(len(hits), len(some))
    value, low, high = _ends(found)
    return {"value": value, "ci95": None if found is None else [low, high], "n": len(some)}


def _ends(found: Share | None) -> tuple[float | None, float | None, float | None]:
    return (found.value, found.low, found.high) if found else (None, None, None)
