"""The countdown judge against slow twins: every way to bracket the numbers, and every right solution written out."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backtrack.trace import Detour, Role, WrongTry, build_trace
from pipeline.backtrack.undo import UndoRule, apply_undo
from pipeline.task_config import CountdownTask
from pipeline.tasks import countdown
from pipeline.tasks.problem import Problem
from verifiers.countdown import reaches
from verifiers.judge import FirstError
from verifiers.tasks import judge_of

TASK = CountdownTask(name="countdown", train=60, dev=8, test=8, ood=24)
PROBLEMS = list(countdown.load(TASK, 5))


def make(numbers: list[int], target: int, solution: str = "") -> Problem:
    params = json.dumps({"core": [numbers, target]})
    return Problem("countdown/test/0", "test", "countdown", True, "", solution, str(target), params)


GOLD = "<<8*3=24>>24, left 7 10 24\n<<10-7=3>>3, left 3 24\n<<24*3=72>>72, left 72\n#### 72"
PROBLEM = make([3, 7, 8, 10], 72, GOLD)
JUDGE = judge_of(PROBLEM)


# --- the search -------------------------------------------------------------------------------------------------------


def apply(sign: str, a: Fraction, b: Fraction) -> Fraction | None:
    if sign == "/":
        return a / b if b else None
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def all_values(numbers: tuple[int, ...]) -> set[Fraction]:
    """What the numbers make in any order, with any signs and brackets: nothing is shared, nothing remembered."""

    def between(row: tuple[Fraction, ...]) -> Iterator[Fraction]:
        if len(row) == 1:
            yield row[0]
        for cut in range(1, len(row)):
            for a, b, sign in product(between(row[:cut]), between(row[cut:]), "+-*/"):
                value = apply(sign, a, b)
                if value is not None:
                    yield value

    return {value for order in set(permutations(map(Fraction, numbers))) for value in between(order)}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.data())
def test_the_search_finds_what_every_bracketing_finds(numbers: list[int], data: st.DataObject) -> None:
    everything = all_values(tuple(numbers))
    mine = tuple(sorted(map(Fraction, numbers)))
    for value in random.Random(0).sample(sorted(everything), min(len(everything), 40)):
        assert reaches(mine, value)
    for other in data.draw(st.lists(st.fractions(-50, 50, max_denominator=6) | st.integers(-200, 200), max_size=20)):
        assert reaches(mine, Fraction(other)) == (other in everything)


def pairwise(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    """The same by putting any two numbers together until one is left; fast enough for five."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i, j in permutations(range(len(numbers)), 2):
        rest = tuple(numbers[k] for k in range(len(numbers)) if k not in (i, j))
        for sign in "+-*/" if i < j else "-/":
            value = apply(sign, numbers[i], numbers[j])
            if value is not None:
                found |= _pairwise(tuple(sorted((*rest, value))))
    return found


_pairwise = cache(pairwise)


@pytest.mark.parametrize("numbers", [(1, 1, 5, 7, 7), (0, 0, 2, 3, 9)])
def test_the_search_on_five_numbers(numbers: tuple[int, ...]) -> None:
    mine = tuple(map(Fraction, numbers))
    everything = pairwise(mine)
    _pairwise.cache_clear()
    draw = random.Random(1)
    assert all(reaches(mine, value) for value in draw.sample(sorted(everything), min(len(everything), 200)))
    for target in [*range(-20, 400, 3), *(Fraction(draw.randint(1, 60), draw.randint(2, 9)) for _ in range(100))]:
        assert reaches(mine, Fraction(target)) == (target in everything)


def test_fractions_and_negative_numbers_count() -> None:
    assert reaches((Fraction(3), Fraction(3), Fraction(8), Fraction(8)), Fraction(24))  # 8 / (3 - 8 / 3)
    assert reaches((Fraction(0), Fraction(5)), Fraction(0)) and not reaches((Fraction(0), Fraction(5)), Fraction(1))


