"""Traces: whatever went wrong in between, the reader sees the solution; no wrong decision is ever taught."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.backtrack.layout import IGNORE
from pipeline.backtrack.targets import Targets
from pipeline.backtrack.trace import Detour, Role, Trace, WrongTry, build_trace, step_labels, wrong_states
from pipeline.backtrack.undo import UndoRule, Unit, apply_undo
from tests.pipeline.tiny import labels_of, trace_at

U = 9
tokens = st.integers(0, 4)  # few, so that tries often begin as the correction does
rules = st.builds(UndoRule, st.just(U), st.sampled_from(["token", "step", "all"]), st.frozensets(tokens))
DECISION, SPAN = Targets("decision"), Targets("span")


@st.composite
def wrong_tries(draw: st.DrawFn, nested: bool = True) -> WrongTry:
    ids = draw(st.lists(tokens, min_size=1, max_size=6))
    wrong = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)).filter(any))
    return WrongTry(tuple(ids), tuple(wrong), tuple(draw(detours(len(ids), 1))) if nested else ())


@st.composite
def detours(draw: st.DrawFn, length: int, most: int) -> list[Detour]:
    count = draw(st.integers(0, most))
    return [Detour(draw(st.integers(0, length)), draw(wrong_tries(nested=most > 1))) for _ in range(count)]


@st.composite
def traces(draw: st.DrawFn) -> tuple[list[int], list[int], list[Detour], UndoRule, Trace]:
    prompt, solution, rule = draw(st.lists(tokens, min_size=1, max_size=4)), draw(st.lists(tokens, max_size=10)), draw(rules)
    some = draw(detours(len(solution), 3))
    try:
        trace = build_trace(prompt, solution, some, rule)
    except ValueError as error:
        assert "inner try" in str(error) or "nothing nests" in str(error)
        assume(False)
    return prompt, solution, some, rule, trace


def completion(trace: Trace) -> tuple[int, ...]:
    return trace.ids[trace.prompt_length :]


def all_tries(some: list[Detour]) -> list[WrongTry]:
    return [one for detour in some for one in (detour.wrong_try, *all_tries(list(detour.wrong_try.inner)))]


@settings(deadline=None)
@given(traces())
def test_the_solution_survives(drawn: tuple[list[int], list[int], list[Detour], UndoRule, Trace]) -> None:
    prompt, solution, _, rule, trace = drawn
    assert trace.ids[: len(prompt)] == tuple(prompt)
    assert len(trace.ids) == len(trace.roles)
    undone = apply_undo(completion(trace), rule)
    assert undone.surviving == tuple(solution)
    assert undone.noops == 0


@settings(deadline=None)
@given(traces())
def test_roles_say_what_happens(drawn: tuple[list[int], list[int], list[Detour], UndoRule, Trace]) -> None:
    """U is an undo and nothing else is; tries are deleted; with unit `token` nothing else is; every error is written once."""
    prompt, _, some, rule, trace = drawn
    roles, deleted_by = trace.roles[len(prompt) :], apply_undo(completion(trace), rule).deleted_by
    for token, role, by in zip(completion(trace), roles, deleted_by, strict=True):
        assert (token == U) == (role == Role.UNDO)
        if role in (Role.ERROR, Role.CONSEQUENCE):
            assert by >= 0
        elif rule.unit == "token":
            assert by < 0
    wrong = [id for one in all_tries(some) for id, is_wrong in zip(one.ids, one.wrong, strict=True) if is_wrong]
    errors = [id for id, role in zip(trace.ids, trace.roles, strict=True) if role == Role.ERROR]
    assert sorted(errors) == sorted(wrong)


@settings(deadline=None)
@given(traces())
def test_masks(drawn: tuple[list[int], list[int], list[Detour], UndoRule, Trace]) -> None:
    *_, rule, trace = drawn
    decision, span, everything = (labels_of(trace, rule, targets) for targets in (DECISION, SPAN, Targets("none")))
    for token, role, by_decision, by_span, all_in in zip(trace.ids, trace.roles, decision, span, everything, strict=True):
        taught = role not in (Role.PROMPT, Role.ERROR)
        assert all_in == (IGNORE if role == Role.PROMPT else token)
        assert by_decision == (token if taught else IGNORE)
        assert by_span == (token if taught and role != Role.CONSEQUENCE else IGNORE)


@settings(deadline=None)
@given(traces())
def test_wrong_states_by_hand(drawn: tuple[list[int], list[int], list[Detour], UndoRule, Trace]) -> None:
    """A state is wrong when an error is among what survives of the completion up to there."""
    *_, rule, trace = drawn
    start, found = trace.prompt_length, wrong_states(trace, rule)
    assert found[:start] == (False,) * start
    for end in range(start, len(trace.ids)):
        survivors = apply_undo(trace.ids[start : end + 1], rule).source
        assert found[end] == any(trace.roles[start + at] == Role.ERROR for at in survivors)
    assert not found or not found[-1]


@settings(deadline=None)
@given(traces())
def test_where_undos_are_asked_for(drawn: tuple[list[int], list[int], list[Detour], UndoRule, Trace]) -> None:
    """`first`: in every wrong state; `step_end`: in those behind the end of the wrong step; no other target changes."""
    *_, rule, trace = drawn
    start, states = trace.prompt_length, (False, *wrong_states(trace, rule))
    at_evidence = labels_of(trace, rule, DECISION)
    for detect_at in ("first", "step_end"):
        labels = labels_of(trace, rule, Targets("decision", detect_at))
        for at in range(start, len(trace.ids)):
            standing = [start + i for i in apply_undo(trace.ids[start:at], rule).source]
            error = next((i for i, place in enumerate(standing) if trace.roles[place] == Role.ERROR), None)
            assert states[at] == (error is not None)
            due = error is not None
            if due and detect_at == "step_end":
                due = any(trace.ids[place] in rule.step_end_ids for place in standing[error:])
            assert labels[at] == (U if due else at_evidence[at])


def test_nested_undos_by_token() -> None:
    """Outer try 1 2 3 (1 is wrong); on the way 4 is written for 3, seen, and taken back first."""
    outer = WrongTry((1, 2, 3), (True, False, False), (Detour(2, WrongTry((4,), (True,))),))
    trace = build_trace([7], [5, 6], [Detour(1, outer)], UndoRule(U))
    assert trace.ids == (7, 5, 1, 2, 4, U, 3, U, U, U, 6)
    assert trace.roles == (0, 1, 2, 3, 2, 4, 3, 4, 4, 4, 5)
    assert wrong_states(trace, UndoRule(U)) == (False, False, *[True] * 7, False, False)


def test_nested_undos_by_step() -> None:
    """Lines end with 0. The second line of the try is spoilt and written anew; the wrong first line stands meanwhile."""
    outer = WrongTry((1, 0, 2, 3), (True, False, False, False), (Detour(3, WrongTry((4,), (True,))),))
    rule = UndoRule(U, "step", frozenset({0}))
    trace = build_trace([7], [5], [Detour(0, outer)], rule)
    assert trace.ids == (7, 1, 0, 2, 4, U, 2, 3, U, U, 5)
    assert trace.roles == (0, 2, 3, 3, 2, 4, 3, 3, 4, 4, 5)
    with pytest.raises(ValueError, match="takes its wrong decision along"):
        build_trace([7], [5], [Detour(0, outer)], UndoRule(U, "all"))


def test_errors_at_several_places() -> None:
    rule = UndoRule(U, "step", frozenset({0}))
    some = [Detour(2, WrongTry((4,), (True,))), Detour(0, WrongTry((3,), (True,)))]
    trace = build_trace([7], [1, 0, 2], some, rule)
    assert trace.ids == (7, 3, U, 1, 0, 4, U, 2)
    assert trace.roles == (0, 2, 4, 5, 5, 2, 4, 5)


def test_step_labels() -> None:
    """Right line 1 0, wrong line 2 0 with its consequence 3, taken back by two undos, right line 4."""
    rule = UndoRule(U, "step", frozenset({0}))
    trace = trace_at([7], [1, 0], [WrongTry((2, 0, 3), (True, False, False))], [4], rule)
    assert trace.ids == (7, 1, 0, 2, 0, 3, U, U, 4)
    assert step_labels(trace, rule, rule.step_end_ids) == ((2, True), (4, False), (5, False), (8, True))


def test_weights_by_role_and_prompts() -> None:
    from pipeline.backtrack.targets import Weights, trace_walk

    trace = trace_at([7, 6], [1], [WrongTry((2, 3), (True, False))], [4], UndoRule(U, "all"))
    walk = trace_walk(trace, UndoRule(U, "all"), Targets(weights=Weights(undo=2.0, consequence=0.5), prompt=True))
    assert walk.ids == (1, 2, 3, U, 1, 4) and walk.weights == (1, 0, 0.5, 2, 1, 1) and walk.prompt_weight == 1


def test_a_trace_of_two_tries_by_step() -> None:
    tries = [WrongTry((1, 2, 0, 3), (True, False, False, False)), WrongTry((4,), (True,))]
    trace = trace_at([7], [5, 0], tries, [6, 0], UndoRule(U, "step", frozenset({0})))
    assert trace.ids == (7, 5, 0, 1, 2, 0, 3, U, U, 4, U, 6, 0)
    assert trace.roles == (0, 1, 1, 2, 3, 3, 3, 4, 4, 2, 4, 5, 5)
    rule = UndoRule(U, "step", frozenset({0}))
    assert labels_of(trace, rule, DECISION) == [IGNORE, 5, 0, IGNORE, 2, 0, 3, U, U, IGNORE, U, 6, 0]
    assert labels_of(trace, rule, SPAN) == [IGNORE, 5, 0, *[IGNORE] * 4, U, U, IGNORE, U, 6, 0]


def test_a_try_that_begins_right_keeps_its_beginning_by_token() -> None:
    """`Try 5` taken back for `Try 4` needs one undo, and `Try` is taught under either mask: it stands in the end."""
    trace = trace_at([7], [1], [WrongTry((2, 5), (False, True))], [2, 4], UndoRule(U))
    assert trace.ids == (7, 1, 2, 5, U, 4)
    assert labels_of(trace, UndoRule(U), DECISION) == labels_of(trace, UndoRule(U), SPAN) == [IGNORE, 1, 2, IGNORE, U, 4]


def test_unit_all_writes_the_prefix_again() -> None:
    trace = trace_at([], [1], [WrongTry((2,), (True,))], [3], UndoRule(U, "all"))
    assert trace.ids == (1, 2, U, 1, 3)


def test_unit_step_writes_an_unfinished_line_again() -> None:
    trace = trace_at([], [1, 0, 2], [WrongTry((3,), (True,))], [4], UndoRule(U, "step", frozenset({0})))
    assert trace.ids == (1, 0, 2, 3, U, 2, 4)


@pytest.mark.parametrize("unit", ["token", "step", "all"])
def test_no_tries_is_a_clean_row(unit: Unit) -> None:
    trace = trace_at([1], [2], [], [3], UndoRule(U, unit))
    assert trace.ids == (1, 2, 3) and trace.roles == (Role.PROMPT, Role.CORRECTION, Role.CORRECTION)


@pytest.mark.parametrize(
    ("prompt", "solution", "tries", "message"),
    [
        ([U], [1], [], "prompt holds the undo token"),
        ([], [1, U], [], "solution holds the undo token"),
        ([], [1], [WrongTry((1, U), (True, False))], "try holds the undo token"),
        ([], [1], [WrongTry((), ())], "without a wrong token"),
        ([], [1], [WrongTry((1,), (True,)), WrongTry((1, 2), (False, False))], "without a wrong token"),
        ([], [1], [WrongTry((1, 2), (False, True), (Detour(0, WrongTry((3,), (True,))),))], "inner try before"),
    ],
)
def test_refused(prompt: list[int], solution: list[int], tries: list[WrongTry], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_trace(prompt, solution, [Detour(0, one) for one in tries], UndoRule(U))


def test_a_detour_outside_the_solution() -> None:
    with pytest.raises(ValueError, match="a detour at 3 of a way of 2 tokens"):
        build_trace([7], [1, 2], [Detour(3, WrongTry((4,), (True,)))], UndoRule(U))
