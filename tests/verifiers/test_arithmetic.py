"""Equations in prose: false ones are found, true ones never called false, and hostile text costs nothing."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers.arithmetic import MAX_EQUATIONS, equations

DATA = os.environ.get("RETRACT_DATA")

TABLE = [
    ("5 + 7 = 12", "true"), ("5+7=13", "false"), ("<<5+7=12>>12", "true"), ("<<5+7=13>>13", "false"),
    ("She has 3 x $4 = $12 left", "true"), ("3 × 4 = 11", "false"), ("12 ÷ 4 = 3", "true"), ("10 − 4 = 6", "true"),
    ("(2 + 3) * 4 = 20", "true"), ("(2 + 3) * 4 = 14", "false"), ("2 + 3 * 4 = 14", "true"), ("-5 + 3 = -2", "true"),
    ("1,080 * 2 = 2,160", "true"), ("100 000 / 2 = 50 000", "true"), ("0.1 + 0.2 = 0.3", "true"), (".5*4=2", "true"),
    ("2^3 = 8", "true"), ("2**3 = 9", "false"), ("5² = 25", "true"), ("50(2)=100", "true"), ("(1/2) 18 = 9", "true"),
    ("1 1/2 + 1/2 = 2", "true"), ("1 – ¾ = ¼", "true"), ("20% of 50 = 10", "true"), ("20% of 50 = 11", "false"),
    ("5/20 * 100 = 25%", "true"), ("100% - 20% = 80%", "true"), ("50 + 10% = 55", "unchecked"),
    ("10/3 = 3.33", "true"), ("2/3 = 0.67", "true"), ("2/3 = 0.66", "true"), ("2/3 = 0.68", "false"), ("100/3=33", "true"),
    ("40/9 = 4", "false"), ("22/7 ≈ 3", "true"), ("22/7 ≈ 5", "false"), ("17*24 = 409", "false"),
    ("0.1*3 = 0.30000000000000004", "true"), ("80 seats/subsection * 3 subsections = 240 seats", "true"),
    ("3 apples + 5 apples = 9 apples", "false"), ("2 feet + 6 inches = 30 inches", "unchecked"),
    ("3 * 25 cents = $0.75", "unchecked"), ("5 plus 3 equals 8", "true"), ("6 divided by 2 equals 4", "false"),
    ("\\( 5 \\times 3 = 15 \\)", "true"), ("\\frac{1}{2} * 8 = 5", "false"), ("**5** + **3** = **8**", "true"),
    ("- 5 + 3 = 8", "true"), ("1. 5 + 3 = 8", "true"), ("Step 2: 5 + 3 = 9", "false"), ("Day 1 - 5 + 3 = 8", "true"),
    ("He had 20 (5*4 = 20)", "true"), ("3x + 5 = 20", "unchecked"), ("x + 5 * 2 = 20", "unchecked"),
    ("60 / 3/4 = 80", "unchecked"), ("at 7:50 + 30 minutes = 8:20", "unchecked"), ("1/0 = 5", "unchecked"),
    ("9**9**9**9 = 1", "unchecked"), ("1e400 + 1 = 2", "unchecked"), ("0^-1 + 1 = 2", "unchecked"),
    ("__import__('os').system('ls') + 1 = 2", "unchecked"), ("5 million + 3 million = 8 million", "true"),
    ("(" * 60 + "1+1" + ")" * 60 + " = 3", "unchecked"), ("5! + 1 = 121", "unchecked"), ("3 + 4 = 7 + 1", "unchecked"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "verdict"), TABLE)
def test_verdict(text: str, verdict: str) -> None:
    assert [equation.verdict for equation in equations(text)] == [verdict]


@pytest.mark.parametrize(
    "text", ["", "=", "= 5", "5 =", "x = 5", "1 hour = 60 minutes", "5 >= 3 + 1", "nan = inf", "a=b=c", "<<>>"]
)
def test_nothing_to_check(text: str) -> None:
    assert equations(text) == []


def test_spans_and_values() -> None:
    text = "She eats 5 + 7 = $13 worth."
    (one,) = equations(text)
    assert text[one.start : one.end] == "5 + 7 = $13"
    assert text[one.left_start : one.left_end] == "5 + 7"
    assert text[one.right_start : one.right_end] == "13"
    assert (one.left, one.right) == (Fraction(12), Fraction(13))


def test_an_annotation_is_one_equation() -> None:
    text = "12/4=<<12/4=3>>3 and 2 * 5 = $<<2*5=10>>10."
    found = equations(text)
    assert [text[one.start : one.end] for one in found] == ["12/4=3", "2*5=10"]
    assert [one.verdict for one in found] == ["true", "true"]


def test_a_chain_gives_each_link() -> None:
    assert [one.verdict for one in equations("2+3 = 5 = 6")] == ["true", "false"]
    assert [one.verdict for one in equations("2*6 = 3*4 = 12")] == ["true", "true"]


def test_the_number_behind_an_annotation_is_no_new_left_side() -> None:
    assert "false" not in {one.verdict for one in equations("5 + <<2*3=6>>6*2 = 17")}


@pytest.mark.parametrize(
    "unit", ["9", "1+", "1=", "(", "-", "9**", "1+1=3 ", "<<", "<<1+1=3>>", "1+1=2\n", "a", " ", "1,", "\\frac{", "²", "% of "]
)
def test_a_megabyte_is_bounded(unit: str) -> None:
    found = equations("1+1=" + unit * (1_000_000 // len(unit)) + "=2")
    assert len(found) <= MAX_EQUATIONS


def test_thousand_digits_are_left_unchecked() -> None:
    assert {one.verdict for one in equations("9" * 1000 + " * 2 = 5")} <= {"unchecked"}


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=80), st.text("0123456789.,-+*/%$()^{}<>=x a\n²½", max_size=60)))
def test_no_text_raises(text: str) -> None:
    for one in equations(text):
        assert 0 <= one.start == one.left_start < one.left_end <= one.right_start < one.right_end == one.end <= len(text)


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.sampled_from("+-*"), st.integers(-3, 3))
def test_whole_numbers_are_exact(left: int, right: int, op: str, off: int) -> None:
    result = {"+": left + right, "-": left - right, "*": left * right}[op] + off
    (one,) = equations(f"So we get {left:,} {op} {right} = {result:,} apples.")
    assert one.verdict == ("false" if off else "true")


@given(st.integers(1, 999), st.integers(1, 999), st.integers(1, 6))
def test_rounding_to_shown_digits_is_no_error(top: int, bottom: int, digits: int) -> None:
    (one,) = equations(f"{top} / {bottom} = {round(Fraction(top, bottom) * 10**digits) / 10**digits:.{digits}f}")
    assert one.verdict == "true"


@pytest.mark.skipif(not DATA, reason="RETRACT_DATA is not set")
def test_few_false_alarms_on_gold_solutions() -> None:
    solutions = alarms = annotations = 0
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        for line in (Path(str(DATA)) / name).open(encoding="utf-8"):
            found = equations(json.loads(line)["answer"])
            solutions += 1
            alarms += any(one.verdict == "false" for one in found)
            annotations += sum(one.verdict == "true" for one in found)
    assert alarms / solutions <= 0.005
    assert annotations >= 27_500
