"""Pairs of preferences: what they hold for every unit of undoing, what counts in them, and which are left out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.backtrack.preferences import Pair, flaw, keep_pair, step_pair, undo_pair, walks
from pipeline.backtrack.trace import Detour, Role, WrongTry, build_trace
from pipeline.backtrack.undo import Unit, apply_undo
from tests.pipeline.tiny import END, VOCABULARY, U, rule

PROMPT = (5, 2)
UNITS: list[Unit] = ["token", "step", "all"]
GOOD = Pair(PROMPT, (1, END), (4, 6, U, 2, END), (4, 6, 0, END), "undo", wrong=(True, False, False, False, False))


def made(unit: Unit, horizon: int | None = None) -> Pair:
    """Prefix 1 END; the error 4 and its consequence 6; the right way 2 END 0; the model went on 6 5 END 5."""
    trace = build_trace(PROMPT, (1, END, 2, END, 0), [Detour(2, WrongTry((4, 6), (True, False)))], rule(unit))
    pair = undo_pair(trace, (1, END, 4, 6, 5, END, 5), rule(unit), horizon)
    assert pair is not None
    return pair


@pytest.mark.parametrize(("unit", "undos"), [("token", (U, U)), ("step", (U,)), ("all", (U, 1, END))])
def test_an_error_taken_back_against_the_same_error_continued(unit: Unit, undos: tuple[int, ...]) -> None:
    pair = made(unit)
    assert (pair.prompt_ids, pair.prefix_ids) == (PROMPT, (1, END))
    assert pair.chosen_ids == (4, 6, *undos, 2, END, 0)
    assert pair.rejected_ids == (4, 6, 5, END, 5)
    assert pair.wrong == (True, *[False] * (len(pair.chosen_ids) - 1)) and pair.shared == 2
    assert flaw(pair, rule(unit), VOCABULARY) is None
    short = made(unit, 1)
    assert (short.chosen_ids, short.rejected_ids) == ((4, 6, *undos, 2, END), (4, 6, 5, END))
    assert len(short.wrong) == len(short.chosen_ids)
    assert made(unit, 9) == pair


def test_a_right_step_against_a_wrong_one() -> None:
    for unit in UNITS:
        trace = build_trace(PROMPT, (1, END, 2, END, 0), [Detour(2, WrongTry((4, 6), (True, False)))], rule(unit))
        pair = step_pair(trace, (1, END, 4, 6, 5, END, 5), rule(unit))
        assert pair == Pair(PROMPT, (1, END), (2, END), (4, 6, 5, END), "step")
        assert step_pair(trace, (1, 1, 4), rule(unit)) is None and undo_pair(trace, (1, 1, 4), rule(unit)) is None


def test_a_right_way_gone_on_with_against_undo() -> None:
    for unit in UNITS:
        trace = build_trace(PROMPT, (1, END, 2, END, 0), [Detour(2, WrongTry((4, 6), (True, False)))], rule(unit))
        assert keep_pair(trace, rule(unit), 1) == Pair(PROMPT, (1,), (END,), (U,), "keep")
        pair = keep_pair(trace, rule(unit), 2)
        assert pair == Pair(PROMPT, (1, END), (2, END), (U,), "keep") and flaw(pair, rule(unit), VOCABULARY) is None


def test_only_what_differs_counts_and_never_a_wrong_decision() -> None:
    chosen, rejected = walks(made("step"))
    assert chosen.ids == (1, END, 4, 6, U, 2, END, 0) and rejected.ids == (1, END, 4, 6, 5, END, 5)
    assert chosen.weights == (0, 0, 0, 0, 1, 1, 1, 1) and rejected.weights == (0, 0, 0, 0, 1, 1, 1)
    assert chosen.roles is not None and [at for at, role in enumerate(chosen.roles) if role == Role.ERROR] == [2]
    apart = Pair(PROMPT, (), (6, 1, 4, U, 2), (6, 0), "undo", wrong=(False, False, True, False, False))
    assert walks(apart)[0].weights == (0, 1, 0, 1, 1)  # the sides differ before the wrong decision


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("unknown_kind", {"kind": "other"}),
        ("empty_prompt", {"prompt_ids": ()}),
        ("empty_side", {"chosen_ids": (), "wrong": ()}),
        ("empty_side", {"rejected_ids": ()}),
        ("equal_sides", {"rejected_ids": GOOD.chosen_ids}),
        ("unknown_id", {"rejected_ids": (4, 6, VOCABULARY)}),
        ("unknown_id", {"prefix_ids": (-1,)}),
        ("error_where_the_sides_part", {"wrong": (False, False, True, False, False)}),
        ("undo_in_prompt", {"prompt_ids": (5, U)}),
        ("undo_in_prefix", {"prefix_ids": (1, U)}),
        ("no_margin", {"margin": math.nan}),
        ("one_side_begins_the_other", {"rejected_ids": (4, 6)}),
        ("undo_without_undo", {"chosen_ids": (4, 6, 2), "wrong": ()}),
        ("undo_without_error", {"chosen_ids": (U, 2), "rejected_ids": (4, 2), "wrong": ()}),
    ],
)
def test_what_cannot_be_learned_from_has_a_name(why: str, change: dict[str, Any]) -> None:
    assert flaw(GOOD, rule("step"), VOCABULARY) is None
    assert flaw(replace(GOOD, **change), rule("step"), VOCABULARY) == why


tokens = st.integers(0, 6).filter(lambda token: token != END)


@given(st.sampled_from(UNITS), st.data())
def test_the_chosen_side_ends_as_the_solution_does(unit: Unit, data: Any) -> None:
    lines = st.lists(tokens, min_size=1, max_size=3).map(lambda line: (*line, END))
    right = [token for line in data.draw(st.lists(lines, min_size=1, max_size=3)) for token in line]
    at = data.draw(st.sampled_from([0, *[at + 1 for at, token in enumerate(right[:-1]) if token == END]]))
    wrong = data.draw(st.lists(tokens, min_size=1, max_size=4))
    decision = data.draw(st.integers(0, len(wrong) - 1))
    trace = build_trace(
        PROMPT, right, [Detour(at, WrongTry(tuple(wrong), tuple(i == decision for i in range(len(wrong)))))], rule(unit)
    )
    emitted = (*right[:at], *wrong, *data.draw(st.lists(tokens, max_size=4)))
    pair = undo_pair(trace, emitted, rule(unit))
    if pair is None:  # what the try shares with the right way is prefix there, and is no more what was emitted
        assert unit == "token"
        return
    assert apply_undo(pair.prefix_ids + pair.chosen_ids, rule(unit)).surviving == tuple(right)
    assert pair.prefix_ids + pair.rejected_ids == emitted
    if flaw(pair, rule(unit), VOCABULARY) is None:
        for walk, side in zip(walks(pair), (pair.chosen_ids, pair.rejected_ids), strict=True):
            counted = [token for token, weight in zip(walk.ids, walk.weights or (), strict=True) if weight]
            assert len(counted) <= len(side) - pair.shared
            assert tuple(counted) == side[len(side) - len(counted) :] or walk.ids == pair.prefix_ids + pair.chosen_ids
