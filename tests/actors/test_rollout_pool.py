"""The pool of rollout actors on real Ray: decoding with undo, weights in place, actors that die, and a learner that publishes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from transformers import AutoModelForCausalLM

from actors.cluster import ClusterError
from actors.decode import HfDecoder
from actors.policy import Policy, Sampled
from actors.rollout import RolloutPool
from actors.weights import Weights
from actors.workers import Workers
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.backtrack.tree import Walk
from pipeline.cluster_config import ClusterSettings
from pipeline.config import EngineSettings, Settings, UndoSettings
from pipeline.grpo_config import GrpoSettings
from pipeline.stages.io import Codec
from tests.pipeline.saved import save_problems_and_models

ROW_TOKENS, SLOTS = 64, 4
SMALL: dict[str, Any] = {"cpus": 0.1, "threads": 1}
SETTINGS = Settings.model_validate(
    {
        "engine": EngineSettings(kind="hf", max_num_seqs=SLOTS).model_dump(),
        "cluster": ClusterSettings(rollout_actors=2).model_dump() | {"rollout": SMALL, "learner": SMALL, "judge": SMALL},
    }
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pool")
    return save_problems_and_models({name: root / name for name in ("problems", "one", "two")})


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with Workers(SETTINGS, tmp_path_factory.mktemp("logs"), lambda line: None) as started:
        started.start()
        yield started


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def pool(workers: Workers, folders: dict[str, Path], tmp_path: Path, said: list[str]) -> Iterator[RolloutPool]:
    started = RolloutPool(SETTINGS, folders["one"], "one", ROW_TOKENS, tmp_path, said.append)
    yield started
    started.close()


def decoding_of(folder: Path) -> tuple[Codec, Decoding]:
    codec = Codec(folder, UndoSettings(unit="token"), "{question}\n")
    return codec, Decoding("rewind", 1.0, 1.0, 16, codec.stop_id, codec.rule, "immediate", threshold=None, undo_bias=3.0)


REQUESTS = [DecodeRequest(tuple(range(10 + i, 14 + i)), seed=i) for i in range(24)]


def expected(folder: Path) -> list[Decoded]:
    return HfDecoder.from_folder(folder, SLOTS, ROW_TOKENS).decode(REQUESTS, decoding_of(folder)[1])


def ids(found: list[Decoded]) -> list[tuple[int, ...]]:
    return [one.ids for one in found]


def test_a_batch_is_spread_and_comes_back_in_order(pool: RolloutPool, folders: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    found, version = pool.decode(REQUESTS, decoding_of(folders["one"])[1], 5, lambda rows, tokens: seen.append((rows, tokens)))
    assert (ids(found), version) == (ids(expected(folders["one"])), "one")
    assert sum(rows for rows, _ in seen) == 24 and sum(tokens for _, tokens in seen) == sum(len(one.ids) for one in found)


def test_published_weights_are_those_that_decode(pool: RolloutPool, folders: dict[str, Path]) -> None:
    how = decoding_of(folders["one"])[1]
    model = AutoModelForCausalLM.from_pretrained(folders["two"])
    pool.publish(ray.put(Weights.of(model, "float32")), "two")
    found, version = pool.decode(REQUESTS, how, 8)
    assert (ids(found), version) == (ids(expected(folders["two"])), "two")
    assert ids(found) != ids(expected(folders["one"]))


def test_weights_that_are_not_what_their_probe_says_are_refused(pool: RolloutPool, folders: dict[str, Path]) -> None:
    one, two = (Weights.of(AutoModelForCausalLM.from_pretrained(folders[name]), "float32") for name in ("one", "two"))
    with pytest.raises(ClusterError, match=r"the engine does not generate with the weights of new: log-probabilities are off by"):
        pool.publish(ray.put(Weights(one.arrays, "float32", two.probe)), "new")


def test_a_dead_actor_is_started_again_with_the_weights_of_now(
    pool: RolloutPool, folders: dict[str, Path], said: list[str]
) -> None:
    how = decoding_of(folders["one"])[1]
    model = AutoModelForCausalLM.from_pretrained(folders["two"])
    pool.publish(ray.put(Weights.of(model, "float32")), "two")
    for actor in list(pool._actors):
        ray.kill(actor)
    found, version = pool.decode(REQUESTS, how, 4)
    assert (ids(found), version) == (ids(expected(folders["two"])), "two")
    assert [line.split(":")[0] for line in said] == [
        f"a rollout actor died and is started again, {left} times more at most" for left in (4, 3)
    ]
    ray.kill(pool._actors[1])
    pool.use(folders["one"], "one")  # one answers, the other begins with them
    assert len(said) == 3 and ids(pool.decode(REQUESTS, how, 8)[0]) == ids(expected(folders["one"]))


def test_an_actor_that_hangs_is_killed_and_started_again(
    workers: Workers, folders: dict[str, Path], said: list[str], tmp_path: Path
) -> None:
    cluster = SETTINGS.cluster.model_copy(update={"rollout_actors": 1, "batch_timeout": 10})
    pool = RolloutPool(SETTINGS.model_copy(update={"cluster": cluster}), folders["one"], "one", ROW_TOKENS, tmp_path, said.append)
    how = decoding_of(folders["one"])[1]
    assert ids(pool.decode(REQUESTS[:4], how, 4)[0]) == ids(expected(folders["one"])[:4])
    os.kill(ray.get(pool._actors[0].__ray_call__.remote(lambda self: os.getpid())), signal.SIGSTOP)
    found = pool.decode(REQUESTS[:4], how, 4)[0]
    assert ids(found) == ids(expected(folders["one"])[:4])
    assert said[0] == "a rollout actor has not answered for cluster.batch_timeout=10 s and is killed" and len(said) == 2
    pool.close()


def test_a_model_that_does_not_load_is_not_tried_again(workers: Workers, folders: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ClusterError, match="a rollout actor did not start: "):
        RolloutPool(SETTINGS, tmp_path / "nowhere", "x", ROW_TOKENS, tmp_path, said.append)
    assert said == []


def test_what_a_dead_actor_had_in_work_is_done_by_another(pool: RolloutPool, folders: dict[str, Path], said: list[str]) -> None:
    pool._restarts = 0
    ray.kill(pool._actors[0])
    found, _ = pool.decode(REQUESTS, decoding_of(folders["one"])[1], 4)
    assert ids(found) == ids(expected(folders["one"]))
    assert len(said) == 1 and said[0].startswith("a rollout actor died, 1 go on with its requests: ")
    ray.kill(pool._actors[0])
    with pytest.raises(ClusterError, match="a rollout actor died"):
        pool.decode(REQUESTS, decoding_of(folders["one"])[1], 4)


def test_a_learner_publishes_what_it_has_learned(
    workers: Workers, pool: RolloutPool, folders: dict[str, Path], tmp_path: Path
) -> None:
    codec, how = decoding_of(folders["one"])
    asked = GrpoSettings(steps=2, group=2, max_tokens=16, row_tokens=128, lr=0.01)
    learner = workers.grpo(folders["one"], asked, Policy(codec.rule, "immediate", 3.0), seed=0)
    rolled, _ = pool.decode(REQUESTS[:4], how, 8)
    walks = [Walk((1, 2), one.ids, one.logprobs, one.banned) for one in rolled]
    report = learner.learn([[0, 1], [2, 3]], [Sampled(walk, (0.5,) * len(walk.ids)) for walk in walks])
    assert report["tokens"] == sum(len(walk.ids) for walk in walks)
    learner.publish(pool, "learned")
    learner.save(tmp_path / "saved")
    found, version = pool.decode(REQUESTS, how, 8)
    assert version == "learned" and ids(found) == ids(expected(tmp_path / "saved")) != ids(expected(folders["one"]))
    learner.close()
    with pytest.raises(ClusterError, match="the GRPO learner died"):
        learner.save(tmp_path / "again")
    with pytest.raises(ClusterError, match="the GRPO learner died"):  # not: a rollout actor
        learner.publish(pool, "never")
    assert ids(pool.decode(REQUESTS, how, 8)[0]) == ids(found)
