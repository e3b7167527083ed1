"""Stage `evaluate`: start model, clean control and fine-tuned model on the same problems, with undo and with undo forbidden,
and P(undo) in wrong and right states. Every row is kept, so that any two models can be compared later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from typing import Any

from datasets import Features, Value
from datasets import List as ListOf

from actors.engines import Completion, Request, Sampling
from actors.judge import judge_rows
from actors.probe import ProbeRow
from actors.rollout import RolloutPool
from pipeline.backtrack.undo import apply_undo
from pipeline.metrics import Evaluated, Probed, accepted, summarise
from pipeline.stages.io import Codec, read_problems, write_json, write_rows
from pipeline.stages.rollouts import context_length, row_seed, within_context
from pipeline.stages.sft import CONTROL
from pipeline.stages.sources import locate
from pipeline.stages.stage import Context
from pipeline.tasks.problem import Problem
from verifiers.tasks import judge_of

ROWS = Features(
    {
        "model": Value("string"),
        "problem": Value("string"),
        "split": Value("string"),
        "family": Value("string"),
        "hindsight": Value("bool"),
        "correct": Value("bool"),
        "first_correct": Value("bool"),
        "tokens": Value("int32"),
        "undos": Value("int32"),
        "noops": Value("int32"),
        "spurious": Value("int32"),
        "finish": Value("string"),
        "token_ids": ListOf(Value("int32")),
        "first_token_ids": ListOf(Value("int32")),
    }
)
PROBES = Features(
    {
        "model": Value("string"),
        "problem": Value("string"),
        "family": Value("string"),
        "hindsight": Value("bool"),
        "error": Value("string"),
        "p_undo_error": Value("float64"),
        "p_undo_right": Value("float64"),
        "logp_error": Value("float64"),
    }
)


@dataclass(frozen=True)
class Model:
    """One model under evaluation."""

    name: str
    folder: Path
    version: str


def run(context: Context) -> None:
    settings = context.settings
    codec = Codec(context.inputs["model"], settings.undo, settings.base.prompt)
    asked = settings.evaluate
    problems = read_problems(context.inputs["problems"])
    chosen = [
        p for split, most in (("test", asked.test), ("dev", asked.dev), ("ood", asked.ood)) for p in _first(problems, split, most)
    ]
    prompts = [codec.prompt_ids(problem) for problem in chosen]
    fits, too_long = within_context(context, chosen, prompts)
    chosen = [chosen[i] for i in fits]
    models = _models(context)
    rows: list[Evaluated] = []
    with context.terminal.stage("evaluate", len(models) * len(chosen)) as progress:
        for model in models:
            pool = context.workers.pool(model.folder, model.version, context_length(context))
            rows += _evaluate(context, model, chosen, codec, pool)
            progress.update(len(rows), model.name)
    with context.terminal.stage("probes", None) as progress:
        probes = _probe(context, models, [p for p in chosen if p.split == "test"], codec)
        progress.update(len(probes))
    write_rows([asdict(row) for row in rows], ROWS, context.out)
    write_rows([asdict(row) for row in probes], PROBES, context.out / "probes")
    metrics = summarise(rows, probes, context.round, asked.temperature)
    metrics["accepted"] = accepted(rows)
    write_json(metrics, context.out / "metrics.json")
    if not metrics["accepted"]:
        context.terminal.warn(f"round {context.round} is not accepted: dev accuracy fell; the next round starts from the old model")
    context.counts.update(rows=len(rows), models=len(models), problems=len(chosen), probes=len(probes), prompt_too_long=too_long)


def _first(problems: Sequence[Problem], split: str, most: int | None) -> list[Problem]:
    """Evenly spread over the split, so that every family is there."""
    of_split = [problem for problem in problems if problem.split == split]
    if most is None or most >= len(of_split):
        return of_split
    return [of_split[i * len(of_split) // most] for i in range(most)]


def _models(context: Context) -> list[Model]:
    """base is the model the round started from; in the first round that is the base model itself."""
    models = [Model("base", context.inputs["model"], context.digests["model"])]
    if (context.inputs["sft"] / CONTROL).is_dir():
        models.append(Model("clean_control", context.inputs["sft"] / CONTROL, f"{context.digests['sft']}/{CONTROL}"))
    return [*models, Model("sft", context.inputs["sft"], context.digests["sft"])]


def _evaluate(context: Context, model: Model, problems: Sequence[Problem], codec: Codec, pool: RolloutPool) -> list[Evaluated]:
    asked = context.settings.evaluate

    def generate(some: Sequence[Problem], forbidden: tuple[int, ...]) -> list[Completion]:
        sampling = Sampling(asked.temperature, asked.top_p, asked.max_tokens, codec.stop_id, forbidden)
        seeds = [row_seed(context.settings.run.seed, f"evaluate/{problem.id}") for problem in some]
        requests = [Request(codec.prompt_ids(problem), seed) for problem, seed in zip(some, seeds, strict=True)]
        return pool.generate(requests, sampling, context.settings.rollouts.batch)[0]

    soft = generate(problems, ())
    # A greedy row without an undo token is its own first try: there the ban changes nothing.
    again = [i for i, done in enumerate(soft) if asked.temperature > 0 or codec.rule.undo_id in done.token_ids]
    first = dict(enumerate(soft)) | dict(zip(again, generate([problems[i] for i in again], (codec.rule.undo_id,)), strict=True))
    return [_row(model.name, problem, soft[i], first[i], codec) for i, problem in enumerate(problems)]


def _row(model: str, problem: Problem, soft: Completion, first: Completion, codec: Codec) -> Evaluated:
    undone = apply_undo(soft.token_ids, codec.rule)
    return Evaluated(
        model=model,
        problem=problem.id,
        split=problem.split,
        family=problem.family,
        hindsight=problem.hindsight,
        correct=judge_of(problem).correct(problem, codec.decode(undone.surviving).text),
        first_correct=judge_of(problem).correct(problem, codec.decode(first.token_ids).text),
        tokens=len(soft.token_ids),
        undos=undone.undos,
        noops=undone.noops,
        spurious=spurious_undos(problem, soft.token_ids, codec),
        finish=soft.finish,
        token_ids=soft.token_ids,
        first_token_ids=first.token_ids,
    )


def spurious_undos(problem: Problem, ids: Sequence[int], codec: Codec) -> int:
    """Undo tokens that deleted something while nothing wrong stood there."""
    count = 0
    for index, token in enumerate(ids):
        if token == codec.rule.undo_id:
            state = apply_undo(ids[:index], codec.rule).surviving
            count += bool(state) and not judge_of(problem).state_is_wrong(problem, codec.decode(state).text)
    return count


def _probe(context: Context, models: Sequence[Model], problems: Sequence[Problem], codec: Codec) -> list[Probed]:
    """Own errors of the start model on test problems, and the same states made right, under every model."""
    settings = context.settings
    start = models[0]
    pool = context.workers.pool(start.folder, start.version, context_length(context))
    sampling = Sampling(1.0, 1.0, settings.rollouts.max_tokens, codec.stop_id, (codec.rule.undo_id,))
    requests = [Request(codec.prompt_ids(p), row_seed(settings.run.seed, f"probe/{p.id}")) for p in problems]
    completions, _ = pool.generate(requests, sampling, settings.rollouts.batch)
    cases = _cases(problems, completions, codec)[: settings.evaluate.probes]
    found: list[Probed] = []
    for model in models if cases else ():
        questions = [question for case in cases for question in (case.error, case.right)]
        answers = context.workers.probe(model.folder, questions)
        for case, error, right in zip(cases, answers[::2], answers[1::2], strict=True):
            found.append(
                Probed(
                    model=model.name,
                    problem=case.problem.id,
                    family=case.problem.family,
                    hindsight=case.problem.hindsight,
                    error=case.kind,
                    p_undo_error=exp(error[0]),
                    p_undo_right=exp(right[0]),
                    logp_error=sum(error[1:]),
                )
            )
    return found


@dataclass(frozen=True)
class Case:
    """An own error and the right state beside it."""

    problem: Problem
    kind: str
    error: ProbeRow
    """Asks for the undo token at the evidence, then for the tokens of the wrong decision."""
    right: ProbeRow
    """Asks for the undo token at the same place of the gold solution."""


def _cases(problems: Sequence[Problem], completions: Sequence[Completion], codec: Codec) -> list[Case]:
    texts = [codec.decode(completion.token_ids) for completion in completions]
    judged = judge_rows([(problem, text.text) for problem, text in zip(problems, texts, strict=True)])
    cases = []
    for problem, completion, one in zip(problems, completions, judged, strict=True):
        if one.attempt is None:
            continue
        right = judge_of(problem).right_state(problem, one.attempt.step, one.attempt.text.count("\n") + 1)
        if right is None:
            continue
        prompt = codec.prompt_ids(problem)
        verdict: Mapping[str, Any] = {
            "try_start": one.attempt.start,
            "try_text": one.attempt.text,
            "try_wrong": one.attempt.wrong,
            "try_own": one.attempt.own,
        }
        rollout = {"id": problem.id, "prompt_ids": prompt, "token_ids": completion.token_ids}
        if (wrong := locate(verdict, rollout, problem, codec)) is None:
            continue
        before = (*prompt, *wrong.prefix)
        ids = (*before, *wrong.wrong_try.ids)
        decisions = tuple(len(before) + i for i, is_wrong in enumerate(wrong.wrong_try.wrong) if is_wrong)
        undo = codec.rule.undo_id
        error = ProbeRow(ids, (len(ids), *decisions), (undo, *(ids[i] for i in decisions)))
        state = (*prompt, *codec.encode(right))
        kind = one.verdict.error.kind if one.verdict.error else ""
        cases.append(Case(problem, kind, error, ProbeRow(state, (len(state),), (undo,))))
    return cases
