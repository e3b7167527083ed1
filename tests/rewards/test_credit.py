"""Who earns a reward: advantages worked by hand, and credit by tree against a version that looks at every prefix anew."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.backtrack.tree import Rewinding, Walk
from pipeline.backtrack.undo import Unit, apply_undo
from rewards.credit import Credit, Episode, advantages, own_credit, spread
from rewards.rollout import UndoRun
from tests.pipeline.tiny import FORMS, U, decisions, rule

TOKEN, PROMPT = rule("token"), (5,)
KINDS: tuple[Credit, ...] = ("sequence", "segment", "tree")


def episode(ids: Sequence[int], reward: float, *wrong: int, prompt: tuple[int, ...] = PROMPT) -> Episode:
    """`wrong`: the runs of undos, by number, that begin in a wrong state; they make it right."""
    runs, at = [], 0
    while at < len(ids):
        end = at
        while end < len(ids) and ids[end] == U:
            end += 1
        if end > at:
            runs.append(UndoRun(at, end, len(runs) not in wrong, True, 0, 0))
        at = end + 1
    return Episode(Walk(prompt, tuple(ids)), reward, True, tuple(runs))


def credited(*group: Episode, kind: Credit = "tree", rewinding: Rewinding = "immediate") -> list[list[float]]:
    return [list(values) for values in advantages(group, TOKEN, kind, 1.0, rewinding=rewinding)]


def near(*rows: Sequence[float]) -> list[object]:
    return [pytest.approx(row, abs=1e-12) for row in rows]


# ---- sequence and segment ----


def test_sequence_is_what_grpo_does() -> None:
    """Rewards 1, 0, 0, 1: mean 1/2, deviation with n - 1 sqrt(1/3) = .57735."""
    group = [episode(ids, reward) for ids, reward in (((1, 2), 1.0), ((3,), 0.0), ((4, 4), 0.0), ((1,), 1.0))]
    value = 0.5 / (0.5773502691896258 + 1e-4)
    expected = [(value,) * 2, (-value,), (-value,) * 2, (value,)]
    assert advantages(group, TOKEN, "sequence") == near(*expected)
    assert advantages(group, TOKEN, "sequence", scale=0.5) == near((1, 1), (-1,), (-1, -1), (1,))


def test_spread() -> None:
    assert spread([1.0, 0.0]) == pytest.approx(0.7071067811865476)
    assert spread([3.0]) == 0 == spread([2.0, 2.0, 2.0])


def test_a_group_that_earned_alike_has_no_advantage() -> None:
    group = [episode((1, 2), 0.5), episode((1, U, 3), 0.5, 0)]
    for kind in KINDS:
        assert all(value == 0 for row in advantages(group, TOKEN, kind) for value in row)


def test_a_deleted_id_of_a_good_rollout_earns_nothing_and_of_a_bad_one_its_blame() -> None:
    """1 is taken back; the rest of the rollout has its reward."""
    group = [episode((1, U, 2), 1.0), episode((1, U, 3), 0.0)]
    assert credited(*group, kind="sequence") == near((0, 0.5, 0.5), (-0.5, -0.5, -0.5))


def test_segment_blames_wrong_text_that_was_taken_back() -> None:
    """The first rollout takes back 1, which is wrong, then 2, which is right. Worst 0, mean .6."""
    group = [episode((1, U, 2, U, 3), 1.0, 0), episode((4,), 0.0), episode((4,), 0.8)]
    assert credited(*group, kind="segment") == near((-0.6, 0.4, 0, 0.4, 0.4), (-0.6,), (0.2,))
    assert credited(*group, kind="sequence") == near((0, 0.4, 0, 0.4, 0.4), (-0.6,), (0.2,))


def test_segment_of_longer_runs() -> None:
    """Both ids of a wrong line go with one run of two undos, the right one before them with another run."""
    group = [episode((1, 2, U, U, 3, U, 4), 0.5, 0), episode((4,), 0.0), episode((4,), 1.0)]
    assert credited(*group, kind="segment") == near((-0.5, -0.5, 0, 0, 0, 0, 0), (-0.5,), (0.5,))


@pytest.mark.parametrize("kind", KINDS)
def test_undo_credit_is_added_to_each_undo_of_a_run(kind: Credit) -> None:
    """One makes wrong right, one right wrong, one changes nothing, one removes what was right; not divided by the scale."""
    ids = (1, 2, U, U, 3, U, 4, U, 6, U)
    runs = (
        *(UndoRun(2, 4, False, True, 0, 0), UndoRun(5, 6, True, False, 1, 0)),
        *(UndoRun(7, 8, False, False, 0, 0), UndoRun(9, 10, True, True, 1, 0)),
    )
    group = [Episode(Walk(PROMPT, ids), 1.0, True, runs), episode((4,), 0.0)]
    without, with_credit = (advantages(group, TOKEN, kind, 2.0, undo_credit)[0] for undo_credit in (0.0, 0.25))
    difference = [after - before for before, after in zip(without, with_credit, strict=True)]
    assert difference == pytest.approx([0, 0, 0.25, 0.25, 0, -0.25, 0, 0, 0, -0.25])


def test_an_undo_before_any_evidence_earns_nothing_of_its_own() -> None:
    run = UndoRun(2, 4, False, True, 0, 0)
    assert [own_credit(one, True) for one in (run, replace(run, seen=False), replace(run, seen=False, after=False))] == [1, 0, 0]


def test_an_undo_is_worth_what_comes_of_it() -> None:
    """Behind a right one the rollout may fail all the same; a wrong one is wrong whatever comes."""
    run = UndoRun(2, 4, False, True, 0, 0)
    spurious = (replace(run, before=True, after=False), replace(run, before=True, unnecessary=1))
    assert [own_credit(one, False) for one in (run, *spurious)] == [0, -1, -1]
    assert [own_credit(one, True) for one in spurious] == [-1, -1]


@pytest.mark.parametrize("kind", KINDS)
def test_error_credit_is_taken_from_what_the_judge_finds_wrong(kind: Credit) -> None:
    """By the share of the group that ended right, and not divided by the scale."""
    group = [replace(episode((1, 2, 3), 0.5), wrong=(1, 2)), episode((1, 4), 0.5)]
    assert advantages(group, TOKEN, kind, 2.0, error_credit=0.25) == near((0, -0.25, -0.25), (0, 0))
    apart = [replace(group[0], reward=1.0), group[1]]
    without, with_credit = (advantages(apart, TOKEN, kind, 2.0, error_credit=credit)[0] for credit in (0.0, 0.25))
    assert [a - b for a, b in zip(without, with_credit, strict=True)] == pytest.approx([0, 0.25, 0.25])
    for right, share in (((False, True), 0.5), ((False, False), 0.0)):
        some = [replace(one, correct=correct) for one, correct in zip(group, right, strict=True)]
        assert advantages(some, TOKEN, kind, 2.0, error_credit=0.25) == near((0, -0.25 * share, -0.25 * share), (0, 0))


# ---- tree ----


def test_a_branch_is_credited_against_what_is_below_its_parent() -> None:
    r"""
    5 - 1 - 2    1.0      1 is worth .5, 4 is worth .2, chosen twice and once: mean .4
          \ 3 - 3  0.0    2 is worth 1, 3 is worth 0: mean .5
      \ 4       0.2
    """
    found = credited(episode((1, 2), 1.0), episode((1, 3, 3), 0.0), episode((4,), 0.2))
    assert found == near((0.1, 0.5), (0.1, -0.5, 0), (-0.2,))


def test_where_nothing_is_shared_the_first_choice_alone_has_the_advantage_of_the_rollout() -> None:
    group = [episode((1, 2, 3), 1.0), episode((2, 2), 0.3), episode((3, 6), 0.2)]
    whole = credited(*group, kind="sequence")
    assert credited(*group) == near(*((values[0], *(0 for _ in values[1:])) for values in whole))


def test_what_all_begin_with_earns_nothing() -> None:
    """1 and 2 are there in both, and only the third id makes a difference."""
    assert credited(episode((1, 2, 3), 1.0), episode((1, 2, 4), 0.0)) == near((0, 0, 0.5), (0, 0, -0.5))


def test_a_wrong_branch_that_was_taken_back() -> None:
    r"""
    5 - 1 (U)    worst: 0     1 and 3 are worth 0, 2 is worth 1: mean 1/3
      \ 2       1.0          nobody else was at 1: U has nothing to be compared with
      \ 3       0.0
    """
    found = credited(episode((1, U, 2), 1.0, 0), episode((3,), 0.0))
    assert found == near((-1 / 3, 0, 2 / 3), (-1 / 3,))


def test_a_right_branch_that_was_taken_back_is_worth_what_came_of_it() -> None:
    """1 was right: its end has the rollout's reward, 1.0; but a deleted id gets nothing positive."""
    found = credited(episode((1, U, 2), 1.0), episode((3,), 0.4))
    assert found == near((0, 0, 0.2), (-0.4,))
    blamed = credited(episode((1, U, 2), 0.1), episode((3,), 0.4))
    assert blamed == near((-0.1, 0, -0.1), (0.2,))


