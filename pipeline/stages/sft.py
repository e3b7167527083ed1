"""Stage `sft`: masked fine-tuning on traces and clean rows, and the clean control: same start, same steps, no trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from pipeline.stages.stage import Context, StageError

CONTROL = "control"
"""Folder of the clean control below the stage's own model folder."""


def run(context: Context) -> None:
    settings = context.settings
    wanted = range(1, context.round + 1) if settings.traces.replay else [context.round]
    traces = [_trace(row) for round in wanted for row in read_rows(context.inputs[f"traces-{round}"])]
    if not traces:
        raise StageError("sft: the traces stage left no rows")
    codec = Codec(context.inputs["model"], settings.undo, settings.base.prompt)
    curve = _train(context, "sft", training_set(traces, codec.rule, settings.sft), context.out)
    context.counts.update(rows=len(traces), steps=curve.step, tokens=curve.tokens, target_tokens=curve.target_tokens)
    context.counts["left_out"] = curve.left_out
    if settings.sft.control:
        clean = [clean_trace(codec, problem) for problem in read_problems(context.inputs["problems"], "train")]
        control = _train(context, "sft/control", TrainingSet(clean, codec.rule), context.out / CONTROL)
        context.counts.update(control_rows=len(clean), control_steps=control.step, control_tokens=control.tokens)


def start(context: Context) -> Path:
    """The model folder that training starts from."""
    return context.inputs["base" if context.settings.sft.init == "base" else "model"]


def _trace(row: dict[str, Any]) -> Trace:
    return Trace(tuple(row["input_ids"]), tuple(row["roles"]))


def training_set(traces: Sequence[Trace], rule: UndoRule, sft: SftSettings) -> TrainingSet:
    """Traces as the settings want them taught."""
    weights = Weights(**sft.weights.model_dump())
    return TrainingSet(
        traces,
        rule,
        Targets(sft.mask, sft.detect_at, sft.train_prompt, weights),
        Form(sft.form, sft.rewinding, sft.hide_undos, sft.positions),
        sft.together,
        parse_schedule("sft.most_undos", sft.most_undos) if sft.most_undos else None,
    )


def _train(context: Context, name: str, data: TrainingSet, target: Path) -> Curve:
    train = context.settings.sft
    with context.terminal.stage(name, train.steps, "steps") as progress:
        curve = context.workers.fit(
            start(context),
            target,
            data,
            train,
            context.settings.run.seed,
            lambda c: progress.update(c.step, f"loss {c.losses[-1][1]:.3f}" if c.losses else ""),
            resume=context.resume / name.replace("/", "-"),
        )
        progress.update(curve.step, f"loss {curve.losses[-1][1]:.3f}" if curve.losses else "")
    if curve.left_out:
        context.terminal.warn(
            f"{name}: {curve.left_out} of {len(data.traces)} rows are longer than sft.row_tokens and were left out"
        )
    write_json(curve_json(curve), target / "curve.json")
    return curve
