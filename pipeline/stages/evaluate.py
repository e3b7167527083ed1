"""Stage `evaluate`: start model, controls and trained models on the same problems, with undo in every mode and with undo
forbidden, and P(undo) in wrong and right states. Every row is kept, so that any two models can be compared later.

The main mode decodes every split; the others, which are there to be set beside it, the test split. So do further temperatures, in
the main mode. The control that searches in its context has one mode, on the test split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from math import exp
from pathlib import Path

from datasets import Features, Value
from datasets import List as ListOf

from pipeline.backtrack.cursor import DecodeRequest, Mode
from pipeline.breakdown import by_bias, by_difficulty, by_error_kind, rationalisation, undo_lengths_by_model
from pipeline.causal import hazards, interventions
from pipeline.config import EvaluateSettings
from pipeline.metrics import Evaluated, Probed, acceptance, in_numbers, summarise, tokens_table
from pipeline.passes import passes
from pipeline.stages.io import Codec, read_problems, write_json, write_rows
from pipeline.stages.kept import Kept, tuples
from pipeline.stages.measured import Model, decode, evaluated, generate, requests_of, rolled_of
from pipeline.stages.planted import OUTCOMES, biased_rows, planted_outcomes
from pipeline.stages.probes import Case, own_errors, spread
from pipeline.stages.rollouts import within_context
from pipeline.stages.sft import CONTROL, IN_CONTEXT
from pipeline.stages.stage import Context
from pipeline.stages.votes import SAMPLES, vote
from pipeline.tasks.problem import Problem

ROWS = Features(
    {
        "model": Value("string"),
        "mode": Value("string"),
        "problem": Value("string"),
        "split": Value("string"),
        "family": Value("string"),
        "hindsight": Value("bool"),
        "temperature": Value("float64"),
        "correct": Value("bool"),
        "first_correct": Value("bool"),
        "tokens": Value("int32"),
        "undos": Value("int32"),
        "noops": Value("int32"),
        "spurious": Value("int32"),
        "finish": Value("string"),
        "token_ids": ListOf(Value("int32")),
        "first_token_ids": ListOf(Value("int32")),
        "steps": Value("int32"),
        "undo_lengths": ListOf(Value("int32")),
        "first_errors": Value("int32"),
        "rationalised": Value("bool"),
        "first_rationalised": Value("bool"),
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


def run(context: Context) -> None:
    settings = context.settings
    codec = Codec(context.inputs["model"], settings.undo, settings.base.prompt)
    asked = settings.evaluate
    problems = read_problems(context.inputs["problems"])
    chosen = [
        p for split, most in (("test", asked.test), ("dev", asked.dev), ("ood", asked.ood)) for p in spread(problems, split, most)
    ]
    prompts = [codec.prompt_ids(problem) for problem in chosen]
    fits, too_long = within_context(context, chosen, prompts)
    chosen = [chosen[i] for i in fits]
    models = _models(context)
    rows: list[Evaluated] = []
    temperatures = (asked.temperature, *asked.also_at)
    told = {
        model.name: sum(len(some) for at in temperatures for some in _told(asked, model, at, chosen).values()) for model in models
    }
    with context.terminal.stage("evaluate", sum(told.values())) as progress, Kept(context.resume / "models.jsonl") as kept:
        for model in models:
            if model.name not in kept.found:  # a killed run may have left it behind
                progress.advance(0, model.name)
                found = _evaluate(context, model, chosen, codec, lambda count, tokens: progress.advance(count))
                context.rollouts.write([line for row in found for line in rolled_of(row, model.version)])
                kept.add({model.name: [astuple(row) for row in found]})
            else:
                progress.advance(told[model.name], model.name)
            rows += [Evaluated(*tuples(row)) for row in kept.found[model.name]]
    rows.sort(key=lambda row: row.temperature != asked.temperature)  # what is measured beside comes behind
    test = [problem for problem in chosen if problem.split == "test"]
    elected, samples = vote(context, models, rows, test, codec)
    rows += elected
    biased = biased_rows(context, models[-1], rows, test, codec)
    with context.terminal.stage("probes", None) as progress:
        cases = own_errors(context, models[0].folder, models[0].version, test, codec)[: asked.probes]
        general = [model for model in models if model.mode is None]
        probes = _probe(context, general, cases)
        progress.update(len(probes))
    outcomes = planted_outcomes(context, general[1:], test, cases, codec)
    for some, features, folder in (
        (rows, ROWS, context.out),
        (probes, PROBES, context.out / "probes"),
        (samples, SAMPLES, context.out / "samples"),
        (biased, ROWS, context.out / "biases"),
        (outcomes, OUTCOMES, context.out / "planted"),
    ):
        write_rows([asdict(row) for row in some], features, folder)
    main, round = asked.modes[0], context.round
    metrics = summarise(rows, probes, round, main) | {
        "difficulty": list(by_difficulty(rows, round)),
        "rationalisation": list(rationalisation(rows, round)),
        "error_kinds": list(by_error_kind(probes, round)),
        "undo_lengths": list(undo_lengths_by_model(rows, round)),
        "passes": list(passes(samples, round)),
        "biases": list(by_bias(biased, round)),
        "hazards": list(hazards(outcomes, round)),
        "interventions": list(interventions(outcomes, round)),
    }
    for line in tokens_table(metrics["evaluations"]):
        context.terminal.info(line)
    metrics |= acceptance(rows, main, asked.accept_p) | {"mode": main}
    write_json(metrics, context.out / "metrics.json")
    if not metrics["accepted"]:
        fell = f"dev accuracy fell {in_numbers(metrics['dev'])}"
        context.terminal.warn(
            f"round {context.round} is not accepted: {fell}; what follows starts from {_origin(context.inputs['model'])} again"
        )
    context.counts.update(rows=len(rows), models=len(models), problems=len(chosen), probes=len(probes), prompt_too_long=too_long)


def _origin(model: Path) -> str:
    """An accepted model's output folder in words."""
    return "the base model" if model.name == "base" else f"the model of round {model.parent.name}"


