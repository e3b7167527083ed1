"""A wrong try keeps the model's decision, loses its excuses, and ends where the evidence stands."""

from __future__ import annotations

import json
import random
import re
import typing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.task_config import FamilyName, SyntheticTask
from pipeline.tasks import synthetic
from pipeline.tasks.problem import Problem
from verifiers.arithmetic import equations
from verifiers.synthetic import attempt_text
from verifiers.tasks import judge_of

TASK = SyntheticTask(train=320, dev=8, test=8, ood=160, families=list(typing.get_args(FamilyName)))
PROBLEMS = list(synthetic.load(TASK, 3))
HINDSIGHT = [problem for problem in PROBLEMS if problem.hindsight]
FORWARD = [problem for problem in PROBLEMS if not problem.hindsight]
FAMILIES = {"hindsight": ["boxes", "budget", "legs", "rows"], "forward": ["chain", "shop", "compare"]}


def right_choice(problem: Problem) -> int:
    found = re.match(r"Try (\d+) ", problem.solution)
    assert found
    return int(found[1])


def wrong_choice(problem: Problem, draw: random.Random) -> int:
    most = 9 if problem.family == "rows" else 12  # `fewer than 10 full rows`
    return draw.choice([choice for choice in range(1, most + 1) if choice != right_choice(problem)])


def rationalised(problem: Problem, choice: int, draw: random.Random) -> str:
    """What a model writes that was trained on right solutions alone: the wrong choice, and a false equation that saves it."""
    text = attempt_text(problem, choice)
    if problem.family == "legs":
        line = text.rpartition("=")[0] + "=0>>0 legs left."
    else:
        other = draw.randint(1, 9)
        line = f"{text}{other}>>{other} of them."
    answer = int(problem.answer) + draw.randint(1, 5)
    return f"{line}\nThere are <<{choice}+{answer - choice}={answer}>>{answer}.\n#### {answer}"


def test_all_families_are_here() -> None:
    assert {problem.family for problem in HINDSIGHT} == set(FAMILIES["hindsight"])
    assert {problem.family for problem in FORWARD} == set(FAMILIES["forward"])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(HINDSIGHT), st.randoms(use_true_random=False))
def test_a_wrong_choice_is_cut_at_its_evidence(problem: Problem, draw: random.Random) -> None:
    choice = wrong_choice(problem, draw)
    solution = rationalised(problem, choice, draw)
    verdict = judge_of(problem).judge(problem, solution)
    attempt = judge_of(problem).attempt(problem, solution, verdict)
    assert verdict.error and attempt
    assert (verdict.error.kind, verdict.error.step) == ("choice", 0)
    assert solution[verdict.error.start : verdict.error.end] == str(choice)
    assert (attempt.step, attempt.start) == (0, 0)
    assert [attempt.text[start:end] for start, end in attempt.wrong] == [str(choice)]
    assert attempt.text.startswith(f"Try {choice} ") and "\n" not in attempt.text
    assert all(equation.verdict == "true" for equation in equations(attempt.text))
    assert attempt.own == solution.startswith(attempt.text)
    assert does_not_fit(attempt.text)


def does_not_fit(text: str) -> bool:
    """The end of a try shows that its choice is wrong: a remainder, nothing left, or legs left."""
    if legs := re.search(r">>(\d+)$", text):
        return legs[1] != "0"
    left = re.search(r"<<(\d+)([-/])(\d+)=$", text)
    assert left, text
    first, second = int(left[1]), int(left[3])
    return first % second != 0 if left[2] == "/" else first <= second


def test_a_false_equation_in_a_try_is_recomputed() -> None:
    problem = next(one for one in HINDSIGHT if one.family == "boxes" and right_choice(one) != 1)
    params = json.loads(problem.params)
    a, total = params["a"], params["total"]
    part, rest = a + 1, total - a - 1
    solution = f"Try 1 boxes of {a}: <<1*{a}={part}>>{part}, <<{total}-{part}={rest}>>{rest}, <<{rest}/"
    attempt = judge_of(problem).attempt(problem, solution, judge_of(problem).judge(problem, solution))
    assert attempt and not attempt.own
    assert attempt.text == attempt_text(problem, 1) and f"<<1*{a}={a}>>{a}" in attempt.text


def test_other_words_than_the_familys_are_no_choice() -> None:
    problem = next(one for one in HINDSIGHT if one.family == "boxes" and right_choice(one) != 3)
    verdict = judge_of(problem).judge(problem, "Try 3 hats of 1: <<3*1=3>>3\n#### 99999")
    assert verdict.error and verdict.error.kind != "choice"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORWARD), st.data())
def test_a_false_result_in_a_forward_family(problem: Problem, data: st.DataObject) -> None:
    lines = problem.solution.split("\n")
    step = data.draw(st.integers(0, len(lines) - 2))
    found = re.fullmatch(r"(.*<<.*=)(\d+)>>(\d+)(.*)", lines[step])
    assert found
    false = int(found[2]) + data.draw(st.integers(1, 30))
    line = f"{found[1]}{false}>>{false}{found[4]}"
    solution = "\n".join([*lines[:step], line, "#### 99999"])
    attempt = judge_of(problem).attempt(problem, solution, judge_of(problem).judge(problem, solution))
    assert attempt
    assert (attempt.step, attempt.text, attempt.own) == (step, line, True)
    assert solution[: attempt.start] == "".join(f"{one}\n" for one in lines[:step])
    assert [line[start:end] for start, end in attempt.wrong] == [str(false)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([problem for problem in FORWARD if problem.family == "chain"]), st.data())
