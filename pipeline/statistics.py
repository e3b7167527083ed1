"""Intervals and tests for accuracies: every number of a report goes through here, on scipy's implementations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean, stdev

from scipy.stats import binomtest, mannwhitneyu
from scipy.stats import t as student


@dataclass(frozen=True)
class Share:
    """A share of n rows with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    n: int


def share(hits: int, n: int) -> Share | None:
    """None when there is nothing to take a share of."""
    if n == 0:
        return None
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return Share(hits / n, float(interval.low), float(interval.high), n)


@dataclass(frozen=True)
class Mean:
    """A mean of n values with its 95 % interval by Student's t; the interval is None for a single value."""

    value: float
    low: float | None
    high: float | None
    n: int


def mean(values: Sequence[float], least: float = -inf, most: float = inf) -> Mean | None:
    """None when there are no values. `least` and `most` are the bounds of what is measured; an interval ends there."""
    n = len(values)
    if n == 0:
        return None
    value = fmean(values)
    if n == 1:
        return Mean(value, None, None, 1)
    half = float(student.ppf(0.975, n - 1)) * stdev(values) / n**0.5
    return Mean(value, max(least, value - half), min(most, value + half), n)


@dataclass(frozen=True)
class Paired:
    """Difference of two accuracies on the same problems."""

    difference: float
    low: float
    high: float
    """95 % interval of the difference (normal approximation for paired shares)."""
    mcnemar_p: float
    """Exact two-sided McNemar test."""
    gained: int
    lost: int
    n: int


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired | None:
    """after - before. None for no rows. Raises ValueError when the lengths differ."""
    pairs = list(zip(before, after, strict=True))
    n = len(pairs)
    if n == 0:
        return None
    gained = sum(b and not a for a, b in pairs)
    lost = sum(a and not b for a, b in pairs)
    difference = (gained - lost) / n
    half = 1.96 * max(0.0, gained + lost - (gained - lost) ** 2 / n) ** 0.5 / n
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Paired(difference, difference - half, difference + half, p, gained, lost, n)


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Probability that a positive scores above a negative, ties counted half; None when one side is empty."""
    if not positive or not negative:
        return None
    return float(mannwhitneyu(positive, negative).statistic) / (len(positive) * len(negative))
