"""pass@k and maj@k: what several samples of a problem are worth, at equal tokens. Plain rows in, records for metrics.json out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean
from typing import Any

from pipeline.metrics import KIND_GROUPS, groups
from pipeline.statistics import bootstrap


@dataclass(frozen=True)
class Sample:
    """One of several samples of a problem by one model."""

    model: str
    mode: str
    """`forbidden`: a first try; else the mode in which it could undo."""
    problem: str
    number: int
    """From 0."""
    split: str
    family: str
    hindsight: bool
    temperature: float
    correct: bool
    answer: str | None
    """Of the surviving text, equal answers spelt alike; None where it gives none."""
    tokens: int
    """All emitted ones, deleted ones included."""
    logprob: float | None
    """Of all of them together, as in `Decoded.logprobs`; None where the engine was not asked for it."""
    undos: int
    finish: str
    token_ids: Sequence[int]


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold a right one: 1 - C(n - right, k) / C(n, k), the unbiased
    estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Raises:
        ValueError: k is not within 1 .. n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1 .. {n}, is {k}")
    return 1 - comb(n - right, k) / comb(n, k)


def plurality(answers: Sequence[str | None]) -> int:
    """Index of the first of the answer that most give; of equally frequent ones the earliest wins. None counts only where there
    is nothing else.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("a vote needs at least one answer")
    counts = Counter(answer for answer in answers if answer is not None)
    return answers.index(counts.most_common(1)[0][0]) if counts else 0


def majority_at_k(samples: Sequence[Sample], k: int) -> float:
    """Share of right votes of k samples each: the samples of one problem in groups of k, what does not fill one left out, so that
    no sample votes twice."""
    starts = range(0, len(samples) - k + 1, k)
    elected = [samples[start + plurality([one.answer for one in samples[start : start + k]])] for start in starts]
    return fmean(one.correct for one in elected)


def sizes(n: int) -> list[int]:
    """The k's that are told of n samples: powers of two, and n."""
    return sorted({n, *(2**power for power in range(n.bit_length()) if 2**power <= n)}) if n else []


def passes(samples: Sequence[Sample], round: int) -> Iterator[dict[str, Any]]:
    """One record for each model and mode, kind of problems, and k, with 95 % bootstrap intervals over problems. `tokens` is what
    k samples of a problem spend: models are set side by side where it is equal."""
    for model, mode in dict.fromkeys((one.model, one.mode) for one in samples):
        mine = [one for one in samples if (one.model, one.mode) == (model, mode)]
        for group, belongs in groups(mine):
            if group not in KIND_GROUPS:
                continue
            by_problem: dict[str, list[Sample]] = {}
            for one in filter(belongs, mine):
                by_problem.setdefault(one.problem, []).append(one)
            tried = list(by_problem.values())
            for k in sizes(min(map(len, tried), default=0)):
                record: dict[str, Any] = {"round": round, "model": model, "mode": mode, "group": group, "k": k, "n": len(tried)}
                record |= {"split": mine[0].split, "temperature": mine[0].temperature}
                record["tokens"] = k * fmean(fmean(one.tokens for one in some) for some in tried)
                for name, values in (
                    ("pass", [pass_at_k(len(some), sum(one.correct for one in some), k) for some in tried]),
                    ("majority", [majority_at_k(some, k) for some in tried]),
                ):
                    found = bootstrap(values)
                    assert found is not None
                    record[name] = found.value
                    record[f"{name}_ci95"] = None if found.low is None else [found.low, found.high]
                yield record
