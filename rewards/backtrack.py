"""What undos earn and cost. The formula of the literature pays for planted errors; here it is bounded so that it cannot.

Two rollouts with the same surviving text: the one with fewer undos never has less. docs/rewards.md says why the bounds are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from pipeline.reward_config import BacktrackSettings
from rewards.rollout import JudgedRollout


@dataclass(frozen=True)
class Backtrack:
    """-1 .. `right_at_once`, by the number of undos first, and by what they did second.

    Without undos: `right_at_once` or -`wrong_without_undo`. With n undos the value lies between `ceiling(n + 1)` and `ceiling(n)`,
    at the place that the raw formula has between the worst and the best that it gives to so many undos and runs.
    More than `max_undos` give -1.
    """

    settings: BacktrackSettings

    def __call__(self, rollouts: Sequence[JudgedRollout], progress: float) -> list[float]:
        return [self._value(one) for one in rollouts]

    def _value(self, rollout: JudgedRollout) -> float:
        if rollout.undos > self.settings.max_undos:
            return -1.0
        if not rollout.undos:
            return self.settings.right_at_once if rollout.correct else -self.settings.wrong_without_undo
        high, low = (self.ceiling(count, rollout.correct) for count in (rollout.undos, rollout.undos + 1))
        return low + self.quality(rollout) * (high - low)

    def ceiling(self, undos: int, correct: bool) -> float:
        """The most that so many undos can have, at least one; falls with their number.

        Right answers: the raw formula for one correction. Wrong ones: what no undo has at one undo, and the same fall from there.
        """
        saved = self.settings.efficiency / sqrt(undos)
        return (
            self.settings.correction_bonus + saved
            if correct
            else saved - self.settings.efficiency - self.settings.wrong_without_undo
        )

    def raw(self, rollout: JudgedRollout) -> float:
        """The formula as it stands: bonuses and penalties of all runs added up."""
        one = self.settings
        total = -one.unnecessary * rollout.unnecessary - one.noop * rollout.noops
        for run in rollout.undo_runs:
            total += one.correction_bonus + one.efficiency / sqrt(rollout.undos) if run.improvement > 0 else -one.failed
        return total

    def quality(self, rollout: JudgedRollout) -> float:
        """Where the raw formula lies between its worst (0) and its best (1) for so many undos and runs."""
        one, runs = self.settings, len(rollout.undo_runs)
        best = runs * (one.correction_bonus + one.efficiency / sqrt(rollout.undos))
        worst = -runs * one.failed - rollout.undos * max(one.unnecessary, one.noop)
        # Rounding may leave the raw value a little outside.
        return min(1.0, max(0.0, (self.raw(rollout) - worst) / (best - worst))) if best > worst else 1.0
