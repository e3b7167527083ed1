"""Answers: a wrong one is never paid, a right one never rejected for its form."""

from __future__ import annotations

import json
import os
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers.answers import extract_answer, gold_number, is_right, parse_number

DATA = os.environ.get("RETRACT_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="RETRACT_DATA is not set")

RIGHT = [
    ("A: 18", "18"), ("#### 18", "18"), ("####18", "18"), ("#### $16.00", "16"), ("#### 1,080", "1080"),
    ("#### $16.00 on ice cream after 60 days.", "16"), ("#### 18 of the 20 eggs", "18"), ("A:\n18", "18"),
    ("\\boxed{\\frac{3}{4}}", "0.75"), ("\\boxed{\\$18}", "18"), ("The answer is $\\boxed{18}$.", "18"),
    ("**Answer:** 18", "18"), ("The answer is **18**.", "18"), ("#### **18**", "18"), ("\\boxed{18\\text{ eggs}}", "18"),
    ("\\boxed{x=5}", "5"), ("\\boxed{1{,}080}", "1080"), ("\\boxed{\\text{18}}", "18"),
    ("#### −5", "-5"), ("#### -$5", "-5"), ("#### $-5", "-5"), ("#### (18)", "18"), ("#### $$18$$", "18"),
    ("#### 5½", "5.5"), ("#### ¾", "3/4"), ("#### 1 1/2", "3/2"), ("#### 18/20", "0.9"), ("#### 3 / 4", ".75"),
    ("#### 25%", "25"), ("#### 25%", "0.25"), ("#### 25", "25%"), ("#### 2,5", "2.5"), ("#### 1.080,50", "1080.5"),
    ("#### 0,125", "0.125"), ("#### 1 080", "1080"), ("#### 1,00,000", "100000"), ("#### １８", "18"),
    ("#### 2^{3}", "8"), ("\\boxed{\\sqrt{4}}", "2"), ("#### 16 - 3 - 4 = 9", "9"), ("#### 16-3-4", "9"),
    ("#### 1.5 million", "1500000"), ("#### 1.6e1", "16"), ("#### 1.6 \\times 10^{1}", "16"), ("#### 18.0 eggs", "18"),
    ("So she has 26 eggs left", "26"), ("The answer is that Janet makes $18 every day.", "18"), ("#### €18", "18"),
    ("#### 18\n\nThat took 5 lines.", "18"), ("18 eggs. ####", "18"), ("Final Answer: $18$. I hope it is correct.", "18"),
    ("#### 5 m^2", "5"), ("A: 7\nQ: more?\nA: 18", "18"), ("#### 7, no: #### 18", "18"), ("#### £1,234.50", "1234.5"),
]  # fmt: skip

WRONG = [
    ("", "18"), ("####", "3"), ("no number", "3"), ("#### nan", "3"), ("#### inf", "3"), ("#### NaN 3", "4"),
    ("#### 1e400", "1"), ("#### 9**9**9**9", "9"), ("#### 9^9^9^9", "9"), ("#### __import__('os')", "0"),
    ("#### 18 or 20", "18"), ("The answer is 18 or 20", "20"), ("#### 18 20", "18"), ("#### 18; 20", "18"),
    ("#### 18 dollars and 50 cents", "18"), ("#### 12:30", "12"), ("#### 10-15", "10"), ("#### 1/2/2020", "1/2"),
    ("#### 3 3", "33"), ("#### 3.5.1", "3.5"), ("#### -5", "5"), ("#### 5", "-5"), ("#### 100,000", "100"),
    ("#### 0,125", "125"), ("#### 5%", "500"), ("#### 1/0", "0"), ("10 - 5", "-5"), ("#### 18.", "18.5"),
    ("#### 1080", "1.080"), ("\\boxed{", "1"), ("\\boxed{}", "1"), ("\\boxed{\\frac{1}{2}", "1"), ("#### 18 ####19", "18"),
    ("\\boxed{\\frac{\\frac{\\frac{1}{2}}{3}}{0}}", "1"), ("#### " + "(" * 60 + "1" + ")" * 60, "2"),
    ("#### 18", ""), ("#### 18", "no gold"), ("A: 1/5", "2"), ("#### 0.30000000000000004", "0.3"), ("#### 33.33", "100/3"),
    ("So 16 * 7 = 112 eggs and then 112 *", "7"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "gold"), RIGHT)
def test_right_whatever_the_form(text: str, gold: str) -> None:
    assert is_right(text, gold)


@pytest.mark.parametrize(("text", "gold"), WRONG)
def test_wrong_is_never_paid(text: str, gold: str) -> None:
    assert not is_right(text, gold)


@pytest.mark.parametrize(
    ("span", "value"),
    [
        ("$1,080.50", Fraction(2161, 2)), ("18 eggs.", Fraction(18)), ("-1 1/2", Fraction(-3, 2)), ("2.5e-3", Fraction(1, 400)),
        (".5", Fraction(1, 2)), ("25 %", Fraction(25)), ("3 million", Fraction(3_000_000)), ("\\dfrac{3}{4}", Fraction(3, 4)),
        ("1e101", None), ("3 or 4", None), ("--5", None), ("inf", None), ("", None), ("5:30", None), ("9" * 101, None),
    ],
)  # fmt: skip
def test_parse_number(span: str, value: Fraction | None) -> None:
    assert parse_number(span) == value


def test_the_last_marker_wins_over_later_numbers() -> None:
    assert extract_answer("#### 5\nA: 18\nChecked on 3 lines.") == "18"
    assert extract_answer("It is 7.\nThe answer is 8. That took 9 lines.") == "8"
    assert extract_answer("nothing here") is None


def test_gold_number_says_what_is_wrong() -> None:
    assert gold_number("16 - 7 = 9\n#### 1,080") == 1080
    with pytest.raises(ValueError, match="holds no number: 'ten'"):
        gold_number("ten")


@pytest.mark.parametrize("unit", ["9", "A: ", "#### ", "\\boxed{", "- ", "1,", "answer is ", " ", "\n", "1/", "$", "(", "e1"])
def test_a_megabyte_is_answered(unit: str) -> None:
    assert is_right(unit * (1_000_000 // len(unit)), "123456") is False


def test_judges_off_the_main_thread() -> None:
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(is_right("\\boxed{2^{3}}", "8")))
    thread.start()
    thread.join()
    assert seen == [True]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=80), st.text("0123456789.,-+/%$()^{}\\=x A:#e½½", max_size=40)))
