"""Calibration: every point is what a decode with that setting gives, the best is told, and nothing is written half."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.decode import HfDecoder
from actors.engines import Completion
from pipeline import calibrate
from pipeline.calibrate import STAGES, SWEEPS, Point, best_of, main, table_of
from pipeline.config import DecodeSettings, EngineSettings, EvaluateSettings, Settings
from pipeline.config import UndoSettings as Undo
from pipeline.metrics import figures
from pipeline.settings_file import dump_settings
from pipeline.stages.io import Codec
from pipeline.stages.measured import evaluated, evaluation_decoding, requests_of
from pipeline.store import Store
from tests.pipeline.saved import CONTEXT, PROBLEMS, save_problems_and_models

DEV = [problem for problem in PROBLEMS if problem.split == "dev"]
SETTINGS = Settings(
    engine=EngineSettings(kind="hf", max_prompt=400, max_num_seqs=8),
    decode=DecodeSettings(max_undos=6, max_undos_per_state=3),
    evaluate=EvaluateSettings(max_tokens=24),
    undo=Undo(unit="step"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(dump_settings(SETTINGS))
    store = Store(folder)
    save_problems_and_models({"problems": store.path(0, "problems"), "base": store.path(0, "base"), "sft": store.path(1, "sft")})
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs without manifests, and grids of two values."""
    monkeypatch.setattr(Store, "check", lambda self, round, stage: None if self.path(round, stage).is_dir() else "missing")
    for name, values in (("threshold", (0.002, 0.01)), ("bias", (0.0, 4.0)), ("probability", (0.05, 0.5))):
        monkeypatch.setitem(SWEEPS, name, replace(SWEEPS[name], values=values))


def point(value: float | None, accuracy: float, tokens: float) -> Point:
    row: dict[str, Any] = {"accuracy": accuracy, "tokens_per_problem": tokens, "ci95": [0, 1], "n": 4}
    row |= {"spurious_undo_rate": 0.25, "undo_rate": 0.5}
    return Point(value, row, row | {"n": 0}, row)


def test_the_best_is_the_most_accurate_and_then_the_cheapest() -> None:
    points = [point(0.1, 0.5, 20), point(0.2, 0.75, 40), point(0.3, 0.75, 30), point(0.4, 0.25, 10)]
    assert best_of(points).value == 0.3
    lines = table_of("entropy", point(None, 0.5, 9), points)
    assert lines[0] == "decode.signal.threshold (decode.signal.kind=entropy)"
    assert [line.split()[0] for line in lines[1:]] == ["value", "forbidden", "0.1", "0.2", "0.3", "0.4"]
    assert [line.endswith("<- best") for line in lines[1:]] == [False] * 4 + [True, False]
    assert lines[2].split() == "forbidden 0.500 0.000 .. 1.000 – 0.500 0.250 0.500 9.0".split()


def test_every_point_is_a_decode_with_that_setting(run: Path, few: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--sweep", "threshold", "--sweep", "probability", "--sweep", "bias", "evaluate.dev=6"]) == 0
    found, out = json.loads((run / "calibration.json").read_text()), capsys.readouterr().out
    codec = Codec(run / "1" / "sft", SETTINGS.undo, SETTINGS.base.prompt)
    chosen = [DEV[i * len(DEV) // 6] for i in range(6)]
    requests = requests_of(SETTINGS, codec, chosen)
    decoder = HfDecoder.from_folder(run / "1" / "sft", 1, CONTEXT)
    rewind = evaluation_decoding(SETTINGS, codec, "rewind")

    def done(decoding: Any) -> list[Completion]:
        return [Completion(one.ids, (), one.finish) for one in decoder.decode(requests, decoding)]

    first = done(replace(rewind, mode="forbidden"))
    assert (found["n"], found["model"], found["split"], set(found["sweeps"])) == (
        6,
        "sft",
        "dev",
        {"threshold", "bias", "probability"},
    )
    undone = 0.0
    for name, sweep in found["sweeps"].items():
        for entry in sweep["curve"]:
            decoding = SWEEPS[name].apply(rewind, entry["value"])
            cases = zip(chosen, done(decoding), first, strict=True)
            rows = [evaluated("sft", name, decoding.temperature, *case, codec) for case in cases]
            assert entry["all"] == figures(rows)
            undone += entry["all"]["undo_rate"]
        assert f"use: python run.py {sweep['use']}" in out
        assert sweep["use"].endswith(f"{SWEEPS[name].key}={sweep['best']:g}")
    assert undone > 1
    assert found["sweeps"]["bias"]["use"].startswith("decode.threshold=null decode.undo_bias=")


@pytest.mark.parametrize(("model", "place"), [("dpo", "dpo"), ("grpo", "grpo"), ("grpo_control", "grpo/control")])
def test_every_model_that_a_run_can_make_is_calibrated(
    model: str, place: str, run: Path, few: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--model", model, "--sweep", "threshold"]) == 1
    assert f"1/{STAGES[model]}: missing" in capsys.readouterr().err
    folder = run / "1" / place
    shutil.copytree(run / "1" / "sft", folder)
    loaded: list[Path] = []
    load = HfDecoder.from_folder
    monkeypatch.setattr(HfDecoder, "from_folder", lambda where, *more: loaded.append(where) or load(where, *more))
    try:
        assert main([str(run), "--model", model, "--sweep", "threshold", "evaluate.dev=2"]) == 0
    finally:
        shutil.rmtree(run / "1" / STAGES[model])
    assert loaded == [folder] and json.loads((run / "calibration.json").read_text())["model"] == model


def test_the_settings_that_are_named_exist() -> None:
    for sweep in SWEEPS.values():
        for value in sweep.values:
            given: dict[str, Any] = {}
            for text in (*sweep.with_also.split(), f"{sweep.key}={value}"):
                path, _, what = text.partition("=")
                *parents, last = path.split(".")
                at = given
                for parent in parents:
                    at = at.setdefault(parent, {})
                at[last] = None if what == "null" else float(what) if last != "kind" else what
            Settings.model_validate(given)


def test_what_cannot_be_calibrated_is_one_line(run: Path, few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "calibration.json").read_bytes() if (run / "calibration.json").exists() else None
    for arguments, code, message in (
        ([str(tmp_path)], 2, "no configuration file"),
        ([str(run), "--round", "2"], 1, "2/sft: missing"),
        ([str(run), "--model", "clean_control"], 1, "sft.control=false"),
        ([str(run), "decode.threshold=2"], 2, "decode.threshold (set in the command line)"),
        ([str(run), "engine.max_prompt=1"], 1, "no dev prompt has at most engine.max_prompt=1 tokens"),
    ):
        assert main(arguments) == code
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    for arguments in ([str(run), "--problems", "0"], [str(run), "--sweep", "luck"], []):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert ((run / "calibration.json").read_bytes() if before else None) == before


def test_a_failed_decode_leaves_the_old_file(run: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    target = run / "calibration.json"
    target.write_text("old")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "calibrate", stop)
    assert main([str(run)]) == 130
    assert target.read_text() == "old"
