"""Reward-weighted regression (Peters and Schaal 2007): fine-tuning in which better traces count more. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

from pipeline.backtrack.trace import Trace
from pipeline.backtrack.undo import UndoRule, apply_undo


def trace_reward(trace: Trace, rule: UndoRule) -> float:
    """Share of a trace's emitted tokens, undo tokens included, that survive: 1 for a clean row, less the more is taken back.

    What survives in a trace is right, so this is all that tells one from another.

    Example:
        >>> trace_reward(Trace((5, 1, 9, 2), (0, 2, 4, 5)), UndoRule(undo_id=9, unit="token"))
        0.3333333333333333
    """
    emitted = trace.ids[trace.prompt_length :]
    return len(apply_undo(emitted, rule).surviving) / len(emitted) if emitted else 1.0


def regression_weights(rewards: Sequence[float], beta: float, most: float) -> list[float]:
    """exp((reward - mean reward) / beta), at most `most`, then divided by their mean so that the learning rate keeps its meaning.

    Args:
        beta: small ones leave the best traces alone, large ones weigh all alike.
        most: the limit of advantage-weighted regression (Peng et al. 2019), so that no single trace rules a step.

    Example:
        >>> [round(weight, 3) for weight in regression_weights([1.0, 0.5], beta=0.5, most=20)]
        [1.462, 0.538]
    """
    if not rewards:
        return []
    baseline = sum(rewards) / len(rewards)
    advantages = (reward - baseline for reward in rewards)
    # A large advantage over a small beta overflows exp; beyond the limit its size does not matter.
    raw = [most if advantage / beta > 700 else min(most, exp(advantage / beta)) for advantage in advantages]
    mean = sum(raw) / len(raw)
    return [weight / mean for weight in raw]