def test_undo_with_rivals() -> None:
    r"""
    5 - 1 (U)    worst: 0              at 1: U is worth 1, 4 is worth 0: mean .5
         \ 4    0.0                   at 5: 1 is worth 0, chosen twice, 2 is worth 1: mean 1/3
      \ 2       1.0 (to which U led)
    """
    found = credited(episode((1, U, 2), 1.0, 0), episode((1, 4), 0.0))
    assert found == near((-1 / 3, 0.5, 2 / 3), (-1 / 3, -0.5))


def test_a_rollout_that_ends_with_an_undo_ends_where_that_leads() -> None:
    r"""
    5            0.6 (the first rollout)
      \ 1 (U)    worst: 0            at 5: 1 is worth 0, 2 is worth (0 + .6 + .9) / 3, both chosen twice: mean .25
           \ 4  0.0                  at 1: U is worth .6, 4 is worth 0: mean .3
      \ 2        0.6 (the third)
           \ 1 (U)  worst: 0         at 2: 1 is worth 0, 3 is worth .9: mean .45
           \ 3  0.9                  at 2 - 1: nothing to be compared with
    """
    found = credited(episode((1, U), 0.6, 0), episode((1, 4), 0.0), episode((2, 1, U), 0.6, 0), episode((2, 3), 0.9))
    assert found == near((-0.25, 0.3), (-0.25, -0.3), (0.25, -0.45, 0), (0.25, 0.45))