def test_a_wrong_operand_in_a_forward_family(problem: Problem, data: st.DataObject) -> None:
    """The equation is true, the number in it is not the problem's: the decision is the operand, the result is right given it."""
    lines = problem.solution.split("\n")
    step = data.draw(st.integers(0, len(lines) - 2))
    found = re.fullmatch(r"(.*<<)(\d+)\+(\d+)=\d+>>\d+(.*)", lines[step])
    if not found:
        return
    kept, operand = int(found[2]), int(found[3]) + 1000  # out of reach of every right calculation
    result = kept + operand
    line = f"{found[1]}{kept}+{operand}={result}>>{result}{found[4]}"
    solution = "\n".join([*lines[:step], line, f"#### {result}"])
    attempt = judge_of(problem).attempt(problem, solution, judge_of(problem).judge(problem, solution))
    assert attempt
    assert (attempt.step, attempt.text) == (step, line)
    assert [line[start:end] for start, end in attempt.wrong] == [str(operand)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PROBLEMS))
def test_right_solutions_have_no_attempt(problem: Problem) -> None:
    verdict = judge_of(problem).judge(problem, problem.solution)
    assert verdict.correct and judge_of(problem).attempt(problem, problem.solution, verdict) is None
    unsure = replace(verdict, correct=False, error=None)
    assert judge_of(problem).attempt(problem, problem.solution, unsure) is None


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PROBLEMS), st.data())
def test_prefixes_of_gold_are_not_wrong(problem: Problem, data: st.DataObject) -> None:
    """At the end of every line, with its line break and without, and anywhere else: within a number too."""
    gold = problem.solution
    ends = [at for at, letter in enumerate(gold) if letter == "\n"]
    anywhere = data.draw(st.lists(st.integers(0, len(gold)), min_size=8, max_size=8))
    for end in {0, len(gold), *ends, *(end + 1 for end in ends), *anywhere}:
        assert not judge_of(problem).state_is_wrong(problem, gold[:end]), gold[:end]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(HINDSIGHT), st.randoms(use_true_random=False))
def test_a_wrong_try_is_a_wrong_state(problem: Problem, draw: random.Random) -> None:
    choice, judge = wrong_choice(problem, draw), judge_of(problem)
    text, right = attempt_text(problem, choice), attempt_text(problem, right_choice(problem))
    for end in range(len(text) + 1):  # from the number on that no right one begins like, before the evidence too
        assert judge.state_is_wrong(problem, text[:end]) == (not right.startswith(text[:end])), text[:end]
        assert end == len(text) or right.startswith(text[:end]) or not judge.evidence_seen(problem, text[:end])
    assert judge_of(problem).state_is_wrong(problem, rationalised(problem, choice, draw).splitlines()[0])
    assert not judge_of(problem).state_is_wrong(problem, "Try ") and not judge_of(problem).state_is_wrong(
        problem, attempt_text(problem, right_choice(problem))
    )


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(HINDSIGHT), st.randoms(use_true_random=False))
def test_a_wrong_choice_is_seen_once_all_of_its_consequences_stand_there(problem: Problem, draw: random.Random) -> None:
    """Or once one of them is false, which the calculation itself shows."""
    judge, choice = judge_of(problem), wrong_choice(problem, draw)
    text = attempt_text(problem, choice)
    assert judge.evidence_seen(problem, text) and judge.evidence_seen(problem, f"{text}3")
    assert not any(judge.evidence_seen(problem, text[:end]) for end in range(text.index(":"), len(text)))
    assert judge.evidence_seen(problem, rationalised(problem, choice, draw).splitlines()[0])
    first = re.search(r"=(\d+)>>", text)
    assert not first or judge.evidence_seen(problem, f"{text[: first.start(1)]}{int(first[1]) + 1}>>")


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PROBLEMS), st.data())
def test_a_false_equation_is_a_wrong_state(problem: Problem, data: st.DataObject) -> None:
    found = data.draw(st.sampled_from(list(re.finditer(r"=(\d+)>>", problem.solution))))
    before, right = problem.solution[: found.start(1)], found[1]
    false = data.draw(st.integers(1, 200).map(str).filter(lambda number: not right.startswith(number)))
    assert judge_of(problem).state_is_wrong(problem, before + false)
    assert judge_of(problem).state_is_wrong(problem, f"{before}{int(right) + 1}>>{int(right) + 1} things.\n")
    if len(right) > 1:  # cut off by `>>`, a right beginning is a wrong number
        assert judge_of(problem).state_is_wrong(problem, f"{before}{right[:-1]}>>")


@pytest.mark.parametrize("problem", [HINDSIGHT[0], HINDSIGHT[-1], FORWARD[0], FORWARD[-1]], ids=lambda one: one.family)
def test_the_right_state_beside_a_wrong_one(problem: Problem) -> None:
    lines = problem.solution.split("\n")
    for step in range(len(lines)):
        right = judge_of(problem).right_state(problem, step)
        assert right is not None and problem.solution.startswith(right)
        assert right.count("\n") == step and not judge_of(problem).state_is_wrong(problem, right)
        whole = right == "\n".join(lines[: step + 1])
        assert whole != (problem.hindsight and step == 0)  # a try's evidence stands before its line ends
    assert judge_of(problem).right_state(problem, len(lines)) is None


def test_forward_families_have_no_choices() -> None:
    with pytest.raises(ValueError, match="has no choices"):
        attempt_text(FORWARD[0], 3)