# --- right solutions --------------------------------------------------------------------------------------------------


def judged(solution: str, problem: Problem = PROBLEM) -> tuple[bool, str | None, str | None]:
    """Correct, kind of the first error, and the characters that it names."""
    verdict = judge_of(problem).judge(problem, solution)
    assert verdict.correct == judge_of(problem).correct(problem, solution)
    error = verdict.error
    assert verdict.correct or error is not None
    return verdict.correct, error and error.kind, error and solution[error.start : error.end]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)
def test_gold_is_right_and_no_beginning_of_it_wrong(problem: Problem) -> None:
    gold = problem.solution
    judge = judge_of(problem)
    assert judged(gold, problem) == (True, None, None)
    assert judge.attempt(problem, gold, judge.judge(problem, gold)) is None
    for end in range(len(gold) + 1):
        assert not judge.state_is_wrong(problem, gold[:end]), gold[:end]


def writings(number: Fraction) -> list[str]:
    if number.denominator > 1:
        return [f"({number})"]
    return [str(number)] if number >= 0 else [str(number), f"({number})"]


def right_solutions(numbers: tuple[Fraction, ...], target: int) -> Iterator[str]:
    """Every right solution in every way to write it."""
    if len(numbers) == 1:
        if numbers[0] == target:
            yield f"#### {target}"
        return
    for i, j in permutations(range(len(numbers)), 2):
        rest = [numbers[k] for k in range(len(numbers)) if k not in (i, j)]
        for sign in "+-*/":
            value = apply(sign, numbers[i], numbers[j])
            if value is None:
                continue
            ends = list(right_solutions((*rest, value), target))
            for a, b, order in product(writings(numbers[i]), writings(numbers[j]), permutations([*rest, value]) if ends else ()):
                line = f"<<{a}{sign}{b}={value}>>{value}, left {' '.join(map(str, order))}"
                yield from (f"{line}\n{end}" for end in ends)


CASES = [([1, 2, 5], 7), ([2, 4, 5], 3), ([3, 5, 10], 2), ([1, 4, 6], 24), ([2, 2, 3], 12), ([1, 10, 12], 120)]
WAYS = {(tuple(numbers), target): sorted(set(right_solutions(tuple(map(Fraction, numbers)), target))) for numbers, target in CASES}


@pytest.mark.parametrize(("numbers", "target"), CASES)
def test_every_right_solution_is_right(numbers: list[int], target: int) -> None:
    problem = make(numbers, target)
    assert len(WAYS[tuple(numbers), target]) >= 8
    for solution in WAYS[tuple(numbers), target]:
        assert judged(solution, problem) == (True, None, None)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CASES), st.data())
def test_a_state_is_right_as_long_as_some_right_solution_begins_with_it(case: tuple[list[int], int], data: st.DataObject) -> None:
    numbers, target = case
    ways = WAYS[tuple(numbers), target]
    way = data.draw(st.sampled_from(ways))
    end = data.draw(st.integers(0, len(way)))
    text = (
        way[:end]
        + data.draw(st.text("0123456789<>=+-*/()\n#, left", max_size=3))
        + way[end : data.draw(st.integers(end, len(way)))]
    )
    wanted = not any(one.startswith(text) for one in ways) and text.rstrip() not in ways
    assert judge_of(PROBLEM).state_is_wrong(make(numbers, target), text) == wanted, text


def test_the_spaces_behind_an_answer_do_not_matter() -> None:
    assert judged(GOLD + " \n\n") == (True, None, None)
    assert not JUDGE.state_is_wrong(PROBLEM, GOLD + "\n\n")


# --- errors -----------------------------------------------------------------------------------------------------------

ONE, TWO, THREE, ANSWER = GOLD.split("\n")


