"""An undo takes back what it should, and the outcome says so the same way in all its fields."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backtrack.undo import Append, Delete, UndoRule, UndoStream, Unit, apply_undo, apply_undo_batch

U, ENDS = 9, frozenset({3, 4})
UNITS: tuple[Unit, ...] = ("token", "step", "all")

units = st.sampled_from(UNITS)
completions = st.lists(st.sampled_from([0, 1, 2, 3, 4, U, U]), max_size=24)
batches = st.lists(completions, max_size=6)


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
@given(completions, units)
def test_the_index_maps_are_inverse(ids: list[int], unit: Unit) -> None:
    undone = apply_undo(ids, rule(unit))
    assert [undone.place[index] for index in undone.source] == list(range(len(undone.surviving)))
    assert len(undone.place) == len(ids)
    for index, place in enumerate(undone.place):
        assert place == -1 if index not in undone.source else undone.source[place] == index


@settings(deadline=None)
@given(completions, units)
def test_what_survived_has_nothing_left_to_undo(ids: list[int], unit: Unit) -> None:
    surviving = apply_undo(ids, rule(unit)).surviving
    again = apply_undo(surviving, rule(unit))
    assert again.surviving == surviving
    assert again.source == again.place == tuple(range(len(surviving)))
    assert again.undos == again.noops == 0


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


@settings(deadline=None)
@given(completions, units)
def test_the_stream_equals_the_batch_at_every_moment(ids: list[int], unit: Unit) -> None:
    """One id at a time; a reader that follows the events alone sees the same."""
    stream = UndoStream(rule(unit))
    screen: list[int] = []
    for end, token in enumerate(ids, 1):
        (event,) = stream.feed([token])
        if isinstance(event, Append):
            screen.append(event.id)
        else:
            assert 0 <= event.count <= len(screen)
            del screen[len(screen) - event.count :]
        undone = apply_undo(ids[:end], rule(unit))
        assert tuple(screen) == stream.surviving == undone.surviving
        assert (stream.undos, stream.noops) == (undone.undos, undone.noops)


@settings(deadline=None)
@given(completions, completions, units)
def test_a_stream_may_be_fed_in_any_pieces(first: list[int], second: list[int], unit: Unit) -> None:
    pieces, whole = UndoStream(rule(unit)), UndoStream(rule(unit))
    assert pieces.feed(first) + pieces.feed([]) + pieces.feed(second) == whole.feed(iter(first + second))
    assert pieces.surviving == whole.surviving == apply_undo(first + second, rule(unit)).surviving


def test_events() -> None:
    stream = UndoStream(rule("step"))
    assert stream.feed([U, 1, 3, 2, 0, U]) == [Delete(0), Append(1), Append(3), Append(2), Append(0), Delete(2)]


@settings(deadline=None)
@given(batches, units, st.sampled_from([0, 3, U, -1]), st.integers(0, 3))
def test_the_batch_form_equals_the_naive_version(rows: list[list[int]], unit: Unit, padding: int, spare: int) -> None:
    """Whatever the padding is: an undo token or a step end there does nothing."""
    width = max(map(len, rows), default=0) + spare
    ids = np.array([row + [padding] * (width - len(row)) for row in rows], dtype=np.int64).reshape(len(rows), width)
    keep = apply_undo_batch(ids, [len(row) for row in rows], rule(unit))
    assert keep.shape == ids.shape and keep.dtype == np.bool_
    for row, kept in zip(rows, keep, strict=True):
        assert np.flatnonzero(kept).tolist() == naive(row, unit)[0] == list(apply_undo(row, rule(unit)).source)


@pytest.mark.parametrize("unit", UNITS)
def test_a_long_row_that_empties_and_fills_its_stack(unit: Unit) -> None:
    """Deep stacks, many no-ops, long lines: where an overflow or a slip in a running minimum would show."""
    ids = [1] * 5000 + [3] * 50 + [U] * 6000 + [1, 3] * 3000 + [U] * 1000 + [2, U] * 1000
    keep = apply_undo_batch([ids], [len(ids)], rule(unit))
    assert tuple(np.flatnonzero(keep[0])) == apply_undo(ids, rule(unit)).source


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_the_batch_form_reads_tensors(dtype: torch.dtype) -> None:
    keep = apply_undo_batch(torch.tensor([[1, 2, U, 3], [U, 1, 0, 0]], dtype=dtype), torch.tensor([4, 2]), rule("token"))
    assert keep.tolist() == [[True, False, False, True], [False, True, False, False]]


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([1, 2], [2], r"ids must be \[rows, tokens\]"),
        ([[1, 2]], [1, 1], r"are \(1, 2\) and \(2,\)"),
        ([[1, 2]], [3], r"lengths must lie in 0 .. 2, are 3 .. 3"),
        ([[1, 2], [1, 2]], [-1, 2], r"are -1 .. 2"),
    ],
)
def test_the_batch_form_refuses(ids: list[int], lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_undo_batch(ids, lengths, rule("token"))
