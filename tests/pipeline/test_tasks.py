"""Problems: the same for the same seed, never in two splits, always solvable in one way, and bad files named by line."""

from __future__ import annotations

import json
import os
import random
import re
import typing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.task_config import FamilyName, Gsm8kTask, SyntheticTask
from pipeline.tasks import gsm8k, synthetic
from pipeline.tasks.problem import Problem, TaskError
from verifiers.arithmetic import equations
from verifiers.judge import judge
from verifiers.synthetic import attempt_text
from verifiers.tasks import judge_of

DATA = os.environ.get("RETRACT_DATA")
ALL_FAMILIES = list(typing.get_args(FamilyName))
TASK = SyntheticTask(train=280, dev=56, test=56, ood=112, families=ALL_FAMILIES)
PROBLEMS = list(synthetic.load(TASK, 0))
HINDSIGHT = [problem for problem in PROBLEMS if problem.hindsight]


# --- synthetic --------------------------------------------------------------------------------------------------------


def test_the_seed_decides() -> None:
    assert list(synthetic.load(TASK, 0)) == PROBLEMS
    other = list(synthetic.load(TASK, 1))
    assert [problem.id for problem in other] == [problem.id for problem in PROBLEMS]
    assert sum(a.question == b.question for a, b in zip(PROBLEMS, other, strict=True)) < 10


def test_splits_have_the_size_asked_for_and_share_no_numbers() -> None:
    assert Counter(problem.split for problem in PROBLEMS) == {"train": 280, "dev": 56, "test": 56, "ood": 112}
    assert len({problem.id for problem in PROBLEMS}) == len({problem.question for problem in PROBLEMS}) == len(PROBLEMS)
    cores = {
        split: {(p.family, json.dumps(json.loads(p.params)["core"])) for p in PROBLEMS if p.split == split}
        for split in ("train", "dev", "test")
    }
    assert not cores["train"] & cores["dev"] | cores["train"] & cores["test"] | cores["dev"] & cores["test"]


def test_another_seed_puts_no_numbers_into_another_split() -> None:
    train = {(p.family, json.dumps(json.loads(p.params)["core"])) for p in PROBLEMS if p.split == "train"}
    for problem in synthetic.load(TASK, 7):
        if problem.split in ("dev", "test"):
            assert (problem.family, json.dumps(json.loads(problem.params)["core"])) not in train


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_families_and_hindsight_share_are_respected(share: float) -> None:
    families: list[FamilyName] = ["chain", "compare", "legs"]
    task = SyntheticTask(train=40, dev=8, test=8, ood=8, families=families, hindsight_share=share)
    problems = list(synthetic.load(task, 0))
    assert len(problems) == 64
    assert sum(problem.hindsight for problem in problems) == share * 64
    wanted = {"chain", "compare"} if share == 0 else {"legs"} if share == 1 else set(families)
    assert {problem.family for problem in problems} == wanted
    assert all(problem.hindsight == (problem.family == "legs") for problem in problems)


@pytest.mark.parametrize(("family", "share", "missing"), [("legs", 0.5, "forward"), ("chain", 0.5, "hindsight")])
def test_a_share_without_a_family(family: FamilyName, share: float, missing: str) -> None:
    task = SyntheticTask(train=8, dev=8, test=8, ood=8, families=[family], hindsight_share=share)
    with pytest.raises(TaskError, match=rf"task\.families names no {missing} family.*task\.hindsight_share"):
        list(synthetic.load(task, 0))


def test_more_problems_than_there_are() -> None:
    task = SyntheticTask(train=8, dev=400, test=8, ood=8, families=["legs"], hindsight_share=1, steps=[2, 3])
    with pytest.raises(TaskError, match=r"^task\.dev: family legs has fewer than 400.*lower task\.dev"):
        list(synthetic.load(task, 0))


def test_gold_solutions_are_right() -> None:
    for problem in PROBLEMS:
        for verdict in (
            judge(problem.solution, problem.solution, problem.answer),
            judge_of(problem).judge(problem, problem.solution),
        ):
            assert verdict.correct and verdict.error is None, problem
        found = equations(problem.solution)
        assert found and all(equation.verdict == "true" for equation in found), problem
        least = 0 if problem.family == "legs" else 1  # its evidence is that nothing is left
        assert all(equation.right is not None and equation.right >= least for equation in found), problem
        assert re.fullmatch(r"[1-9]\d*", problem.answer)
        assert problem.solution.splitlines()[-1] == f"#### {problem.answer}"
        assert all(re.search(r"<<.+>>", line) for line in problem.solution.splitlines()[:-1])


def numbers(problem: Problem) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", problem.question)]