@pytest.mark.parametrize(
    ("solution", "kind", "named", "evidence"),
    [
        # the answer alone is worth nothing
        ("#### 72", "answer", "72", "3 7 8 10 are left: nothing has made 72 yet"),
        (f"{ONE}\n{TWO}\n#### 72", "answer", "72", "3 24 are left"),
        (f"{ONE}\n{TWO}\n{THREE}\n#### 73", "answer", "73", "the numbers make 72"),
        (f"{ONE}\n{TWO}\n{THREE}\n####72", "answer", "72", "the answer line should be '#### 72'"),
        (f"{ONE}\n{TWO}\n{THREE}\n#### 72 or 73", "answer", "72 or 73", "the numbers make 72"),
        # false results
        (f"<<8*3=72>>72, left 7 10 72\n{ANSWER}", "arithmetic", "72", "8 * 3 is 24, not 72"),
        (f"{ONE}\n{TWO}\n<<24*3=71>>71, left 71\n#### 71", "arithmetic", "71", "24 * 3 is 72, not 71"),
        (f"{ONE}\n{TWO}\n<<24*3=144/2>>144/2, left 72\n{ANSWER}", "expression", "<<24*3=144/2>>144/2, left 72", "neither"),
        # numbers that are not there
        ("<<9*8=72>>72, left 3 7 10\n#### 72", "operand", "9", "9 is not among 3 7 8 10"),
        ("<<72/1=72>>72, left 72\n#### 72", "operand", "72", "72 is not among 3 7 8 10"),
        ("<<8*8=64>>64, left 3 7 10 64\n#### 72", "operand", "8", "8 is not there twice"),
        (f"{ONE}\n<<8*7=56>>56, left 10 24 56\n#### 72", "operand", "8", "8 is not among 7 10 24"),
        (f"{ONE}\n{TWO}\n{THREE}\n<<72*1=72>>72, left 72\n#### 72", "operand", "1", "1 is not among 72"),
        # what is left
        ("<<8*3=24>>24, left 7 11 24\n<<11-7=4>>4, left 4 24", "copy", "11", "left are 7 10 24, not 7 11 24"),
        ("<<8*3=24>>24, left 7 24\n<<24*7=168>>168, left 168", "copy", "7 24", "left are 7 10 24, not 7 24"),
        ("<<8*3=24>>24, left 7 10 24 24\n", "copy", "24", "left are 7 10 24, not 7 10 24 24"),
        ("<<8*3=24>>25, left 7 10 24\n#### 3", "copy", "25", "the result 24 is written as 25"),
        ("<<8*3=24>>24\n#### 3", "copy", "24", "behind it belongs '24, left'"),
        ("<<8*3=24>>\n#### 3", "copy", "<<8*3=24>>", "behind it belongs '24, left'"),
        ("<<8*3=24>>24, left over\n#### 3", "copy", "24, left over", "behind it belongs '24, left'"),
        # nothing leads to the target any more
        ("<<10*7=70>>70, left 3 8 70\n<<70*3=210>>210, left 8 210", "choice", "10*7", "from 3 8 70 no way leads to 72"),
        (f"{ONE}\n{TWO}\n<<24-3=21>>21, left 21\n#### 21", "choice", "24-3", "from 21 no way leads to 72"),
        (f"{ONE}\n{TWO}\n<<24-3=72>>72, left 72\n{ANSWER}", "choice", "24-3", "from 21 no way leads to 72"),
        # other lines
        (f"Let us see.\n{GOLD}", "expression", "Let us see.", "neither an operation"),
        (f"{ONE}\n\n{TWO}\n{THREE}\n{ANSWER}", "expression", "", "neither an operation"),
        (f"{GOLD}\n#### 73", "expression", "#### 73", "the answer stands already"),
        ("<<8*3*10=240>>240, left 7 240\n", "expression", "<<8*3*10=240>>240, left 7 240", "neither an operation"),
        ("<<08*3=24>>24, left 7 10 24\n#### 3", "expression", "<<08*3=24>>24, left 7 10 24", "neither an operation"),
        # it just ends
        (f"{ONE}\n{TWO}\n{THREE}", "step", THREE, "ends here without an answer"),
        (f"{ONE}\n<<10-7=3>>3, left 3 2", "step", "<<10-7=3>>3, left 3 2", "ends here"),
        ("", "step", "", "ends here"),
    ],
)
def test_first_errors(solution: str, kind: str, named: str, evidence: str) -> None:
    assert judged(solution) == (False, kind, named)
    error = JUDGE.judge(PROBLEM, solution).error
    assert error and evidence in error.evidence and len(error.evidence) < 200
    assert solution.count("\n", 0, error.start) == error.step or not named


