"""What the report shows beside accuracy, from made-up records: every part, nothing where nothing was measured, NaN as missing."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.breakdown import by_bias, by_difficulty, by_error_kind, rationalisation, undo_lengths_by_model
from pipeline.causal import ARMS, RIGHT, WRONG, Outcome, hazards, interventions
from pipeline.config import Settings
from pipeline.figures import Line, Plot, figures
from pipeline.metrics import Probed, summarise
from pipeline.passes import Sample, passes
from pipeline.report import NBSP, NONE, in_words, planted_word, render
from pipeline.stages.evaluate import ROWS
from pipeline.stages.evidence import NEW, audits_of, evidence_of
from pipeline.stages.io import write_json, write_rows
from tests.pipeline.reported import FAMILIES, evaluated, page, parsed, probed

NAN = float("nan")


def records() -> dict[str, Any]:
    """metrics.json of one round with everything in it."""
    rng = random.Random(0)
    rows = [replace(row, steps=1 + i % 3, undo_lengths=(9,) * row.undos) for i, row in enumerate(evaluated())]
    mine = [row for row in rows if (row.model, row.mode, row.split) == ("sft", "rewind", "test")]
    biased = [replace(row, mode=f"bias {bias}") for bias in (-2, 0, 3) for row in mine]
    samples = [
        Sample(model, mode, f"p{i}", k, "test", family, hindsight, 0.7, rng.random() < 0.6, "7", 50, None, 0, "stop", ())
        for model, mode in (("clean_control", "forbidden"), ("sft", "rewind"))
        for family, hindsight in FAMILIES.items()
        for i in range(12)
        for k in range(4)
    ]
    outcomes = [
        Outcome(
            "sft", f"p{i}", "chain", False, kind, arm, rng.choice([0, 1, 5]) if arm == "free" else 0, True, False, True, 9, (1,)
        )
        for kind in (*WRONG, *RIGHT)
        for arm in (ARMS if kind in ("own", "right") else ARMS[:1])
        for i in range(20)
    ]
    found = {"run": "made", "rounds": [{"round": 1, "accepted": True, "mode": "rewind"}]}
    return found | summarise(rows, probed(), 1, "rewind") | {
        "difficulty": list(by_difficulty(rows, 1)),
        "rationalisation": list(rationalisation([replace(row, rationalised=not row.correct) for row in rows], 1)),
        "error_kinds": list(by_error_kind(probed(), 1)),
        "undo_lengths": list(undo_lengths_by_model(rows, 1)),
        "passes": list(passes(samples, 1)),
        "biases": list(by_bias(biased, 1)),
        "hazards": list(hazards(outcomes, 1)),
        "interventions": list(interventions(outcomes, 1)),
    }  # fmt: skip


def curve_of(*shares: float) -> dict[str, Any]:
    """So many of 100 first tries are right at steps 0, 300, ..; the others have an error each."""
    right = [[i < 100 * share for i in range(100)] for share in shares]
    return {"first_tries": [(300 * at, some, [not one for one in some]) for at, some in enumerate(right)]}


def html_of(metrics: dict[str, Any], audits: list[dict[str, Any]], settings: Settings) -> str:
    return render(page(metrics=metrics, evidence=evidence_of(metrics, audits, settings)))


def between(html: str, start: str) -> str:
    at = html.index(f'<section id="{start}"')
    return html[at : html.index("</section>", at)]


def test_every_part_is_on_the_page(tmp_path: Path) -> None:
    write_rows([asdict(row) for row in evaluated()], ROWS, tmp_path)
    metrics = records()
    problems = [str(number) for number in range(100)]
    learned = [
        {"step": step, "first_tries": {"problems": problems, "correct": right, "errors": errors}}
        for step, right, errors in curve_of(0.5, 0.9)["first_tries"]
    ]
    histories = {"grpo-1": [learned[0], {"step": 1, "reward": 0.5}, learned[1]], "grpo-1-control": []}
    audits = audits_of({"evaluate-1": tmp_path}, {"sft-1": curve_of(0.7, 0.6, 0.4), "base": {}}, histories, [1])
    assert [one["name"] for one in audits] == ["sft, round 1, dev", "grpo, round 1, dev", "the trained model of each round, test"]
    assert [planted_word(one) for one in audits[:2]] == ["first tries get worse", "first tries get better"]
    html = html_of(metrics, audits, Settings())
    parsed(html)
    assert html == html_of(metrics, audits, Settings())
    assert len(set(one for one in html.split('id="')[1:])) == html.count('id="')
    samples, undos, causal = between(html, "samples"), between(html, "undos"), between(html, "causal")
    assert samples.count("<figure>") == 2 and "clean control, undo forbidden" in samples
    assert "tokens taken back by one run of undos" in undos and undos.count("<tr") == 1 + 2 * 3 * 3
    assert causal.count("<figure>") == 1 + 1 + 6 and "right, worded otherwise" in causal and "first tries get worse" in causal
    assert causal.count('<th scope="row">after') == 2 * 2  # kinds of interventions for all and forward problems
    assert causal.count('<th scope="row">false result</th><td>20</td>') == 1
    assert between(html, "rationalisation").count(f"100.0{NBSP}%") == 3 * 2  # models and modes; first tries hold none
    assert between(html, "detection").count("<td>product</td>") == 3
    missing = between(html, "missing")
    assert "temperature 1 (evaluate.also_at)" in missing and "stage grpo (grpo.steps)" in missing
    assert "bias sweep" not in missing and "planted errors" not in missing and "clean control" not in missing


def test_nothing_measured_says_so() -> None:
    nothing: dict[str, Any] = {name: [] for name in (*NEW, "evaluations", "comparisons", "probes")}
    html = html_of(nothing | {"rounds": []}, [], Settings())
    parsed(html)
    for said in ("No samples were drawn.", "No error was planted.", "measured at one time alone", "has taken anything back"):
        assert said in html
    missing = between(html, "missing")
    for said in (
        "the clean control",
        "the test split",
        "majority vote",
        "temperature 0",
        "bias sweep",
        "planted errors",
        "own errors",
    ):
        assert said in missing
    assert "nan" not in html.lower().replace("finance", "")


def test_a_nan_is_missing_and_never_0(tmp_path: Path) -> None:
    write_json({"a": NAN, "b": [1.0, float("inf")], "c": (2, {"d": -float("inf")})}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1.0, None], "c": [2, {"d": None}]}
    probes = [Probed("base", "p", "chain", False, "x", 0.1, 0.1, -1.0), Probed("sft", "p", "chain", False, "x", NAN, 0.1, NAN)]
    found = summarise(evaluated(("base", "sft")), probes, 1, "rewind")["probes"]
    sft = next(one for one in found if (one["model"], one["group"]) == ("sft", "all"))
    assert sft["p_undo_error"] is sft["auroc"] is sft["logp_error_change"] is None and sft["p_undo_right"] == 0.1
    metrics = records()
    for name in (*NEW, "evaluations"):
        metrics[name] = [spoilt(one) for one in metrics[name]]
    html = html_of(metrics, [], Settings())
    parsed(html)
    for part in ("accuracy", "samples", "undos", "causal"):
        cells = [cell.split("</td>")[0] for cell in between(html, part).split("<td")]
        assert not [cell for cell in cells if "nan" in cell or ">0.0" in cell] and between(html, part).count(NONE) > 30


def spoilt(record: Any, name: str = "") -> Any:
    """A record with NaN in the place of every number but those that say where it belongs."""
    if isinstance(record, dict):
        kept = ("round", "k", "n", "steps", "bias", "temperature")
        return {key: value if key in kept else spoilt(value, key) for key, value in record.items()}
    if isinstance(record, list):
        return [record[0], *(spoilt(one) for one in record[1:])] if name == "within" else [spoilt(one) for one in record]
    return NAN if isinstance(record, int | float) and not isinstance(record, bool) else record


def test_a_point_that_is_no_number_is_left_out_of_a_figure() -> None:
    whole = Plot("x", [Line("a", [(1, 0.5), (2, 0.25)], [(1, 0.1, 0.9)])])
    gap = Plot("x", [Line("a", [(1, 0.5), (2, NAN), (2, 0.25), (3, None)], [(1, 0.1, 0.9), (2, None, 1.0)])])  # type: ignore[list-item]
    assert figures([whole], "f") == figures([gap], "f")
    assert figures([Plot("x", [Line("a", [(1, NAN)])])], "f") == []


@pytest.mark.parametrize("ends", [None, [-0.1, 0.2]])
def test_too_few_problems_are_not_decided(ends: Any) -> None:
    one = {"round": 1, "split": "test", "group": "all", "before": "base rewind", "after": "sft rewind", "difference": 0.5}
    said = in_words(one | {"ci95": ends, "mcnemar_p": 0.5, "gained": 2, "lost": 0, "n": 4}).replace(NBSP, " ")
    assert said.endswith("not decided at this n.") and ("too few problems for an interval" in said) == (ends is None)
