"""Stage `prm`: the process reward model, and a verifier head for each model of the round (docs/verifiers.md).

Both learn from the training problems, a part of which is held out and chooses what is kept and where the thresholds stand. What is
written to metrics.json is measured on own solutions of test problems, sampled here.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

from actors.engines import Completion, Request, Sampling
from actors.judge import judge_rows
from actors.labelled import Labelled, linear
from actors.parts import all_there
from actors.prm import VerifierCurve, solution_score
from actors.verifier_head import FILE as HEAD
from actors.watch import Watch
from pipeline.backtrack.cursor import Signal
from pipeline.metrics import groups
from pipeline.prm_config import PrmSettings
from pipeline.stages.io import Codec, read_problems, read_rows, write_json
from pipeline.stages.probes import Case, cases_of, spread
from pipeline.stages.rollouts import context_length, row_seed, within_context
from pipeline.stages.sft import CONTROL, read_traces, training_set
from pipeline.stages.stage import Context, StageError
from pipeline.stages.step_labels import (
    Solution,
    is_held_out,
    judged_solution,
    judged_solutions,
    searched_rows,
    some_of,
    undo_states,
)
from pipeline.statistics import auroc
from pipeline.step_metrics import Valued, best_threshold, step_figures
from pipeline.tasks.problem import Problem

MODEL, HEADS = "prm", "head"
"""Folders in the output: of the process reward model, and of a head for each model, by the model's name in the evaluation."""


def run(context: Context) -> None:
    settings = context.settings
    asked, seed = settings.prm, settings.run.seed
    codec = Codec(context.inputs["model"], settings.undo, settings.base.prompt)
    problems = {problem.id: problem for problem in read_problems(context.inputs["problems"])}
    test, completions = own_solutions(context, codec, list(problems.values()))
    tested = solutions_of(test, completions, codec)
    threshold = _train_prm(context, codec, problems)
    figures = _prm_figures(context, problems, tested, threshold)
    heads = _train_heads(context, codec, cases_of(test, completions, codec), problems)
    found = {"threshold": threshold, "score": asked.score, "prm": figures, "heads": heads, "labels": asked.labels}
    write_json({"round": context.round, "seed": seed, **found}, context.out / "metrics.json")
    for line in table(figures, heads):
        context.terminal.info(line)


def own_solutions(context: Context, codec: Codec, problems: Sequence[Problem]) -> tuple[list[Problem], list[Completion]]:
    """Test problems and a solution of the start model for each, at temperature 1 with undo forbidden."""
    settings = context.settings
    chosen = spread(problems, "test", settings.prm.test)
    fits, _ = within_context(context, chosen, [codec.prompt_ids(problem) for problem in chosen])
    chosen = [chosen[i] for i in fits]
    pool = context.workers.pool(context.inputs["model"], context.digests["model"], context_length(context))
    sampling = Sampling(1.0, 1.0, settings.rollouts.max_tokens, codec.stop_id, (codec.rule.undo_id, *codec.spare_ids))
    requests = [Request(codec.prompt_ids(one), row_seed(settings.run.seed, f"prm/{one.id}")) for one in chosen]
    return chosen, all_there(pool.generate(requests, sampling, settings.rollouts.batch)[0])


def solutions_of(problems: Sequence[Problem], completions: Sequence[Completion], codec: Codec) -> list[Solution]:
    """Completions with labels by the judge; those without a step are left out."""
    texts = [codec.decode(completion.token_ids) for completion in completions]
    judged = judge_rows([(problem, text.text) for problem, text in zip(problems, texts, strict=True)])
    found = []
    for problem, text, one, completion in zip(problems, texts, judged, completions, strict=True):
        error = text.token_at(one.verdict.error.start) if one.verdict.error else -1
        prompt, ids = codec.prompt_ids(problem), completion.token_ids
        solution = judged_solution(problem.id, prompt, ids, one.verdict.correct, error, codec.rule, codec.stop_id)
        found += [solution] if solution else []
    return found


# The process reward model