def test_a_division_by_zero() -> None:
    solution = "<<4-4=0>>0, left 0 5\n<<5/0=20>>20, left 20\n#### 20"
    problem = make([4, 4, 5], 20)
    assert judged(solution, problem)[1:] == ("choice", "4-4")
    assert judged("<<5/0=5>>5, left 4 5\n#### 20", make([0, 4, 5], 20))[1:] == ("arithmetic", "5")


def test_fractions_are_legal_on_the_way() -> None:
    lines = ["<<8/3=8/3>>8/3, left 8/3 3 8", "<<3-(8/3)=1/3>>1/3, left 1/3 8", "<<8/(1/3)=24>>24, left 24", "#### 24"]
    problem = make([3, 3, 8, 8], 24)
    assert judged("\n".join(lines), problem) == (True, None, None)
    assert judged("<<3-8=-5>>-5, left -5 3 8\n<<-5+8=3>>3, left 3 3\n", problem)[1:] == ("choice", "3-8")


def test_a_wrong_list_does_not_make_a_right_way_wrong_but_the_state() -> None:
    solution = GOLD.replace("left 7 10 24", "left 7 10 25")
    assert judged(solution) == (True, "copy", "25")
    assert JUDGE.attempt(PROBLEM, solution, JUDGE.judge(PROBLEM, solution)) is None
    assert JUDGE.state_is_wrong(PROBLEM, solution.split("\n")[0] + "\n")


# --- tries ------------------------------------------------------------------------------------------------------------


def marked(solution: str) -> tuple[int, str, list[str]] | None:
    """Step and text of the wrong try, and the pieces of it that are wrong decisions."""
    attempt = JUDGE.attempt(PROBLEM, solution, JUDGE.judge(PROBLEM, solution))
    if attempt is None:
        return None
    assert attempt.own == solution.startswith(attempt.text, attempt.start)
    assert solution.count("\n", 0, attempt.start) == attempt.step
    return attempt.step, attempt.text, [attempt.text[start:end] for start, end in attempt.wrong]


WRONG = "<<10*7=70>>70, left 3 8 70"


def test_a_try_goes_from_the_choice_to_the_dead_end() -> None:
    tried = f"{WRONG}\n<<8-3=5>>5, left 5 70\n<<70+5=75>>75, left 75"
    assert marked(f"{tried}\n#### 75") == (0, tried, ["10*7"])
    assert marked(f"{tried}\n#### 72") == (0, tried, ["10*7"])
    later = "<<10+7=17>>17, left 17 24\n<<24-17=7>>7, left 7"
    assert marked(f"{ONE}\n{later}\n#### 7") == (1, later, ["10+7"])


