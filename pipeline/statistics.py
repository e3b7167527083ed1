"""Intervals and tests for accuracies: every number of a report goes through here, on scipy's implementations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from statistics import fmean, stdev

import numpy as np
from scipy.stats import binomtest, mannwhitneyu, norm
from scipy.stats import t as student

LEAST = 10
"""Fewest problems from which an interval of a difference, or by the bootstrap, is taken: of fewer it would be far too narrow."""
_DRAWS = 1000


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
    """None when there are no values, or one of them is no number. `least` and `most` are the bounds of what is measured; an
    interval ends there."""
    n = len(values)
    if n == 0 or not all(map(isfinite, values)):
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
    low: float | None
    high: float | None
    """95 % interval of the difference (normal approximation for paired shares); None for fewer than LEAST problems."""
    mcnemar_p: float
    """Exact two-sided McNemar test."""
    gained: int
    lost: int
    n: int


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired | None:
    """after - before. None for no rows. Raises ValueError when the lengths differ."""
    pairs = list(zip(before, after, strict=True))
    return paired_counts(sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs), len(pairs))


def paired_counts(gained: int, lost: int, n: int) -> Paired | None:
    """The same of what is known by number: n problems, of which so many became right, so many wrong."""
    if n == 0:
        return None
    difference = (gained - lost) / n
    half = 1.96 * max(0.0, gained + lost - (gained - lost) ** 2 / n) ** 0.5 / n
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    low, high = (difference - half, difference + half) if n >= LEAST else (None, None)
    return Paired(difference, low, high, p, gained, lost, n)


def bootstrap(values: Sequence[float]) -> Mean | None:
    """Mean with its 95 % percentile bootstrap interval over the values (Efron 1979), which need no distribution: tokens, shares
    of samples. Equal values give equal intervals.

    None when there are no values or one of them is no number; without an interval for fewer than LEAST.
    """
    n = len(values)
    if n == 0 or not all(map(isfinite, values)):
        return None
    if n < LEAST:
        return Mean(fmean(values), None, None, n)
    rng, array = np.random.default_rng(0), np.asarray(values, float)
    means = np.concatenate([array[rng.integers(n, size=(50, n))].mean(1) for _ in range(_DRAWS // 50)])
    low, high = np.quantile(means, (0.025, 0.975))
    return Mean(fmean(values), float(low), float(high), n)


@dataclass(frozen=True)
class Trend:
    """How what is measured on the same problems again and again goes up or down."""

    slope: float
    """Least squares within each problem, per unit of the scores."""
    low: float | None
    high: float | None
    """95 % interval over problems (Student's t of their slopes); None for fewer than LEAST problems."""
    p: float
    """Two-sided, of no order within any problem: Mantel's extension test with each problem as a stratum."""
    n: int
    """Problems."""


def trend(scores: Sequence[float], outcomes: Sequence[Sequence[float]]) -> Trend | None:
    """Whether outcomes rise or fall with the scores (Mantel 1963, a problem being a stratum, so that hard and easy ones do not
    hide it).

    Args:
        scores: [times] such as training steps.
        outcomes: [problems][times].

    Returns:
        None without problems, with fewer than two different scores, or where an outcome is no number.
    """
    array, x = np.asarray(outcomes, float), np.asarray(scores, float)
    if array.size == 0 or len(set(scores)) < 2 or not np.isfinite(array).all():
        return None
    apart = x - x.mean()
    spread = float(apart @ apart)
    sums = array @ apart
    variance = spread * float(((array - array.mean(1, keepdims=True)) ** 2).sum()) / (len(x) - 1)
    z = float(sums.sum()) / variance**0.5 if variance else 0.0
    slopes = mean((sums / spread).tolist())
    assert slopes is not None
    low, high = (slopes.low, slopes.high) if slopes.n >= LEAST else (None, None)
    return Trend(slopes.value, low, high, float(2 * norm.sf(abs(z))), slopes.n)


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Probability that a positive scores above a negative, ties counted half; None when one side is empty or holds no number."""
    if not positive or not negative or not all(map(isfinite, (*positive, *negative))):
        return None
    return float(mannwhitneyu(positive, negative).statistic) / (len(positive) * len(negative))
