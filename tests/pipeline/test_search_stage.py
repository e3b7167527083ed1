"""The stage search with a scripted engine in one process: what it writes, what reads it, and where it stands in a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from datasets import load_from_disk

from actors.engines import Completion, Request, Sampling
from actors.prm import ProcessRewardModel
from actors.search import Meter, Searcher
from pipeline.backtrack.undo import apply_undo
from pipeline.config import EngineSettings, RolloutSettings, Settings, TraceSettings
from pipeline.rollout_log import RolloutLog
from pipeline.stages import search
from pipeline.stages.graph import steps
from pipeline.stages.io import Codec
from pipeline.stages.sources import searched_errors
from pipeline.stages.stage import Context, StageError
from tests.pipeline.saved import PROBLEMS, save_problems_and_models
from verifiers.tasks import judge_of

TRAIN = [one for one in PROBLEMS if one.split == "train"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("search")
    return save_problems_and_models({name: root / name for name in ("problems", "model")})


def settings_of(**asked: Any) -> Settings:
    return Settings.model_validate(
        {
            "engine": EngineSettings(kind="hf", max_prompt=400).model_dump(),
            "rollouts": RolloutSettings(max_tokens=256).model_dump(),
            "evaluate": {"max_tokens": 100},
            "base": {"scratch": {"context": 4096}},
            "search": {"problems": 100, "max_tokens": 256, "simulations": 8} | asked,
        }
    )


class Scripted:
    """Writes the gold solution with a wrong last line, and names the right way where the two part."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.ways = {codec.prompt_ids(one): (codec.solution_ids(one.solution), self._wrong(one.solution)) for one in TRAIN}

    def _wrong(self, solution: str) -> tuple[int, ...]:
        before, _, answer = solution.rpartition("#### ")
        return self.codec.solution_ids(f"{before}#### {int(answer) + 1}")

    def shared(self) -> Scripted:
        return self

    def generate(self, requests: Sequence[Request], sampling: Sampling, batch: int) -> tuple[list[Completion], str]:
        return [self._one(request.prompt_ids, sampling.also_stop) for request in requests], "v"

    def _one(self, ids: tuple[int, ...], also_stop: Sequence[int]) -> Completion:
        prompt = next(prompt for prompt in self.ways if ids[: len(prompt)] == prompt)
        gold, wrong = self.ways[prompt]
        given = ids[len(prompt) :]
        on_gold = given == gold[: len(given)] and given != wrong[: len(given)]
        way = gold if on_gold else wrong
        top = []
        for place in range(len(given), len(way)):
            parts = not on_gold and way[:place] == gold[:place] and way[place] != gold[place]
            top.append(((way[place], -0.1), *(((gold[place], -2.4),) if parts else ())))
        ids = way[len(given) :]
        end = next((at + 1 for at, token in enumerate(ids) if token in also_stop), len(ids))
        return Completion(ids[:end], (-0.1,) * end, "stop", tuple(top[:end]))


class Run:
    def __init__(self, inputs: dict[str, Path], folder: Path, settings: Settings, values: dict[str, Any] | None = None) -> None:
        """`values`: value functions by the folders of their models."""
        self.codec = Codec(inputs["model"], settings.undo, settings.base.prompt)
        self.out, self.warnings, self.counts = folder, list[str](), dict[str, int]()
        folder.mkdir()

        @contextmanager
        def progress(*_: Any) -> Iterator[Any]:
            yield SimpleNamespace(update=lambda *_: None)

        def state_values(place: Path) -> Any:
            return (values or {}).get(str(place)) or ProcessRewardModel.load(place)

        pool = Scripted(self.codec)
        self.context = SimpleNamespace(
            settings=settings, round=1, out=folder, counts=self.counts, inputs=inputs, digests={"model": "m"},
            resume=folder.parent / f"{folder.name}-resume",
            rollouts=RolloutLog(folder.parent / "logs", "search", 1),
            terminal=SimpleNamespace(stage=progress, warn=self.warnings.append, info=self.warnings.append),
            workers=SimpleNamespace(
                pool=lambda *_: pool, search=Here, verifiers=lambda: SimpleNamespace(state_values=state_values)
            ),
        )  # fmt: skip
        search.run(cast(Context, self.context))

    def rows(self, name: str) -> list[dict[str, Any]]:
        return list(load_from_disk(str(self.out / name)))


