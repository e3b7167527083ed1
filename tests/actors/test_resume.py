"""A training that is killed at any moment goes on from its last checkpoint and ends with the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from actors.learner import Curve, DevCheck, TrainingError, TreeTrainer, fit
from pipeline.backtrack.curriculum import parse_schedule
from pipeline.config import BaseTraining, SftSettings, TrainSettings
from tests.actors.trained import content, prepared, thirty_traces

STEPS, SAVED_AT = 12, 4
COMMON: dict[str, Any] = {"steps": STEPS, "rows": 2, "row_tokens": 64, "lr": 1e-2, "log_every": 2, "checkpoint_every": SAVED_AT}
KINDS: dict[str, TrainSettings] = {
    "base": BaseTraining(**COMMON, check_every=3, check_problems=4, patience=9),
    "sft": SftSettings(**COMMON, most_undos=[[0, 0], [6, 5]]),
    "lora": SftSettings(**COMMON, trainable="lora"),
}


def train(kind: str, source: Path, target: Path, resume: Path | None) -> Curve:
    settings = KINDS[kind]
    check = DevCheck(((30, 7), (31, 7)), lambda index, text: len(text) % 2 == 0, 4) if kind == "base" else None
    most = None
    if isinstance(settings, SftSettings) and settings.most_undos:
        most = parse_schedule("most", settings.most_undos)
    return fit(source, target, thirty_traces(source, most_undos=most), settings, 0, Curve(), check, resume)


def killed(kind: str, source: Path, target: Path, resume: Path, at: int, where: str) -> None:
    """Train in another process that is killed at a step: before it is taken, or while its checkpoint is being saved."""
    done = subprocess.run(
        [sys.executable, __file__, kind, str(source), str(target), str(resume), str(at), where],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."}, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert not (target / "config.json").exists()


@pytest.mark.parametrize(
    ("kind", "at", "where", "from_step"),
    [("base", 10, "step", 8), ("sft", 8, "save", 4), ("lora", 6, "step", 4), ("sft", 2, "step", 0)],
)
def test_killed_and_gone_on(
    kind: str, at: int, where: str, from_step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, resume = tmp_path / "source", tmp_path / "resume"
    prepared(source)
    whole = train(kind, source, tmp_path / "whole", None)
    killed(kind, source, tmp_path / "again", resume, at, where)
    taken = []
    step = TreeTrainer.training_step
    monkeypatch.setattr(
        TreeTrainer, "training_step", lambda self, *a, **k: taken.append(self.state.global_step) or step(self, *a, **k)
    )
    again = train(kind, source, tmp_path / "again", resume)
    assert taken == list(range(from_step, STEPS))
    assert content(tmp_path / "again") == content(tmp_path / "whole")
    ignored = {"seconds": 0}
    assert json.dumps(asdict(again) | ignored) == json.dumps(asdict(whole) | ignored)


def test_a_finished_training_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage was killed behind it, before its output stood."""
    prepared(tmp_path / "source")
    first = train("sft", tmp_path / "source", tmp_path / "one", tmp_path / "resume")
    monkeypatch.setattr(TreeTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert train("sft", tmp_path / "source", tmp_path / "two", tmp_path / "resume") == first
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_loss_that_is_no_number_names_step_traces_and_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(tmp_path / "source")
    step = TreeTrainer.training_step

    def spoilt(self: Any, model: Any, *given: Any, **more: Any) -> Any:
        if self.state.global_step == 6:
            model.lm_head.weight.data.fill_(float("nan"))
        return step(self, model, *given, **more)

    monkeypatch.setattr(TreeTrainer, "training_step", spoilt)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 7, on traces \d+, .*; the last checkpoint is of step 4$"):
        train("sft", tmp_path / "source", tmp_path / "target", tmp_path / "resume")
    assert not (tmp_path / "target").exists()


def _die(at: int, where: str) -> None:
    """Make this process kill itself, as `kill -9` would."""
    name = "training_step" if where == "step" else "_save_rng_state"
    original = getattr(TreeTrainer, name)

    def patched(self: Any, *given: Any, **more: Any) -> Any:
        if self.state.global_step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *given, **more)

    setattr(TreeTrainer, name, patched)


if __name__ == "__main__":
    kind, source, target, resume, at, where = sys.argv[1:]
    _die(int(at), where)
    train(kind, Path(source), Path(target), Path(resume))
