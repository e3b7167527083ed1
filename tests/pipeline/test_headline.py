"""What of a run the one picture shows, and the table for other programs."""

from __future__ import annotations

import csv
import io
from typing import Any

from pipeline.figures import Line, Plot, figure, picture
from pipeline.headline import headline, table


def row(model: str, group: str, accuracy: float, tokens: float, mode: str = "rewind", **more: Any) -> dict[str, Any]:
    told = {"model": model, "group": group, "accuracy": accuracy, "tokens_per_problem": tokens, "mode": mode, "n": 50}
    return told | {"round": 1, "split": "test", "temperature": 0.0, "ci95": [accuracy - 0.1, accuracy + 0.1]} | more


ROWS = [
    row("base", "hindsight", 0.3, 60),
    row("clean_control", "hindsight", 0.4, 61),
    row("clean_control", "hindsight", 0.42, 180, "vote"),
    row("sft", "hindsight", 0.9, 170),
    row("sft", "hindsight", 0.2, 65, "forbidden"),
    row("sft", "hindsight", 0.8, 160, temperature=1.0),
    row("sft", "hindsight", 0.1, 10, split="ood"),
    row("sft", "hindsight", 0.1, 10, round=0),
    row("base", "forward", 0.9, 50, ci95=None),
    row("sft", "forward", float("nan"), 55),
]
METRICS = {"rounds": [{"round": 0, "mode": "soft"}, {"round": 1, "mode": "rewind"}], "evaluations": ROWS}


def test_one_point_a_model_of_the_last_round_on_the_test_split() -> None:
    hindsight, forward = headline(METRICS, 0.0)
    assert [(line.name, *line.points) for line in hindsight.lines] == [
        ("before", (60, 0.3)),
        ("clean control, as much training", (61, 0.4)),
        ("its majority vote", (180, 0.42)),
        ("with undo", (170, 0.9)),
    ]
    assert hindsight.lines[3].band == [[170, 0.8, 1.0]] and forward.lines[0].band == ()
    assert hindsight.reach == forward.reach and hindsight.reach is not None and hindsight.reach > 180
    assert headline({"rounds": [], "evaluations": []}, 0.0) == []


def test_without_kinds_all_problems_are_one_figure() -> None:
    only = headline({"rounds": METRICS["rounds"], "evaluations": [row("base", "all", 0.5, 60)]}, 0.0)
    assert [plot.title for plot in only] == ["all problems"]


def test_a_picture_stands_alone_in_light_and_dark_and_is_the_same_each_time() -> None:
    svg, png = picture(headline(METRICS, 0.0))
    assert svg.startswith("<svg") and "prefers-color-scheme: dark" in svg and "with undo" in svg
    assert "#0a0b0c" not in svg and svg.count("var(--series-4)") and svg.count("--series-4:") == 2
    assert png.startswith(b"\x89PNG")
    assert (svg, png) == picture(headline(METRICS, 0.0))
    assert picture([])[0].startswith("<svg")


def test_a_point_that_is_no_number_is_missing() -> None:
    assert "with undo" in figure(headline(METRICS, 0.0)[0], "a") and "with undo" not in figure(headline(METRICS, 0.0)[1], "b")
    assert "reach" not in figure(Plot("t", [Line("reach", [(1, float("nan"))])]), "c")


def test_the_table_holds_every_row_and_nothing_for_what_is_no_number() -> None:
    found = list(csv.DictReader(io.StringIO(table(METRICS))))
    assert len(found) == len(ROWS) and found[0]["ci95_low"] == "0.19999999999999998" and found[0]["model"] == "base"
    assert (found[8]["ci95_low"], found[9]["accuracy"]) == ("", "")
