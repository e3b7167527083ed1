"""Reward settings out of bounds are refused with a line that says what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.reward_config import RewardSettings


def test_defaults_are_those_of_the_documents() -> None:
    one = RewardSettings()
    assert one.weights.model_dump() == {"outcome": 1.0, "process": 0.7, "backtrack": 0.6, "format": 0.3, "budget": 0.1}
    assert one.phases is None and one.combine == "sum" and one.partial_credit == 0.5 and one.custom == {}
    undos = one.backtrack
    assert (undos.correction_bonus, undos.efficiency, undos.unnecessary, undos.failed) == (0.4, 0.25, 0.2, 0.3)
    assert (undos.wrong_without_undo, undos.max_undos) == (0.1, 20)


@pytest.mark.parametrize(
    ("values", "where", "message"),
    [
        ({"weights": {"outcome": -0.1}}, "weights.outcome", "greater than or equal to 0"),
        ({"weights": {"process": 11}}, "weights.process", "less than or equal to 10"),
        ({"weights": {"length": 1}}, "weights.length", "Extra inputs are not permitted"),
        ({"weights": dict.fromkeys(("outcome", "process", "backtrack", "format", "budget"), 0.0)}, "", "at least one weight must"),
        (
            {"phases": {"late": {"outcome": 11.0, "process": 1.0, "backtrack": 1.0}}},
            "phases.late.outcome",
            "less than or equal to 10",
        ),
        ({"phases": {"late": {"outcome": 1.0}}}, "phases.late.process", "Field required"),
        ({"phases": {"middle_from": 0.0}}, "phases.middle_from", "greater than or equal to 0.01"),
        ({"phases": {"middle_from": 0.7}}, "phases", "late_from must be at least middle_from \\+ 0.01 = 0.71, is 0.67"),
        ({"combine": "mean"}, "combine", "Input should be 'sum' or 'gdpo'"),
        ({"partial_credit": 1.0}, "partial_credit", "less than or equal to 0.9"),
        ({"backtrack": {"correction_bonus": 0.6}}, "backtrack", "right_at_once must be above .* = 0.85, is 0.75: .* planted"),
        ({"backtrack": {"right_at_once": 0.65}}, "backtrack", "right_at_once must be above"),
        ({"backtrack": {"wrong_without_undo": 0.8}}, "backtrack", "wrong_without_undo \\+ efficiency must be at most 1, is 1.05"),
        ({"backtrack": {"max_undos": 0}}, "backtrack.max_undos", "greater than or equal to 1"),
        ({"budget": {"end": 600}}, "budget", "end must be at most start, 512, is 600"),
        ({"custom": {"a": {"function": "module.function"}}}, "custom.a.function", "must be module:function, such as"),
        ({"custom": {"a": {"function": "os:system('x')"}}}, "custom.a.function", "must be module:function, such as"),
        ({"custom": {"outcome": {"function": "a:b"}}}, "custom", "the name outcome belongs to a component that is built in"),
        ({"custom": {"My reward": {"function": "a:b"}}}, "custom", "the name 'My reward' must be of a-z"),
        ({"custom": {"a": {"function": "a:b", "weight": -1.0}}}, "custom.a.weight", "greater than or equal to 0"),
    ],
)
def test_out_of_bounds(values: dict[str, Any], where: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        RewardSettings.model_validate(values)
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == where


def test_a_custom_reward_alone_is_enough() -> None:
    none = dict.fromkeys(("outcome", "process", "backtrack", "format", "budget"), 0.0)
    one = RewardSettings.model_validate({"weights": none, "custom": {"mine": {"function": "a.b:c", "weight": 2.0}}})
    assert one.custom["mine"].weight == 2.0
