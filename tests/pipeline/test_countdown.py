"""Countdown problems: solvable by their gold solution, the same for the same seed, and never in two splits."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from pydantic import ValidationError

from pipeline.task_config import CountdownTask
from pipeline.tasks import countdown
from pipeline.tasks.problem import Problem, TaskError, split_of

TASK = CountdownTask(name="countdown", train=300, dev=60, test=60, ood=60)
PROBLEMS = list(countdown.load(TASK, 0))


def core(problem: Problem) -> tuple[list[int], int]:
    numbers, target = json.loads(problem.params)["core"]
    return numbers, target


def test_the_seed_decides() -> None:
    assert list(countdown.load(TASK, 0)) == PROBLEMS
    other = list(countdown.load(TASK, 1))
    assert [problem.id for problem in other] == [problem.id for problem in PROBLEMS]
    assert sum(a.question == b.question for a, b in zip(PROBLEMS, other, strict=True)) < 10


def test_splits_have_the_size_asked_for_and_share_no_problem() -> None:
    assert Counter(problem.split for problem in PROBLEMS) == {"train": 300, "dev": 60, "test": 60, "ood": 60}
    assert len({problem.id for problem in PROBLEMS}) == len({problem.question for problem in PROBLEMS}) == len(PROBLEMS)
    assert len({problem.params for problem in PROBLEMS}) == len(PROBLEMS)


def test_another_seed_puts_no_problem_into_another_split() -> None:
    crowded = CountdownTask(name="countdown", train=300, dev=60, test=60, ood=8, numbers=3, largest=8)
    split = {problem.params: problem.split for problem in countdown.load(crowded, 0)}
    again = [problem for problem in countdown.load(crowded, 1) if problem.params in split]
    assert {problem.split for problem in again} >= {"train", "dev", "test"}
    assert all(problem.split == split[problem.params] for problem in again)


def test_the_hash_shares_the_problems_out() -> None:
    found = Counter(split_of(json.dumps([[1, 2, number], target])) for number in range(50) for target in range(40))
    assert set(found) == {"train", "dev", "test"} and 1300 < found["train"] < 1500 and min(found.values()) > 240


@pytest.mark.parametrize("problem", PROBLEMS[::7], ids=lambda problem: problem.id)
def test_question_and_solution_say_the_same_problem(problem: Problem) -> None:
    """Read here without the judge: every line takes two of the numbers and puts a right whole result in their place."""
    numbers, target = core(problem)
    assert (problem.family, problem.hindsight, problem.answer) == ("countdown", True, str(target))
    assert [int(number) for number in re.findall(r"\d+", problem.question)] == [*numbers, target]
    assert numbers == sorted(numbers) and min(numbers) >= 1 and max(numbers) <= 12 and 1 <= target <= 100
    assert len(numbers) == (5 if problem.split == "ood" else 4)
    *operations, answer = problem.solution.split("\n")
    left = Counter(numbers)
    for line in operations:
        found = re.fullmatch(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+), left ([\d ]+)", line)
        assert found and found[4] == found[5]
        a, b, result = int(found[1]), int(found[3]), int(found[4])
        left.subtract([a, b])
        assert min(left.values()) >= 0
        assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[found[2]] == result >= 0
        left[result] += 1
        assert found[6] == " ".join(map(str, sorted(left.elements())))
    assert list(left.elements()) == [target] and answer == f"#### {target}"


def test_the_wording() -> None:
    small = CountdownTask(name="countdown", train=8, dev=8, test=8, ood=8, numbers=3, largest=9)
    problem = next(iter(countdown.load(small, 0)))
    (a, b, c), target = core(problem)
    assert problem.question == f"Use each of {a}, {b} and {c} once with + - * / to make {target}."


def test_numbers_of_the_ood_split() -> None:
    task = CountdownTask(name="countdown", train=8, dev=8, test=8, ood=8, numbers=3, ood_numbers=6)
    assert {(p.split == "ood", len(core(p)[0])) for p in countdown.load(task, 0)} == {(False, 3), (True, 6)}
    with pytest.raises(ValidationError, match="ood_numbers must be above numbers, 5, is 5"):
        CountdownTask(name="countdown", numbers=5, ood_numbers=5)


def test_more_problems_than_there_are() -> None:
    task = CountdownTask(name="countdown", train=8, dev=2000, test=8, ood=8, numbers=3, largest=5)
    with pytest.raises(TaskError, match=r"^task\.dev: no more than \d+ of 2000 .* lower task\.dev or raise task\.largest$"):
        list(countdown.load(task, 0))
