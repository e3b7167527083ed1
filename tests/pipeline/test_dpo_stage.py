"""The stage dpo with the real learner in one process: its pairs, what is left out, what it says, where it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file

from actors.dpo import PairSet, Record, fit
from actors.engines import Completion
from actors.judge import judge_rows
from actors.policy import Policy
from actors.probe import probe
from actors.watch import Watch
from pipeline.backtrack.preferences import Pair, flaw
from pipeline.backtrack.undo import apply_undo
from pipeline.config import Settings, UndoSettings
from pipeline.dpo_config import DpoSettings
from pipeline.grpo_config import GrpoSettings
from pipeline.search_config import SearchSettings
from pipeline.stages import dpo
from pipeline.stages.evaluate import _models
from pipeline.stages.graph import steps, trained_stage
from pipeline.stages.io import Codec, write_rows
from pipeline.stages.judged import FEATURES as JUDGED
from pipeline.stages.judged import row_of
from pipeline.stages.pairs import FEATURES, PAIRS
from pipeline.stages.probes import Case, cases_of
from pipeline.stages.rollouts import FEATURES as ROLLED
from pipeline.stages.stage import Context, StageError
from tests.pipeline.saved import PROBLEMS, save_problems_and_models
from verifiers.tasks import judge_of

TRAIN = [one for one in PROBLEMS if one.split == "train"]


def solutions(problem: Any) -> list[str]:
    """The gold solution, and two with a wrong answer in which a number is off: in the first equation and in the second."""
    found = [problem.solution]
    body = problem.solution[: problem.solution.index("####")]
    for place in list(re.finditer(r"=(\d+)>>\1", body))[:2]:
        wrong = str(int(place[1]) + 1)
        found.append(f"{body[: place.start()]}={wrong}>>{wrong}{body[place.end() :]}#### {int(problem.answer) + 1}")
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dpo")
    found = save_problems_and_models({name: folder / name for name in ("problems", "sft")})
    codec = Codec(found["sft"], UndoSettings(), "{question}\n")
    tried = [(problem, text) for problem in TRAIN for text in solutions(problem)]
    rollouts, verdicts = [], []
    for number, ((problem, text), one) in enumerate(zip(tried, judge_rows(tried), strict=True)):
        ids = codec.solution_ids(text)
        row = {"id": f"r{number}", "problem": problem.id, "prompt_ids": codec.prompt_ids(problem), "token_ids": ids}
        rollouts.append(row | {"logprobs": [], "finish": "stop", "hot": False, "version": ""})
        verdicts.append(row_of(f"r{number}", problem.id, codec.decode(ids).offsets, one, "exact"))
    write_rows(rollouts, ROLLED, folder / "rollouts")
    write_rows(verdicts, JUDGED, folder / "judge")
    return found | {"model": found["sft"], "rollouts": folder / "rollouts", "judge": folder / "judge"}


SEARCHED = SearchSettings(problems=1, model="sft")


def settings_of(**asked: Any) -> Settings:
    given = {"steps": 3, "batch": 4, "check_every": 2, "check_pairs": 12, "checkpoint_every": 1, "lr": 1e-3, "probes": 0}
    return Settings(dpo=DpoSettings(**given | asked), search=SEARCHED)


class Killed(BaseException):
    """As good as -9: nothing behind it runs on."""


class Run:
    """The stage in a folder, as often as it is started."""

    def __init__(self, inputs: dict[str, Path], folder: Path, settings: Settings) -> None:
        self.inputs, self.folder, self.settings = inputs, folder, settings
        self.warnings: list[str] = []
        self.data: PairSet
        (folder / "out").mkdir(parents=True)

    def start(self, killed_at: int | None = None) -> dict[str, int]:
        @contextmanager
        def stage(*_: Any) -> Iterator[Any]:
            yield SimpleNamespace(update=lambda *_: None)

        context = SimpleNamespace(
            settings=self.settings, round=1, out=self.folder / "out", resume=self.folder / "resume", counts={}, inputs=self.inputs,
            digests={"sft": "s"}, terminal=SimpleNamespace(stage=stage, warn=self.warnings.append),
            workers=SimpleNamespace(dpo=partial(self._train, killed_at), probe=probe, watch=partial(Watch, self.folder / "logs")),
        )  # fmt: skip
        dpo.run(cast(Context, context))
        counts: dict[str, int] = context.counts
        return counts

    def _train(self, killed_at: int | None, source: Path, target: Path, data: PairSet, asked: DpoSettings, policy: Policy,
               seed: int, resume: Path, on_records: Any) -> None:  # fmt: skip
        self.data = data

        def note(record: Record) -> None:
            if record["step"] == killed_at:
                raise Killed
            on_records([record])

        fit(source, target, data, asked, policy, seed, resume, note)

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "out" / "model.safetensors")

    def json(self, name: str) -> Any:
        return json.loads((self.folder / "out" / name).read_text())


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


def test_pairs_of_judged_rollouts(inputs: dict[str, Path], tmp_path: Path) -> None:
    run = Run(inputs, tmp_path, settings_of())
    counts = run.start()
    codec = Codec(inputs["sft"], UndoSettings(), "{question}\n")
    rows = load_from_disk(tmp_path / "out" / PAIRS)
    assert rows.features == FEATURES
    assert counts["rows"] == len(rows) == sum(counts[f"kind_{kind}"] for kind in ("undo", "step", "keep")) > 20
    assert 0 < counts["held_out"] == len(run.data.held_out) <= 12 and counts["steps"] == 3
    assert len(run.data.train) + len(run.data.held_out) == len(rows)
    by_id = {problem.id: problem for problem in TRAIN}
    for row in rows:
        problem, pair = by_id[row["problem"]], Pair(*(tuple(row[name]) for name in list(FEATURES)[1:5]), row["kind"])
        assert flaw(pair, codec.rule, codec.vocabulary) is None and pair.prompt_ids == codec.prompt_ids(problem)
        way = apply_undo(pair.prefix_ids + pair.chosen_ids, codec.rule).surviving
        wrong = codec.decode(pair.prefix_ids + pair.rejected_ids).text
        if row["kind"] == "undo":
            assert judge_of(problem).correct(problem, codec.decode(way).text)
            assert codec.rule.undo_id in pair.chosen_ids and codec.decode(pair.chosen_ids[: pair.shared]).text in wrong
        elif row["kind"] == "keep":
            assert pair.rejected_ids == (codec.rule.undo_id,) and problem.solution.startswith(codec.decode(way).text)
        else:
            assert problem.solution.startswith(codec.decode(way).text) and not problem.solution.startswith(wrong)
    held = {pair.prompt_ids for pair in run.data.held_out}
    assert not held & {pair.prompt_ids for pair in run.data.train}
    history = run.json(dpo.HISTORY)
    assert [one["step"] for one in history if "loss" in one] == [1, 2, 3]
    assert [one["step"] for one in history if "held_out_margin" in one] == [0, 2, 3]
    assert run.json("errors.json") == {"n": 0}
    lines = [json.loads(line) for line in (tmp_path / "logs" / "dpo.jsonl").read_text().splitlines()]
    assert lines == history
    assert differ(run.weights(), load_file(inputs["sft"] / "model.safetensors"))


def test_a_kind_alone(inputs: dict[str, Path], tmp_path: Path) -> None:
    counts = Run(inputs, tmp_path, settings_of(kinds=["undo"], steps=1, horizon=1, loss="sft", check_pairs=0)).start()
    assert counts["rows"] == counts["kind_undo"] and "kind_step" not in counts and counts["held_out"] == 0


def test_a_killed_stage_ends_with_the_same_weights(inputs: dict[str, Path], tmp_path: Path) -> None:
    whole, killed = (Run(inputs, tmp_path / name, settings_of()) for name in ("whole", "killed"))
    whole.start()
    with pytest.raises(Killed):
        killed.start(killed_at=3)
    killed.start()
    assert not differ(whole.weights(), killed.weights())
    without_times = [
        [{k: v for k, v in one.items() if "seconds" not in k} for one in run.json(dpo.HISTORY)] for run in (whole, killed)
    ]
    assert without_times[0] == without_times[1]


# ---- search ----


def searched(inputs: dict[str, Path], folder: Path, *changes: dict[str, Any]) -> dict[str, Path]:
    """The pairs that search would leave: a good one, then one for each change to it."""
    codec = Codec(inputs["sft"], UndoSettings(), "{question}\n")
    ids = (codec.encode("a b"), codec.encode(" c"))
    good = {"problem": TRAIN[0].id, "prompt_ids": codec.prompt_ids(TRAIN[0]), "prefix_ids": (), "chosen_ids": ids[0]}
    good |= {"rejected_ids": ids[1], "kind": "step", "margin": 0.5}
    write_rows([good | change for change in ({}, *changes)], FEATURES, folder / "search" / PAIRS)
    return inputs | {"search": folder / "search"}


def test_pairs_of_search_and_what_is_left_out(inputs: dict[str, Path], tmp_path: Path) -> None:
    undo_id = Codec(inputs["sft"], UndoSettings(), "{question}\n").rule.undo_id
    given = searched(
        inputs, tmp_path, {}, {"chosen_ids": []}, {"rejected_ids": [99_999]}, {"prefix_ids": [undo_id]}, {"margin": 0.1},
        {"margin": float("nan")}, {"margin": None}, {"rejected_ids": [5] * 400}, {"kind": "undo"}, {"kind": "other"},
        {"prompt_ids": []}, {"prefix_ids": [5], "margin": 0.9},
    )  # fmt: skip
    run = Run(given, tmp_path / "run", settings_of(pairs="search", steps=1, margin=0.3, row_tokens=300))
    counts = run.start()
    reasons = (
        "duplicate", "empty_side", "unknown_id", "undo_in_prefix", "small_margin", "no_margin", "null", "longer_than_a_row",
        "undo_without_undo", "unknown_kind", "empty_prompt",
    )  # fmt: skip
    assert {name: count for name, count in counts.items() if name.startswith("left_out")} == {
        f"left_out_{name}": 1 for name in reasons
    }
    assert counts["rows"] == 2 and run.warnings[0] == "dpo: 1 pairs are longer than 300 tokens and were left out"
    both = Run(given, tmp_path / "both", settings_of(pairs="both", steps=1)).start()
    assert both["rows"] > 20 and both["left_out_unknown_kind"] == 1


def test_no_pair_is_one_line(inputs: dict[str, Path], tmp_path: Path) -> None:
    given = searched(inputs, tmp_path)
    with pytest.raises(StageError, match=r"^dpo: no pair to learn from \(1 small_margin\): raise rollouts\.problems, or change"):
        Run(given, tmp_path / "1", settings_of(pairs="search", margin=0.9)).start()
    with pytest.raises(StageError, match=r"dpo\.pairs: row 1 of .*: 'nobody' is no training problem"):
        Run(searched(inputs, tmp_path / "a", {"problem": "nobody"}), tmp_path / "2", settings_of(pairs="search")).start()
    with pytest.raises(StageError, match=r"dpo\.pairs: no dataset in .*nowhere"):
        Run(inputs | {"search": tmp_path / "nowhere"}, tmp_path / "3", settings_of(pairs="search")).start()
    rows = load_from_disk(given["search"] / PAIRS).remove_columns(["margin", "kind"])
    rows.save_to_disk(tmp_path / "lacking" / PAIRS)
    with pytest.raises(StageError, match=r"lacks the columns kind, margin"):
        Run(inputs | {"search": tmp_path / "lacking"}, tmp_path / "4", settings_of(pairs="search")).start()


# ---- alarms ----


def test_planted_errors_are_warned_of(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Codec(inputs["sft"], UndoSettings(), "{question}\n")
    wrong = [(problem, text) for problem in TRAIN for text in solutions(problem)[1:]]
    found = cases_of([one for one, _ in wrong], [Completion(codec.solution_ids(text), (), "stop") for _, text in wrong], codec)
    assert len(found) > 8
    monkeypatch.setattr(dpo, "dev_cases", lambda *_: found)
    run = Run(inputs, tmp_path / "plain", settings_of(probes=8, steps=1))
    run.start()
    asked = run.json("errors.json")
    assert asked["n"] == len(found) and asked["ci95"][0] <= asked["logp_error_change"] <= asked["ci95"][1]
    change = asked["after"]["logp_error"] - asked["before"]["logp_error"]
    assert change == pytest.approx(asked["logp_error_change"]) and 0 <= asked["before"]["p_undo_right"] <= 1
    plain = dpo._asked

    def planted(context: Context, folder: Path, cases: Sequence[Case]) -> list[dict[str, float]]:
        rise = 2.0 if folder == context.out else 0.0
        more = {"logp_error": rise, "p_undo_right": rise / 10}
        return [{name: value + more.get(name, 0) for name, value in row.items()} for row in plain(context, folder, cases)]

    monkeypatch.setattr(dpo, "_asked", planted)
    warned = Run(inputs, tmp_path / "planted", settings_of(probes=8, steps=1))
    warned.start()
    assert any("has risen by" in line and "planting errors" in line for line in warned.warnings)
    assert any(
        re.search(r"mean P\(undo\) in \d+ right states of dev problems has risen by 0\.[12]", line) for line in warned.warnings
    )
    assert not any("planting" in line for line in run.warnings)


# ---- where it stands ----


def test_the_stage_stands_between_sft_and_grpo() -> None:
    def names(settings: Settings) -> list[str]:
        return [stage.name for _, stage in steps(settings) if stage.per_round]

    def read(settings: Settings, name: str) -> set[str]:
        return {one.name for _, stage in steps(settings) if stage.name == name for one in stage.inputs(1)}

    assert "dpo" not in names(Settings()) and trained_stage(Settings()) == "sft"
    preferring = settings_of()
    assert names(preferring)[-4:] == ["sft", "search", "dpo", "evaluate"] and trained_stage(preferring) == "dpo"
    assert {"rollouts", "judge", "sft"} <= read(preferring, "dpo") and "dpo" in read(preferring, "evaluate")
    assert "dpo-1" in read(preferring, "report")
    both = Settings(dpo=DpoSettings(steps=1, pairs="both"), grpo=GrpoSettings(steps=1), search=SEARCHED)
    assert names(both)[-5:] == ["sft", "search", "dpo", "grpo", "evaluate"] and trained_stage(both) == "grpo"
    assert "dpo" in read(both, "grpo") and {"search", "rollouts"} <= read(both, "dpo")
    search = settings_of(pairs="search")
    assert "search" in read(search, "dpo") and not {"rollouts", "judge"} & read(search, "dpo")


def test_it_is_evaluated_by_name(tmp_path: Path) -> None:
    names = ("model", "sft", "dpo", "grpo")
    context = SimpleNamespace(inputs={name: tmp_path / name for name in names}, digests={name: name for name in names})
    assert [one.name for one in _models(cast(Context, context))] == ["base", "sft", "dpo", "grpo"]
