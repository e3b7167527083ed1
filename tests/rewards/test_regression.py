"""Reward-weighted regression against numbers computed by hand."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.backtrack.trace import Detour, WrongTry, build_trace
from pipeline.backtrack.undo import UndoRule
from rewards.regression import regression_weights, trace_reward

RULE = UndoRule(9, "token")


def test_rewards_by_hand() -> None:
    """Of 3 + 2 + 2 emitted tokens the 3 of the solution survive; a clean row keeps all."""
    trace = build_trace((5, 6), (1, 2, 3), [Detour(1, WrongTry((7, 8), (True, False)))], RULE)
    assert trace_reward(trace, RULE) == pytest.approx(3 / 7)
    assert trace_reward(build_trace((5, 6), (1, 2, 3), [], RULE), RULE) == 1
    assert trace_reward(build_trace((5,), (), [], RULE), RULE) == 1


def test_weights_by_hand() -> None:
    """Advantages .3 and -.3 over beta .3 give e and 1/e, whose mean is 1.5431."""
    assert regression_weights([1.0, 0.4], 0.3, 20) == pytest.approx([math.e / 1.543081, 1 / math.e / 1.543081], rel=1e-6)
    assert regression_weights([1.0, 0.0, 0.0, 0.0], 0.1, 5) == pytest.approx(
        [5 / ((5 + 3 * math.exp(-2.5)) / 4)] + [math.exp(-2.5) / ((5 + 3 * math.exp(-2.5)) / 4)] * 3
    )
    assert regression_weights([], 1, 2) == [] and regression_weights([0.7] * 3, 1e-9, 20) == [1, 1, 1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(1e-6, 10), st.floats(1, 100))
def test_better_traces_never_count_less(rewards: list[float], beta: float, most: float) -> None:
    weights = regression_weights(rewards, beta, most)
    assert sum(weights) / len(weights) == pytest.approx(1) and all(math.isfinite(weight) and weight >= 0 for weight in weights)
    ordered = [weight for _, weight in sorted(zip(rewards, weights, strict=True))]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(ordered))