class Here:
    """Search workers in this process."""

    def __init__(self, searcher: Searcher, pool: Any) -> None:
        self.search = searcher.search
        self.meter: Meter = searcher.meter

    def close(self) -> None: ...


def test_what_the_stage_writes(inputs: dict[str, Path], tmp_path: Path) -> None:
    run = Run(inputs, tmp_path / "out", settings_of())
    trees, values, pairs = run.rows("trees"), run.rows("steps"), run.rows("pairs")
    assert len(trees) == len(TRAIN) == run.counts["rows"] == run.counts["solved"] and not run.warnings
    by_id = {one.id: one for one in TRAIN}
    assert list(trees[0]) == [*search.TREE_FEATURES]
    for tree in trees:
        gold, wrong = (
            run.codec.solution_ids(by_id[tree["problem"]].solution),
            Scripted(run.codec).ways[tuple(tree["prompt_ids"])][1],
        )
        ends = {tuple(path(tree, node)): tree["right"][node] for node in range(len(tree["parent"])) if tree["right"][node] >= 0}
        assert ends == {gold: 1, wrong: 0} and tree["solved"] and tree["simulations"] == 2 and sum(tree["undone"]) >= 1
        assert tree["tokens"] > len(wrong)
    kinds = [one["kind"] for one in pairs]
    assert set(kinds) == {"step", "undo", "keep"} and all(one["margin"] == 1.0 for one in pairs)
    assert kinds.count("keep") == kinds.count("undo") > 0
    for one in pairs:
        problem = by_id[one["problem"]]
        if one["kind"] == "keep":
            kept, gold = one["prefix_ids"] + one["chosen_ids"], run.codec.solution_ids(problem.solution)
            assert one["rejected_ids"] == [run.codec.rule.undo_id] and one["chosen_ids"] and one["prefix_ids"]
            assert kept == list(gold[: len(kept)])
            inner = set(one["chosen_ids"][:-1])
            assert not inner & run.codec.rule.step_end_ids  # to the end of one step, and no further
            continue
        sides = [one["prefix_ids"] + one[side] for side in ("chosen_ids", "rejected_ids")]
        solved = [judge_of(problem).correct(problem, text(run.codec, ids)) for ids in sides]
        assert solved == [True, False]
        assert (run.codec.rule.undo_id in one["chosen_ids"]) == (one["kind"] == "undo")
    assert all(0 <= one["value"] <= 1 and 0 <= one["q"] <= 1 and one["samples"] >= 1 for one in values)
    assert {1.0, 0.0, 0.5} == {one["value"] for one in values}
    drawn = json.loads((run.out / "trees.json").read_text())
    page = (run.out / "search.html").read_text()
    assert len(drawn) == len(TRAIN) and all(one["problem"] in page for one in drawn) and "↩ 1" in page
    assert page.count('class="verdict">right') == len(TRAIN)


def path(tree: dict[str, Any], node: int) -> list[int]:
    return [] if node == 0 else path(tree, tree["parent"][node]) + tree["ids"][node]


def text(codec: Codec, ids: Sequence[int]) -> str:
    return codec.decode(apply_undo(ids, codec.rule).surviving).text


def test_traces_read_the_trees(inputs: dict[str, Path], tmp_path: Path) -> None:
    run = Run(inputs, tmp_path / "out", settings_of())
    found = list(searched_errors(str(run.out / "trees"), {one.id: one for one in TRAIN}, TraceSettings(), run.codec, 0))
    assert len(found) == len(TRAIN)
    for one in found:
        ids = one.trace.ids[one.trace.prompt_length :]
        assert run.codec.rule.undo_id in ids and judge_of(one.problem).correct(one.problem, text(run.codec, ids))