def _models(context: Context) -> list[Model]:
    """base is the model the round started from; in the first round that is the base model itself."""
    models = [Model("base", context.inputs["model"], context.digests["model"])]
    if (context.inputs["sft"] / CONTROL).is_dir():
        models.append(Model("clean_control", context.inputs["sft"] / CONTROL, f"{context.digests['sft']}/{CONTROL}"))
    if (context.inputs["sft"] / IN_CONTEXT).is_dir():
        models.append(Model(IN_CONTEXT, context.inputs["sft"] / IN_CONTEXT, f"{context.digests['sft']}/{IN_CONTEXT}", "soft"))
    models.append(Model("sft", context.inputs["sft"], context.digests["sft"]))
    if preferring := context.inputs.get("dpo"):
        models.append(Model("dpo", preferring, context.digests["dpo"]))
    if learned := context.inputs.get("grpo"):
        if (learned / CONTROL).is_dir():
            models.append(Model("grpo_control", learned / CONTROL, f"{context.digests['grpo']}/{CONTROL}"))
        models.append(Model("grpo", learned, context.digests["grpo"]))
    return models


def _evaluate(
    context: Context, model: Model, problems: Sequence[Problem], codec: Codec, on_rows: Callable[[int, int], None]
) -> list[Evaluated]:
    asked = context.settings.evaluate
    rows = []
    for temperature in (asked.temperature, *asked.also_at):
        rows += _at(context, model, _told(asked, model, temperature, problems), temperature, codec, on_rows)
    return rows


def _told(asked: EvaluateSettings, model: Model, temperature: float, problems: Sequence[Problem]) -> dict[Mode, list[Problem]]:
    """What a model decodes in which mode at a temperature."""
    if model.mode is not None:
        return {model.mode: [problem for problem in problems if problem.split == "test"]}
    of_mode = {mode: _told_mode(asked, mode, temperature, problems) for mode in asked.modes}
    return {mode: some for mode, some in of_mode.items() if some}


def _told_mode(asked: EvaluateSettings, mode: Mode, temperature: float, problems: Sequence[Problem]) -> list[Problem]:
    """The first mode at the first temperature decodes everything, and dev is for it alone."""
    first, leads = temperature == asked.temperature, mode == asked.modes[0]
    if not (asked.everywhere or first or leads):
        return []
    splits = {"test", *(("ood",) if asked.everywhere or first and leads else ()), *(("dev",) if first and leads else ())}
    return [problem for problem in problems if problem.split in splits]


def _at(
    context: Context,
    model: Model,
    of_mode: Mapping[Mode, Sequence[Problem]],
    temperature: float,
    codec: Codec,
    on_rows: Callable[[int, int], None],
) -> list[Evaluated]:
    """Rows of the modes at one temperature, each on its problems; the first one has all that the others have."""
    main = next(iter(of_mode))

    def wanted(problems: Sequence[Problem]) -> list[DecodeRequest]:
        return requests_of(context.settings, codec, problems)

    written = {mode: decode(context, model, wanted(some), temperature, codec, mode, on_rows) for mode, some in of_mode.items()}
    # First tries come from the engine of the main mode with the same seeds, so that undo alone makes a difference. Without an
    # undo token a row is its own first try, unless U was among the ids that were drawn from.
    drawn = temperature > 0 and (main == "soft" or (main == "rewind" and context.settings.decode.threshold is None))
    done_first = list(zip(of_mode[main], written[main], strict=True))
    again = [problem for problem, done in done_first if drawn or codec.rule.undo_id in done.token_ids]
    decode_first = generate if main == "soft" else decode
    tried = decode_first(context, model, wanted(again), temperature, codec, "forbidden")
    first = {problem.id: done for problem, done in done_first} | dict(zip([one.id for one in again], tried, strict=True))
    return [
        evaluated(model.name, mode, temperature, problem, done, first[problem.id], codec)
        for mode, rows in written.items()
        for problem, done in zip(of_mode[mode], rows, strict=True)
    ]


def _probe(context: Context, models: Sequence[Model], cases: Sequence[Case]) -> list[Probed]:
    """Own errors of the start model on test problems, and the same states made right, under every model."""
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
