"""The page of a study, and the same as JSON and CSV: reads what its runs have evaluated, writes beside them.

Called by the command line behind every run, so that a long study can be looked at while it goes on.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.compare import read
from pipeline.config import Settings
from pipeline.figures import DARK, LIGHT, Line, Plot, figures, is_number
from pipeline.headline import TITLES
from pipeline.metrics import KIND_GROUPS
from pipeline.report import COSINES, NBSP, count, p_value, points, templates
from pipeline.settings_file import dump_settings
from pipeline.stages.graph import trained_stage
from pipeline.store import Store
from pipeline.study.results import MEASURES, Result, compared
from pipeline.study.runs import StudyRun, evaluated_round

PAGE, RECORDS, TABLE = "study.html", "study.json", "study.csv"
_ACROSS = "tokens per problem, deleted ones included"


def publish(
    settings: Settings, runs: Sequence[StudyRun], done: Sequence[StudyRun], known: dict[str, Result], folder: Path
) -> Path | None:
    """Write page, JSON and CSV of the runs that are evaluated; the page's path, None where there is none such.

    Args:
        runs: all of the study.
        done: those that have been run, or found up to date, so far.
        known: results of runs that were read before; what is read now is put into it.
    """
    for run in done:
        if run.name not in known and (found := result_of(run)):
            known[run.name] = found
    if not known:
        return None
    records = records_of(settings, runs, known)
    versions = Store(done[0].folder).manifest(0, "problems")
    page = render(settings, records, versions.versions if versions else {})
    texts = {PAGE: page, RECORDS: json.dumps(records, indent=1, allow_nan=False) + "\n", TABLE: table(records)}
    for name, text in texts.items():
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)
    return folder / PAGE


def result_of(run: StudyRun) -> Result | None:
    """What a run has evaluated in its last round; None where that does not stand, or is not what the settings ask for.

    Raises:
        StoreError: it is damaged.
    """
    round = evaluated_round(run)
    if round is None:
        return None
    store = Store(run.folder)
    metrics = json.loads(store.text(round, "evaluate", "metrics.json") or "{}")
    curve = json.loads(store.text(round, "sft", "curve.json") or "{}")
    # Later checks replace earlier ones.
    cosines = {name: value for _, _, name, value, *_ in curve.get("probes", ()) if name in COSINES}
    return Result(
        run.variant,
        run.seed,
        trained_stage(run.settings),
        metrics["mode"],
        run.settings.evaluate.temperature,
        metrics,
        read(str(run.folder), "test", round),
        cosines,
    )


def records_of(settings: Settings, runs: Sequence[StudyRun], known: Mapping[str, Result]) -> dict[str, Any]:
    """What `study.json` holds."""
    asked = settings.study
    against = asked.against or next(iter(asked.variants))
    order = [against, *(name for name in asked.variants if name != against)]
    results = [known[run.name] for run in runs if run.name in known]
    told = [
        {
            "name": name,
            "changes": dict(_flat(asked.variants[name])),
            "runs": [{"seed": run.seed, "folder": run.name, "evaluated": run.name in known} for run in runs if run.variant == name],
        }
        for name in order
    ]
    found = compared(results, order, against)
    sentences = [in_words(one, against) for one in found["differences"]]
    return {"study": settings.run.name, "against": against, "variants": told, **found, "sentences": sentences}


def _flat(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as `key.sub` and value."""
    for key, value in changes.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def in_words(one: Mapping[str, Any], against: str) -> str:
    """A plain sentence on one variant and kind of problems; claim and evidence are parted by a colon."""
    place = "all problems" if one["group"] == "all" else f"{one['group']} problems"
    if "why" in one:
        return f"{one['variant']} cannot be compared with {against}: {one['why']}."
    decided = one["verdict"] != "not decided"
    claim = f"is {one['verdict']} than {against}" if decided else f"against {against} is not decided at this n"
    ends, seeds = one["ci95"], one["over_seeds"]
    problems = f"{_reach(ends)} over {count(one['n'])} problems" if ends else f"too few problems ({one['n']}) for an interval"
    trainings = (
        "one seed, which says nothing of another training"
        if seeds["low"] is None
        else f"{_reach((seeds['low'], seeds['high']))} over {seeds['n']} seeds"
    )
    return (
        f"{one['variant']} {claim} on {place}: {points(one['difference'])} points, 95{NBSP}% interval {problems}, {trainings}; "
        f"McNemar p{NBSP}{p_value(one['mcnemar_p'])}."
    )


def _reach(ends: Sequence[float]) -> str:
    return f"{points(ends[0])} to {points(ends[1])}"


def plots(records: Mapping[str, Any]) -> list[Plot]:
    """Accuracy over tokens, a point for each variant; intervals over seeds, over problems where there is one seed."""
    trained = [one for one in records["figures"] if one["trained"] and one["accuracy"] and one["tokens_per_problem"]]
    groups = [group for group in ("hindsight", "forward") if any(one["group"] == group for one in trained)] or ["all"]
    costs = [one["tokens_per_problem"]["value"] for one in trained]
    return [
        Plot(
            TITLES[group],
            [_point(one) for one in trained if one["group"] == group],
            percent=True,
            across=_ACROSS,
            reach=1.08 * max(costs) if costs else None,
        )
        for group in groups
    ]


def _point(one: Mapping[str, Any]) -> Line:
    at, accuracy = one["tokens_per_problem"]["value"], one["accuracy"]
    return Line(one["variant"], [(at, accuracy["value"])], [(at, *(accuracy["ci95"] or one["pooled_ci95"]))])


def render(settings: Settings, records: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """The HTML page."""
    sections = (
        "figures", "differences", "controls", "rationalisation", "error_kinds", "cosines", "variants", "sentences", "against",
    )  # fmt: skip
    return (
        templates()
        .get_template("study.html.j2")
        .render(
            name=settings.run.name,
            kinds=list(KIND_GROUPS),
            seeds=settings.study.seeds,
            light=LIGHT.css(),
            dark=DARK.css(),
            plots=figures(plots(records), "study"),
            cosine_words=COSINES,
            config=dump_settings(settings),
            versions=sorted(versions.items()),
            **{name: records[name] for name in sections},
        )
    )


def table(records: Mapping[str, Any]) -> str:
    """CSV of all figures: a row for each variant, model, mode, kind of problems and seed, and one for the mean over seeds, with
    its interval in two columns; empty where there is no number."""
    out = io.StringIO()
    ends = [f"{name}_{end}" for name in MEASURES for end in ("low", "high")]
    writer = csv.DictWriter(out, ["variant", "model", "mode", "group", "seed", "n", *MEASURES, *ends], lineterminator="\n")
    writer.writeheader()
    for one in records["figures"]:
        place = {key: one[key] for key in ("variant", "model", "mode", "group")}
        seeds = dict.fromkeys(seed for name in MEASURES if one[name] for seed in one[name]["by_seed"])
        for seed in seeds:
            writer.writerow(place | {"seed": seed} | {name: one[name]["by_seed"].get(seed) for name in MEASURES if one[name]})
        means: dict[str, Any] = {"seed": "mean", "n": one["n"]}
        for name in MEASURES:
            if one[name] and is_number(one[name]["value"]):
                means[name] = one[name]["value"]
                means |= dict(zip((f"{name}_low", f"{name}_high"), one[name]["ci95"] or (None, None), strict=True))
        writer.writerow(place | means)
    return out.getvalue()
