"""What a rollout's undos did, by hand and against the obvious slow way of finding it."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest

from pipeline.backtrack.undo import UndoRule, Unit, apply_undo
from pipeline.tasks.problem import Problem
from rewards.rollout import UndoRun, judged, state_is_wrong, undo_runs, verdict_of, wrong_ids
from tests.rewards.made import (
    ANA,
    LAST,
    LINE_1,
    LINE_2,
    PROBLEMS,
    STOP,
    UNDO,
    UNITS,
    WORDS,
    WRONG_1,
    WRONG_2,
    detours,
    judge_ids,
    rollout,
    rule,
    solution,
)  # fmt: skip
from verifiers.synthetic import attempt_text
from verifiers.tasks import judge_of


def test_a_correction_by_hand() -> None:
    one = rollout(WRONG_1, 1, LINE_1, LINE_2, LAST)
    start = len(WORDS.encode(WRONG_1))
    assert one.undo_runs == (UndoRun(start, start + 1, before=False, after=True, unnecessary=0, noops=0),)
    assert one.correct and one.text == ANA.solution and one.surviving[-1] == STOP and one.token_ids[-1] == STOP
    assert (one.undos, one.noops, one.unnecessary, one.deleted) == (1, 0, 0, start)
    assert one.undo_runs[0].improvement == 1 and one.verdict.correct


def test_right_text_undone_an_error_kept_and_an_empty_stack() -> None:
    one = rollout(2, LINE_1, WRONG_2, 1, LINE_2, 1, LINE_2, WRONG_1, LINE_1, 1, "#### 15")
    shapes = [(run.end - run.start, run.before, run.after, run.unnecessary, run.noops) for run in one.undo_runs]
    assert shapes == [
        (2, True, True, 0, 2),  # no-ops
        (1, False, True, 0, 0),  # a correction
        (1, True, True, 1, 0),  # a right line
        (1, False, False, 0, 0),  # the error stands one line above
    ]
    assert (one.undos, one.noops, one.unnecessary, one.correct) == (5, 2, 1, False)


def test_whether_a_run_of_undos_had_seen_the_error() -> None:
    problem = next(one for one in PROBLEMS if one.hindsight)
    right = int(problem.solution.split()[1])
    text = attempt_text(problem, right + 1)
    for length, seen in ((len(text), True), (text.index(":") + 1, False)):
        ids = [*range(length), 999, *range(1000, 1003)]
        runs = undo_runs(problem, ids, UndoRule(999, "all"), lambda some: text[: len(some)])
        assert [(run.before, run.after, run.seen) for run in runs] == [(False, True, seen)]


def test_what_is_wrong_in_the_surviving_text() -> None:
    """A false result and what is false behind it; neither the wrong line that was taken back nor the right one between."""
    one = rollout(WRONG_1, 1, LINE_1, WRONG_2, LAST)
    offsets = spans(one.surviving)
    found = wrong_ids(one, offsets, rule("step"))
    error = one.verdict.error
    assert error is not None and one.text[error.start : error.end] in WRONG_2
    first = len(WORDS.encode(WRONG_1)) + 1
    text = {first + at: one.text[slice(*span)] for at, span in enumerate(offsets)}
    marked = "".join(text[at] for at in found)
    assert one.text[error.start : error.end] in marked and found[0] >= first + len(WORDS.encode(LINE_1))
    assert wrong_ids(rollout(WRONG_1, 1, LINE_1, LINE_2, LAST), offsets, rule("step")) == ()


def spans(surviving: Sequence[int]) -> list[tuple[int, int]]:
    """Characters of each id, by decoding every prefix."""
    ends = [len(WORDS.decode(surviving[:end])) for end in range(len(surviving))]
    return list(pairwise(ends))


def test_units_by_hand() -> None:
    word = rollout("Ana has 3+4=<<3+4=8", 1, "7>>7 apples.\n", LINE_2, LAST, unit="token")
    assert [(run.before, run.after, run.unnecessary) for run in word.undo_runs] == [(False, True, 0)] and word.correct
    far = rollout("Ana has 3+4=<<3+4=8", 3, "4=7>>7 apples.\n", LINE_2, LAST, unit="token")
    assert [(run.end - run.start, run.before, run.after, run.unnecessary) for run in far.undo_runs] == [(3, False, True, 2)]
    whole = rollout(WRONG_1, LINE_2, 1, ANA.solution, unit="all")
    assert [(run.before, run.after) for run in whole.undo_runs] == [(False, True)] and whole.correct


def test_trailing_undos_are_applied() -> None:
    one = rollout(LINE_1, LINE_2, LAST, 2, stop=False)
    assert one.text == LINE_1 and not one.correct and one.finish == "length" and one.unnecessary == 2


def slow_runs(problem: Problem, ids: Sequence[int], unit: Unit) -> list[UndoRun]:
    """Every state found from the start again and judged again."""

    def state(end: int) -> str:
        return WORDS.decode(apply_undo(ids[:end], rule(unit)).surviving)

    def right(end: int) -> bool:
        return not state(end) or not judge_of(problem).state_is_wrong(problem, state(end))

    runs: list[UndoRun] = []
    for index, token in enumerate(ids):
        if token != UNDO or index and ids[index - 1] == UNDO:
            continue
        end = index
        while end < len(ids) and ids[end] == UNDO:
            end += 1
        full = [bool(apply_undo(ids[:at], rule(unit)).surviving) for at in range(index, end)]
        unnecessary = sum(there and right(at) for at, there in zip(range(index, end), full, strict=True))
        seen = right(index) or judge_of(problem).evidence_seen(problem, state(index))
        runs.append(UndoRun(index, end, right(index), right(end), unnecessary, full.count(False), seen))
    return runs


@pytest.mark.parametrize("unit", UNITS)
def test_runs_equal_the_slow_way(unit: Unit) -> None:
    draw = random.Random(unit)
    kinds: Counter[tuple[bool, bool]] = Counter()
    for problem in PROBLEMS[:25]:
        ids = detours(problem, WORDS.encode(solution(problem, draw)), unit, draw)
        ids += draw.choice([[], [UNDO] * draw.randint(1, 3)])
        found = undo_runs(problem, ids, rule(unit), WORDS.decode)
        assert list(found) == slow_runs(problem, ids, unit)
        kinds.update((run.before, run.after) for run in found)
        one = judge_ids(problem, ids, unit)
        undone = apply_undo(ids, rule(unit))
        assert (one.surviving, one.undos, one.noops) == (undone.surviving, undone.undos, undone.noops)
        assert one.correct == judge_of(problem).correct(problem, one.text) == one.verdict.correct
        assert one.deleted == sum(by >= 0 for by in undone.deleted_by)
    assert kinds[False, True] and kinds[True, True]


def test_each_state_is_decoded_once_and_work_is_bounded() -> None:
    asked: list[tuple[int, ...]] = []

    def decode(ids: Sequence[int]) -> str:
        asked.append(tuple(ids))
        return WORDS.decode(ids)

    line = WORDS.encode(LINE_1)
    ids = [*line, *[*line, UNDO] * 30, STOP]
    everything = judged(ANA, ids, "stop", rule(), decode)
    assert max(Counter(asked).values()) == 1 and len(asked) == 3 and everything.unnecessary == 30
    some = judged(ANA, ids, "stop", rule(), decode, max_undos=20)
    assert len(some.undo_runs) == 21 and some.undos == 30 and some.undo_runs == everything.undo_runs[:21]
    long = judged(ANA, [*line, *[UNDO] * 500], "length", rule("token"), decode, max_undos=4)
    assert [run.end - run.start for run in long.undo_runs] == [5] and long.undos == 500


def test_no_text_makes_it_fail_and_what_is_missing_does() -> None:
    assert judge_ids(ANA, []).text == "" and not judge_ids(ANA, []).correct and judge_ids(ANA, [UNDO, STOP]).noops == 1
    with pytest.raises(ValueError, match="gsm8k/train/0: the rollout has no token ids"):
        judged(ANA, None, "stop", rule(), WORDS.decode)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finish must be stop or length, is 'abort'"):
        judged(ANA, [STOP], "abort", rule(), WORDS.decode)


def test_it_can_be_pickled_and_judging_keeps_nothing() -> None:
    one = rollout(WRONG_1, 1, LINE_1, LINE_2, LAST)
    assert pickle.loads(pickle.dumps(one)) == one
    for cache in (state_is_wrong, verdict_of):
        assert cache.cache_info().maxsize == 4096
