"""Traces: whatever went wrong in between, the reader sees prefix and correction; no wrong decision is ever taught."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backtrack.trace import IGNORE, Role, Trace, WrongTry, build_trace, targets
from pipeline.backtrack.undo import UndoRule, Unit, apply_undo

U = 9
tokens = st.integers(0, 4)  # few, so that tries often begin as the correction does
parts = st.lists(tokens, max_size=6)
rules = st.builds(UndoRule, st.just(U), st.sampled_from(["token", "step", "all"]), st.frozensets(tokens))


@st.composite
def wrong_tries(draw: st.DrawFn) -> WrongTry:
    ids = draw(st.lists(tokens, min_size=1, max_size=6))
    wrong = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)).filter(any))
    return WrongTry(tuple(ids), tuple(wrong))


tries_of_one = st.lists(wrong_tries(), max_size=4)


def completion(trace: Trace) -> tuple[int, ...]:
    return trace.ids[trace.prompt_length :]


@settings(deadline=None)
@given(parts, parts, tries_of_one, parts, rules)
def test_prefix_and_correction_survive(
    prompt: list[int], prefix: list[int], tries: list[WrongTry], correction: list[int], rule: UndoRule
) -> None:
    trace = build_trace(prompt, prefix, tries, correction, rule)
    assert trace.ids[: len(prompt)] == tuple(prompt)
    assert len(trace.ids) == len(trace.roles)
    undone = apply_undo(completion(trace), rule)
    assert undone.surviving == (*prefix, *correction)
    assert undone.noops == 0


@settings(deadline=None)
@given(parts, parts, tries_of_one, parts, rules)
def test_roles_say_what_happens(
    prompt: list[int], prefix: list[int], tries: list[WrongTry], correction: list[int], rule: UndoRule
) -> None:
    """U is an undo and nothing else is; tries are deleted; with unit `token` nothing else is."""
    trace = build_trace(prompt, prefix, tries, correction, rule)
    roles, deleted_by = trace.roles[len(prompt) :], apply_undo(completion(trace), rule).deleted_by
    for token, role, by in zip(completion(trace), roles, deleted_by, strict=True):
        assert (token == U) == (role == Role.UNDO)
        if role in (Role.ERROR, Role.CONSEQUENCE):
            assert by >= 0
        elif rule.unit == "token":
            assert by < 0
    wrong = [id for one in tries for id, is_wrong in zip(one.ids, one.wrong, strict=True) if is_wrong]
    errors = [id for id, role in zip(trace.ids, trace.roles, strict=True) if role == Role.ERROR]
    assert sorted(errors) == sorted(wrong)


@settings(deadline=None)
@given(parts, parts, tries_of_one, parts, rules)
def test_targets(prompt: list[int], prefix: list[int], tries: list[WrongTry], correction: list[int], rule: UndoRule) -> None:
    trace = build_trace(prompt, prefix, tries, correction, rule)
    decision, span = targets(trace, "decision"), targets(trace, "span")
    for token, role, by_decision, by_span in zip(trace.ids, trace.roles, decision, span, strict=True):
        taught = role not in (Role.PROMPT, Role.ERROR)
        assert by_decision == (token if taught else IGNORE)
        assert by_span == (token if taught and role != Role.CONSEQUENCE else IGNORE)
        if role == Role.UNDO:
            assert by_decision == by_span == U
    tried = [at for at, role in enumerate(trace.roles) if role in (Role.ERROR, Role.CONSEQUENCE)]
    assert all(span[at] == IGNORE for at in tried)


def test_a_trace_of_two_tries_by_step() -> None:
    tries = [WrongTry((1, 2, 0, 3), (True, False, False, False)), WrongTry((4,), (True,))]
    trace = build_trace([7], [5, 0], tries, [6, 0], UndoRule(U, "step", frozenset({0})))
    assert trace.ids == (7, 5, 0, 1, 2, 0, 3, U, U, 4, U, 6, 0)
    assert trace.roles == (0, 1, 1, 2, 3, 3, 3, 4, 4, 2, 4, 5, 5)
    assert targets(trace, "decision") == (IGNORE, 5, 0, IGNORE, 2, 0, 3, U, U, IGNORE, U, 6, 0)
    assert targets(trace, "span") == (IGNORE, 5, 0, *[IGNORE] * 4, U, U, IGNORE, U, 6, 0)


def test_a_try_that_begins_right_keeps_its_beginning_by_token() -> None:
    """`Try 5` taken back for `Try 4` needs one undo, and `Try` is taught under either mask: it stands in the end."""
    trace = build_trace([], [1], [WrongTry((2, 5), (False, True))], [2, 4], UndoRule(U))
    assert trace.ids == (1, 2, 5, U, 4)
    assert targets(trace, "decision") == targets(trace, "span") == (1, 2, IGNORE, U, 4)


def test_unit_all_writes_the_prefix_again() -> None:
    trace = build_trace([], [1], [WrongTry((2,), (True,))], [3], UndoRule(U, "all"))
    assert trace.ids == (1, 2, U, 1, 3)


def test_unit_step_writes_an_unfinished_line_again() -> None:
    trace = build_trace([], [1, 0, 2], [WrongTry((3,), (True,))], [4], UndoRule(U, "step", frozenset({0})))
    assert trace.ids == (1, 0, 2, 3, U, 2, 4)


@pytest.mark.parametrize("unit", ["token", "step", "all"])
def test_no_tries_is_a_clean_row(unit: Unit) -> None:
    trace = build_trace([1], [2], [], [3], UndoRule(U, unit))
    assert trace.ids == (1, 2, 3) and targets(trace, "span") == (IGNORE, 2, 3)


@pytest.mark.parametrize(
    ("prompt", "prefix", "tries", "correction", "message"),
    [
        ([U], [], [], [1], "prompt holds the undo token"),
        ([], [1, U], [], [1], "prefix holds the undo token"),
        ([], [], [], [U], "correction holds the undo token"),
        ([], [], [WrongTry((1, U), (True, False))], [1], "try holds the undo token"),
        ([], [], [WrongTry((), ())], [1], "without a wrong token"),
        ([], [], [WrongTry((1,), (True,)), WrongTry((1, 2), (False, False))], [1], "without a wrong token"),
    ],
)
def test_refused(prompt: list[int], prefix: list[int], tries: list[WrongTry], correction: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_trace(prompt, prefix, tries, correction, UndoRule(U))
