"""The stage report: what it reads of a run, and what stands beside the page."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from datasets import Features

from pipeline.card import GROUPS, model_card
from pipeline.config import Settings
from pipeline.metrics import summarise
from pipeline.stages import evaluate, judge, problems, rollouts, traces
from pipeline.stages import report as stage
from pipeline.stages.base import train_tokenizer
from pipeline.stages.io import Codec, write_json, write_rows
from pipeline.stages.stage import Context
from tests.pipeline.reported import (
    evaluated,
    parsed,
    probed,
)

QUESTIONS = {
    "boxes": "Pens come in boxes of 3 and boxes of 5. Ada bought 47 pens in 11 boxes. How many boxes of 5 did she buy?",
    "chain": "Tom has 12 <b>apples</b> & buys 4 bags of 6. How many apples has he now?",
}
WRITTEN = {
    "boxes": [
        "try 5 boxes of 5: 5*5=<<5*5=25>>25, 6*3=<<6*3=18>>18, 25+18=43\n",
        "try 7 boxes of 5: 7*5=35, 4*3=12, 35+12=47\n#### 7",
    ],
    "chain": ["4*6=26\n", "4*6=24\n12+24=36\n#### 36"],
}


def stage_inputs(folder: Path, settings: Settings) -> dict[str, Path]:
    """Outputs of the earlier stages, made by hand."""
    base = folder / "base"
    tokenizer = train_tokenizer([*QUESTIONS.values(), *(text for pair in WRITTEN.values() for text in pair)], 320)
    tokenizer.add_special_tokens({"additional_special_tokens": [settings.undo.token]})
    tokenizer.save_pretrained(base)
    write_json(
        {"losses": [[20, 2.5], [40, 1.25]], "checks": [[40, 0.5]], "kept_step": 40, "step": 40, "tokens": 900}, base / "curve.json"
    )
    codec = Codec(base, settings.undo, settings.base.prompt)

    def rows(name: str, some: list[dict[str, Any]], features: Features) -> Path:
        write_rows(some, features, folder / name)
        return folder / name

    known = [
        {"id": f"made/{split}/{family}", "split": split, "family": family, "hindsight": family == "boxes"}
        | {"question": question, "solution": "#### 7", "answer": "7", "params": "{}"}
        for split in ("train", "dev", "test")
        for family, question in QUESTIONS.items()
    ]
    judged = [
        dict.fromkeys(judge.FEATURES, "")
        | {"id": f"{family}#{i}", "problem": f"made/train/{family}", "correct": i == 0, "try_start": start, "steps": []}
        | {"error_step": min(start, 0), "error_chars": [-1, -1] if start < 0 else [0, 8], "error_tokens": [-1, -1]}
        | {"try_wrong": [], "try_own": False, "later_errors": [], "continuation": [], "error_kind": "choice", "method": "exact"}
        for family in QUESTIONS
        for i, start in enumerate((-1, 0, 0, -1))
    ]
    made = [
        {"problem": "made/train/boxes", "family": "boxes", "source": source, "correction": "gold", "rollouts": used}
        | {"errors": len(used), "difficulty": undone, "input_ids": [1] * tokens, "roles": [0], "id": "", "split": "train"}
        | {"kinds": [], "undos": len(used), "partner": 0}
        for source, used, undone, tokens in (("self", ["boxes#1"], 5, 300), ("clean", [], 0, 64))
    ]
    sampled = [
        {
            "id": row["id"],
            "problem": row["problem"],
            "prompt_ids": [1],
            "token_ids": codec.encode(WRITTEN[row["id"].split("#")[0]][0]),
        }
        | {"logprobs": [], "finish": "stop", "hot": False, "version": ""}
        for row in judged
    ]
    done = []
    for row in evaluated(each=1):
        if row.split == "ood" or row.family not in QUESTIONS:
            continue
        wrong, right = WRITTEN[row.family]
        ids = (*codec.encode(wrong), codec.rule.undo_id, *codec.solution_ids(right))
        right_now = row.family == "boxes" and row.mode == "rewind"
        done.append(replace(row, problem=f"made/{row.split}/{row.family}", undos=1, correct=right_now, token_ids=ids))
    found = {
        "problems": rows("problems", known, problems.FEATURES),
        "base": base,
        "rollouts-1": rows("rollouts", sampled, rollouts.FEATURES),
        "judge-1": rows("judge", judged, judge.FEATURES),
        "traces-1": rows("traces", made, traces.FEATURES),
        "sft-1": folder / "sft",
        "evaluate-1": rows("evaluate", [asdict(row) for row in done], evaluate.ROWS),
    }
    write_json([{"filter": "length", "source": "self", "count": 4}], folder / "traces" / "removed.json")
    (folder / "sft").mkdir()
    write_json({"losses": [[5, 0.5]], "checks": [], "step": 5, "tokens": 80}, folder / "sft" / "curve.json")
    write_json(
        summarise(done, probed(), 1, "rewind") | {"accepted": True, "mode": "rewind", "dev": None},
        folder / "evaluate" / "metrics.json",
    )
    return found


class _Terminal:
    def stage(self, *_: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return SimpleNamespace(update=lambda *_: None)

    def __exit__(self, *_: object) -> None:
        return None


class TestStage:
    @pytest.fixture(scope="class")
    def written(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
        folder = tmp_path_factory.mktemp("report")
        settings = Settings()
        inputs = stage_inputs(folder, settings)
        counts: dict[str, int] = {}
        for name in ("out", "again"):
            (folder / name).mkdir()
            context = SimpleNamespace(
                settings=settings, round=1, out=folder / name, inputs=inputs, counts=counts, terminal=_Terminal()
            )
            stage.run(cast(Context, context))
        return folder, counts

    def test_page_shows_decoded_rollouts_and_raw_metrics_stand_beside_it(self, written: tuple[Path, dict[str, int]]) -> None:
        folder, counts = written
        html = (folder / "out" / "report.html").read_text()
        parsed(html)
        assert counts["rows"] == 2 and html.count("✓ right") == 1  # of the main mode alone
        assert "25+18=43\n</del>" in html and "&lt;&lt;5*5=25&gt;&gt;25" in html
        assert "12 &lt;b&gt;apples&lt;/b&gt; &amp; buys" in html
        assert "&lt;|end|&gt;" not in html
        found = json.loads((folder / "out" / "metrics.json").read_text())
        assert found["run"] == "tiny" and found["rounds"] == [{"round": 1, "accepted": True, "mode": "rewind", "dev": None}]
        assert {row["model"] for row in found["evaluations"]} == {"base", "clean_control", "sft"}
        assert found["counts"]["problems"] == {"train": 2, "dev": 2, "test": 2}

    def test_the_card_says_what_was_trained_on_what_and_how_it_did(self, written: tuple[Path, dict[str, int]]) -> None:
        card = (written[0] / "out" / "README.md").read_text()
        metrics = json.loads((written[0] / "out" / "metrics.json").read_text())
        rows = [row for row in metrics["evaluations"] if row["split"] == "test" and row["group"] in GROUPS and row["n"]]
        assert rows and all(f"| {row['model']} | {row['mode']} | 0 | {row['group']} | {row['n']} |" in card for row in rows)
        assert "round 1 of 1, seed 0" in card and "- Training run `sft-1`: 5 steps, 80 tokens." in card
        metrics["rounds"][0]["accepted"] = False
        refused = model_card(Settings(), metrics, "base")
        assert "None of 1 rounds was accepted" in refused and "masked fine-tuning" not in refused

    def test_equal_inputs_give_equal_bytes(self, written: tuple[Path, dict[str, int]]) -> None:
        for name in ("report.html", "metrics.json", "README.md"):
            assert (written[0] / "out" / name).read_bytes() == (written[0] / "again" / name).read_bytes()

    def test_rollouts_are_counted_on_their_way_into_traces(self, written: tuple[Path, dict[str, int]]) -> None:
        tables = json.loads((written[0] / "out" / "metrics.json").read_text())["counts"]["tables"]
        assert tables["round 1: rollouts and what became of them"] == {
            "rollouts": 8,
            "right": 2,
            "wrong": 6,
            "located": 4,
            "in traces": 1,
            "not used": 3,
            "not located": 2,
        }
        made = {"traces": 1, "clean rows": 1, "source self": 1, "correction gold": 1, "1 error": 1}
        assert tables["round 1: training rows"] == made
        sizes = {name: count for name, count in tables["round 1: training rows by source"].items() if count}
        assert sizes == {"rows": 2, "8 or fewer undone": 1, "64 or fewer tokens": 1, "over 256 tokens": 1}
        assert tables["round 1: left out by filter"] == {"length": 4}

    def test_first_errors_are_marked_and_counted_by_step(self, written: tuple[Path, dict[str, int]]) -> None:
        html = (written[0] / "out" / "report.html").read_text()
        assert html.count("<mark>") == 4 and "step 1: choice" in html
        first = WRITTEN["boxes"][0]
        assert f"<mark>{first[:8]}</mark>{first[8:].split('<')[0]}" in html
        assert "round 1: first wrong step" in html and "round 1: kinds of first error, by method" in html

    def test_quota_is_even_and_fills_up_where_a_group_is_short(self) -> None:
        plenty = dict.fromkeys(stage.GROUPS, 1000)
        assert list(stage._quota(plenty, 50).values()) == [15, 15, 15, 5]
        assert list(stage._quota(plenty | {stage.GROUPS[1]: 2}, 20).values()) == [8, 2, 8, 2]
        assert list(stage._quota(dict.fromkeys(stage.GROUPS, 1), 50).values()) == [1, 1, 1, 1]
        assert sum(stage._quota(plenty, 0).values()) == 0