def test_a_run_of_undos_is_one_end() -> None:
    r"""
    5 - 1 - 2 - 3 (U U)   worst: 0, once   at 5: 1 is worth (0 + 1 + .8) / 3, chosen twice, 2 is worth 0: mean .4
         \ 4             1.0              at 1: 2 is worth 0, 4 is worth 1, 6 is worth .8: mean .6
         \ 6             0.8              at 3: nothing to be compared with
      \ 2                0.0
    """
    group = [episode((1, 2, 3, U, U, 4), 1.0, 0), episode((1, 6), 0.8), episode((2,), 0.0)]
    assert credited(*group, rewinding="deferred") == near((0.2, -0.6, 0, 0, 0, 0.4), (0.2, 0.2), (-0.4,))
    # The second U stands at 2 now, where it is worth 1, and the 3 that went before it 0: mean .5.
    assert credited(*group, rewinding="immediate") == near((0.2, -0.6, -0.5, 0, 0.5, 0.4), (0.2, 0.2), (-0.4,))


def test_where_a_deferred_run_ends_is_a_choice() -> None:
    r"""Behind 1 2 U one goes on with U and earns 1, one ends the run and earns 0; immediate, they stand at 1 and choose U or 3.

    5 - 1 - 2 - U - U   1.0
                 \ end  0.0
    """
    group = [episode((1, 2, U, U, 4), 1.0, 0), episode((1, 2, U, 3), 0.0, 0)]
    deferred, immediate = (credited(*group, rewinding=rewinding) for rewinding in ("deferred", "immediate"))
    # At 5: 1 is worth (0 + 0 + 0) / 3, twice, 4 is worth 1: mean 1/3. At 1: 2 is worth 0 twice, 3 is worth 0.
    # At 2 both undo. Behind that U: going on is worth 1, the end 0.
    assert deferred == near((-1 / 3, 0, 0, 0.5, 2 / 3), (-1 / 3, 0, 0, 0))
    # At 1 there are three choices now: 2 (0, twice), U (1), 3 (0): mean 1/4.
    assert immediate == near((-1 / 3, -0.25, 0, 0.75, 2 / 3), (-1 / 3, -0.25, 0, -0.25))


def test_unit_step_takes_back_a_line() -> None:
    r"""
    5 - 1 - 3 (U)    worst: 0     3 ends a line; at 1: 3 is worth 0, 2 is worth 1
         \ 2 - 3    1.0          at 5: 1 is worth (0 + 1) / 2, chosen twice, 4 is worth 0: mean 1/3
      \ 4           0.0
    """
    group = [episode((1, 3, U, 1, 2, 3), 1.0, 0), episode((4,), 0.0)]
    assert advantages(group, rule("step"), "tree", 1.0) == near((0, -0.5, 0, 1 / 6, 0.5, 0), (-1 / 3,))


# ---- against an obvious version, and what always holds ----


