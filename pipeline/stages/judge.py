"""Stage `judge`: a verdict for every rollout, and for wrong ones the first error, in characters and tokens, with its evidence."""

from __future__ import annotations

from datasets import Features, List, Value

from actors.judge import Judged, judge_all
from pipeline.stages.io import Codec, Text, read_problems, read_rows, write_rows
from pipeline.stages.stage import Context
from verifiers.steps import token_span

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
        "try_start": Value("int32"),
        "try_text": Value("string"),
        "try_wrong": List(List(Value("int32"))),
        "try_own": Value("bool"),
    }
)


def run(context: Context) -> None:
    settings = context.settings
    codec = Codec(context.inputs["model"], settings.undo, settings.base.prompt)
    problems = {problem.id: problem for problem in read_problems(context.inputs["problems"], "train")}
    rollouts = read_rows(context.inputs["rollouts"])
    texts = [codec.decode(ids) for ids in rollouts["token_ids"]]
    pairs = [(problems[problem], text.text) for problem, text in zip(rollouts["problem"], texts, strict=True)]
    context.workers.start()
    judged: list[Judged] = []
    with context.terminal.stage("judge", len(pairs)) as progress:
        for batch in judge_all(pairs, settings.judge.batch, settings.cluster.judge):
            judged += batch
            progress.update(len(judged))
    names = zip(rollouts["id"], rollouts["problem"], strict=True)
    rows = [_row(row_id, problem, text, one) for (row_id, problem), text, one in zip(names, texts, judged, strict=True)]
    write_rows(rows, FEATURES, context.out)
    right = sum(one.verdict.correct for one in judged)
    located = sum(one.attempt is not None for one in judged)
    context.counts.update(rows=len(rows), right=right, wrong=len(rows) - right, located=located)


def _row(row_id: str, problem: str, text: Text, judged: Judged) -> dict[str, object]:
    verdict, attempt = judged.verdict, judged.attempt
    error = verdict.error
    tokens = token_span(text.offsets, error.start, error.end) if error else (-1, -1)
    return {
        "id": row_id,
        "problem": problem,
        "correct": verdict.correct,
        "answer": verdict.answer,
        "steps": [[step.start, step.end] for step in verdict.steps],
        "error_step": error.step if error else -1,
        "error_chars": [error.start, error.end] if error else [-1, -1],
        "error_tokens": list(tokens),
        "error_kind": error.kind if error else "",
        "evidence": error.evidence if error else "",
        "try_start": attempt.start if attempt else -1,
        "try_text": attempt.text if attempt else "",
        "try_wrong": [list(span) for span in attempt.wrong] if attempt else [],
        "try_own": attempt.own if attempt else False,
    }
