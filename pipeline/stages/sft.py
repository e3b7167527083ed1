"""Stage `sft`: masked fine-tuning on traces and clean rows, and two controls of the same start and steps: the clean one without
traces, and one that learns from the same traces to go on behind a failed try, which stays in its context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actors.checks import HeldOut, alarms, said
from actors.learner import Curve
from actors.packing import TrainingSet
from actors.workers import curve_json
from pipeline.backtrack.curriculum import parse_schedule
from pipeline.backtrack.targets import Form, Targets, Weights
from pipeline.backtrack.trace import Trace
from pipeline.backtrack.undo import UndoRule
from pipeline.config import SftSettings
from pipeline.stages.base import clean_trace
from pipeline.stages.io import Codec, read_problems, read_rows, write_json
from pipeline.stages.probes import dev_cases, first_tries, held_out
from pipeline.stages.stage import Context, StageError
from rewards.regression import regression_weights, trace_reward

CONTROL = "control"
"""Folder of the clean control below the stage's own model folder."""
IN_CONTEXT = "in_context"
"""Of the control that searches in its context."""


def run(context: Context) -> None:
    settings = context.settings
    wanted = range(1, context.round + 1) if settings.traces.replay else [context.round]
    traces = [trace for round in wanted for trace in read_traces(context.inputs[f"traces-{round}"])]
    if not traces:
        raise StageError("sft: the traces stage left no rows")
    codec = Codec(context.inputs["model"], settings.undo, settings.base.prompt)
    checked = None
    if settings.sft.checks.every and (settings.sft.fsdp is not None or settings.sft.deepspeed is not None):
        context.terminal.warn("sft: no process sees the whole of a sharded model, so sft.checks has no effect")
    elif settings.sft.checks.every:
        asked = settings.sft.checks
        tried = first_tries(context, codec, asked.first_tries)
        checked = held_out(settings.sft, dev_cases(context, codec, asked.problems), first_tries=tried)
    data = training_set(traces, codec.rule, settings.sft)
    kept = context.resume / "sft"
    curve = train(context, "sft", data, context.out, settings.sft, settings.run.seed, kept, checked)
    write_json(curve_json(curve), context.out / "curve.json")
    context.counts.update(rows=len(traces), steps=curve.step, tokens=curve.tokens, target_tokens=curve.target_tokens)
    context.counts["left_out"] = curve.left_out
    plain = settings.sft.model_copy(update={"dynamic": False, "head_weight": 0.0})
    if settings.sft.control:
        clean = [clean_trace(codec, problem) for problem in read_problems(context.inputs["problems"], "train")]
        data = TrainingSet(clean, codec.rule)
        kept = context.resume / "sft-control"
        control = train(context, "sft/control", data, context.out / CONTROL, plain, settings.run.seed, kept)
        write_json(curve_json(control), context.out / CONTROL / "curve.json")
        context.counts.update(control_rows=len(clean), control_steps=control.step, control_tokens=control.tokens)
    if settings.sft.in_context:
        plain = plain.model_copy(update={"form": "soft", "hide_undos": False, "positions": "kept"})
        data, kept = training_set(traces, codec.rule, plain), context.resume / "sft-in-context"
        control = train(context, "sft/in_context", data, context.out / IN_CONTEXT, plain, settings.run.seed, kept)
        write_json(curve_json(control), context.out / IN_CONTEXT / "curve.json")
        context.counts.update(in_context_steps=control.step, in_context_tokens=control.tokens)


def start(context: Context) -> Path:
    """The model folder that training starts from."""
    return context.inputs["base" if context.settings.sft.init == "base" else "model"]


def read_traces(folder: Path) -> list[Trace]:
    """Traces of the traces stage, clean rows among them."""
    return [Trace(tuple(row["input_ids"]), tuple(row["roles"])) for row in read_rows(folder)]


def training_set(traces: Sequence[Trace], rule: UndoRule, sft: SftSettings) -> TrainingSet:
    """Traces as the settings want them taught."""
    weights = Weights(**sft.weights.model_dump())
    beta, most = sft.reward_weight.beta, sft.reward_weight.most
    return TrainingSet(
        traces,
        rule,
        Targets(sft.mask, sft.detect_at, sft.train_prompt, weights),
        Form(sft.form, sft.rewinding, sft.hide_undos, sft.positions),
        sft.together,
        parse_schedule("sft.most_undos", sft.most_undos) if sft.most_undos else None,
        regression_weights([trace_reward(trace, rule) for trace in traces], beta, most) if beta else None,
    )


def train(
    context: Context,
    name: str,
    data: TrainingSet,
    target: Path,
    settings: SftSettings,
    seed: int,
    resume: Path,
    checked: HeldOut | None = None,
) -> Curve:
    """Train the start model on the set, with progress, and warn of what the checks find."""
    told: list[str] = []
    logged: list[str] = []
    with context.terminal.stage(name, settings.steps, "steps") as progress, context.workers.watch(name, 0) as watch:

        def show(curve: Curve, ended: bool = False) -> None:
            watch.curve(curve)
            progress.update(curve.step, f"loss {curve.losses[-1][1]:.3f}" if curve.losses else "")
            # While it runs, a check of the step that it stands at may be under way.
            checks = said([one for one in curve.probes if ended or one.step < curve.step])
            for line in checks[len(logged) :]:
                context.terminal.info(f"{name}: {line}")
            logged[:] = checks
            lines = alarms(curve.probes, curve.right_states, context.settings.decode.threshold)
            for line in lines[len(told) :]:
                context.terminal.warn(f"{name}: {line}")
            told[:] = lines

        curve = context.workers.fit(start(context), target, data, settings, seed, show, resume=resume, held_out=checked)
        show(curve, ended=True)
    if curve.left_out:
        context.terminal.warn(
            f"{name}: {curve.left_out} of {len(data.traces)} rows are longer than sft.row_tokens and were left out"
        )
    return curve
