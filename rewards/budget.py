"""Whether a completion keeps within a token budget that decays over training. Deleted tokens are spent too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.backtrack.curriculum import Schedule, over_training, part_of
from pipeline.reward_config import BudgetSettings
from rewards.rollout import JudgedRollout


@dataclass(frozen=True)
class Budget:
    """0 within the budget; above it minus the share of the budget that is spent too much, -1 at twice the budget and beyond."""

    settings: BudgetSettings

    def __call__(self, rollouts: Sequence[JudgedRollout], progress: float) -> list[float]:
        budget = self.schedule().at(part_of(progress))
        return [-min(1.0, max(0.0, self.spent(one) / budget - 1)) for one in rollouts]

    def schedule(self) -> Schedule:
        """The budget over training."""
        return over_training([(0, self.settings.start), (self.settings.until, self.settings.end)], "linear")

    def spent(self, rollout: JudgedRollout) -> int:
        """Tokens charged: those that survive, the undo tokens, and the deleted ones.

        The deleted ones of n undos count as n - 1 times `undo_tokens` at least and n times at most. Otherwise one undo of a
        long step would cost more than two of short ones, and of two rollouts with the same surviving text the one with fewer
        undos could have less.
        """
        undos, each = rollout.undos, self.settings.undo_tokens
        deleted = min(undos * each, max((undos - 1) * each, rollout.deleted))
        return len(rollout.surviving) + undos + deleted