def test_what_follows_from_a_wrong_choice_is_made_right() -> None:
    # A false result that saves the choice; a number that is not there; a number that is lost on the way.
    honest = f"{WRONG}\n<<8-3=5>>5, left 5 70\n<<70+5=75>>75, left 75"
    saved = f"{WRONG}\n<<8-3=2>>2, left 2 70\n<<70+2=72>>72, left 72"
    assert marked(f"{saved}\n#### 72") == (0, honest, ["10*7"])
    assert [saved[start:end] for start, end in JUDGE.judge(PROBLEM, saved).later] == ["2"]
    assert marked(f"{WRONG}\n<<9-3=6>>6, left 6 70\n<<70+6=76>>76, left 76\n#### 76") == (0, honest, ["10*7"])
    assert marked(f"{WRONG}\n<<8-3=5>>5, left 5 7\n<<7+5=12>>12, left 12") == (0, honest, ["10*7"])
    false = "<<10*7=72>>72, left 3 8 72"
    assert marked(f"{false}\n<<8-8=0>>0, left 0 72") == (0, f"{WRONG}\n<<8-3=5>>5, left 5 70", ["10*7"])
    assert marked(f"{false}\n<<8/0=3>>3, left 3") == (0, f"{WRONG}\n<<8/3=8/3>>8/3, left 8/3 70", ["10*7"])
    lost = "<<8*3=25>>25, left 7 10 25\n<<25*10=250>>250, left 8 250\n<<250-8=242>>242, left 242"
    assert marked(f"{lost}\n#### 242") == (0, lost.splitlines()[0], ["25"])  # a false result shows on its own line


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PROBLEMS), st.randoms(use_true_random=False))
def test_the_try_of_a_lying_solution_is_a_wrong_choice_and_nothing_else_wrong(problem: Problem, draw: random.Random) -> None:
    """Its results, operands and lists are as they come; the judge finds one error in what is made of it, without a later one."""
    judge, (numbers, _) = judge_of(problem), json.loads(problem.params)["core"]
    left, lines = list(numbers), []
    while len(left) > 1:
        a, b = (draw.choice(left) if draw.random() < 0.9 else draw.randint(1, 9) for _ in range(2))
        sign = draw.choice("+-*/")
        value = apply(sign, Fraction(a), Fraction(b))
        result = value.numerator if value is not None and value >= 0 and draw.random() < 0.7 else draw.randint(0, 99)
        left = [result, *left[2:]] if draw.random() < 0.7 else [draw.randint(1, 9), *left[2:]]
        lines.append(f"<<{a}{sign}{b}={result}>>{result}, left {' '.join(map(str, left))}")
    solution = "\n".join(lines)
    verdict = judge.judge(problem, solution)
    attempt = judge.attempt(problem, solution, verdict)
    if verdict.error is None or verdict.error.kind != "choice":
        return
    assert attempt and attempt.start == solution.rfind("\n", 0, verdict.error.start) + 1
    again = judge.judge(problem, solution[: attempt.start] + attempt.text)
    assert again.error and (again.error.kind, again.error.start, again.later) == ("choice", verdict.error.start, ())
    assert attempt.wrong == ((again.error.start - attempt.start, again.error.end - attempt.start),)
    assert judge.evidence_seen(problem, solution[: attempt.start] + attempt.text) == (
        attempt.step + attempt.text.count("\n") == len(numbers) - 2
    )


def test_the_evidence_of_a_wrong_choice_is_what_it_comes_to() -> None:
    tried = f"{WRONG}\n<<8-3=5>>5, left 5 70\n<<70+5=75>>75, left 75"
    shown = tried.index("=75>>") + len("=75>>")
    for end in range(1, len(tried) + 1):
        if JUDGE.state_is_wrong(PROBLEM, tried[:end]):
            assert JUDGE.evidence_seen(PROBLEM, tried[:end]) == (end >= shown), tried[:end]
        else:
            assert end < tried.index("=70")
    for hidden in ("8-3=2", "9-3=6"):
        assert JUDGE.evidence_seen(PROBLEM, f"{WRONG}\n<<{hidden}>>")
    assert JUDGE.evidence_seen(PROBLEM, f"{WRONG}\n#### 72")
    assert JUDGE.evidence_seen(PROBLEM, "<<8*3=25>>") and JUDGE.evidence_seen(PROBLEM, "<<9*3=")


def test_a_wrong_choice_after_a_false_result_is_an_error_of_its_own() -> None:
    """Behind the false result 55 + 10 + 7 would be 72."""
    tried = "<<8*3=55>>55, left 7 10 55\n<<10-7=3>>3, left 3 55\n<<55+3=58>>58, left 58"
    solution = f"{tried}\n#### 58"
    assert [solution[start:end] for start, end in JUDGE.judge(PROBLEM, solution).later] == ["10-7", "58"]


