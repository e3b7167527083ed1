"""Whether the surviving answer is right; a wrong one is paid in part for the gold results that stand in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rewards.rollout import JudgedRollout
from verifiers.arithmetic import equations


@dataclass(frozen=True)
class Outcome:
    """1 for a right answer, else `partial_credit` x share of gold's intermediate results that are reached: at most .9."""

    partial_credit: float

    def __call__(self, rollouts: Sequence[JudgedRollout], progress: float) -> list[float]:
        return [1.0 if one.correct else self.partial_credit * reached(one) for one in rollouts]


def reached(rollout: JudgedRollout) -> float:
    """Share of the different results of gold's equations that an equation of the surviving text has, and has rightly.

    0 where gold computes nothing.
    """
    gold = gold_results(rollout.problem.solution)
    if not gold:
        return 0.0
    own = {equation.right for equation in equations(rollout.text) if equation.verdict == "true"}
    return len(gold & own) / len(gold)


@lru_cache(maxsize=512)  # a problem has many rollouts
def gold_results(solution: str) -> frozenset[Fraction]:
    return frozenset(equation.right for equation in equations(solution) if equation.right is not None)
