"""An undo takes back what it should, and the outcome says so the same way in all its fields."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backtrack.undo import UndoRule, Unit, apply_undo

U, ENDS = 9, frozenset({3, 4})
UNITS: tuple[Unit, ...] = ("token", "step", "all")

units = st.sampled_from(UNITS)
completions = st.lists(st.sampled_from([0, 1, 2, 3, 4, U, U]), max_size=24)


def rule(unit: Unit) -> UndoRule:
    return UndoRule(U, unit, ENDS if unit == "step" else frozenset())


def keep(text: str, unit: Unit) -> int:
    """How many characters of a text one undo leaves, said with string functions."""
    if unit == "token":
        return max(0, len(text) - 1)
    return 0 if unit == "all" else text.removesuffix("\n").rfind("\n") + 1


def naive(ids: list[int], unit: Unit) -> tuple[list[int], list[int], int]:
    """(indices that survive, deleted_by, noops): while there is an undo, write the sequence again without it and its victims."""
    line, deleted_by, noops = list(range(len(ids))), [-1] * len(ids), 0
    while undos := [at for at, index in enumerate(line) if ids[index] == U]:
        first = undos[0]
        kept = keep("".join("\n" if ids[i] in ENDS else "x" for i in line[:first]), unit)
        for index in line[kept:first]:
            deleted_by[index] = line[first]
        noops += first == 0
        line = line[:kept] + line[first + 1 :]
    return line, deleted_by, noops


@settings(deadline=None)
@given(completions, units)
def test_equals_the_naive_version(ids: list[int], unit: Unit) -> None:
    undone = apply_undo(ids, rule(unit))
    source, deleted_by, noops = naive(ids, unit)
    assert undone.source == tuple(source)
    assert undone.surviving == tuple(ids[index] for index in source)
    assert undone.deleted_by == tuple(deleted_by)
    assert (undone.undos, undone.noops) == (ids.count(U), noops)


@settings(deadline=None)
@given(completions, units)
def test_the_fields_agree(ids: list[int], unit: Unit) -> None:
    undone = apply_undo(ids, rule(unit))
    assert U not in undone.surviving
    assert sorted(undone.source) == list(undone.source)
    for index, token in enumerate(ids):
        by = undone.deleted_by[index]
        assert (by == -1) == (token == U or index in undone.source)
        assert by == -1 or (by > index and ids[by] == U)
    idle = ids.count(U) - len({by for by in undone.deleted_by if by >= 0})
    assert undone.noops == idle


@settings(deadline=None)
@given(completions, completions, units)
def test_what_went_before_is_all_that_counts(first: list[int], second: list[int], unit: Unit) -> None:
    """Undoing in two goes is undoing in one: an engine may hand over the survivors and go on."""
    before = apply_undo(first, rule(unit)).surviving
    assert apply_undo([*before, *second], rule(unit)).surviving == apply_undo([*first, *second], rule(unit)).surviving


@settings(deadline=None)
@given(completions, units)
def test_an_undo_leaves_a_prefix(ids: list[int], unit: Unit) -> None:
    before, after = apply_undo(ids, rule(unit)).surviving, apply_undo([*ids, U], rule(unit)).surviving
    assert before[: len(after)] == after
    assert len(after) < len(before) or not before


@pytest.mark.parametrize(
    ("unit", "ids", "surviving", "noops"),
    [
        ("token", [1, 2, U], (1,), 0),  # trailing undos apply
        ("token", [1, 2, U, U], (), 0),
        ("token", [U, 1, U, U, 2], (2,), 2),  # an empty stack
        ("step", [1, 3, 2, U], (1, 3), 0),
        ("step", [1, 3, 2, 4, U], (1, 3), 0),  # right after a line break: that line goes, not nothing
        ("step", [1, 3, 3, U], (1, 3), 0),  # an empty line is a step
        ("step", [1, 3, 2, 4, 0, U, U], (1, 3), 0),
        ("step", [1, 3, 2, U, U, U, 0], (0,), 1),
        ("step", [3, U], (), 0),
        ("all", [1, 3, 2, U], (), 0),
        ("all", [1, U, U, 2], (2,), 1),
        ("all", [], (), 0),
    ],
)
def test_cases(unit: Unit, ids: list[int], surviving: tuple[int, ...], noops: int) -> None:
    undone = apply_undo(ids, rule(unit))
    assert (undone.surviving, undone.noops) == (surviving, noops)
