"""Parts of stages that no engine is needed for: prompts that do not fit the context, and which traces a round trains on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Features, List, Value

from actors.learner import Curve
from actors.packing import TrainingSet
from pipeline.backtrack.curriculum import Schedule
from pipeline.backtrack.targets import Form, Targets, Weights
from pipeline.backtrack.trace import Role, Trace
from pipeline.config import ScratchModel, Settings, UndoSettings
from pipeline.stages import sft
from pipeline.stages.base import new_model, train_tokenizer
from pipeline.stages.graph import MODEL, NAMES, STAGES
from pipeline.stages.io import Codec, Text, read_rows, write_rows
from pipeline.stages.problems import FEATURES as PROBLEMS
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


def trace_row(number: int, **more: Any) -> dict[str, Any]:
    """A row of the traces stage: one prompt token, one token of its own."""
    text = dict.fromkeys(("id", "problem", "family", "split", "source", "correction"), "")
    counts = dict.fromkeys(("errors", "undos", "difficulty"), 0) | {"partner": -1}
    roles = [int(Role.PROMPT), int(Role.CORRECTION)]
    return text | counts | {"rollouts": [], "kinds": [], "input_ids": [5, number], "roles": roles} | more


@pytest.fixture
def with_undo(model: Path) -> Path:
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    tokenizer.add_tokens([UndoSettings().token], special_tokens=True)
    tokenizer.save_pretrained(model)
    return model


class Trained:
    """Stands for the learner: keeps what it was asked to train on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sets: dict[str, TrainingSet] = {}
        monkeypatch.setattr(sft, "train", self._train)

    def _train(self, context: Any, name: str, data: TrainingSet, target: Path, *_: Any) -> Curve:
        self.sets[name] = data
        target.mkdir(exist_ok=True)
        return Curve(step=1, tokens=1, target_tokens=1)


@pytest.mark.parametrize(("replay", "seen"), [(True, [1, 2, 3]), (False, [3])])
def test_replay_keeps_the_traces_of_earlier_rounds(
    tmp_path: Path, with_undo: Path, monkeypatch: pytest.MonkeyPatch, replay: bool, seen: list[int]
) -> None:
    inputs = {"model": with_undo}
    for round in (1, 2, 3):
        write_rows([trace_row(round)], FEATURES, tmp_path / str(round))
        inputs[f"traces-{round}"] = tmp_path / str(round)
    trained = Trained(monkeypatch)
    settings = Settings.model_validate({"traces": {"replay": replay}, "sft": {"control": False, "checks": {"every": None}}})
    sft.run(SimpleNamespace(settings=settings, round=3, inputs=inputs, out=tmp_path, resume=tmp_path, counts={}))  # type: ignore[arg-type]
    (data,) = trained.sets.values()
    assert [trace.ids for trace in data.traces] == [(5, token) for token in seen]
    assert {trace.prompt_length for trace in data.traces} == {1}


@pytest.mark.parametrize(("init", "folder"), [("previous", "new"), ("base", "old")])
def test_a_round_trains_the_newest_model_or_the_base_again(init: str, folder: str) -> None:
    settings = Settings.model_validate({"sft": {"init": init}})
    context = SimpleNamespace(settings=settings, inputs={"model": Path("new"), "base": Path("old")})
    assert sft.start(context) == Path(folder)  # type: ignore[arg-type]
    assert {(one.name, one.stage) for one in STAGES[NAMES.index("sft")].inputs(3)} >= {("model", MODEL), ("base", "base")}


def test_traces_are_taught_as_the_settings_say(tmp_path: Path, with_undo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the clean control has the gold solutions of training problems alone, in the plain form."""
    undo_id = Codec(with_undo, UndoSettings(), "{question}").rule.undo_id
    ids, roles = [5, 6, undo_id, 7], [Role.PROMPT, Role.ERROR, Role.UNDO, Role.CORRECTION]
    write_rows([trace_row(1, input_ids=ids, roles=list(map(int, roles)))], FEATURES, tmp_path / "traces")
    known = [problem for problem in problems(3)] + [replace(problems(1)[0], id="held out", split="test")]
    write_rows([vars(problem) for problem in known], PROBLEMS, tmp_path / "problems")
    trained = Trained(monkeypatch)
    settings = Settings.model_validate(
        {
            "undo": {"unit": "token"},
            "sft": {
                "form": "hard", "hide_undos": True, "positions": "depth", "mask": "span", "detect_at": "first",
                "train_prompt": True, "together": False, "weights": {"undo": 2.0}, "most_undos": [[0, 1], [5, 3]],
                "in_context": True, "reward_weight": {"beta": 0.5}, "checks": {"every": None},
            },
        }
    )  # fmt: skip
    inputs = {"model": with_undo, "traces-1": tmp_path / "traces", "problems": tmp_path / "problems"}
    counts: dict[str, int] = {}
    sft.run(SimpleNamespace(settings=settings, round=1, inputs=inputs, out=tmp_path, resume=tmp_path, counts=counts))  # type: ignore[arg-type]
    data, control = trained.sets["sft"], trained.sets["sft/control"]
    assert data.traces == [Trace(tuple(ids), tuple(roles))]
    assert (data.rule.undo_id, data.rule.unit) == (undo_id, "token")
    assert data.targets == Targets("span", "first", True, Weights(undo=2.0))
    assert data.form == Form("hard", "deferred", True, "depth") and not data.together
    assert data.weights == [1.0]  # the only trace is as good as their mean
    assert data.most_undos == Schedule(((0, 1), (5, 3)))
    searching = trained.sets["sft/in_context"]  # the same lesson, but for what is seen of failed tries
    assert searching.form == Form("soft", "deferred", False, "kept")
    assert (searching.traces, searching.targets, searching.most_undos) == (data.traces, data.targets, data.most_undos)
    assert len(control.traces) == counts["control_rows"] == 3
    assert control.targets == Targets() and control.form == Form() and control.most_undos is None
    assert {role for trace in control.traces for role in trace.roles} == {Role.PROMPT, Role.CORRECTION}


def test_a_sharded_training_is_not_checked_and_says_so(tmp_path: Path, with_undo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before own errors are sampled for nothing: there are no problems here to sample them on."""
    write_rows([trace_row(1)], FEATURES, tmp_path / "traces")
    Trained(monkeypatch)
    asked = {"sft": {"control": False, "fsdp": {}}, "cluster": {"learner_workers": 2}}
    warnings: list[str] = []
    some = context(with_undo, warnings, **asked)
    some.inputs["traces-1"] = tmp_path / "traces"
    some.round, some.out, some.resume, some.counts = 1, tmp_path, tmp_path, {}
    sft.run(some)
    assert warnings == ["sft: no process sees the whole of a sharded model, so sft.checks has no effect"]


@pytest.mark.parametrize("rows", [[], [{"a": "x", "b": [1, 2]}]], ids=["none", "one"])
def test_rows_come_back_as_they_were_written(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    features = Features({"a": Value("string"), "b": List(Value("int32"))})
    write_rows(rows, features, tmp_path / "rows")
    found = read_rows(tmp_path / "rows")
    assert list(found) == rows and found.features == features


def test_the_first_token_of_a_character() -> None:
    """The second character is made of two tokens, of which the first has no characters of its own."""
    text = Text((5, 6, 7, 8), "aéb", ((0, 1), (1, 1), (1, 2), (2, 3)))
    assert [text.token_at(char) for char in range(5)] == [0, 1, 3, 4, 4]