def _train_prm(context: Context, codec: Codec, problems: dict[str, Problem]) -> float:
    """Train it; the threshold below which a step counts as wrong, chosen on the held-out problems."""
    asked, seed = context.settings.prm, context.settings.run.seed
    judged, none = judged_solutions(
        read_rows(context.inputs["rollouts"]), read_rows(context.inputs["judge"]), codec.rule, codec.stop_id
    )
    rows: list[tuple[str, Labelled]] = []
    if asked.labels != "search":  # held-out rows are read as they are used
        held = [is_held_out(one.problem, asked.held_out, seed) for one in judged]
        dense = [asked.every_token and not is_held for is_held in held]
        rows += [(one.problem, one.every_token if every else one.row) for one, every in zip(judged, dense, strict=True)]
    if asked.labels != "judge":
        rows += searched_rows(context.inputs["search"])
    if none:
        context.terminal.warn(f"prm: {none} solutions without a step were left out")
    parts: dict[bool, list[Labelled]] = {True: [], False: []}
    for problem, row in rows:
        parts[is_held_out(problem, asked.held_out, seed)].append(row)
    source = context.inputs["sft" if asked.backbone == "sft" else "model"]
    with context.terminal.stage("prm", asked.steps, "steps") as progress, context.workers.watch("prm", 0) as watch:
        show = partial(_show, progress, watch)
        curve = context.workers.verifiers().fit_prm(
            source, context.out / MODEL, parts[False], parts[True], asked, codec.rule.step_end_ids, codec.stop_id, seed,
            context.resume, show,
        )  # fmt: skip
        show(curve)
    if curve.left_out:
        context.terminal.warn(f"prm: {curve.left_out} of {len(parts[False])} rows are longer than prm.row_tokens and were left out")
    write_json(asdict(curve), context.out / "curve.json")
    context.counts.update(rows=curve.rows, held_out=len(parts[True]), steps=curve.step, left_out=curve.left_out)
    chosen_on = [one for one in judged if is_held_out(one.problem, asked.held_out, seed)]
    return best_threshold(_valued(context, problems, chosen_on))


def _show(progress: Any, watch: Watch, curve: VerifierCurve) -> None:
    watch.curve(curve, "held_out_loss")
    progress.update(curve.step, f"loss {curve.losses[-1][1]:.3f}" if curve.losses else "")


def _valued(context: Context, problems: dict[str, Problem], solutions: Sequence[Solution]) -> list[Valued]:
    values = context.workers.verifiers().values(context.out / MODEL, [one.row for one in solutions]) if solutions else []
    return [
        Valued(one.problem, problems[one.problem].family, problems[one.problem].hindsight, one.correct, one.row.labels or (), found)
        for one, found in zip(solutions, values, strict=True)
    ]


def _prm_figures(
    context: Context, problems: dict[str, Problem], solutions: Sequence[Solution], threshold: float
) -> list[dict[str, Any]]:
    asked: PrmSettings = context.settings.prm
    if not solutions:
        raise StageError("prm: none of the sampled solutions of test problems has a step")
    found = step_figures(_valued(context, problems, solutions), threshold, lambda values: solution_score(values, asked.score))
    if found[0]["auroc"] is None:
        kind = "right" if found[0]["right_steps"] else "wrong"
        context.terminal.warn(f"prm: all {found[0]['steps']} steps on test problems are {kind}: AUROC is not defined")
    return found


def named_signal(signal: Signal | None, verifiers: Path | None, model: str) -> Signal | None:
    """A signal of kind `score` with the folder of its verifier in the output of this stage, where there is one and none is named.

    Args:
        verifiers: that output.
        model: name of the policy in the evaluation; what dpo and grpo trained further keeps the head of what it began as.
    """
    if signal is None or signal.kind != "score" or signal.folder is not None or verifiers is None:
        return signal
    heads = verifiers / HEADS / {"dpo": "sft", "grpo": "sft", "grpo_control": "clean_control"}.get(model, model)
    return replace(signal, folder=str((verifiers / MODEL if signal.by == "prm" else heads).resolve()))


# Verifier heads