def solutions(problem: Problem) -> list[tuple[int, int]]:
    """(choice, what the question asks for) of all ways to solve a hindsight problem, from the numbers of its question alone."""
    given = numbers(problem)
    found: list[tuple[int, int]] = []
    if problem.family in ("boxes", "budget"):
        a, b, total = (given[1], given[2], given[0]) if problem.family == "boxes" else (given[0], given[1], given[2])
        found = [(x, x + y) for x in range(1, 200) for y in range(1, 200) if a * x + b * y == total]
    elif problem.family == "legs":
        heads, high, low, legs = given[:4]
        found = [(x, x) for x in range(1, heads) if x * high + (heads - x) * low == legs]
    else:
        fewer, a, away, group = given[:4]
        found = [(x, a * x) for x in range(1, fewer) if a * x > away and (a * x - away) % group == 0]
    later = sum(given[3:] if problem.family in ("boxes", "budget") else given[4:])
    return [(choice, asked + later) for choice, asked in found]


@pytest.mark.parametrize("family", ["boxes", "budget", "legs", "rows"])
def test_one_choice_solves_a_hindsight_problem(family: str) -> None:
    mine = [problem for problem in HINDSIGHT if problem.family == family]
    assert mine
    for problem in mine:
        ways = solutions(problem)
        assert len(ways) == 1, problem
        choice, asked = ways[0]
        assert asked == int(problem.answer)
        assert problem.solution.startswith(f"Try {choice} ")


def can_be_completed(problem: Problem, text: str) -> bool:
    """Whether what stands at the end of a try comes out: a whole number of groups, something left, no leg left."""
    if legs := re.search(r">>(\d+)$", text):
        return int(legs[1]) == 0
    left = re.search(r"<<(\d+)([-/])(\d+)=$", text)
    assert left, text
    first, second = int(left[1]), int(left[3])
    return left[2] == "/" and first > 0 and first % second == 0


@pytest.mark.parametrize("family", ["boxes", "budget", "legs", "rows"])
def test_only_the_right_try_can_be_completed(family: str) -> None:
    for problem in (problem for problem in HINDSIGHT if problem.family == family):
        right = solutions(problem)[0][0]
        most = numbers(problem)[0] - 1 if family == "rows" else 40
        for choice in range(1, most + 1):
            text = attempt_text(problem, choice)
            assert can_be_completed(problem, text) == (choice == right), (problem, text)
            assert all(equation.verdict == "true" for equation in equations(text))
        assert problem.solution.startswith(attempt_text(problem, right))


def steps(problem: Problem) -> int:
    return len(equations(problem.solution))


@pytest.mark.parametrize(("few", "many"), [([2, 4], [5, 8]), ([2, 3], [4, 5])])
def test_ood_problems_are_longer(few: list[int], many: list[int]) -> None:
    task = SyntheticTask(train=112, dev=14, test=14, ood=70, families=ALL_FAMILIES, steps=few, ood_steps=many)
    problems = list(synthetic.load(task, 0))
    for family in ALL_FAMILIES:
        mine = [problem for problem in problems if problem.family == family]
        inside = [steps(problem) for problem in mine if problem.split != "ood"]
        outside = [steps(problem) for problem in mine if problem.split == "ood"]
        assert inside and outside and max(inside) < min(outside), family
        if not mine[0].hindsight:  # a try is worth three to five steps, whatever is asked
            assert few[0] <= min(inside) and max(inside) <= few[1] and many[0] <= min(outside), family
        assert max(outside) <= many[1] + (family == "legs"), family  # its try is one longer than extra steps are counted from


def test_ood_problems_too_short_to_be_any() -> None:
    task = SyntheticTask(train=8, dev=8, test=8, ood=8, families=["legs"], hindsight_share=1, steps=[2, 2], ood_steps=[3, 4])
    with pytest.raises(TaskError, match=r"^task\.ood: family legs.*widen task\.ood_steps"):
        list(synthetic.load(task, 0))


# --- gsm8k ------------------------------------------------------------------------------------------------------------


def good(index: int, kind: str = "q") -> str:
    return json.dumps({"question": f"{kind} {index}?", "answer": f"It is <<{index}+1={index + 1}>>{index + 1}.\n#### {index + 1}"})


def files(folder: Path, train: Sequence[str], test: Sequence[str], **more: Any) -> Gsm8kTask:
    (folder / "train.jsonl").write_text("\n".join(train))
    (folder / "test.jsonl").write_text("\n".join(test))
    return Gsm8kTask(
        name="gsm8k", train_file=str(folder / "train.jsonl"), test_file=str(folder / "test.jsonl"), **({"dev": 2} | more)
    )


def loaded(task: Gsm8kTask, seed: int) -> tuple[list[Problem], int]:
    problems, bad = gsm8k.load(task, seed)
    return list(problems), bad


TRAIN, TEST = [good(i) for i in range(10)], [good(i, "test") for i in range(4)]


