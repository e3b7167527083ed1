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
from tests.actors.trained import prepared, thirty_traces

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
