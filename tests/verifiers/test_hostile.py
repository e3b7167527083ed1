"""Odd and hostile texts: no wrong answer is paid, no right one rejected for its form, and nothing raises, runs or takes long."""

from __future__ import annotations

import builtins
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from verifiers.answers import MAX_TAIL, extract_answer, is_right
from verifiers.judge import Verdict, judge
from verifiers.steps import split_steps

QUESTION = "Janet has 16 eggs, eats three, bakes with 4 and sells the rest for $2 each."
GOLD = "16 - 3 - 4 = 9 eggs are left.\n9 * 2 = 18 dollars are made.\n#### 18"

RIGHT = [
    # digits and signs of other scripts
    ("#### ٥", "5"), ("#### ۱۸", "18"), ("#### १८", "18"), ("#### 𝟏𝟖", "18"), ("#### ⑱", "18"), ("#### １，０８０", "1080"),
    ("#### ＄18", "18"), ("#### ‒18", "-18"), ("#### ﹣18", "-18"), ("#### －18", "-18"), ("#### ⁻18", "-18"), ("#### ⁻¹⁸", "-18"),
    ("So −18", "-18"), ("So there are １８", "18"), ("He eats ¾", "0.75"), ("He eats 5 ½", "5.5"), ("#### 3⁄4", "0.75"),
    ("#### 9²", "81"), ("#### √81", "9"),
    # characters that do not show
    ("#### \u200b18", "18"), ("#### 18\u200b", "18"), ("#### 1\u200b8", "18"), ("#### \u200e18\u200f", "18"),
    ("####\u202b18\u202c", "18"), ("#### 1\u20608", "18"), ("\ufeff#### 18", "18"), ("#### \u00ad18", "18"),
    ("####\u00a018\u00a0eggs", "18"), ("#### 18\x00", "18"), ("#### \x0718", "18"), ("#### \x1b[1m18\x1b[0m", "18"),
    ("#### 1\ufe0f\u20e38\ufe0f\u20e3", "18"), ("So 1\u200b8", "18"), ("#### \t18\t", "18"), ("\r\n#### 18\r\n", "18"),
    ("#### 18\u2028Next 5", "18"), ("#### \ud80018", "18"), ("#### 18 🥚", "18"), ("#### 🥚 18", "18"), ("#### 18。", "18"),
    ("#### 18．", "18"), ("答案是 18。", "18"),
    # groups of digits and decimal signs
    ("#### 1.234,56", "1234.56"), ("#### 1 234,56", "1234.56"), ("#### 1\u2009080,50", "1080.5"), ("#### 1\u202f080", "1080"),
    ("#### 1.234.567", "1234567"), ("#### 1.234.567,89", "1234567.89"), ("#### 1'234.50", "1234.5"), ("#### 1’234’567", "1234567"),
    ("#### 12,34,567", "1234567"), ("#### 1,23,45,678.90", "12345678.9"), ("#### 1_000", "1000"), ("#### 1 234 567", "1234567"),
    ("#### 3,14", "3.14"), ("#### 3,140", "3140"), ("#### 1.000,00", "1000"), ("Sie zahlt 18,50 €", "18.5"), ("#### 018", "18"),
    # currencies and units before and after
    ("#### 18$", "18"), ("#### 18 €", "18"), ("#### € 18", "18"), ("#### EUR 18", "18"), ("#### 18 USD", "18"),
    ("#### US$18", "18"), ("#### A$18", "18"), ("#### ¥500", "500"), ("#### 500円", "500"), ("#### 500 ₹", "500"),
    ("#### Rs. 500", "500"), ("#### 18¢", "18"), ("#### $18/hour", "18"), ("#### 18 km/h", "18"), ("#### 18 cm²", "18"),
    ("#### 18°", "18"), ("#### 5 pm", "5"), ("#### 3rd place", "3"), ("#### $2 million", "2000000"), ("#### 1.8 thousand", "1800"),
    ("#### 18k", "18000"), ("#### 18 eggs per 2 days", "18"),
    # percent, fractions, powers
    ("#### 25 %", "25"), ("#### 25 percent", "0.25"), ("#### 25\\%", "25"), ("#### 3-1/2", "3.5"), ("#### 3 and 1/2", "3.5"),
    ("#### 6/8", "3/4"), ("#### -3/4", "-0.75"), ("#### 2**3", "8"), ("#### 1.8*10**1", "18"), ("#### 1.8E+1", "18"),
    ("#### 1.8 × 10¹", "18"), ("#### 3 × 4", "12"), ("#### 12 ÷ 4", "3"), ("#### 5 = 2 + 3", "5"), ("#### minus 18", "-18"),
    ("The answer is negative 18.", "-18"), ("#### -$18.50", "-18.5"), ("#### -0", "0"), ("#### .5.", "0.5"), ("#### 5...", "5"),
    # LaTeX
    ("\\sqrt{16}", "4"), ("#### \\frac34", "0.75"), ("\\boxed{-\\frac12}", "-0.5"), ("\\boxed{\\frac{\\frac{1}{2}}{2}}", "0.25"),
    ("\\boxed{18 \\text{ dollars}}", "18"), ("\\boxed{18\\mathrm{~cm}}", "18"), ("\\boxed{18\\ \\text{eggs}}", "18"),
    ("\\boxed{18^\\circ}", "18"), ("\\boxed{\\approx 18}", "18"), ("\\boxed{1,\\!080}", "1080"),
    ("\\boxed{\\left(18\\right)}", "18"), ("\\boxed{\\boxed{18}}", "18"), ("\\boxed{18}\n\\boxed{}", "18"),
    ("\\boxed{\n18\n}", "18"), ("#### $\\boxed{18}$", "18"), ("\\boxed{2\\cdot 10^{3}}", "2000"),
    ("\\boxed{\\$1{,}080.50}", "1080.5"), ("#### 18\\\\", "18"), ("\\[18\\]", "18"),
    # markdown and HTML
    ("#### *18*", "18"), ("#### __18__", "18"), ("#### _18_", "18"), ("#### `18`", "18"), ("**Answer: 18**", "18"),
    ("*Answer:* 18", "18"), ("Answer:\n- 18", "18"), ("#### <b>18</b>", "18"), ("#### 18<br/>", "18"),
    ("<answer>18</answer>", "18"), ("#### <18>", "18"), ("#### “18”", "18"), ("#### [18]", "18"), ("## Answer: 18", "18"),
    ('{"answer": 18}', "18"), ("##### 18", "18"),
    # where the answer stands
    ("A: 18\nBecause 9 * 2 = 18, and 9 is 16 - 7.", "18"), ("#### 7\n#### 18", "18"), ("#### 18\n####", "18"),
    ("####\n\n\n18", "18"), ("#### #### 18", "18"), ("#### Total: $18", "18"), ("#### 18 (eighteen)", "18"),
    ("#### eighteen (18)", "18"), ("#### about 18", "18"), ("#### 18, not 9", "18"), ("#### 18 (9 * 2)", "18"),
    ("#### 18 - the total", "18"), ("#### 18?", "18"), ("ANSWER IS 18", "18"), ("Q: 3 + 4?\nA: 7\nQ: 9 * 2?\nA: 18", "18"),
    ("He had 18 at 10:30", "18"), ("eval('18')", "18"), ("#### 18; DROP TABLE eggs", "18"),
]  # fmt: skip

