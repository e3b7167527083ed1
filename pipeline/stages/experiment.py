"""Stage `experiment`: ways to fine-tune, compared. Every variant of the section sft is trained with every seed from the start
model on the same traces, and measured on the same held-out problems while it trains. It runs where variants are configured.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from datasets import Features, Value

from actors.checks import BATCH, Measured
from pipeline.config import SftSettings, variant
from pipeline.stages.io import Codec, read_problems, write_json, write_rows
from pipeline.stages.probes import decodes, dev_cases, first_tries, held_out, spread
from pipeline.stages.rollouts import within_context
from pipeline.stages.sft import read_traces, train, training_set
from pipeline.stages.stage import Context, StageError
from pipeline.statistics import mean

FEATURES = Features(
    {
        "variant": Value("string"),
        "seed": Value("int64"),
        "step": Value("int64"),
        "group": Value("string"),
        "name": Value("string"),
        "value": Value("float64"),
        "low": Value("float64"),
        "high": Value("float64"),
        "n": Value("int64"),
    }
)


def run(context: Context) -> None:
    settings = context.settings
    asked = settings.experiment
    codec = Codec(context.inputs["model"], settings.undo, settings.base.prompt)
    traces = read_traces(context.inputs["traces"])
    if not traces:
        raise StageError("experiment: the traces stage left no rows")
    problems = spread(read_problems(context.inputs["problems"]), "dev", asked.problems)
    fits, _ = within_context(context, problems, [codec.prompt_ids(problem) for problem in problems])
    problems = [problems[i] for i in fits]
    cases = dev_cases(context, codec, settings.sft.checks.problems)
    tried = first_tries(context, codec, settings.sft.checks.first_tries)
    context.resume.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in asked.variants:
        sft = variant(settings, name)
        for seed in asked.seeds:
            done = context.resume / f"{name}-{seed}.json"
            if not done.is_file():  # what a killed run has finished is not trained again
                folder = context.resume / f"{name}-{seed}"
                checked = held_out(sft, cases, decodes(context, codec, sft, problems), tried)
                data = training_set(traces, codec.rule, sft)
                curve = train(context, f"{name}/{seed}", data, context.scratch / "model", sft, seed, folder, checked)
                part = done.with_suffix(".part")
                write_json(curve.probes, part)
                part.rename(done)
                shutil.rmtree(folder)
                shutil.rmtree(context.scratch / "model")
            found = [Measured(*one) for one in json.loads(done.read_text())]
            rows += [{"variant": name, "seed": seed} | one._asdict() for one in found]
    write_rows(rows, FEATURES, context.out)
    write_json({"measures": summarise(rows), "variants": _told(settings.sft, asked.variants)}, context.out / "metrics.json")
    context.counts.update(rows=len(rows), trainings=len(asked.variants) * len(asked.seeds), own_errors=len(cases))


def _told(sft: SftSettings, variants: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": name, "changes": changes, "form": changes.get("form", sft.form)} for name, changes in variants.items()]


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a variant, step, group and measure: the mean over seeds with its 95 % interval over seeds (Student's t), or over
    problems where there is one seed."""
    keys = ("variant", "step", "group", "name")
    members: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        members.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [dict(zip(keys, place, strict=True)) | figures for place, some in members.items() for figures in _figures(some)]


def _figures(some: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    name, group = some[0]["name"], some[0]["group"]
    free = name == "logp_error" or group == BATCH
    bounds = (-float("inf"), 0.0 if name == "logp_error" else float("inf")) if free else (0.0, 1.0)
    if name == "errors_per_try":
        bounds = (0.0, float("inf"))
    if over_seeds := mean([row["value"] for row in some], *bounds):
        figures = {key: value for key, value in asdict(over_seeds).items() if key != "n"}
        if len(some) == 1:
            figures |= {key: some[0][key] for key in ("low", "high")}
        yield figures | {"seeds": len(some), "n": some[0]["n"], "by_seed": {str(row["seed"]): row["value"] for row in some}}
