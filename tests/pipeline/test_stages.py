"""Parts of stages that no engine is needed for: prompts that do not fit the context, and which traces a round trains on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import ScratchModel, Settings
from pipeline.stages import sft
from pipeline.stages.base import new_model, train_tokenizer
from pipeline.stages.io import write_rows
from pipeline.stages.rollouts import context_length, within_context
from pipeline.stages.stage import StageError
from pipeline.stages.traces import FEATURES
from pipeline.tasks.problem import Problem


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    new_model(ScratchModel(layers=1, width=32, heads=2, vocab=300, context=100), tokenizer, 0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def context(model: Path, warnings: list[str], **settings: Any) -> Any:
    terminal = SimpleNamespace(warn=warnings.append)
    return SimpleNamespace(settings=Settings.model_validate(settings), inputs={"model": model}, terminal=terminal)


def problems(count: int) -> list[Problem]:
    return [Problem(f"p{i}", "train", "gsm8k", False, "", "", "1", "{}") for i in range(count)]


def prompts(*lengths: int) -> list[list[int]]:
    return [[1] * length for length in lengths]


def test_prompts_longer_than_the_context_are_reported_and_left_out(model: Path) -> None:
    """The model sees 100 tokens and a completion may take 60 of them."""
    warnings: list[str] = []
    some = context(model, warnings, rollouts={"max_tokens": 60}, evaluate={"max_tokens": 50})
    assert context_length(some) == 100
    assert within_context(some, problems(5), prompts(40, 41, 1, 90, 0)) == ([0, 2], 3)
    assert warnings == ["3 of 5 prompts are longer than 40 tokens and were left out; the longest, p3, has 90 (engine.max_prompt)"]


def test_prompts_longer_than_the_setting_allows(model: Path) -> None:
    warnings: list[str] = []
    some = context(model, warnings, rollouts={"max_tokens": 60}, evaluate={"max_tokens": 50}, engine={"max_prompt": 30})
    assert within_context(some, problems(2), prompts(30, 31)) == ([0], 1)
    assert within_context(some, problems(1), prompts(30)) == ([0], 0)
    assert len(warnings) == 1


def test_no_prompt_fits(model: Path) -> None:
    some = context(model, [], rollouts={"max_tokens": 90}, evaluate={"max_tokens": 50})
    with pytest.raises(StageError, match=r"every prompt is longer than the 10 tokens that max_tokens leaves.*engine\.max_prompt"):
        within_context(some, problems(2), prompts(11, 12))


@pytest.mark.parametrize(("replay", "seen"), [(True, [1, 2, 3]), (False, [3])])
def test_replay_keeps_the_traces_of_earlier_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replay: bool, seen: list[int]
) -> None:
    inputs = {}
    for round in (1, 2, 3):
        row = dict.fromkeys(("problem", "family", "source", "correction"), "") | {"rollouts": [], "errors": 1, "difficulty": 1}
        write_rows([row | {"input_ids": [round], "roles": [0], "labels": [round]}], FEATURES, tmp_path / str(round))
        inputs[f"traces-{round}"] = tmp_path / str(round)
    trained: list[int] = []

    def train(context: Any, name: str, examples: Any, target: Path) -> Any:
        trained.extend(example.input_ids[0] for example in examples)
        return SimpleNamespace(step=1, tokens=1, target_tokens=1, left_out=0)

    monkeypatch.setattr(sft, "_train", train)
    settings = Settings.model_validate({"traces": {"replay": replay}, "sft": {"control": False}})
    sft.run(SimpleNamespace(settings=settings, round=3, inputs=inputs, out=tmp_path, counts={}))  # type: ignore[arg-type]
    assert trained == seen
