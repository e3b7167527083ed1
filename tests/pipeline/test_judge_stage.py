"""The stage judge without Ray: a killed one judges again only what it had not come to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from datasets import load_from_disk

from actors.engines import Request, Sampling, make_engine
from actors.judge import Judged, judge_each, judge_rows
from actors.parts import Quarantined
from pipeline.config import EngineSettings, JudgeSettings, Settings, UndoSettings
from pipeline.stages import judge, rollouts
from pipeline.stages.io import Codec, write_rows
from pipeline.stages.stage import Context
from tests.pipeline.saved import PROBLEMS, save_problems_and_models

SETTINGS = Settings(undo=UndoSettings(unit="token"), judge=JudgeSettings(batch=3))
TRAIN = [problem for problem in PROBLEMS if problem.split == "train"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With rollouts half of which are wrong."""
    root = tmp_path_factory.mktemp("judge")
    found = save_problems_and_models({name: root / name for name in ("problems", "model")})
    codec = Codec(found["model"], SETTINGS.undo, SETTINGS.base.prompt)
    engine = make_engine(found["model"], EngineSettings(kind="scripted", script=str(found["problems"])), 512, 0)
    rows = []
    for seed in range(4):
        prompts = [codec.prompt_ids(problem) for problem in TRAIN]
        made = engine.generate([Request(one, seed) for one in prompts], Sampling(1.0, 1.0, 400, codec.stop_id, logprobs=True))
        rows += [
            {"id": f"{p.id}#1.{seed}", "problem": p.id, "prompt_ids": ids, "hot": False, "version": "v"}
            | {name: getattr(one, name) for name in ("token_ids", "logprobs", "finish")}
            for p, ids, one in zip(TRAIN, prompts, made, strict=True)
        ]
    write_rows(rows, rollouts.FEATURES, root / "rollouts")
    return found | {"rollouts": root / "rollouts"}


class Judges:
    """In this process: interrupted after so many batches, and unable to judge one row."""

    def __init__(self, batches: int = 999, unable: int | None = None) -> None:
        self.left, self.unable, self.judged = batches, unable, 0

    def __call__(self, rows: Sequence[Any], batch: int, *_: Any) -> Iterator[list[Judged | Quarantined]]:
        for start in range(0, len(rows), batch):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            found = judge_each(rows[start : start + batch], 1)
            self.judged += len(found)
            if self.unable is not None and start <= self.unable < start + batch:
                found[self.unable - start] = Quarantined(3, "no")
            yield found


class Terminal:
    @contextmanager
    def stage(self, *_: Any) -> Iterator[Any]:
        yield SimpleNamespace(update=lambda *_: None)

    def warn(self, text: str) -> None: ...


def judged(inputs: dict[str, Path], out: Path, judges: Judges, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(judge, "judge_all", judges)
    quarantine = SimpleNamespace(add=lambda *_: None, rows=1)
    context = SimpleNamespace(
        settings=SETTINGS, out=out, resume=out.parent / "resume", counts={}, inputs=inputs, terminal=Terminal(),
        workers=SimpleNamespace(start=lambda: None, quarantine=lambda: quarantine),
    )  # fmt: skip
    judge.run(cast(Context, context))
    return [dict(row) for row in load_from_disk(out)]


def test_a_killed_stage_judges_again_only_what_it_had_not_come_to(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = judged(inputs, tmp_path / "whole" / "out", Judges(), monkeypatch)
    assert {row["correct"] for row in whole} == {True, False} and len(whole) > 9
    # The row without a verdict is tried once more; a batch is cut where the rows that are left do not fill it.
    first, second = Judges(batches=3, unable=4), Judges()
    with pytest.raises(KeyboardInterrupt):
        judged(inputs, tmp_path / "out", first, monkeypatch)
    assert judged(inputs, tmp_path / "out", second, monkeypatch) == whole
    assert first.judged == 9 and second.judged == len(whole) - 8


def test_a_verdict_comes_back_from_a_file_as_it_was(inputs: dict[str, Path]) -> None:
    codec = Codec(inputs["model"], SETTINGS.undo, SETTINGS.base.prompt)
    texts = [codec.decode(ids).text for ids in load_from_disk(str(inputs["rollouts"]))["token_ids"]]
    found = judge_rows([(TRAIN[at % len(TRAIN)], text) for at, text in enumerate(texts)])
    assert any(one.attempt for one in found) and any(one.verdict.error is None for one in found)
    assert [judge.judged_from(json.loads(json.dumps(astuple(one)))) for one in found] == found
