"""A row of the stage judge: a verdict as columns, and read from them again. Knows neither engines nor files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Features, List, Value

from actors.judge import Judged
from pipeline.stages.io import token_at
from verifiers.judge import FirstError, Verdict
from verifiers.steps import Step, token_span

FEATURES = Features(
    {
        "id": Value("string"),
        "problem": Value("string"),
        "correct": Value("bool"),
        "answer": Value("string"),
        "steps": List(List(Value("int32"))),
        "error_step": Value("int32"),
        "error_chars": List(Value("int32")),
        "error_tokens": List(Value("int32")),
        "error_kind": Value("string"),
        "evidence": Value("string"),
        "method": Value("string"),
        "later_errors": List(List(Value("int32"))),
        "try_start": Value("int32"),
        "try_text": Value("string"),
        "try_wrong": List(List(Value("int32"))),
        "try_own": Value("bool"),
        "continuation": List(Value("int32")),
    }
)


def row_of(
    name: str, problem: str, offsets: Sequence[tuple[int, int]], judged: Judged, method: str, continuation: Sequence[int] = ()
) -> dict[str, Any]:
    """The row of a rollout.

    Args:
        offsets: [tokens] characters of each token of its text.
        continuation: ids of a right completion of the steps before its first wrong one.
    """
    verdict, attempt = judged.verdict, judged.attempt
    error = verdict.error
    tokens = (token_at(offsets, error.start), token_span(offsets, error.start, error.end)[1]) if error else (-1, -1)
    return {
        "id": name,
        "problem": problem,
        "correct": verdict.correct,
        "answer": verdict.answer,
        "steps": [[step.start, step.end] for step in verdict.steps],
        "error_step": error.step if error else -1,
        "error_chars": [error.start, error.end] if error else [-1, -1],
        "error_tokens": list(tokens),
        "error_kind": error.kind if error else "",
        "evidence": error.evidence if error else "",
        "method": method,
        "later_errors": [list(span) for span in verdict.later] if error else [],
        "try_start": attempt.start if attempt else -1,
        "try_text": attempt.text if attempt else "",
        "try_wrong": [list(span) for span in attempt.wrong] if attempt else [],
        "try_own": attempt.own if attempt else False,
        "continuation": list(continuation),
    }


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in FEATURES}


def verdict_of(row: Mapping[str, Any], text: str) -> Verdict:
    """The verdict of a row on the solution `text`."""
    steps = tuple(Step(index, start, end, text[start:end]) for index, (start, end) in enumerate(row["steps"]))
    start, end = row["error_chars"]
    error = FirstError(row["error_step"], start, end, row["error_kind"], row["evidence"]) if row["error_step"] >= 0 else None
    return Verdict(row["correct"], row["answer"], steps, error, tuple(map(tuple, row["later_errors"])))
