"""Quantities in digits and words, and the ones of a wrong solution that come from nowhere."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st

from pipeline.tasks.problem import Problem
from verifiers.judge import judge
from verifiers.quantities import MAX_MENTIONS, foreign, given, is_fact, mentions, unit_words
from verifiers.tasks import judge_of


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("16 eggs and 1,080 more", ["16", "1080"]),
        ("$1.50 or 25% of 3/4", ["3/2", "25", "3/4"]),
        ("twenty-five of forty two", ["25", "42"]),
        ("three hundred", ["300"]),
        ("twice as many, half of it, two-thirds, a quarter", ["2", "1/2", "2/3", "1/4"]),
        ("2 million", ["2000000"]),
        ("350 000 dollars", ["350000"]),
        ("x2 A4 7:30", ["7"]),
        ("", []),
    ],
)
def test_mentions(text: str, values: list[str]) -> None:
    assert [mention.value for mention in mentions(text)] == [Fraction(value) for value in values]


def test_mentions_know_their_place() -> None:
    text = "She eats three and bakes 4."
    assert [text[mention.start : mention.end] for mention in mentions(text)] == ["three", "4"]


def test_what_may_be_no_quantity_is_not_firm() -> None:
    assert [mention.firm for mention in mentions("one day, the third guess, 2x, 1st, both")] == [False] * 5
    assert all(mention.firm for mention in mentions("two days, half, 2 x, 15, twice"))


def test_the_question_gives_its_quantities_and_what_stands_for_them() -> None:
    assert {Fraction(3), Fraction(20)} <= given("three cups for 20 chickens")
    discount = given("a 25% discount")
    assert {Fraction(25), Fraction(1, 4), Fraction(75), Fraction(3, 4), Fraction(5, 4), Fraction(100)} <= discount
    assert {Fraction(2, 3), Fraction(1, 3), Fraction(2), Fraction(3)} <= given("two-thirds of it")
    assert Fraction(85) not in discount and Fraction(17) not in given("milk at $8.50")


def test_facts_need_their_unit() -> None:
    assert is_fact(Fraction(60), unit_words("2 hours are 120 minutes")) and not is_fact(Fraction(60), unit_words("60 apples"))
    assert is_fact(Fraction(1, 12), unit_words("per month")) and not is_fact(Fraction(5, 3), unit_words("per month"))


def found(text: str, *known: int) -> str | None:
    mention = foreign(text, 0, len(text), {Fraction(number) for number in known}, ())
    return text[mention.start : mention.end] if mention else None


def test_foreign_quantities() -> None:
    assert found("Bakes 5 eggs after 3.", 3, 4) == "5"
    assert found("There are four meals, 3 by day.", 3) == "four"
    assert found("Step 2: take 3. There are 24 hours in a day.", 3) is None
    assert found("The three days cost 40.", 40) is None  # it counts what was named
    assert found("x = 180", 80, 150) == "180" and found("x = 70", 80, 150) is None  # one step from what is known


QUESTION = "Janet's ducks lay 16 eggs per day. She eats three and bakes with four. She sells the rest for $2 each. How much is it?"
GOLD = "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18"


@pytest.mark.parametrize(
    ("solution", "kind", "step", "span"),
    [
        # a misquoted quantity, before anything is calculated with it
        ("She lays 16 eggs.\nShe bakes with 5 of them.\n16 - 3 - 5 = 8\n8 * 2 = 16\n#### 16", "quantity", 1, "5"),
        # a calculation whose result is not written behind it
        ("Left = 16 - 3\nLeft is 13.\nMoney = 13 * 2\n#### 26", "operand", 2, "13"),
        # remarks in parentheses between the numbers, and a name behind the expression
        ("Used: 3 (breakfast) + 4 (baked) = 8\n16 - 8 = 8\n8 * 2 = 16\n#### 16", "arithmetic", 0, "8"),
        ("Left = 16 - 7 Total left = 8\n8 * 2 = 16\n#### 16", "arithmetic", 0, "8"),
        # a value of gold, reached again from other numbers
        ("16 - 7 = 9\n3 * 3 = 9\n9 + 9 = 18\n9 + 18 = 27\n#### 27", None, 1, None),
    ],
)
def test_the_question_tells_the_judge_more(solution: str, kind: str | None, step: int, span: str | None) -> None:
    error = judge(solution, GOLD, "18", QUESTION).error
    assert error is not None and error.step == step
    if kind:
        assert (error.kind, solution[error.start : error.end]) == (kind, span)


@pytest.mark.parametrize(
    "solution",
    [
        "3 + 4 = 7\n16 - 7 = 9\n9 * 2 = 18\n#### 18",
        "In a week of 7 days she lays 16 * 7 = 112.\nShe sells 16 - 7 = 9 eggs a day, 9 * 2 = 18 dollars.\n#### 18",
        "16 - 3 = 13\n13 - 4 = 9\nTwice 9 is 18.\n9 * 2 = 18\n#### 18",
    ],
)
def test_other_ways_are_right_even_when_asked_regardless(solution: str) -> None:
    verdict = judge(solution, GOLD, "18", QUESTION, regardless=True)
    assert verdict.correct and verdict.error is None


def test_another_way_is_no_error_while_it_may_still_come_back() -> None:
    """`3 + 4 = 7` leads to gold's 9 or to nothing: that shows only at the end."""
    problem = Problem("gsm8k/test/0", "test", "gsm8k", False, QUESTION, GOLD, "18")
    assert not judge_of(problem).state_is_wrong(problem, "3 + 4 = 7\n")
    assert judge_of(problem).state_is_wrong(problem, "3 + 5 = 8\n")
    error = judge("3 + 4 = 7\n7 + 2 = 9 eggs\n9 + 7 = 16\n#### 16", GOLD, "18", QUESTION).error
    assert error is not None and error.step <= 2


def test_later_false_results_are_errors_of_their_own() -> None:
    solution = "16 - 5 = 11\n11 * 2 = 27\n27 + 1 = 28\n#### 28"
    verdict = judge(solution, GOLD, "18", QUESTION)
    assert [solution[start:end] for start, end in verdict.later] == ["27"]


@settings(max_examples=150, deadline=None)
@hypothesis_given(st.text(max_size=200), st.sets(st.integers(0, 100).map(Fraction)))
def test_no_text_raises(text: str, known: set[Fraction]) -> None:
    assert all(0 <= mention.start < mention.end <= len(text) for mention in mentions(text))
    given(text)
    foreign(text, 0, len(text), known, ())


def test_work_is_bounded() -> None:
    many = "x = 180\n" * 50_000  # one operation on what is known, in every line
    assert judge(many, GOLD, "18", "80 and 100, how many?").error is not None
    assert len(mentions("1 " * 100_000)) <= MAX_MENTIONS
    assert mentions("9" * 1_000_000) == [] or len(mentions("9" * 1_000_000)) < 1000
