"""Which stages a run has: rounds follow one another until one of the stop rules says that it is enough."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.config import RunSettings, Settings
from pipeline.runner import BESIDE, Pipeline, Selection
from pipeline.stages.graph import steps
from pipeline.store import Store
from pipeline.telemetry import Terminal

ROOT = Path(__file__).resolve().parents[2]


class Said(Terminal):
    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)


def rounds_of(folder: Path, accepted: list[tuple[bool, float]], **run: Any) -> tuple[list[tuple[int, str]], list[str]]:
    """(evaluations and the report of a run, what was said), where each round ends as given: accepted, dev accuracy."""
    terminal = Said()
    pipeline = Pipeline(Settings(run=RunSettings(name="a", rounds=len(accepted), **run)), folder, Selection(), terminal)
    seen = []
    for round, stage in pipeline._steps():
        if stage.name in ("evaluate", "report"):
            seen.append((round, stage.name))
        if stage.name == "evaluate":
            out = folder / str(round) / "evaluate"
            out.mkdir(parents=True)
            yes, after = accepted[round - 1]
            (out / "metrics.json").write_text(json.dumps({"accepted": yes, "dev": {"after": after}}))
    return seen, terminal.lines


def ran(rounds: int) -> list[tuple[int, str]]:
    return [*((round, "evaluate") for round in range(1, rounds + 1)), (rounds, "report")]


def test_rounds_go_on_to_the_last(tmp_path: Path) -> None:
    assert rounds_of(tmp_path, [(True, 0.5), (False, 0.4), (True, 0.6), (False, 0.1)]) == (ran(4), [])


def test_refused_rounds_in_a_row_end_it(tmp_path: Path) -> None:
    found, said = rounds_of(tmp_path, [(False, 0.4), (True, 0.5), (False, 0.4), (False, 0.4), (True, 0.9)])
    assert found == ran(4) and said == ["no other round after round 4: 2 in a row were refused (run.patience)"]


def test_the_first_refusal_can_end_it(tmp_path: Path) -> None:
    assert rounds_of(tmp_path, [(True, 0.5), (False, 0.4), (True, 0.6)], patience=1)[0] == ran(2)


def test_an_accuracy_that_is_enough_ends_it(tmp_path: Path) -> None:
    found, said = rounds_of(tmp_path, [(True, 0.5), (False, 0.95), (True, 0.9), (True, 0.9)], enough=0.9)
    assert found == ran(3) and said == ["no other round after round 3: dev accuracy is 0.900 (run.enough)"]


def test_a_plan_knows_no_end_of_a_round_that_is_still_to_run(tmp_path: Path) -> None:
    """The metrics of an evaluation that will be made anew say nothing."""
    out = tmp_path / "1" / "evaluate"
    out.mkdir(parents=True)
    (out / "metrics.json").write_text(json.dumps({"accepted": True, "dev": {"after": 1.0}}))
    settings = Settings(run=RunSettings(name="a", rounds=2, enough=0.9))
    for rebuilt, last in ((set[tuple[int, str]](), 1), ({(1, "evaluate")}, 2)):
        planned = list(Pipeline(settings, tmp_path, Selection(), Said())._steps(rebuilt))
        assert planned[-1][0] == last and planned[-1][1].name == "report"


def test_the_exported_model_has_the_adapter_of_lora_beside_it(tmp_path: Path) -> None:
    """Weights, adapter, card; not the control, the curve or the manifest."""
    store = Store(tmp_path)
    outputs: dict[str, dict[str, str]] = {
        "sft": {"model.safetensors": "w", "curve.json": "{}", "adapter/adapter_model.safetensors": "a", "control/config.json": ""},
        "evaluate": {"metrics.json": '{"accepted": true}'},
        "report": {**dict.fromkeys(BESIDE, "page"), "README.md": "card", "retract.json": "{}"},
    }
    for stage, files in outputs.items():
        with store.write(1, stage, key="k", settings={}, inputs={}, seed=0) as draft:
            for name, content in files.items():
                (draft.path / name).parent.mkdir(exist_ok=True)
                (draft.path / name).write_text(content)
    pipeline = Pipeline(Settings(run=RunSettings(name="a")), tmp_path, Selection(), Said())
    assert pipeline.publish() == tmp_path / "report.html"
    model = tmp_path / "model"
    found = {str(file.relative_to(model)) for file in model.rglob("*") if file.is_file()}
    assert found == {"model.safetensors", "adapter/adapter_model.safetensors", "README.md", "retract.json"}


def test_from_round_leaves_what_is_before() -> None:
    later = Selection(first_round=2)
    assert not later.holds(0, "base") and not later.holds(1, "sft")
    assert later.holds(2, "rollouts") and later.holds(2, "report")
    assert Selection().holds(0, "base") and not Selection(("sft",), first_round=2).holds(2, "evaluate")


def test_from_round_is_within_the_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--from-round", "3", "run.rounds=2"]) == 2
    assert "--from-round must lie in 1 .. run.rounds = 2, is 3" in capsys.readouterr().err


def test_where_the_stages_that_not_every_run_has_stand() -> None:
    """Search before traces or behind sft; verifiers, preferences and reinforcement learning behind, each on what the last left."""
    asked = {
        "search": {"problems": 1},
        "prm": {"steps": 1, "labels": "both"},
        "dpo": {"steps": 1, "pairs": "search"},
        "grpo": {"steps": 1, "reward": {"process_model": True}},
        "traces": {"mix": {"search": 1}},
        "run": {"rounds": 2},
    }
    for model, order in (
        ("start", ["search", "traces", "sft", "prm", "dpo", "grpo", "evaluate"]),
        ("sft", ["traces", "sft", "search", "prm", "dpo", "grpo", "evaluate"]),
    ):
        settings = Settings.model_validate(asked | {"search": {"problems": 1, "model": model}})
        second = {stage.name: stage for round, stage in steps(settings) if round == 2}
        assert [name for name in second if name not in ("rollouts", "judge", "report")] == order
        read = {name: {one.name: one.round for one in stage.inputs(2)} for name, stage in second.items()}
        assert read["traces"]["search"] == (2 if model == "start" else 1)
        assert read["prm"]["search"] == read["dpo"]["search"] == read["grpo"]["prm"] == read["grpo"]["dpo"] == 2
        assert {"prm", "dpo", "grpo"} <= read["evaluate"].keys()
        assert not {"rollouts", "judge"} & read["dpo"].keys() and ("sft" in read["search"]) == (model == "sft")
    plain = [stage.name for _, stage in steps(Settings())]
    assert plain == ["problems", "base", "rollouts", "judge", "traces", "sft", "evaluate", "report"]


def test_a_process_ends_with_its_code_and_is_not_taken_down() -> None:
    """Threads that are still at work find all of the interpreter there to the end."""
    script = """
import atexit, sys
from pipeline.cli import leave
class Kept:
    def __del__(self): print("taken down")
kept, said = Kept(), sys.stderr.write("also kept\\n")
atexit.register(print, "at its end")
sys.stdout.write("all of it ")
leave(3)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (3, "all of it at its end\n", "also kept\n")
