"""What a run comes to, for those who look at one picture: accuracy over the tokens that it costs, where a gain is expected and
where none is; and all figures as a table for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.figures import Line, Plot, is_number
from pipeline.metrics import TRAINED

TITLES = {
    "hindsight": "hindsight: the evidence comes after the choice",
    "forward": "forward: the evidence comes before it",
    "all": "all problems",
}
_ACROSS = "tokens per problem, deleted ones included"


def headline(metrics: Mapping[str, Any], temperature: float) -> list[Plot]:
    """One figure a kind of problem, one point a model; the last round's, on the test split. Empty where nothing was evaluated."""
    if not metrics["rounds"]:
        return []
    last = metrics["rounds"][-1]
    rows = [
        row
        for row in metrics["evaluations"]
        if (row["round"], row["split"], row["temperature"]) == (last["round"], "test", temperature) and row["n"]
    ]
    models = {row["model"] for row in rows}
    trained = next((name for name in TRAINED if name in models), None)
    control = next((name for name in ("grpo_control", "clean_control") if name in models), None)
    shown = [
        ("before", "base", last["mode"]),
        ("clean control, as much training", control, last["mode"]),
        ("its majority vote", control, "vote"),
        ("failed tries kept in the context", "in_context", "soft"),
        ("with undo", trained, last["mode"]),
    ]
    modes = {mode for _, _, mode in shown}
    costs = [row["tokens_per_problem"] for row in rows if row["mode"] in modes and is_number(row["tokens_per_problem"])]
    groups = [group for group in ("hindsight", "forward") if any(row["group"] == group for row in rows)] or ["all"]
    return [
        Plot(
            TITLES[group],
            [
                Line(name, [(row["tokens_per_problem"], row["accuracy"])], _band(row))
                for name, model, mode in shown
                for row in rows
                if (row["model"], row["mode"], row["group"]) == (model, mode, group)
            ],
            percent=True,
            across=_ACROSS,
            reach=1.08 * max(costs) if costs else None,
        )
        for group in groups
    ]


def _band(row: Mapping[str, Any]) -> Sequence[Sequence[float]]:
    ends = [row["tokens_per_problem"], *(row["ci95"] or ())]
    return [ends] if len(ends) == 3 and all(map(is_number, ends)) else ()


def table(metrics: Mapping[str, Any]) -> str:
    """CSV of all evaluations, intervals in two columns; empty where there is no number."""
    rows = [
        {key: value for key, value in row.items() if key != "ci95"}
        | dict(zip(("ci95_low", "ci95_high"), row["ci95"] or (None, None), strict=True))
        for row in metrics["evaluations"]
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, sorted({key for row in rows for key in row}), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: value for key, value in row.items() if not isinstance(value, float) or is_number(value)})
    return out.getvalue()