@pytest.mark.parametrize("ending", ["", "\n", "\n<<8-", "\nso I think\n#### 72"])
def test_a_try_that_stops_half_way(ending: str) -> None:
    assert marked(f"{WRONG}{ending}") == (0, WRONG, ["10*7"])


def test_tries_of_other_errors() -> None:
    assert marked("#### 72") == (0, "#### 72", ["72"])
    assert marked(f"{ONE}\n{TWO}\n{THREE}\n#### 73") == (3, "#### 73", ["73"])
    assert marked(f"Hm.\n{GOLD}") == (0, "Hm.", ["Hm."])
    assert marked(f"{ONE}\n{TWO}") is None  # it only stops
    assert marked(f"{ONE}\n\n{TWO}") is None  # an empty line has no characters
    verdict = JUDGE.judge(PROBLEM, WRONG)
    assert JUDGE.attempt(PROBLEM, WRONG, replace(verdict, error=None)) is None


def test_an_error_that_sampling_found_elsewhere() -> None:
    solution = f"{ONE}\n{WRONG}"
    verdict = JUDGE.judge(PROBLEM, solution)
    attempt = JUDGE.attempt(PROBLEM, solution, replace(verdict, error=FirstError(0, 2, len(ONE), "rollouts", "")))
    assert attempt and (attempt.step, attempt.text, attempt.wrong) == (0, ONE, ((2, len(ONE)),))


def test_an_undo_for_each_line_of_a_try() -> None:
    """Characters as tokens: what survives of prefix, try, undos and correction is the gold solution."""
    tried = "<<10+7=17>>17, left 17 24\n<<24-17=7>>7, left 7"
    solution = f"{ONE}\n{tried}\n#### 7"
    attempt = JUDGE.attempt(PROBLEM, solution, JUDGE.judge(PROBLEM, solution))
    assert attempt and attempt.text == tried
    rule = UndoRule(undo_id=0, unit="step", step_end_ids=frozenset({ord("\n")}))
    wrong = [any(start <= at < end for start, end in attempt.wrong) for at in range(len(tried))]
    prefix, correction = solution[: attempt.start], GOLD[attempt.start :]
    ids = [tuple(map(ord, text)) for text in ("", prefix, tried, correction)]
    trace = build_trace(ids[0], ids[1] + ids[3], [Detour(len(prefix), WrongTry(ids[2], tuple(wrong)))], rule)
    assert trace.roles.count(Role.UNDO) == 2 and trace.roles.count(Role.ERROR) == len("10+7")
    assert "".join(map(chr, apply_undo(trace.ids, rule).surviving)) == GOLD


def test_any_right_beginning_is_continued_to_the_target() -> None:
    for problem in PROBLEMS:
        lines = problem.solution.split("\n")
        assert JUDGE.continuation(problem, "") == problem.solution
        assert JUDGE.continuation(problem, f"{lines[0]}\n") == "\n".join(lines[1:])
        numbers, target = sorted(Fraction(n) for n in json.loads(problem.params)["core"][0]), Fraction(problem.answer)
        for (a, i), (b, j) in permutations([(n, at) for at, n in enumerate(numbers)], 2):
            after = sorted([*(n for at, n in enumerate(numbers) if at not in (i, j)), a + b])
            done = f"<<{a}+{b}={a + b}>>{a + b}, left {' '.join(map(str, after))}\n"
            rest = JUDGE.continuation(problem, done)
            if reaches(tuple(after), target):
                assert rest is not None and JUDGE.correct(problem, done + rest), (problem.question, done, rest)
            else:
                assert rest is None  # a wrong beginning has no continuation
    assert JUDGE.continuation(PROBLEM, f"{WRONG}\n") is None and JUDGE.continuation(PROBLEM, "nonsense\n") is None


