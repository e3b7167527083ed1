"""Rows hold every example that fits, trees what their traces share, phases what their schedule allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.packing import Example, TrainingSet, examples_of, pack, pack_by_phase
from pipeline.backtrack.curriculum import Schedule
from pipeline.backtrack.targets import Form, trace_walk
from pipeline.backtrack.trace import Detour, Trace, WrongTry, build_trace
from tests.actors.drawn import LAYOUTS, solved, traces, undos
from tests.pipeline.tiny import U, decisions, rule

# ---- packing ----


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=80), st.integers(20, 30), st.integers(1, 100), st.integers(0, 3))
def test_rows_hold_every_example(lengths: list[int], row_tokens: int, rows: int, seed: int) -> None:
    packed = pack(lengths, row_tokens, rows, seed)
    assert len(packed) == rows and all(packed)
    assert all(sum(lengths[i] for i in row) <= row_tokens for row in packed)
    if rows >= 2 * len(lengths):  # the one that has waited longest begins the next row, so none waits for ever
        assert {i for row in packed for i in row} == set(range(len(lengths)))
    assert pack(lengths, row_tokens, rows, seed) == packed


def test_as_many_rows_as_examples_hold_all_of_them() -> None:
    """Also when none of them has company: every row is full with one."""
    assert {i for row in pack([10] * 200, 10, 200, 0) for i in row} == set(range(200))


def test_rows_are_filled_with_what_fits() -> None:
    lengths = [60, 40, 70, 30, 50] * 20
    assert sum(lengths[i] for row in pack(lengths, 100, 50, seed=0) for i in row) > 0.97 * 50 * 100


def test_the_seed_shuffles() -> None:
    assert len({tuple(pack([1] * 29, 29, 1, seed)[0]) for seed in range(3)}) == 3


# ---- examples ----


def nodes(group: Sequence[Trace], data: TrainingSet) -> int:
    """Distinct states that walks of these traces come through."""
    found: set[tuple[int, ...]] = set()
    for trace in group:
        walk = trace_walk(trace, data.rule, data.targets)
        states = [walk.prompt]
        for context, token, ends_run in decisions(walk, data.rule.unit, data.form.rewinding):
            if not ends_run and (token != U or data.form.rewinding == "deferred"):
                states.append((*context, token))
        found |= {state[:end] for state in states for end in range(1, len(state) + 1)}
    return len(found)


@settings(deadline=None, max_examples=150)
@given(traces(), st.sampled_from(list(LAYOUTS)), st.booleans(), st.booleans(), st.integers(4, 40))
def test_examples(drawn: Any, form: str, together: bool, scheduled: bool, row_tokens: int) -> None:
    unit, some = drawn
    rewinding = LAYOUTS[form].rewinding if unit == "token" else "immediate"
    data = TrainingSet(some, rule(unit), form=replace(LAYOUTS[form], rewinding=rewinding), together=together)
    if scheduled:
        data = replace(data, most_undos=Schedule(((0, 1), (5, 9))))
    examples, left_out = examples_of(data, row_tokens)
    shares = together and data.form.context == "rewind"
    for one in examples:
        assert one.tokens == (nodes(one.traces, data) if data.form.context == "rewind" else len(one.traces[0].ids)) <= row_tokens
        assert one.undos == max(map(undos, one.traces))
        assert len(one.traces) == 1 or shares
        assert len({trace.ids[: trace.prompt_length] for trace in one.traces}) == 1
        assert not scheduled or len({undos(trace) for trace in one.traces}) == 1
    too_long = [
        trace
        for trace in some
        if (nodes([trace], data) if data.form.context == "rewind" else len(trace.ids)) > row_tokens
    ]  # fmt: skip
    assert left_out == len(too_long)
    assert Counter(trace for one in examples for trace in one.traces) + Counter(too_long) == Counter(some)
    if not shares:
        assert [one.traces[0] for one in examples] == [trace for trace in some if trace not in too_long]


def test_traces_of_a_prompt_share_a_tree() -> None:
    """Prompt 5 2, solutions 1 0 and 1 6: 5 2 1 0 and a 6 beside the 0."""
    some = [solved((5, 2), (1, 0)), solved((5, 1), (1,)), solved((5, 2), (1, 6))]
    apart = TrainingSet(some, rule("token"), form=Form("rewind"))
    assert examples_of(apart, 9) == ([Example((one,), len(one.ids), 0, (n,)) for n, one in enumerate(some)], 0)
    joined = replace(apart, together=True)
    assert examples_of(joined, 9)[0] == [Example((some[0], some[2]), 5, 0, (0, 2)), Example((some[1],), 3, 0, (1,))]
    assert examples_of(replace(joined, form=Form("soft")), 9) == examples_of(apart, 9)


def test_a_group_too_large_for_a_row_is_split() -> None:
    some = [solved((5, 2), (token, 0, 0, 0)) for token in range(5)]
    examples, left_out = examples_of(TrainingSet(some, rule("token"), form=Form("rewind"), together=True), 11)
    assert left_out == 0
    assert [trace for one in examples for trace in one.traces] == some
    assert [len(one.traces) for one in examples] == [2, 1, 2] and [one.tokens for one in examples] == [10, 6, 10]


def test_an_error_longer_than_the_row_is_left_out_and_counted() -> None:
    """Alone, and from within a group whose other traces stay."""
    long = build_trace((5, 2), (1, 0), [Detour(1, WrongTry((4,) * 50, (True,) * 50))], rule("all"))
    some = [solved((5, 2), (1, 0)), long, solved((5, 2), (6,))]
    for form in LAYOUTS.values():
        for together in (False, True):
            examples, left_out = examples_of(TrainingSet(some, rule("all"), form=form, together=together), 40)
            assert left_out == 1
            assert [trace for one in examples for trace in one.traces] == [some[0], some[2]]


def test_with_a_schedule_traces_of_different_undo_counts_do_not_share_a_tree() -> None:
    some = [solved((5, 2), (1,)), solved((5, 2), (1,), 1), solved((5, 2), (6,)), solved((5, 2), (1,), 2)]
    free = TrainingSet(some, rule("token"), form=Form("rewind"), together=True)
    assert [one.undos for one in examples_of(free, 99)[0]] == [4]
    bound = replace(free, most_undos=Schedule(((0, 0), (9, 2))))
    assert [(len(one.traces), one.undos) for one in examples_of(bound, 99)[0]] == [(2, 0), (1, 2), (1, 4)]


# ---- phases ----


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=30),
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(1, 3),
)
def test_each_step_trains_on_what_its_schedule_allows(counts: list[int], limits: list[int], steps: int, rows: int) -> None:
    examples = [Example((), 1 + count % 3, count) for count in counts]
    most = Schedule(tuple((3 * place, limit) for place, limit in enumerate(limits)))
    empty = next((step for step in range(steps) if all(count > most.at(step) for count in counts)), None)
    if empty is not None:
        with pytest.raises(ValueError, match=f"sft.most_undos allows no trace at step {empty}: every one has more undos"):
            pack_by_phase(examples, most, 8, steps, rows, 0)
        return
    packed = pack_by_phase(examples, most, 8, steps, rows, 0)
    assert len(packed) == steps * rows and all(packed)
    for number, row in enumerate(packed):
        assert all(examples[index].undos <= most.at(number // rows) for index in row)
        assert sum(examples[index].tokens for index in row) <= 8
    assert pack_by_phase(examples, most, 8, steps, rows, 0) == packed


def test_a_later_phase_holds_what_it_newly_allows() -> None:
    examples = [Example((), 4, count) for count in (0, 0, 1, 5)]
    packed = pack_by_phase(examples, Schedule(((0, 0), (4, 1), (8, 5))), 8, 12, 2, 0)
    seen = [{index for row in packed[start : start + 8] for index in row} for start in (0, 8, 16)]
    assert seen == [{0, 1}, {0, 1, 2}, {0, 1, 2, 3}]


def test_without_a_schedule_all_is_one_phase() -> None:
    examples = [Example((), length, length) for length in (3, 5, 2, 7)]
    assert pack_by_phase(examples, None, 9, 6, 2, seed=4) == pack([3, 5, 2, 7], 9, 12, 4)


def test_no_example_fits() -> None:
    with pytest.raises(ValueError, match="no example fits into a row of 32 tokens: raise row_tokens"):
        pack_by_phase([], None, 32, 1, 1, 0)
