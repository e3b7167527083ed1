"""The judge finds the place of the first wrong decision and says why."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers.judge import judge

DATA = os.environ.get("RETRACT_DATA")
GOLD = "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18"

ERRORS = [
    ("5 + 7 = 13\n#### 13", "5 + 7 = 12\n#### 12", "arithmetic", 0, "5 + 7 = ", "13"),
    ("16 - 3 = 13\n13 * 2 = 26\n#### 26", GOLD, "operand", 1, "16 - 3 = 13\n", "13"),
    ("16-3 = <<16-3=13>>13 eggs\n13 * 2 = $<<13*2=26>>26\nA: 26", GOLD, "operand", 1, "16-3 = <<16-3=13>>13 eggs\n", "13"),
    ("16 - 3 - 4 = 9\n9 + 2 = 11\n#### 11", GOLD, "operator", 1, "16 - 3 - 4 = 9\n9 ", "+"),
    ("16 - 3 - 4 = 9\n9 * 2 = 18\n#### 81", GOLD, "answer", 2, "16 - 3 - 4 = 9\n9 * 2 = 18\n#### ", "81"),
    ("4 - 2 = 2\n#### 2", GOLD, "operator", 0, "", None),
    ("Just 5.\nSo 7.", GOLD, "answer", 1, "Just 5.\nSo ", "7"),
    ("No idea.\nNone at all", GOLD, "step", 1, "No idea.\n", "None at all"),
    ("5005*10 = <<5005*10=50050>>5005 cents\n#### 5005", "5005*10=50050\n#### 50050", "copy", 0, None, "5005"),
    ("3*4 = <<3*4=12>>0 eggs\n#### 0", "3*4=12\n#### 12", "copy", 0, None, "0"),
    ("100 * 7 = 700\n#### 700", "2 + 3 = 5\n#### 5", "expression", 0, "", "100 * 7"),
]  # fmt: skip


@pytest.mark.parametrize(("solution", "gold", "kind", "step", "before", "span"), ERRORS)
def test_first_error(solution: str, gold: str, kind: str, step: int, before: str | None, span: str | None) -> None:
    verdict = judge(solution, gold, gold.rpartition("####")[2])
    error = verdict.error
    assert not verdict.correct and error is not None
    assert error.step == step
    if span is not None:
        assert error.kind == kind
        assert solution[error.start : error.end] == span
        assert before is None or error.start == len(before)


@pytest.mark.parametrize(
    "solution",
    [
        "16 - 4 = 12\n12 - 3 = 9\n9 + 9 = 18\n18 + 1 = 19\n#### 19",  # other order, then a stray step
        "3 + 4 = 7\n16 - 7 = 9\n2 * 9 = 18\n18 + 1 = 19\n#### 19",  # split step
        "(16 - 3 - 4) * 2 = 18\n18 + 1 = 19\n#### 19",  # merged step
    ],
)
def test_other_ways_are_not_errors(solution: str) -> None:
    error = judge(solution, GOLD, "18").error
    assert error is not None
    assert solution.rpartition("18 + 1")[0].count("\n") == error.step


def test_evidence_is_words() -> None:
    error = judge("5+7 = 13\n#### 13", "5+7=12", "12").error
    assert error is not None and error.evidence == "5+7 is 12, not 13"


def test_a_right_answer_keeps_its_slip() -> None:
    verdict = judge("5 + 7 = 13\n#### 12", "5 + 7 = 12", "12")
    assert verdict.correct and verdict.error is not None and verdict.error.kind == "arithmetic"


def test_right_and_clean() -> None:
    verdict = judge(GOLD, GOLD, "18")
    assert verdict.correct and verdict.error is None and verdict.answer == "18" and len(verdict.steps) == 3


@pytest.mark.parametrize(
    "text", ["", "\n", "9" * 1_000_000, "1+1=3 " * 150_000, "(" * 1_000_000, "####", "=", "<<1+1=3>>" * 100_000]
)
def test_hostile_solutions_are_judged(text: str) -> None:
    assert not judge(text, GOLD, "18").correct
    judge(GOLD, text, "18")


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text("0123456789.-+*/%$()<>= a\n#", max_size=80)), st.sampled_from([GOLD, "", "2+3=5"]))
def test_no_text_raises(text: str, gold: str) -> None:
    verdict = judge(text, gold, "18")
    error = verdict.error
    if error is not None:
        step = verdict.steps[error.step]
        assert 0 <= error.start < error.end <= len(text) and error.start >= step.start
    assert verdict.correct or error is not None or not verdict.steps


@pytest.mark.skipif(not DATA, reason="RETRACT_DATA is not set")
def test_every_wrong_solution_has_a_place() -> None:
    kinds: Counter[str] = Counter()
    for line in (Path(str(DATA)) / "example_model_solutions_dev.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        gold = row["ground_truth"]
        own = judge(gold, gold, gold.rpartition("\n")[2])
        assert own.correct
        for name in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            verdict = judge(row[name]["solution"], gold, gold.rpartition("\n")[2])
            if not verdict.correct:
                assert verdict.error is not None
                kinds[verdict.error.kind] += 1
    located = kinds.total() - kinds["answer"] - kinds["step"]
    assert located / kinds.total() >= 0.7
