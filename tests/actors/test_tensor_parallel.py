"""An engine of two processes on real Ray and real vLLM: what transformers gives, new weights, sleep, a dead process."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from actors.cluster import ClusterError
from actors.decode import HfDecoder
from actors.engines import HfEngine, Request, Sampling
from actors.rollout import RolloutPool
from actors.weights import Weights
from actors.workers import Workers
from pipeline.backtrack.cursor import DecodeRequest, Decoding
from pipeline.config import EngineSettings, Settings, SftSettings, UndoSettings
from pipeline.stages.io import Codec
from tests.actors.trained import thirty_traces
from tests.pipeline.saved import save_problems_and_models

pytestmark = pytest.mark.ray
pytest.importorskip("vllm")

CONTEXT, ROWS = 64, 8
SMALL: dict[str, Any] = {"cpus": 0.1, "threads": 1}
SETTINGS = Settings.model_validate(
    {
        "engine": {"kind": "vllm", "max_num_seqs": ROWS, "sleep": True},
        "cluster": {"tensor_parallel": 2, "rollout": SMALL, "learner": SMALL, "judge": SMALL},
    }
)
ASKED = [Request(tuple(range(10 + i, 14 + i)), seed=i) for i in range(ROWS)]
TO_DECODE = [DecodeRequest(one.prompt_ids, one.seed) for one in ASKED]
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_tokens=16, stop_id=1, logprobs=True)


def decoding(folder: Path) -> Decoding:
    codec = Codec(folder, UndoSettings(unit="token"), "{question}\n")
    return Decoding("rewind", 0.0, 1.0, 16, codec.stop_id, codec.rule, "immediate", threshold=0.05)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_problems_and_models(
        {name: root / name for name in ("problems", "one", "two")}, width=64
    )  # heads of 16 are unknown to vLLM on CPUs


@dataclass
class Started:
    workers: Workers
    pool: RolloutPool
    logs: Path
    said: list[str]


@pytest.fixture(scope="module")
def started(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    said, logs = list[str](), tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch, Workers(SETTINGS, logs, said.append) as workers:
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        yield Started(workers, workers.pool(folders["one"], "one", CONTEXT), logs, said)


def members() -> list[int]:
    """Processes of engines beside the first ones."""
    return [one.pid for one in psutil.Process().children(recursive=True) if any("_Member" in part for part in one.cmdline())]


def agrees_with(pool: RolloutPool, folder: Path) -> None:
    """Greedy completions and decodes with undo are those of transformers, sampled ones those of their seeds."""
    found: Any = pool.generate(ASKED, GREEDY, ROWS)[0]
    hf = HfEngine.from_folder(folder, SETTINGS.engine, CONTEXT)
    for one, other in zip(found, hf.generate(ASKED, GREEDY), strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-3)
    undone: Any = pool.decode(TO_DECODE, decoding(folder), ROWS)[0]
    wanted = HfDecoder.from_folder(folder, ROWS, CONTEXT).decode(TO_DECODE, decoding(folder))
    assert [(one.ids, one.surviving) for one in undone] == [(one.ids, one.surviving) for one in wanted]
    assert any(one.undos for one in undone)


def test_without_vllm_it_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    auto = SETTINGS.model_copy(update={"engine": EngineSettings()})
    with pytest.raises(ClusterError, match=r"^cluster.tensor_parallel is 2, which needs vLLM, and vllm is not installed$"):
        Workers(auto, tmp_path, print).pool(tmp_path, "v", CONTEXT)


def test_two_processes_give_what_one_model_gives(started: Started, folders: dict[str, Path]) -> None:
    assert len(members()) == 1
    agrees_with(started.pool, folders["one"])
    drawn = Sampling(temperature=1.0, top_p=0.9, max_tokens=16, stop_id=1)
    whole, halves = (started.pool.generate(ASKED, drawn, batch)[0] for batch in (ROWS, ROWS // 2))
    assert [one.token_ids for one in whole] == [one.token_ids for one in halves]  # type: ignore[union-attr]


def test_new_weights_reach_every_process(started: Started, folders: dict[str, Path]) -> None:
    started.pool.use(folders["two"], "two")
    agrees_with(started.pool, folders["two"])
    model = AutoModelForCausalLM.from_pretrained(folders["one"])
    started.pool.publish(ray.put(Weights.of(model, "float32")), "one again")
    agrees_with(started.pool, folders["one"])


def test_all_of_them_sleep_while_the_learner_trains(started: Started, folders: dict[str, Path], tmp_path: Path) -> None:
    """On CPUs vLLM pauses, and says that it frees no memory."""
    short, how = SftSettings(steps=1, rows=2), "sleep mode is not supported on CPU"
    data = thirty_traces(folders["one"], undo=SETTINGS.undo.token)
    started.workers.fit(folders["one"], tmp_path / "trained", data, short, 0, lambda curve: None)
    assert [(started.logs / name).read_text().count(how) for name in ("rollout-0.log", "rollout-0-1.log")] == [1, 1]
    agrees_with(started.pool, folders["one"])
    assert [(started.logs / name).read_text().count(how) for name in ("rollout-0.log", "rollout-0-1.log")] == [2, 2]  # awake


def test_a_process_that_dies_takes_its_engine_along_and_both_come_back(started: Started, folders: dict[str, Path]) -> None:
    before = members()
    os.kill(before[0], signal.SIGKILL)
    agrees_with(started.pool, folders["one"])
    assert len(members()) == 1 and members() != before
    assert any("a rollout actor died and is started again" in line for line in started.said)
