"""What a learner refuses, in one line, before it writes anything; and that compiled layers are compiled once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learner import Curve, TrainingError, fit
from pipeline.backtrack.curriculum import Schedule
from pipeline.backtrack.undo import UndoRule
from pipeline.config import RunSettings, Settings, SftSettings
from pipeline.runner import Pipeline, Selection
from pipeline.telemetry import Terminal
from tests.actors.trained import content, prepared, thirty_traces

SMALL = SftSettings(steps=4, rows=2, row_tokens=64, log_every=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    prepared(folder)
    return folder


def test_what_cannot_be_trained_on_is_one_line(source: Path, tmp_path: Path) -> None:
    data = thirty_traces(source)
    long = [replace(trace, ids=trace.ids * 40, roles=trace.roles * 40) for trace in data.traces]
    cases = [
        (replace(data, rule=UndoRule(9999, "all")), "has no token 9999, which traces have as the undo token"),
        (replace(data, traces=[]), "no example fits into a row of 64 tokens: raise row_tokens"),
        (replace(data, traces=long), "no example fits into a row of 64 tokens: raise row_tokens"),
        (
            replace(data, traces=data.traces[1::2], most_undos=Schedule(((0, 0), (2, 9)))),
            "sft.most_undos allows no trace at step 0",
        ),
    ]
    for given, said in cases:
        with pytest.raises(TrainingError) as caught:
            fit(source, tmp_path / "target", given, SMALL, 0, Curve())
        assert said in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "target").exists()


def test_checkpoints_of_another_configuration_are_not_gone_on_from(tmp_path: Path) -> None:
    """They are removed when the output is built with other settings, or anew by --force; those of this very output stay."""
    folder = tmp_path / ".resume" / "1-sft"

    def kept(selection: Selection) -> set[str]:
        for key in ("mine", "other"):
            (folder / key / "sft" / "checkpoint-2").mkdir(parents=True, exist_ok=True)
        pipeline = Pipeline(Settings(run=RunSettings(name="a")), tmp_path, selection, Terminal(None))
        pipeline._forget_checkpoints(folder / "mine")
        return {path.name for path in folder.iterdir()}

    assert kept(Selection()) == {"mine"}
    assert kept(Selection(force=True)) == set()


def test_checkpoints_of_another_training_are_refused(source: Path, tmp_path: Path) -> None:
    """Whoever calls the learner with a folder of their own: by setting, by seed, by data; also where that training has ended."""
    data, kept = thirty_traces(source), tmp_path / "kept"
    settings = SMALL.model_copy(update={"checkpoint_every": 2})
    fit(source, tmp_path / "first", data, settings, 0, Curve(), resume=kept)
    other = settings.model_copy(update={"lr": 0.5})
    for asked, seed, given, said in (
        (other, 0, data, "lr was 0.001, is 0.5"),
        (settings, 7, data, "seed was 0, is 7"),
        (settings, 0, replace(data, traces=data.traces[:20]), "traces was 30, is 20"),
    ):
        with pytest.raises(TrainingError) as caught:
            fit(source, tmp_path / "target", given, asked, seed, Curve(), resume=kept)
        assert str(caught.value) == f"the checkpoints in {kept} are of another training: {said}"
        assert not (tmp_path / "target").exists()
    fit(source, tmp_path / "again", data, settings.model_copy(update={"checkpoint_every": 3}), 0, Curve(), resume=kept)
    assert content(tmp_path / "again") == content(tmp_path / "first")


def test_a_model_that_cannot_be_trained_that_way_is_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lora(*_: Any) -> Any:
        raise ValueError("a head with a bias cannot be trained by rows: peft leaves the bias out")

    monkeypatch.setattr("actors.learner.prepare", no_lora)
    with pytest.raises(TrainingError, match=rf"^the model of {source} cannot be trained: a head with a bias"):
        fit(source, tmp_path / "target", thirty_traces(source), SMALL, 0, Curve())


def test_one_graph_serves_batches_with_any_number_of_targets(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []
    compiled = torch.nn.Module.compile

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled(self, backend=counted))
    plain = fit(source, tmp_path / "plain", thirty_traces(source), SMALL, 0, Curve())
    fast = fit(source, tmp_path / "fast", thirty_traces(source), SMALL.model_copy(update={"compile": True}), 0, Curve())
    assert len(graphs) == 1
    assert [loss for _, loss in fast.losses] == pytest.approx([loss for _, loss in plain.losses], rel=1e-6)