WRONG = [
    # nothing
    ("\n\n\n", "0"), ("\x00", "0"), ("\ufeff", "0"), ("####", "0"), ("####\n####", "0"), ("#### eggs", "0"),
    ("18\n#### unknown", "18"), ("#### ???", "0"), ("#### None", "0"), ("#### null", "0"), ("#### True", "1"), ("\\boxed{ }", "0"),
    ("\\boxed{\\text{A}}", "1"),
    # no numbers, or none that a person would write
    ("#### NaN", "nan"), ("#### -inf", "-inf"), ("#### Infinity", "1"), ("#### ∞", "0"), ("\\boxed{\\infty}", "8"),
    ("#### 1e400", "inf"), ("#### 1e-400", "0"), ("#### 1e99999", "1"), ("#### 0x12", "0"), ("#### 0x12", "12"), ("#### 0b1", "1"),
    ("#### 0o22", "22"), ("#### XVIII", "10"), ("#### Ⅷ", "5"), ("#### 192.168.0.1", "192.168"), ("#### v1.2.3", "1.2"),
    ("#### 1/0", "1"), ("#### 1/0", "0"),
    # code
    ("__import__('os').system('x')", "0"), ("#### __import__('os').system('x')", "0"), ("#### 9**9**9**9", "9"),
    ("#### 9**9**9**9", "9999"), ("#### 2**3", "23"), ("#### 2^3^2", "8"), ("\\boxed{9^{9^{9^9}}}", "9"), ("#### %d", "0"),
    # two answers
    ("#### x = 5 or x = 6", "6"), ("#### either 5 or 6", "5"), ("#### 5, 6", "6"), ("#### ±5", "5"), ("#### 5±1", "5"),
    ("#### 5 -> 6", "5"), ("#### 5 < 6", "5"), ("#### 5 ≠ 6", "5"), ("\\boxed{5, 6}", "5"), ("\\boxed{5\\text{ or }6}", "5"),
    ("\\boxed{[5,6]}", "6"), ("#### ~~5~~ 6", "5"), ("#### 5\t6", "5"), ("#### 5\x0b6", "56"), ("#### 5 6", "56"),
    ("\\boxed{5} and \\boxed{6}", "5"), ("#### 5\n#### 6", "5"), ("The answer is 5. Wait, the answer is 6.", "5"),
    # the right number, denied
    ("#### not 5", "5"), ("The answer is not 5.", "5"), ("#### not 5 but 6", "5"),
    # times, dates, ratios, ranges, and units in two parts
    ("#### 12:30", "12"), ("#### 12:30 PM", "30"), ("We leave at 12:30", "30"), ("#### 3:4", "0.75"), ("#### 3 : 4", "3"),
    ("ratio 3:5", "5"), ("#### 2020-01-02", "2020"), ("#### 01/02/2020", "2020"), ("#### 01/02/2020", "0.5"), ("#### 10-15", "10"),
    ("#### 10–15", "15"), ("#### 10..15", "10"), ("#### 10 ~ 15", "10"), ("#### from 10 to 15", "15"),
    ("#### between 10 and 15", "10"), ("#### 5'6\"", "5"), ("#### 1 hour 30 minutes", "1"), ("#### 1 hour and 30 minutes", "30"),
    ("#### 2h30m", "2"), ("#### 5 feet 6 inches", "5"), ("#### 5 dollars, 50 cents", "5"),
    # a calculation that is cut off or left open
    ("#### 16 -", "16"), ("#### 3 *", "3"), ("#### 3 +", "3"), ("#### 3 /", "3"), ("#### 18/", "18"), ("#### 16 - 7 =", "7"),
    ("#### 16 - 7 eggs", "16"), ("#### 3 x 4", "3"), ("#### (3 * 4) apples", "3"), ("#### 5 = 2 + 3", "2"), ("#### 10-(2", "10"),
    ("#### 3//4", "3"), ("#### 1(", "1"), ("\\boxed{2^2(1033}", "2"), ("\\boxed{1}3}", "13"), ("#### 3 × 4", "3"),
    ("#### √81", "81"),
    # another number
    ("#### 5%", "500"), ("#### 18 thousand", "18"), ("#### 1.000", "1000"), ("#### 10,00", "1000"), ("#### 1,000,00", "100000"),
    ("#### 18,50", "18"), ("Sie zahlt 18,50 €", "18"), ("#### minus 18", "18"), ("So −18", "18"), ("#### ⁻18", "18"),
    ("#### (18)", "-18"), ("Answer:\n- 18", "-18"), ("#### --18", "18"), ("#### 18.0000000001", "18"),
    ("#### 17.9999999999999999", "18"), ("#### 9²", "9"), ("#### \\sqrt{2}", "1.41"), ("#### \\sqrt{2}", "2"), ("#### 2\\pi", "2"),
    ("#### 2\\pi", "6.28"), ("5 + 13 = 1", "18"), ("abc18", "18"),
    # gold answers that are no single number
    ("#### 30", "12:30"), ("#### 20", "18 or 20"), ("#### 2", "\\sqrt{2}"), ("#### 6", "5 feet 6 inches"), ("#### 5", "3:5"),
]  # fmt: skip