def test_the_right_state_beside_a_dead_end() -> None:
    assert [JUDGE.right_state(PROBLEM, step, 3 - step) for step in range(3)] == [f"{ONE}\n{TWO}\n{THREE}"] * 3
    assert [JUDGE.right_state(PROBLEM, step) for step in (0, 3, 4)] == [ONE, GOLD, None]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([problem for problem in PROBLEMS if problem.split == "train"]), st.randoms(use_true_random=False))
def test_random_play(problem: Problem, draw: random.Random) -> None:
    """Legal moves at random: the first after which the slow twin finds no way is the wrong one, and the only one."""
    numbers, target = json.loads(problem.params)["core"]
    left, lines, wrong = [Fraction(number) for number in numbers], [], []
    while len(left) > 1:
        a, b = draw.sample(left, 2)
        sign = draw.choice([sign for sign in "+-*/" if apply(sign, a, b) is not None])
        value = apply(sign, a, b)
        assert value is not None
        left.remove(a)
        left.remove(b)
        left.append(value)
        operation = f"{writings(a)[-1]}{sign}{writings(b)[-1]}"
        if target not in pairwise(tuple(left)):
            wrong.append((len(lines), operation))
        lines.append(f"<<{operation}={value}>>{value}, left {' '.join(map(str, left))}")
    _pairwise.cache_clear()
    solution = "\n".join([*lines, f"#### {target}"])
    judge = judge_of(problem)
    verdict = judge.judge(problem, solution)
    attempt = judge.attempt(problem, solution, verdict)
    assert verdict.correct == (not wrong)
    if wrong:
        step, operation = wrong[0]
        assert verdict.error and (verdict.error.kind, verdict.error.step) == ("choice", step)
        assert attempt and attempt.text == "\n".join(lines[step:])
        assert [attempt.text[start:end] for start, end in attempt.wrong] == [operation]
    for end in range(1, len(lines) + 1):
        assert judge.state_is_wrong(problem, "\n".join(lines[:end])) == bool(wrong and wrong[0][0] < end)


# --- hostile texts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unit", ["9", "<<", "#### ", "#### 72\n", "\n", " ", "<<9*9=", f"{ONE}\n", "1 ", "(", "-", "/3", "é", "\x00"]
)
@pytest.mark.parametrize("before", ["", "<<8*3=24>>24, left ", GOLD])
def test_a_long_text_is_answered(before: str, unit: str) -> None:
    solution = before + unit * (200_000 // len(unit))
    correct, kind, _ = judged(solution)
    verdict = JUDGE.judge(PROBLEM, solution)
    assert correct == (solution.rstrip() == GOLD) and (correct or kind)
    assert verdict.error is None or len(verdict.error.evidence) < 200
    assert JUDGE.state_is_wrong(PROBLEM, solution) == (not correct)
    JUDGE.attempt(PROBLEM, solution, verdict)


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=60) | st.text("0123456789<>=+-*/() \n#,left", max_size=80),
    st.sampled_from(["", f"{ONE}\n", f"{WRONG}\n", "<<"]),
)
def test_no_text_raises_and_spans_are_in_it(text: str, before: str) -> None:
    solution = before + text
    verdict = JUDGE.judge(PROBLEM, solution)
    attempt = JUDGE.attempt(PROBLEM, solution, verdict)
    assert JUDGE.state_is_wrong(PROBLEM, solution) in (True, False)
    if verdict.error:
        assert 0 <= verdict.error.start <= verdict.error.end <= len(solution)
    if attempt:
        assert attempt.own == solution.startswith(attempt.text, attempt.start) and attempt.wrong
        assert all(0 <= start < end <= len(attempt.text) for start, end in attempt.wrong)


def test_code_is_not_run() -> None:
    for text in (
        "<<__import__('os')=1>>1, left 1",
        "<<8**9**9**9=1>>1, left 3",
        "<<8*3=1e9999>>1e9999, left 3",
        f"<<8*{'9' * 5000}=1>>1",
    ):
        assert judged(text)[1] == "expression"
