"""Schedules: the value at every step, and what is wrong with a badly written one."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.backtrack.curriculum import Schedule, allowed_traces, parse_schedule

values = st.floats(-1e6, 1e6)
forms: tuple[Literal["constant", "linear"], ...] = ("constant", "linear")


@st.composite
def schedules(draw: st.DrawFn, form: Literal["constant", "linear"]) -> Schedule:
    steps = sorted({0, *draw(st.lists(st.integers(1, 40), max_size=5))})
    return Schedule(tuple((step, draw(values)) for step in steps), form)


@given(schedules("constant"), st.integers(0, 60))
def test_constant_pieces(schedule: Schedule, step: int) -> None:
    assert schedule.at(step) == dict((s, v) for s, v in schedule.points if s <= step).popitem()[1]


@given(schedules("linear"), st.integers(0, 60))
def test_straight_lines(schedule: Schedule, step: int) -> None:
    """Against the line through both neighbours in exact numbers."""
    before = [point for point in schedule.points if point[0] <= step][-1]
    after = next((point for point in schedule.points if point[0] > step), None)
    exact = Fraction(before[1])
    if after is not None:
        exact += Fraction(step - before[0], after[0] - before[0]) * (Fraction(after[1]) - exact)
    assert schedule.at(step) == pytest.approx(float(exact), rel=1e-12, abs=1e-8)


@given(schedules("linear"))
def test_a_line_goes_through_its_points(schedule: Schedule) -> None:
    assert all(schedule.at(step) == value for step, value in schedule.points)


@given(st.sampled_from(forms).flatmap(schedules))
def test_the_form_in_yaml_reads_back(schedule: Schedule) -> None:
    assert parse_schedule("key", [list(point) for point in schedule.points], schedule.between) == schedule


def test_phases_of_undos() -> None:
    most = parse_schedule("traces.undos", [[0, 2], [100, 5], [300, 10]], least=0)
    undos = [0, 1, 2, 3, 5, 6, 10, 11]
    assert [allowed_traces(undos, most, step) for step in (0, 99, 100, 300, 10**9)] == [
        (0, 1, 2),
        (0, 1, 2),
        (0, 1, 2, 3, 4),
        (0, 1, 2, 3, 4, 5, 6),
        (0, 1, 2, 3, 4, 5, 6),
    ]


def test_a_limit_between_whole_numbers_admits_the_lower_one() -> None:
    assert allowed_traces([0, 2, 3], Schedule(((0, 2), (4, 4)), "linear"), 1) == (0, 1)


@given(st.lists(st.integers(0, 12)), schedules("constant"), st.integers(0, 60))
def test_what_is_allowed(undos: list[int], most: Schedule, step: int) -> None:
    chosen = allowed_traces(undos, most, step)
    assert list(chosen) == sorted(set(chosen))
    assert all((index in chosen) == (count <= most.at(step)) for index, count in enumerate(undos))


@pytest.mark.parametrize(
    ("given_form", "message"),
    [
        (None, "rewards.undo: must be a list of [step, value], not None"),
        (0.5, "rewards.undo: must be a list of [step, value], not 0.5"),
        ("[[0, 1]]", "rewards.undo: must be a list of [step, value], not '[[0, 1]]'"),
        ([], "rewards.undo: needs at least one [step, value]"),
        ([0, 1], "rewards.undo[0]: must be [step, value], not 0"),
        ([[0, 1], [5]], "rewards.undo[1]: must be [step, value], not [5]"),
        ([[0, 1], "ab"], "rewards.undo[1]: must be [step, value], not 'ab'"),
        ([[0.0, 1]], "rewards.undo[0]: the step must be a whole number, not 0.0"),
        ([[False, 1]], "rewards.undo[0]: the step must be a whole number, not False"),
        ([[0, True]], "rewards.undo[0]: the value must be a number, not True"),
        ([[0, "1"]], "rewards.undo[0]: the value must be a number, not '1'"),
        ([[0, 1], [5, -1]], "rewards.undo[1]: the value must be at least 0, is -1"),
        ([[1, 1]], "rewards.undo: the first step must be 0, is 1"),
        ([[-1, 1]], "rewards.undo: the first step must be 0, is -1"),
        ([[0, 1], [5, 1], [5, 2]], "rewards.undo: steps must rise, but step 5 follows step 5"),
        ([[0, 1], [5, 1], [4, 2]], "rewards.undo: steps must rise, but step 4 follows step 5"),
        ([[0, math.inf]], "rewards.undo: the value at step 0 must be finite, is inf"),
        ([[0, 1], [3, math.nan]], "rewards.undo: the value at step 3 must be finite, is nan"),
        ([[0, 10**400]], "rewards.undo: int too large to convert to float"),
    ],
)
def test_a_badly_written_schedule(given_form: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_schedule("rewards.undo", given_form, least=0)
    assert str(error.value) == message


def test_steps_count_from_zero() -> None:
    with pytest.raises(ValueError, match="steps count from 0, got -1"):
        Schedule(((0, 1),)).at(-1)