def models_of(context: Context) -> dict[str, Path]:
    """Policies that get a head, by their names in the evaluation."""
    found = {"base": context.inputs["model"], "sft": context.inputs["sft"]}
    if (context.inputs["sft"] / CONTROL).is_dir():
        found["clean_control"] = context.inputs["sft"] / CONTROL
    return found


def _train_heads(
    context: Context, codec: Codec, cases: Sequence[Case], problems: dict[str, Problem]
) -> dict[str, list[dict[str, Any]]]:
    """A head for each model; AUROC of the heads and of the models' own P(U), at own errors on test problems and the right states
    beside them."""
    settings = context.settings
    asked, seed, sft = settings.prm.head, settings.run.seed, settings.sft
    names = [row["problem"] for row in read_rows(context.inputs["traces"])]
    data = training_set(read_traces(context.inputs["traces"]), codec.rule, sft)
    parts: dict[bool, list[Labelled]] = {True: [], False: []}
    for problem, trace in zip(names, data.traces, strict=True):
        if row := undo_states(trace, codec.rule, data.targets, data.form):
            parts[is_held_out(problem, settings.prm.held_out, seed)].append(row)
    kept = {held: some_of(rows, asked.states, seed) for held, rows in parts.items()}
    found = {}
    for name, folder in models_of(context).items():
        target = context.out / HEADS / name
        if (folder / HEAD).is_file():  # trained along with the model
            target.mkdir(parents=True)
            shutil.copyfile(folder / HEAD, target / HEAD)
        else:
            stage = f"head/{name}"
            with context.terminal.stage(stage, asked.steps, "steps") as progress, context.workers.watch(stage, 0) as watch:
                curve = context.workers.verifiers().fit_head(
                    folder, target, kept[False], kept[True], asked, seed, partial(_show, progress, watch)
                )
                _show(progress, watch, curve)
            write_json(asdict(curve), target / "curve.json")
        found[name] = _head_figures(context, folder, target, cases)
    context.counts.update(states=sum(len(row.at) for row in kept[False]), cases=len(cases))
    if not cases:
        context.terminal.warn("prm: no own error on test problems: the heads' AUROC is not defined")
    return found


def _head_figures(context: Context, policy: Path, head: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    if not cases:
        return []
    states = [state.ids for case in cases for state in (case.error, case.right)]
    asked = context.workers.verifiers().p_should_undo(policy, head, [Labelled(linear(ids), (len(ids) - 1,)) for ids in states])
    own = context.workers.probe(policy, [state for case in cases for state in (case.error, case.right)])
    by_head, by_policy = [one[0] for one in asked], [exp(one[0]) for one in own]
    place = {case.problem.id: at for at, case in enumerate(cases)}
    found = []
    for name, belongs in groups([case.problem for case in cases]):
        some = [place[case.problem.id] for case in cases if belongs(case.problem)]
        figures: dict[str, Any] = {"group": name, "n": len(some)}
        for key, values in (("head", by_head), ("p_undo", by_policy)):
            figures[f"auroc_{key}"] = auroc([values[2 * at] for at in some], [values[2 * at + 1] for at in some])
        found.append(figures)
    return found


def table(figures: Sequence[dict[str, Any]], heads: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines for people."""
    lines = [f"{'prm, test':15}{'solutions':>10}{'steps':>8}{'AUROC':>8}{'ECE':>8}{'F1':>8}"]
    for row in figures:
        rest = (row["auroc"], row["ece"], row["first_error"]["f1"])
        shown = "".join(f"{'–' if one is None else format(one, '.3f'):>8}" for one in rest)
        lines.append(f"{row['group']:15}{row['solutions']:10}{row['steps']:8}{shown}")
    lines.append(f"{'undo, errors':15}{'n':>10}{'head':>8}{'P(U)':>8}")
    for name, some in heads.items():
        for row in some[:1]:
            shown = "".join(f"{'–' if row[key] is None else format(row[key], '.3f'):>8}" for key in ("auroc_head", "auroc_p_undo"))
            lines.append(f"{name:15}{row['n']:10}{shown}")
    return lines
