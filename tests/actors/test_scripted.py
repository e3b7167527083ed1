"""The scripted engine: answers that depend on prompt and seed alone, and that the judge takes for what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.engines import Request, Sampling, make_engine
from actors.judge import judge_rows
from pipeline.config import EngineSettings, UndoSettings
from pipeline.stages.io import Codec
from tests.pipeline.saved import PROBLEMS, save_problems_and_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("scripted")
    return save_problems_and_models({name: root / name for name in ("problems", "model")})


def test_half_of_its_solutions_are_right_and_none_depends_on_the_batch(folders: dict[str, Path]) -> None:
    settings = EngineSettings(kind="scripted", script=str(folders["problems"]))
    engine = make_engine(folders["model"], settings, 512, 0)
    codec = Codec(folders["model"], UndoSettings(unit="token"), "{question}\n")
    how = Sampling(1.0, 1.0, 400, codec.stop_id, logprobs=True)
    asked = [(problem, Request(codec.prompt_ids(problem), seed)) for problem in PROBLEMS for seed in range(8)]
    found = engine.generate([one for _, one in asked], how)
    assert found == [make_engine(folders["model"], settings, 512, 0).generate([one], how)[0] for _, one in asked]
    judged = judge_rows([(one, codec.decode(made.token_ids).text) for (one, _), made in zip(asked, found, strict=True)])
    right = sum(one.verdict.correct for one in judged) / len(judged)
    assert 0.4 < right < 0.6 and any(one.attempt for one in judged)
    for (_, request), whole in zip(asked[::5], found[::5], strict=True):  # a search goes on from anywhere
        more = engine.generate([Request(request.prompt_ids + whole.token_ids[:6], 3)], how)[0]
        assert more.token_ids and more.finish == "stop" and len(more.logprobs) == len(more.token_ids)
    assert engine.generate([asked[0][1]], Sampling(1.0, 1.0, 3, codec.stop_id))[0].finish == "length"
