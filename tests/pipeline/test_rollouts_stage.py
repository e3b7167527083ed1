"""The stage rollouts without Ray: first tries, or what survives of tries with undo, in rows that the judge reads alike."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from datasets import load_from_disk

from actors.decode import HfDecoder
from actors.engines import HfEngine
from actors.parts import Quarantined
from actors.rollout_actor import Batch
from pipeline.backtrack.cursor import DecodeRequest
from pipeline.backtrack.undo import apply_undo
from pipeline.config import DecodeSettings, EngineSettings, EvaluateSettings, RolloutSettings, Settings, UndoSettings
from pipeline.rollout_log import RolloutLog
from pipeline.stages import rollouts
from pipeline.stages.io import Codec, decoding_of
from pipeline.stages.stage import Context
from tests.pipeline.saved import CONTEXT, PROBLEMS, save_problems_and_models

MAX_TOKENS = 24
TRAIN = [problem for problem in PROBLEMS if problem.split == "train"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rollouts")
    return save_problems_and_models({name: folder / name for name in ("problems", "model")})


def settings_of(mode: Any) -> Settings:
    return Settings(
        engine=EngineSettings(kind="hf", max_prompt=400, max_num_seqs=8),
        rollouts=RolloutSettings(mode=mode, samples=2, hot_samples=1, max_tokens=MAX_TOKENS),
        evaluate=EvaluateSettings(max_tokens=MAX_TOKENS),
        decode=DecodeSettings(threshold=0.0003, max_undos=6, max_undos_per_state=3),
        undo=UndoSettings(unit="token"),
    )


class Pool:
    """One engine, which fails on the rows with these seeds and dies after so many batches."""

    version = "v"

    def __init__(self, folder: Path, settings: Settings, failing: Container[int] = (), batches: int = 999) -> None:
        self.engine, self.failing, self.left = HfEngine.from_folder(folder, settings.engine, CONTEXT), failing, batches
        self.asked: list[int] = []

    def stream(self, method: str, requests: Iterable[Any], how: Any, batch: int) -> Iterator[tuple[int, Batch]]:
        requests = list(requests)
        for start in reversed(range(0, len(requests), batch)):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            some = requests[start : start + batch]
            self.asked += [one.seed for one in some]
            done = getattr(self.engine, method)(some, how)
            lost = Quarantined(3, "ValueError: no")
            yield start, Batch([lost if one.seed in self.failing else row for one, row in zip(some, done, strict=True)], "v")


class Terminal:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    @contextmanager
    def stage(self, *_: Any) -> Iterator[Any]:
        yield SimpleNamespace(update=lambda *_: None)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def rows_of(inputs: dict[str, Path], out: Path, settings: Settings, pool: Pool | None = None, **more: Any) -> list[dict[str, Any]]:
    pool = pool or Pool(inputs["model"], settings)
    context = SimpleNamespace(
        settings=settings, round=1, out=out, counts={}, inputs=inputs, digests={"model": "v"}, terminal=Terminal(),
        resume=out.parent / "resume", rollouts=RolloutLog(out.parent / "logs", "rollouts", 1),
        workers=SimpleNamespace(pool=lambda *_: pool), **more,
    )  # fmt: skip
    rollouts.run(cast(Context, context))
    LAST.update(counts=context.counts, warnings=context.terminal.warnings)
    return [dict(row) for row in load_from_disk(out)]


LAST: dict[str, Any] = {}


def test_a_killed_stage_makes_again_only_what_was_under_way(inputs: dict[str, Path], tmp_path: Path) -> None:
    for mode in ("forbidden", "rewind"):
        settings = settings_of(mode)
        settings = settings.model_copy(update={"rollouts": settings.rollouts.model_copy(update={"batch": 4})})
        whole = rows_of(inputs, tmp_path / mode / "whole" / "out", settings)
        counts, first = LAST["counts"], Pool(inputs["model"], settings, batches=3)
        with pytest.raises(KeyboardInterrupt):
            rows_of(inputs, tmp_path / mode / "out", settings, first)
        second = Pool(inputs["model"], settings)
        assert rows_of(inputs, tmp_path / mode / "out", settings, second) == whole and LAST["counts"] == counts
        assert len(first.asked) == 12 and sorted(first.asked + second.asked) == sorted(
            rollouts.row_seed(settings.run.seed, row["id"]) for row in whole
        )


def test_a_row_that_cannot_be_made_is_left_out_and_counted(inputs: dict[str, Path], tmp_path: Path) -> None:
    settings = settings_of("forbidden")
    whole = rows_of(inputs, tmp_path / "whole" / "out", settings)
    assert "quarantined" not in LAST["counts"]
    lost = whole[5]["id"]
    pool = Pool(inputs["model"], settings, failing={rollouts.row_seed(settings.run.seed, lost)})
    assert rows_of(inputs, tmp_path / "out", settings, pool) == [row for row in whole if row["id"] != lost]
    assert LAST["counts"]["quarantined"] == 1 and LAST["counts"]["rows"] == len(whole) - 1
    assert LAST["warnings"] == [f"rollouts: 1 rows could not be made and are left out: {lost}"]


def test_first_tries_hold_neither_undo_nor_ids_that_mean_nothing(inputs: dict[str, Path], tmp_path: Path) -> None:
    codec = Codec(inputs["model"], UndoSettings(unit="token"), "{question}\n")
    rows = rows_of(inputs, tmp_path / "rows", settings_of("forbidden"))
    assert len(rows) == 3 * len(TRAIN) and codec.spare_ids
    assert all(token < codec.vocabulary and token != codec.rule.undo_id for row in rows for token in row["token_ids"])


def test_what_survives_of_tries_with_undo(inputs: dict[str, Path], tmp_path: Path) -> None:
    """The rows are those of the decoder, row by row, without what was taken back; each id with its own log-probability."""
    settings = settings_of("rewind")
    rows = rows_of(inputs, tmp_path / "rows", settings)
    codec = Codec(inputs["model"], settings.undo, settings.base.prompt)
    decoder = HfDecoder.from_folder(inputs["model"], 1, CONTEXT)
    logged = {one["id"]: one for one in map(json.loads, (tmp_path / "logs" / "rollouts-1.jsonl").read_text().splitlines())}
    assert logged.keys() == {row["id"] for row in rows}
    undone = 0
    for row in rows:
        temperature = settings.rollouts.hot_temperature if row["hot"] else settings.rollouts.temperature
        how = decoding_of(codec, settings.decode, "rewind", temperature, 1.0, MAX_TOKENS)
        request = DecodeRequest(tuple(row["prompt_ids"]), rollouts.row_seed(settings.run.seed, row["id"]))
        wanted = decoder.decode([request], how)[0]
        assert tuple(row["token_ids"]) == wanted.surviving == apply_undo(wanted.ids, codec.rule).surviving
        places = apply_undo(wanted.ids, codec.rule).source
        assert row["logprobs"] == pytest.approx([wanted.logprobs[place] for place in places], rel=3e-4, abs=5e-4)
        assert row["finish"] == wanted.finish and codec.rule.undo_id not in row["token_ids"]
        undone += wanted.undos > 0
        line = logged[row["id"]]  # as it was emitted
        assert (tuple(line["token_ids"]), line["undos"], line["finish"]) == (wanted.ids, wanted.undos, wanted.finish)
        assert (line["problem"], line["version"], line["mode"], line["temperature"]) == (row["problem"], "v", "rewind", temperature)
        assert len(line["logprobs"]) == len(wanted.ids)
    assert undone > 4 and sum(row["hot"] for row in rows) == len(TRAIN)