def test_no_text_raises(text: str) -> None:
    for marked in (text, "#### " + text, "\\boxed{" + text + "}"):
        assert is_right(marked, "7") in (True, False)
        assert is_right("#### 7", marked) in (True, False)


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_integers_are_compared_exactly(mine: int, gold: int) -> None:
    assert is_right(f"so\n#### ${mine:,}", str(gold)) == (mine == gold)


@needs_data
def test_agrees_with_labelled_solutions() -> None:
    rows = [json.loads(line) for line in (Path(str(DATA)) / "example_model_solutions_dev.jsonl").open(encoding="utf-8")]
    pairs = []
    for row in rows:
        for name in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            pairs.append((is_right(row[name]["solution"], row["ground_truth"]), row[name]["is_correct"]))
    both = sum(mine and label for mine, label in pairs)
    assert len(pairs) == 2632
    assert both / sum(mine for mine, _ in pairs) >= 0.999
    assert both / sum(label for _, label in pairs) >= 0.999


@needs_data
def test_all_gold_solutions_are_right() -> None:
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        for line in (Path(str(DATA)) / name).open(encoding="utf-8"):
            solution = json.loads(line)["answer"]
            assert is_right(solution, solution.rpartition("####")[2]), solution
            assert not is_right(solution, str(gold_number(solution) + 1)), solution
