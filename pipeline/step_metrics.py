"""How good values of steps are: calibration, AUROC, and finding the first error. Plain numbers in, figures for metrics.json out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.metrics import groups
from pipeline.statistics import auroc, share

BINS = 10
"""Of the calibration error: values of equal width."""


@dataclass(frozen=True)
class Valued:
    """One held-out solution, with what a verifier says of its steps."""

    problem: str
    family: str
    hindsight: bool
    correct: bool
    """Whether it ends right."""
    labels: tuple[float, ...]
    """[steps] 1 where the solution is right so far."""
    values: tuple[float, ...]
    """[steps] 0 .. 1."""


def first_error(values: Sequence[float], threshold: float) -> int:
    """The first step whose value is below the threshold; -1 where none is."""
    return next((at for at, value in enumerate(values) if value < threshold), -1)


def calibration_error(values: Sequence[float], labels: Sequence[float], bins: int = BINS) -> float | None:
    """Expected calibration error: the distance between mean value and mean label in bins of equal width, weighed by their
    sizes (Naeini et al. 2015); None without values."""
    if not values:
        return None
    members: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for value, label in zip(values, labels, strict=True):
        members[min(bins - 1, int(value * bins))].append((value, label))
    return sum(abs(sum(value - label for value, label in some)) for some in members) / len(values)


def first_error_f1(rows: Sequence[Valued], threshold: float) -> dict[str, Any]:
    """ProcessBench's F1 (Zheng et al. 2024): the harmonic mean of the share of wrong solutions whose first error is found at its
    very step and of the share of right ones in which none is found; None where one kind is missing."""
    wrong, right = [0, 0], [0, 0]
    for row in rows:
        truth = first_error(row.labels, 0.5)
        kind = right if truth < 0 else wrong
        kind[0] += first_error(row.values, threshold) == truth
        kind[1] += 1
    found: dict[str, Any] = {}
    for name, (hits, n) in (("found", wrong), ("none_found", right)):
        one = share(hits, n)
        found[name] = {"n": n, "share": one.value if one else None, "ci95": [one.low, one.high] if one else None}
    located, spared = found["found"]["share"], found["none_found"]["share"]
    both = None if located is None or spared is None else 2 * located * spared / (located + spared) if located + spared else 0.0
    return found | {"f1": both}


def best_threshold(rows: Sequence[Valued]) -> float:
    """The threshold with the best F1 among 0.05, 0.1 .. 0.95; 0.5 where it is not defined."""
    scored = [(first_error_f1(rows, number / 20)["f1"], number / 20) for number in range(1, 20)]
    known = [(f1, -abs(threshold - 0.5), threshold) for f1, threshold in scored if f1 is not None]
    return max(known)[2] if known else 0.5


def step_figures(rows: Sequence[Valued], threshold: float, score: Callable[[Sequence[float]], float]) -> list[dict[str, Any]]:
    """For all rows, for each kind and for each family. AUROC is None where all steps, or all solutions, are of one label.

    Args:
        threshold: below it a step counts as wrong, for the first error.
        score: of a whole solution.
    """
    found = []
    for name, belongs in groups(rows):
        some = [row for row in rows if belongs(row)]
        pairs = [(value, label) for row in some for value, label in zip(row.values, row.labels, strict=True)]
        right, wrong = ([value for value, label in pairs if (label >= 0.5) == kind] for kind in (True, False))
        whole = {kind: [score(row.values) for row in some if row.correct == kind] for kind in (True, False)}
        found.append(
            {
                "group": name,
                "solutions": len(some),
                "right_solutions": len(whole[True]),
                "steps": len(pairs),
                "right_steps": len(right),
                "auroc": auroc(right, wrong),
                "auroc_solutions": auroc(whole[True], whole[False]),
                "ece": calibration_error([value for value, _ in pairs], [label for _, label in pairs]),
                "first_error": first_error_f1(some, threshold),
                "first_error_at_half": first_error_f1(some, 0.5),
            }
        )
    return found
