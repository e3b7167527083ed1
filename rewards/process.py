"""How much of the surviving solution is right, step by step: by the judge, or by a process reward model where there is one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rewards.rollout import JudgedRollout
from verifiers.judge import Verdict

StepValues = Callable[[Sequence[JudgedRollout]], Sequence[Sequence[float]]]
"""A process reward model: for each rollout a value of 0 to 1 for each surviving step. It must look at what survives alone,
otherwise an undo may pay."""


@dataclass(frozen=True)
class Process:
    """Mean correctness of the surviving steps; 0 where there are none."""

    step_values: StepValues | None = None

    def __call__(self, rollouts: Sequence[JudgedRollout], progress: float) -> list[float]:
        if self.step_values is None:
            return [_mean(steps_right(one.verdict)) for one in rollouts]
        found = self.step_values(rollouts)
        if len(found) != len(rollouts):
            raise ValueError(f"the process reward model was asked about {len(rollouts)} rollouts, answered for {len(found)}")
        for values in found:
            if not all(0 <= value <= 1 for value in values):
                raise ValueError(f"the process reward model must give values of 0 to 1, gave {list(values)!r:.80}")
        return [_mean(values) for values in found]


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values) if len(values) else 0.0


def steps_right(verdict: Verdict) -> list[bool]:
    """For each step whether the judge finds nothing wrong in it.

    Wrong are the step of the first error and those of the false results behind it; what follows rightly from an error is right.
    Where the solution only breaks off, the judge blames its last step.
    """
    right = [True] * len(verdict.steps)
    starts = [step.start for step in verdict.steps]
    errors = [verdict.error.start] if verdict.error else []
    for start in (*errors, *(start for start, _ in verdict.later)):
        if right:
            right[max(0, bisect_right(starts, start) - 1)] = False
    return right