def test_files_load_and_dev_comes_from_train(tmp_path: Path) -> None:
    task = files(tmp_path, TRAIN, TEST, dev=3)
    problems, bad = loaded(task, 0)
    assert bad == 0
    assert Counter(problem.split for problem in problems) == {"train": 7, "dev": 3, "test": 4}
    assert len({problem.id for problem in problems}) == 14
    questions = {problem.question for problem in problems if problem.split in ("train", "dev")}
    assert questions == {f"q {i}?" for i in range(10)}
    for problem in problems:
        assert problem.id.startswith(f"gsm8k/{problem.split}/")
        assert (problem.family, problem.hindsight) == ("gsm8k", False)
        assert problem.solution.endswith(f"#### {problem.answer}")
    assert loaded(task, 0) == (problems, 0)

    def dev(seed: int) -> tuple[str, ...]:
        return tuple(problem.id for problem in gsm8k.load(task, seed)[0] if problem.split == "dev")

    assert len({dev(seed) for seed in range(5)}) > 1


BAD_ROWS = [
    ('{"question": "q?", "answer"', "not a JSON object"),
    ('["q?", "1"]', "not a JSON object"),
    ("[" * 5000, "not a JSON object"),
    ('{"answer": "#### 1"}', "'question' is missing"),
    ('{"question": "q?"}', "'answer' is missing"),
    ('{"question": " ", "answer": "#### 1"}', "'question' is missing, empty"),
    ('{"question": "q?", "answer": 1}', "'answer' is missing, empty or no text"),
    ('{"question": "q?", "answer": "just 1"}', "no line '#### number'"),
    ('{"question": "q?", "answer": "#### many"}', "gold answer 'many' is no number"),
    ('{"question": "q?", "answer": "#### 1/2"}', "gold answer '1/2' is no number"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named(row: str, message: str, tmp_path: Path) -> None:
    task = files(tmp_path, [*TRAIN[:2], "", row, *TRAIN[2:]], TEST)
    with pytest.raises(TaskError) as caught:
        gsm8k.load(task, 0)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/train.jsonl:4: ") and "\n" not in said  # a blank line counts as a line
    assert message in said and "task.on_bad_row=skip" in said


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [row for row, _ in BAD_ROWS]
    problems, bad = loaded(files(tmp_path, [*rows, *TRAIN], [*TEST, rows[0]], on_bad_row="skip"), 0)
    assert bad == len(BAD_ROWS) + 1
    assert len(problems) == 14


@pytest.mark.parametrize("written", ["1,234", "$1,234", "1234 "])
def test_gold_answers_in_other_writing(written: str, tmp_path: Path) -> None:
    row = json.dumps({"question": "q?", "answer": f"First #### 5\n#### {written}"})
    problems, _ = loaded(files(tmp_path, TRAIN, [row]), 0)
    assert problems[-1].answer == "1234"


def test_duplicates_stay_out(tmp_path: Path) -> None:
    problems, bad = loaded(files(tmp_path, [*TRAIN, TRAIN[0], TEST[0], TRAIN[0]], [*TEST, TEST[1]]), 0)
    assert bad == 0
    assert Counter(problem.split for problem in problems) == {"train": 8, "dev": 2, "test": 4}
    assert len({problem.question for problem in problems}) == len({problem.id for problem in problems}) == 14


def test_limits(tmp_path: Path) -> None:
    problems, _ = loaded(files(tmp_path, TRAIN, TEST, max_train=5, max_test=3), 0)
    assert Counter(problem.split for problem in problems) == {"train": 5, "dev": 2, "test": 3}


def test_files_without_use(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"train\.jsonl: no usable row in the train split \(0 bad ones\)"):
        gsm8k.load(files(tmp_path, [], TEST), 0)
    with pytest.raises(TaskError, match=r"test\.jsonl: no usable row in the test split \(1 bad ones\)"):
        gsm8k.load(files(tmp_path, TRAIN, ["{}"], on_bad_row="skip"), 0)
    with pytest.raises(TaskError, match=r"task\.dev=10 leaves nothing of 10"):
        gsm8k.load(files(tmp_path, TRAIN, TEST, dev=10), 0)
    with pytest.raises(TaskError, match=r"task\.dev=3 leaves nothing of 2"):  # what is left once the test questions are out counts
        gsm8k.load(files(tmp_path, [*TRAIN[:2], *TEST], TEST, dev=3), 0)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    task = files(tmp_path, TRAIN, TEST)
    (tmp_path / "test.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(TaskError, match=r"cannot read .*test\.jsonl"):
        gsm8k.load(task, 0)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(TaskError, match=r"cannot read .*train\.jsonl"):
        gsm8k.load(task, 0)


@pytest.mark.skipif(not DATA, reason="RETRACT_DATA is not set")
def test_the_real_files_load() -> None:
    folder = Path(str(DATA))
    task = Gsm8kTask(name="gsm8k", train_file=str(folder / "gsm8k_train.jsonl"), test_file=str(folder / "gsm8k_test.jsonl"))
    problems, bad = loaded(task, 0)
    counts = Counter(problem.split for problem in problems)
    assert (counts["train"] + counts["dev"], counts["test"], bad) == (7473, 1319, 0)
    for problem in random.Random(0).sample(problems, 200):
        assert judge_of(problem).judge(problem, problem.solution).correct