def slow_tree(group: Sequence[Episode], unit: Unit, rewinding: Rewinding) -> list[list[float]]:
    """Every choice, worth and rival found by looking at all prefixes of all rollouts."""
    rewards = [one.reward for one in group]
    worst = min(rewards)
    ends: list[tuple[tuple[int, ...], float]] = []  # (visible ids, value)
    made: list[list[tuple[tuple[int, ...], object, bool]]] = []  # of each rollout: (visible ids, choice, whether it was emitted)
    for one in group:
        ids = one.walk.ids
        ends.append((one.walk.prompt + apply_undo(ids, rule(unit)).surviving, one.reward))
        mine, step = [], 0
        for context, token, ends_run in decisions(one.walk, unit, rewinding):
            if not ends_run:
                mine.append((context, token, True))
                if token == U and (step == 0 or ids[step - 1] != U):
                    wrong = any(run.start <= step < run.end and not run.before for run in one.runs)
                    ends.append((context, worst if wrong else one.reward))
                step += 1
            elif step - 1 not in one.walk.closed:
                mine.append((context, "end of the run", False))
        made.append(mine)

    def worth(number: int, context: tuple[int, ...], choice: object) -> float:
        if choice in (U, "end of the run"):
            return rewards[number]
        below = (*context, choice)
        return statistics.fmean(value for place, value in ends if place[: len(below)] == below)

    found = []
    for number, mine in enumerate(made):
        values: list[float] = []
        for context, choice, emitted in mine:
            if not emitted:
                continue
            there = [(other, it) for other, theirs in enumerate(made) for place, it, _ in theirs if place == context]
            if len({it for _, it in there}) > 1:
                own = statistics.fmean(worth(other, context, it) for other, it in there if it == choice)
                values.append(own - statistics.fmean(worth(other, context, it) for other, it in there))
            else:
                values.append(0.0)
        deleted_by = apply_undo(group[number].walk.ids, rule(unit)).deleted_by
        found.append([min(value, 0.0) if by >= 0 else value for value, by in zip(values, deleted_by, strict=True)])
    return found


@st.composite
def groups(draw: st.DrawFn) -> tuple[Unit, Rewinding, list[Episode]]:
    """Rollouts of few different ids, so that they meet; runs of undos are judged by chance, and some had to end."""
    unit, rewinding = draw(st.sampled_from(FORMS))
    prompt = draw(st.sampled_from([(5,), (5, 1), (1, 1, 1)]))
    some = []
    for _ in range(draw(st.integers(1, 5))):
        ids = draw(st.lists(st.sampled_from([1, 1, 2, 3, U, U]), max_size=9))
        one = episode(ids, draw(st.sampled_from([0.0, 0.25, 1.0])), *draw(st.sets(st.integers(0, 3))), prompt=prompt)
        last = [at for at, token in enumerate(ids) if token == U and ids[at + 1 : at + 2] != [U]]
        closed = frozenset(at for at in last if rewinding == "deferred" and draw(st.booleans()))
        improvement = [replace(run, after=draw(st.booleans())) for run in one.runs]
        some.append(replace(one, walk=replace(one.walk, closed=closed), runs=tuple(improvement)))
    return unit, rewinding, some


@given(groups())
def test_credit_by_tree_is_what_looking_at_every_prefix_gives(drawn: tuple[Unit, Rewinding, list[Episode]]) -> None:
    unit, rewinding, group = drawn
    fast = advantages(group, rule(unit), "tree", 1.0, rewinding=rewinding)
    assert list(fast) == near(*slow_tree(group, unit, rewinding))


@given(groups(), st.sampled_from(KINDS), st.sampled_from([None, 0.5]), st.sampled_from([0.0, 0.5]))
def test_a_deleted_id_never_gets_a_positive_advantage(
    drawn: tuple[Unit, Rewinding, list[Episode]], kind: Credit, scale: float | None, undo_credit: float
) -> None:
    unit, rewinding, group = drawn
    found = advantages(group, rule(unit), kind, scale, undo_credit, rewinding)
    unblamed = advantages(group, rule(unit), kind, scale, undo_credit, rewinding, blame_deleted=False)
    for one, values, others in zip(group, found, unblamed, strict=True):
        deleted_by = apply_undo(one.walk.ids, rule(unit)).deleted_by
        assert len(values) == len(one.walk.ids)
        assert all(value <= 0 for value, by in zip(values, deleted_by, strict=True) if by >= 0)
        assert others == tuple(0.0 if by >= 0 else value for value, by in zip(values, deleted_by, strict=True))


@given(groups())
def test_where_nothing_was_taken_back_the_choices_of_a_state_balance(drawn: tuple[Unit, Rewinding, list[Episode]]) -> None:
    """Advantages of rival choices sum to 0: what a state as such is worth is in none of them."""
    _, _, group = drawn
    plain = [replace(one, walk=Walk(one.walk.prompt, tuple(t for t in one.walk.ids if t != U)), runs=()) for one in group]
    found = advantages(plain, TOKEN, "tree", 1.0)
    sums: dict[tuple[int, ...], float] = {}
    rivals: dict[tuple[int, ...], set[int]] = {}
    for one, values in zip(plain, found, strict=True):
        for step, (token, value) in enumerate(zip(one.walk.ids, values, strict=True)):
            sums[one.walk.ids[:step]] = sums.get(one.walk.ids[:step], 0.0) + value
            rivals.setdefault(one.walk.ids[:step], set()).add(token)
    assert all(abs(total) < 1e-9 for place, total in sums.items() if len(rivals[place]) > 1)