def test_the_same_seed_gives_the_same_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    one, other = (Run(inputs, tmp_path / name, settings_of(problems=3)) for name in ("a", "b"))
    assert one.counts["rows"] == 3
    for file in (path for path in one.out.rglob("*") if path.is_file()):
        assert file.read_bytes() == (other.out / file.relative_to(one.out)).read_bytes()


@pytest.mark.parametrize("only", ["all", "failed"])
def test_problems_that_nothing_solves_are_said_and_kept(
    only: str, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.EndsRight, "__call__", lambda *_: False)
    run = Run(inputs, tmp_path / "out", settings_of(only=only))
    assert run.counts["unsolved"] == len(TRAIN) and "no simulation solved any problem" in run.warnings[0]
    assert not any(tree["solved"] for tree in run.rows("trees")) and run.counts["pairs"] == 0


def test_a_verifier_that_raises_is_said(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bool:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(search.EndsRight, "__call__", broken)
    run = Run(inputs, tmp_path / "out", settings_of())
    assert run.counts["unjudged"] == 2 * len(TRAIN) and "ZeroDivisionError: by zero" in run.warnings[0]


def test_a_right_answer_by_a_false_step_is_no_right_end(inputs: dict[str, Path]) -> None:
    settings = settings_of()
    codec = Codec(inputs["model"], settings.undo, settings.base.prompt)
    right = search.EndsRight(inputs["model"], settings.undo, settings.base.prompt)
    one = TRAIN[0]
    assert right(one, codec.solution_ids(one.solution))
    assert not right(one, codec.solution_ids(f"So <<1+1=3>>3.\n{one.solution}"))


# ---- the process reward model as value ----


def test_states_are_valued_by_the_process_reward_model(inputs: dict[str, Path], tmp_path: Path) -> None:
    """One step a simulation: what a state without an end below it is worth is what the model says."""
    asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def value_of(states: Sequence[tuple[Any, tuple[int, ...], tuple[int, ...]]]) -> list[float]:
        asked.extend((prompt, ids) for _, prompt, ids in states)
        return [len(ids) % 7 / 10 for _, _, ids in states]

    folder = tmp_path / "prm"
    run = Run(
        inputs, tmp_path / "out", settings_of(prm=str(folder), rollout="step", problems=4, simulations=1), {str(folder): value_of}
    )
    trees = run.rows("trees")
    assert len(set(asked)) == len(asked) > 0
    for tree in trees:
        leaves = [node for node in range(len(tree["parent"])) if node not in tree["parent"]]
        open_ones = [node for node in leaves if tree["right"][node] < 0 and tree["visits"][node] == 1]
        assert open_ones
        for node in open_ones:
            ids = tuple(path(tree, node))
            assert tree["value"][node] == pytest.approx(len(ids) % 7 / 10) and (tuple(tree["prompt_ids"]), ids) in asked


def test_a_round_without_a_process_reward_model_yet(inputs: dict[str, Path], tmp_path: Path) -> None:
    asked = settings_of(prm=str(tmp_path), rollout="step", problems=3)
    settings = asked.model_copy(update={"search": asked.search.model_copy(update={"prm": "run"})})
    run, plain = Run(inputs, tmp_path / "out", settings), Run(inputs, tmp_path / "plain", settings_of(problems=3))
    assert "run to the end" in run.warnings[0] and run.rows("trees") == plain.rows("trees")


def test_a_folder_that_holds_no_process_reward_model(inputs: dict[str, Path], tmp_path: Path) -> None:
    (place,) = (stage for _, stage in steps(settings_of(prm=str(tmp_path))) if stage.name == "search")
    with pytest.raises(StageError, match=r"search\.prm: no process reward model in .*: it has no prm\.json"):
        place.settings(settings_of(prm=str(tmp_path)))
    with pytest.raises(StageError, match=r"search\.prm: .* is no process reward model"):
        Run(inputs, tmp_path / "out", settings_of(prm=str(tmp_path)))


def test_a_changed_process_reward_model_is_a_changed_input(tmp_path: Path) -> None:
    (tmp_path / "prm.json").write_text("{}")
    settings = settings_of(prm=str(tmp_path))
    (stage,) = (stage for _, stage in steps(settings) if stage.name == "search")
    before = stage.settings(settings)
    assert stage.settings(settings) == before
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert stage.settings(settings) != before


# ---- its place in a run ----


def test_where_the_stage_stands() -> None:
    def order(**more: Any) -> list[str]:
        return [stage.name for round, stage in steps(Settings.model_validate(more)) if round == 1]

    assert "search" not in order()
    before = order(search={"problems": 5})
    assert before.index("judge") < before.index("search") < before.index("traces")
    behind = order(search={"problems": 5, "model": "sft"})
    assert behind.index("search") == behind.index("sft") + 1


@pytest.mark.parametrize(
    ("model", "labels", "behind", "wanted"),
    [
        ("sft", "judge", "prm", [(1, 1), (2, 2)]),
        ("sft", "search", "sft", [(2, 1)]),  # it makes the labels of the process reward model
        ("start", "judge", "judge", [(2, 1)]),
    ],
)
def test_which_process_reward_model_a_search_asks(model: str, labels: str, behind: str, wanted: list[tuple[int, int]]) -> None:
    settings = Settings.model_validate(
        {
            "run": {"rounds": 2},
            "search": {"problems": 5, "model": model, "prm": "run"},
            "prm": {"steps": 5, "labels": labels},
            "dpo": {"steps": 5, "pairs": "search"},
        }
    )
    order = steps(settings)
    found = [
        (round, one.round) for round, stage in order if stage.name == "search" for one in stage.inputs(round) if one.name == "prm"
    ]
    names = [stage.name for round, stage in order if round == 1]
    assert found == wanted and names.index("search") == names.index(behind) + 1
    made: list[tuple[int, str]] = []
    for round, stage in order:  # nothing is read before it is made
        assert all((one.round, one.stage) in made for one in stage.inputs(round) if one.stage in ("prm", "search", "sft"))
        made.append((round, stage.name))


@pytest.mark.parametrize(("model", "wanted"), [("start", [(1, 1), (2, 2)]), ("sft", [(2, 1)])])
def test_which_trees_traces_read(model: str, wanted: list[tuple[int, int]]) -> None:
    settings = Settings.model_validate(
        {"run": {"rounds": 2}, "search": {"problems": 5, "model": model}, "traces": {"mix": {"search": 1.0}}}
    )
    found = [
        (round, one.round)
        for round, stage in steps(settings)
        if stage.name == "traces"
        for one in stage.inputs(round)
        if one.name == "search"
    ]
    assert found == wanted


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"search": {"simulations": 0}}, "greater than or equal to 1"),
        ({"search": {"tokens": 0}}, "greater than or equal to 1"),
        ({"search": {"expand": "samples"}}, "needs a temperature above 0"),
        ({"traces": {"mix": {"search": 1.0}}}, "needs search.problems, or traces.search_trees"),
        ({"search": {"problems": 5, "rollout": "step"}}, "rollout: step needs search.prm, run or a folder"),
        ({"search": {"problems": 5, "prm": "run"}}, "needs the stage prm: set prm.steps"),
        ({"search": {"problems": 5, "prm": "run"}, "prm": {"steps": 5}}, "never there in the only round"),
        (
            {"search": {"problems": 5, "prm": "run", "model": "sft"}, "prm": {"steps": 5, "labels": "both"}},
            "never there in the only round",
        ),
    ],
)
def test_bad_settings(more: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Settings.model_validate(more)