EXTRACTED = [
    ("", None), ("\n \n", None), ("no number", None), ("__import__('os').system('x')", None), ("The answer is eighteen.", None),
    ("#### XVIII", "XVIII"), ("We leave at 12:30", None), ("We leave at 12:30 with 18 eggs", "18"), ("#### 5\n####", "5"),
    ("18\n#### unknown", "unknown"), ("#### not 5 but 6", "not 5 but 6"), ("#### 9**9**9**9", "9**9**9**9"),
    ("A: 18\nAs 9 * 2 is it.", "18"), ("Sie zahlt 18,50 €", "18,50"), ("#### " + "x" * 300, None),
    ("\\boxed{" + "1" * 300 + "}", "1" * 300),
]  # fmt: skip

JUDGED = [
    # solution, right, kind of the error, its words
    (GOLD, True, None, ""), (GOLD.replace("\n", "\r\n"), True, None, ""), (GOLD.replace("#### 18", "#### ١٨"), True, None, ""),
    (GOLD.replace("-", "−").replace("*", "×"), True, None, ""), (GOLD.replace(" ", "\u00a0"), True, None, ""),
    ("", False, None, ""), ("\n\n", False, None, ""), ("\x00", False, "step", "\x00"), ("####", False, "step", "####"),
    ("16 - 3 - 4 = 8\n#### 16", False, "arithmetic", "8"), ("16 − 3 − 4 = 8\n#### 16", False, "arithmetic", "8"),
    ("16 - 3 - 4 = 9\n9 * 2 = 18\n#### 81", False, "answer", "81"), ("16 - 3 - 4 = 9 eggs.\n9 * 2 = 1", False, "arithmetic", "1"),
    ("16 - 3 - 4 = 9\n9 + 2 = 11\n#### 11", False, "operator", "+"), ("#### 9**9**9**9", False, "answer", "9**9**9**9"),
    ("16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18 or 19", False, "answer", "18 or 19"), ("#### NaN", False, "answer", "NaN"),
    ("__import__('os').system('x') = 5", False, "answer", "5"), ("16 - 3 - 4 = 1e400\n#### 1", False, "answer", "1"),
    ("1/0 = 1\n#### 1", False, "answer", "1"),
]  # fmt: skip


