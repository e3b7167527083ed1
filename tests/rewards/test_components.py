"""The components but backtrack, each by hand."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import pytest

from pipeline.reward_config import BudgetSettings
from rewards.budget import Budget
from rewards.format import Format, conditions
from rewards.outcome import Outcome
from rewards.process import Process, steps_right
from rewards.rollout import JudgedRollout
from tests.rewards.made import ANA, GARBAGE, LAST, LINE_1, LINE_2, PROBLEMS, UNITS, WRONG_1, WRONG_2, judge_ids, rollout


def test_outcome() -> None:
    """Gold's results are 7 and 14."""
    outcome = Outcome(0.5)
    right, half, both, none = (
        rollout(ANA.solution),
        rollout(LINE_1, LAST + "0"),
        rollout(LINE_1, LINE_2, "#### 3"),
        rollout("#### 2"),
    )
    assert outcome([right, half, both, none], 0) == [1, 0.25, 0.5, 0]
    assert outcome([rollout("3+4=14\n#### 2"), rollout("7 14 2")], 0) == [0, 0]  # a false equation and bare numbers reach nothing
    assert Outcome(0.9)([both], 1) == [0.9] and Outcome(0)([right, both], 0) == [1, 0]


def test_process() -> None:
    process = Process()
    assert process([rollout(ANA.solution), rollout(""), rollout(WRONG_1, "#### 8")], 0)[:2] == [1, 0]
    # The first line is wrong, what follows from it is right, the answer line repeats it.
    carried = rollout(WRONG_1, "She pays 8*2=<<8*2=16>>16 dollars.\n", "#### 16")
    assert steps_right(carried.verdict) == [False, True, True] and process([carried], 0) == [pytest.approx(2 / 3)]
    twice = rollout(WRONG_1, "She pays 8*2=<<8*2=17>>17 dollars.\n", "#### 17")
    assert steps_right(twice.verdict) == [False, False, True]
    assert steps_right(rollout(LINE_1, WRONG_2, "#### 15").verdict) == [True, False, True]
    assert steps_right(rollout(LINE_1, LINE_2, "#### 15").verdict) == [True, True, False]
    assert steps_right(rollout(LINE_1, LINE_2).verdict) == [True, True]  # its last number is the answer
    assert steps_right(rollout(LINE_1).verdict) == [False]  # it breaks off


def test_process_of_exact_judges() -> None:
    """A wrong choice is the wrong step, blank lines move nothing, and gold solutions have no wrong step."""
    for problem in PROBLEMS:
        gold = rollout("\n\n" + problem.solution.replace("\n", "\n\n"), problem=problem)
        assert Process()([gold], 0) == [1]
    hindsight = next(one for one in PROBLEMS if one.family == "boxes")
    wrong = next(n for n in (1, 2) if not hindsight.solution.startswith(f"Try {n} "))
    first, *rest = hindsight.solution.split("\n")
    text = "\n".join([f"Try {wrong} {first.split(' ', 2)[2]}", *rest[:-1], "#### 1000"])
    assert not steps_right(rollout(text, problem=hindsight).verdict)[0]


def steps_of(some: Sequence[JudgedRollout]) -> list[list[float]]:
    return [[0.25 * (index + 1) for index, _ in enumerate(one.verdict.steps)] for one in some]


def test_a_process_reward_model_stands_in_for_the_judge() -> None:
    assert Process(steps_of)([rollout(LINE_1, WRONG_2, "#### 15"), rollout("")], 0) == [0.5, 0]
    with pytest.raises(ValueError, match=r"values of 0 to 1, gave \[1\.5\]"):
        Process(lambda some: [[1.5]])([rollout(LINE_1)], 0)
    with pytest.raises(ValueError, match="values of 0 to 1"):
        Process(lambda some: [[float("nan")]])([rollout(LINE_1)], 0)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (LINE_1 + LINE_2 + LAST, (True, True, True)),
        (LINE_1 + LAST + "\n", (True, True, True)),
        (LINE_1 + LINE_2, (False, False, True)),
        (LINE_1 + LAST + "\n" + LAST, (False, False, True)),
        (LINE_1 + "#### many", (False, True, True)),
        (LINE_1 + LAST + "\nThat is all.", (True, False, True)),
        (LAST, (True, True, False)),
        (LINE_1.replace(">>", ">") + LAST, (True, True, False)),
        (LINE_1.replace("<<3+4=7>>", "<<3+4>>") + LAST, (True, True, False)),
        (LINE_1.replace("<<", "<<<<") + LAST, (True, True, False)),
        ("\ufffd\n" + LAST, (True, True, False)),
        ("It is seven.\nAnswer: 7", (True, True, True)),
        ("", (False, False, False)),
    ],
)
def test_format(text: str, wanted: tuple[bool, bool, bool]) -> None:
    assert conditions(text) == wanted
    assert Format()([rollout(text)], 0) == [pytest.approx(sum(wanted) / 3)]


def test_gold_solutions_have_all() -> None:
    gold = [rollout(problem.solution, problem=problem) for problem in PROBLEMS]
    assert Format()(gold, 0) == Outcome(0.5)(gold, 0) == Process()(gold, 0) == [1] * len(gold)


def test_budget_by_hand() -> None:
    budget = Budget(BudgetSettings(start=40, end=10, until=0.5, undo_tokens=8))
    ids = [5] * 9
    clean, stopped = judge_ids(ANA, ids), judge_ids(ANA, [*ids, 0])
    assert (budget.spent(clean), budget.spent(stopped)) == (9, 10)
    assert [budget([stopped], progress) for progress in (0, 0.5, 1)] == [[0], [0], [0]]
    longer = judge_ids(ANA, [5] * 15)
    assert budget([longer], 0) == [0] and budget([longer], 0.25) == [0] and budget([longer], 1) == [-0.5]
    assert budget([judge_ids(ANA, [5] * 300)], 1) == [-1]
    # 20 tokens at .333 of the training
    assert budget.schedule().at(250) == 25


def test_deleted_tokens_are_charged_by_the_undo() -> None:
    """Two undos are charged 8 to 16 tokens, one at most 8, so that one long step costs no more than two short ones."""
    budget = Budget(BudgetSettings(undo_tokens=8))
    one_short, one_long = rollout("a b\n", 1, "c"), rollout("a b c d e f g h\n", 1, "c")
    two_short, two_long = rollout("a\n", 1, "b\n", 1, "c"), rollout("a b c d\n", 1, "b b b b b\n", 1, "c")
    assert [one.deleted for one in (one_short, one_long, two_short, two_long)] == [4, 16, 4, 18]
    assert [budget.spent(one) for one in (one_short, one_long, two_short, two_long)] == [
        2 + 1 + 4,
        2 + 1 + 8,
        2 + 2 + 8,
        2 + 2 + 16,
    ]
    assert budget.spent(rollout(3, "c")) == 2 + 3 + 16  # no-ops are no cheaper


def test_components_give_a_value_for_whatever_a_model_writes() -> None:
    rows = [rollout(text, problem=problem, unit=unit) for text in GARBAGE for problem in PROBLEMS[:4] for unit in UNITS]
    for component in (Outcome(0.5), Process(), Format(), Budget(BudgetSettings())):
        values = component(rows, 0.5)
        assert len(values) == len(rows) and all(-1 <= value <= 1 for value in values)
        assert pickle.loads(pickle.dumps(component)) == component