def test_the_tables_are_long() -> None:
    assert len({*RIGHT, *WRONG}) == len(RIGHT) + len(WRONG) >= 150


@pytest.mark.parametrize(("text", "gold"), RIGHT)
def test_right_whatever_the_form(text: str, gold: str) -> None:
    assert is_right(text, gold)
    assert is_right(f"First 3 + 4 = 7.\n{text}" if "\n" not in text and "####" in text else text, gold)


@pytest.mark.parametrize(("text", "gold"), WRONG)
def test_wrong_is_never_paid(text: str, gold: str) -> None:
    assert not is_right(text, gold)


@pytest.mark.parametrize(("text", "answer"), EXTRACTED)
def test_extracted(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(("solution", "right", "kind", "words"), JUDGED)
def test_judged(solution: str, right: bool, kind: str | None, words: str) -> None:
    verdict = judge(solution, GOLD, "18", QUESTION)
    assert verdict.correct == right
    assert (verdict.error.kind if verdict.error else None) == kind
    if verdict.error:
        assert solution[verdict.error.start : verdict.error.end] == words


UNITS = [
    "9", " ", "\t", "\n", "\r", "*", "#", "#### ", "#### 5\n", "answer ", "answer is ", "final ", "A: ", "A. ", "Step 1: ",
    "\\boxed{", "\\boxed{1}", "\\frac{", "1+1=3 ", "1+1=3\n", "<<1+1=3>>", "(", "=", "1=", "1, ", "1 1", "- ", "5:30 ", "^", "½",
    "²", "٥", "\u200b", "\ud800", "twenty ", "half of 30 ", "5 or ", "_", "`", "$", "</b>", "1.", "minus ",
]  # fmt: skip


def calls(work: Callable[..., object], *arguments: str) -> int:
    """How many functions a piece of work calls: a measure of time that no busy machine changes."""
    count = 0

    def hear(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(hear)
    try:
        work(*arguments)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("unit", UNITS)
def test_work_is_bounded(unit: str) -> None:
    for length in (2_000, 20_000):
        text = unit * (length // len(unit))
        assert calls(is_right, text, "123456") <= 15 * MAX_TAIL
        assert calls(split_steps, text) <= 100 + 10 * length
        assert calls(judge, text, GOLD, "123456", QUESTION) <= 15 * MAX_TAIL + 150 * length


# A regular expression that backtracks calls nothing; one that takes quadratic time would not end on these.
@pytest.mark.parametrize("before", ["", "answer", "final", "The answer is", "#### ", "1 + 1", "a.", "$"])
@pytest.mark.parametrize("unit", [" ", "\t", "\n", "*", "\u00a0", "(", "1", "1 ", "1,", "-", "#", "\\", "a", "_"])
def test_a_long_stretch_costs_little(before: str, unit: str) -> None:
    text = before + unit * 300_000 + "b"
    assert not is_right(text, "123456")
    assert 1 <= len(split_steps(text)) <= 2


def test_ten_megabytes_of_digits() -> None:
    digits = "7" * 10_000_000
    for text in (digits, f"#### {digits}", f"\\boxed{{{digits}", f"{digits}\n#### 18"):
        assert is_right(text, "18") == text.endswith("#### 18")
    assert not judge(digits, GOLD, "18", QUESTION).correct


# Math-Verify hands each number that it has read, and nothing else, to sympy, which evaluates it.
A_NUMBER = re.compile(r"from sympy import \*|Integer \([0-9]+ \)|Float \('[0-9.]+' \)")


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Fails where text is run as code, or where a file or a process is opened, though an `except` may hide the failure."""
    seen: list[str] = []

    def guarded(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(first: object, *others: Any, **options: Any) -> Any:
            by_import = sys._getframe(1).f_code.co_filename.startswith("<frozen importlib")
            if by_import or name in ("eval", "exec") and isinstance(first, str) and A_NUMBER.fullmatch(first):
                return real(first, *others, **options)
            seen.append(f"{name}({first!r})")
            raise AssertionError(seen[-1])

        return called

    with pytest.MonkeyPatch.context() as patch:
        for module, names in ((builtins, ("eval", "exec", "compile", "open")), (os, ("system", "popen")), (subprocess, ("Popen",))):
            for name in names:
                patch.setattr(module, name, guarded(name, getattr(module, name)))
        yield
    assert not seen


def judged(text: str) -> Verdict:
    with nothing_runs():
        assert is_right(text, "7") in (True, False)
        assert is_right("#### 7", text) in (True, False)
        answer = extract_answer(text)
        assert answer is None or answer
        return judge(text, GOLD, "18", QUESTION)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """The first use of Math-Verify imports, and importing runs code."""
    for text in ("\\sqrt{4}", "\\frac{\\sqrt{3}}{2}", "2^{3}", "2\\pi", "3 - 5", "(1 + 1)/2", "0.5\\cdot4", "1/0", "2^{-3}"):
        is_right(f"\\boxed{{{text}}}", "2")
        is_right(f"\\boxed{{{text}}}", f"\\boxed{{{text}}}")


MATHS = [*"0123456789+-*/.(){}^ ", "\\frac{", "}{", "\\sqrt{", "\\pi", "\\cdot", "\\times", "^{"]
TOKENS = [
    *"0123456789.,:;-+*/=^%$€()[]{}<>|~_`'\"\\!?#&@ \n\t\r\x00", "####", "#### ", "\n#### ", "A: ", "The answer is ", "Answer:",
    "\\boxed{", "\\frac{", "\\sqrt{", "\\text{", "\\pi", "\\times", "\\cdot", "\\left(", "\\right)", "<<", ">>", "16 - 3 - 4 = 9",
    "9 * 2 = 18", "18", "9**9", "1e400", "0x1F", "NaN", "inf", "__import__('os').system('x')", "eval('1')", "lambda:0", "{{7*7}}",
    "½", "²", "−", "×", "÷", "√", "٥", "１", "\u200b", "\u202e", "\ud800", "\ufeff", "🥚", "or", "and", "not", "half", "twice",
    "twenty-five", "percent", "million", "eggs", "Step 1:", "1.", "12:30", "3/4", "1,234.56", "1.234,56", "because", "=",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.text(max_size=200),
        st.lists(st.sampled_from(TOKENS), max_size=40).map("".join),
        st.lists(st.sampled_from(MATHS), max_size=12).map("".join),
    )
)
@example("\\boxed{__import__('os').system('x')}")
@example("#### (" + "9^" * 20 + "9)")
@example("#### \\sqrt{\\sqrt{\\sqrt{2}}}")
def test_no_text_raises_or_runs(text: str) -> None:
    for marked in (text, f"#### {text}", f"\\boxed{{{text}}}"):
        verdict = judged(marked)
        assert verdict.correct or verdict.error or not verdict.steps
