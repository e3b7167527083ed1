"""The pool of rollout actors on real Ray: decoding with undo, weights in place, actors that die, and a learner that publishes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import ray
from transformers import AutoModelForCausalLM

from actors.cluster import ClusterError
from actors.decode import HfDecoder
from actors.parcel import Source
from actors.parts import Quarantine, Quarantined, TooManyQuarantined, all_there
from actors.policy import Policy, Sampled
from actors.rollout import RolloutPool
from actors.rollout_actor import RolloutActor
from actors.weights import Probe, Weights, probe_of
from actors.workers import Workers
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.backtrack.tree import Walk
from pipeline.cluster_config import ClusterSettings
from pipeline.config import EngineSettings, Settings, UndoSettings
from pipeline.grpo_config import GrpoSettings
from pipeline.stages.io import Codec
from tests.pipeline.saved import save_problems_and_models

pytestmark = pytest.mark.ray

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
    """A pool whose actors may die."""
    started = RolloutPool(SETTINGS, folders["one"], "one", ROW_TOKENS, tmp_path, said.append)
    yield started
    started.close()


@pytest.fixture(scope="module")
def started(
    workers: Workers, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RolloutPool, list[str]]]:
    said: list[str] = []
    pool = RolloutPool(SETTINGS, folders["one"], "one", ROW_TOKENS, tmp_path_factory.mktemp("calm"), said.append)
    yield pool, said
    pool.close()


@pytest.fixture
def calm(started: tuple[RolloutPool, list[str]], folders: dict[str, Path]) -> Iterator[RolloutPool]:
    """The pool of those tests in which no actor dies: starting it anew for each of them takes most of their time."""
    pool, said = started
    pool.use(folders["one"], "one")
    yield pool
    assert said == []


def decoding_of(folder: Path) -> tuple[Codec, Decoding]:
    codec = Codec(folder, UndoSettings(unit="token"), "{question}\n")
    return codec, Decoding("rewind", 1.0, 1.0, 16, codec.stop_id, codec.rule, "immediate", threshold=None, undo_bias=3.0)


REQUESTS = [DecodeRequest(tuple(range(10 + i, 14 + i)), seed=i) for i in range(24)]


def expected(folder: Path) -> list[Decoded]:
    return HfDecoder.from_folder(folder, SLOTS, ROW_TOKENS).decode(REQUESTS, decoding_of(folder)[1])


def ids(found: list[Decoded]) -> list[tuple[int, ...]]:
    return [one.ids for one in found]


def test_a_batch_is_spread_and_comes_back_in_order(calm: RolloutPool, folders: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    found, version = calm.decode(REQUESTS, decoding_of(folders["one"])[1], 5, lambda rows, tokens: seen.append((rows, tokens)))
    assert (ids(found), version) == (ids(expected(folders["one"])), "one")
    assert sum(rows for rows, _ in seen) == 24 and sum(tokens for _, tokens in seen) == sum(len(one.ids) for one in found)


def test_published_weights_are_those_that_decode(calm: RolloutPool, folders: dict[str, Path]) -> None:
    how = decoding_of(folders["one"])[1]
    model = AutoModelForCausalLM.from_pretrained(folders["two"])
    calm.publish(ray.put(Weights.of(model, "float32")), "two")
    found, version = calm.decode(REQUESTS, how, 8)
    assert (ids(found), version) == (ids(expected(folders["two"])), "two")
    assert ids(found) != ids(expected(folders["one"]))


def test_weights_that_are_not_what_their_probe_says_are_refused(calm: RolloutPool, folders: dict[str, Path]) -> None:
    one, two = (Weights.of(AutoModelForCausalLM.from_pretrained(folders[name]), "float32") for name in ("one", "two"))
    with pytest.raises(ClusterError, match=r"the engine does not generate with the weights of new: log-probabilities are off by"):
        calm.publish(ray.put(Weights(one.arrays, "float32", two.probe)), "new")


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
        f"a rollout actor died and is started again, {left} times more at most" for left in (19, 18)
    ]
    ray.kill(pool._actors[1])
    pool.use(folders["one"], "one")  # one answers, the other begins with them
    assert len(said) == 3 and ids(pool.decode(REQUESTS, how, 8)[0]) == ids(expected(folders["one"]))


def test_weights_sent_past_the_store_come_through_it_to_an_actor_that_is_started_again(
    pool: RolloutPool, folders: dict[str, Path]
) -> None:
    how = decoding_of(folders["one"])[1]
    one, two = (AutoModelForCausalLM.from_pretrained(folders[name]) for name in ("one", "two"))
    weights, asked = ray.put(Weights.of(two, "float32")), []

    def take(self: Any, weights: Weights) -> None:
        self._engine.set_weights(weights.tensors())

    def send(actors: list[Any]) -> Probe:
        ray.get([actor.__ray_call__.remote(take, weights) for actor in actors])
        return probe_of(two)

    def again() -> Any:
        asked.append(True)
        return weights

    pool.transfer(send, again, "two")
    assert pool.decode(REQUESTS, how, 4)[1] == "two" and not asked
    ray.kill(pool._actors[0])
    found, version = pool.decode(REQUESTS, how, 4)
    assert (ids(found), version, len(asked)) == (ids(expected(folders["two"])), "two", 1)
    with pytest.raises(ClusterError, match="the engine does not generate with the weights of one: log-probabilities are off by"):
        pool.transfer(lambda actors: probe_of(one), again, "one")


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


def test_a_stream_takes_requests_as_it_goes_and_gives_each_place_once(calm: RolloutPool, folders: dict[str, Path]) -> None:
    taken, most_ahead, got = 0, 0, {}

    def source() -> Iterator[DecodeRequest]:
        nonlocal taken
        for request in REQUESTS:
            taken += 1
            yield request

    for start, batch in calm.stream("decode", source(), decoding_of(folders["one"])[1], 2):
        assert start not in got and batch.version == "one"
        got[start] = batch.done
        most_ahead = max(most_ahead, taken - sum(map(len, got.values())))
    assert [one.ids for start in sorted(got) for one in got[start]] == ids(expected(folders["one"]))
    assert most_ahead <= 2 * 2 * 2  # actors, batches of an actor, rows of a batch


def poisoned(pool: RolloutPool, seed: int, kind: str) -> None:
    """Make a row impossible for the engines that run now."""

    def poison(self: Any) -> None:
        decode = self._engine.decode

        def patched(requests: Any, decoding: Any) -> Any:
            if any(one.seed == seed for one in requests):
                if kind == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("cannot be done")
            return decode(requests, decoding)

        self._engine.decode = patched

    for actor in pool._actors:
        ray.get(actor.__ray_call__.remote(poison))


def test_a_row_that_its_engine_raises_on_is_found_and_left_out(
    pool: RolloutPool, folders: dict[str, Path], said: list[str], tmp_path: Path
) -> None:
    poisoned(pool, 13, "raises")
    how = decoding_of(folders["one"])[1]
    found, _ = pool.decode(REQUESTS, how, 8)
    lost = found.pop(13)
    assert isinstance(lost, Quarantined) and (lost.tries, lost.why) == (3, "ValueError: cannot be done")
    assert "in patched" in lost.traceback
    assert ids(found) == [one for at, one in enumerate(ids(expected(folders["one"]))) if at != 13]
    assert said == ["a row is left out after 3 tries (cluster.row_tries) of decode: ValueError: cannot be done"]
    kept = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert len(kept) == 1 and "seed=13" in kept[0]["row"] and kept[0]["traceback"] == lost.traceback
    with pytest.raises(ClusterError, match=r"row 2 failed 3 times \(cluster.row_tries\): ValueError: cannot be done"):
        all_there(pool.decode(REQUESTS[12:15], how, 8)[0])


def test_more_rows_left_out_than_allowed_end_it(pool: RolloutPool, folders: dict[str, Path], said: list[str]) -> None:
    poisoned(pool, 13, "raises")
    pool.quarantine = Quarantine(1, pool._log_dir / "quarantine.jsonl")
    how = decoding_of(folders["one"])[1]
    with pytest.raises(
        TooManyQuarantined, match=r"^2 rows failed 3 times each .* more than cluster.quarantine=1; the last one, in"
    ):
        pool.decode([REQUESTS[13], REQUESTS[13], REQUESTS[1]], how, 8)


def test_a_row_that_its_engine_dies_of_is_left_out(
    workers: Workers, folders: dict[str, Path], said: list[str], tmp_path: Path
) -> None:
    """Beside it stands a batch that waits in the same actor: nothing is held against that one."""
    cluster = SETTINGS.cluster.model_copy(update={"rollout_actors": 1, "row_tries": 2})
    pool = RolloutPool(SETTINGS.model_copy(update={"cluster": cluster}), folders["one"], "one", ROW_TOKENS, tmp_path, said.append)
    poisoned(pool, 0, "dies")
    start = pool._start

    def start_poisoned() -> Any:
        pool._actors, before = [start()], pool._actors
        poisoned(pool, 0, "dies")
        started, pool._actors = pool._actors[0], before
        return started

    pool._start = start_poisoned  # type: ignore[method-assign]
    found, _ = pool.decode(REQUESTS[:4], decoding_of(folders["one"])[1], 1)
    assert isinstance(found[0], Quarantined) and ids(found[1:]) == ids(expected(folders["one"])[1:4])
    assert [line.split(":")[0] for line in said] == [
        "a rollout actor died and is started again, 19 times more at most",
        "a rollout actor died and is started again, 18 times more at most",
        "a row is left out after 2 tries (cluster.row_tries) of decode",
    ]
    pool.close()


def test_whoever_shares_the_pool_gets_to_know_of_new_actors(pool: RolloutPool, folders: dict[str, Path], said: list[str]) -> None:
    """As a search worker has it: this process does not ask, it only looks after the actors."""
    shared, how = pool.shared(), decoding_of(folders["one"])[1]
    ray.get([actor.ready.remote() for actor in pool.tend()])
    assert said == []
    for actor in pool.tend():
        ray.kill(actor)
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(shared.decode, REQUESTS, how, 4)
        while not asked.done():
            shared.replace(pool.tend())
            wait([asked], timeout=0.5)
    assert ids(asked.result()[0]) == ids(expected(folders["one"]))
    assert len(said) == 2


def test_one_that_finds_no_place_is_not_waited_for(
    pool: RolloutPool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node is gone, and no other has room for it."""
    how = decoding_of(folders["one"])[1]
    nowhere: Any = RolloutActor.options(num_cpus=1000)
    monkeypatch.setattr(pool, "_start", lambda: nowhere.remote(Source("", "one"), SETTINGS, ROW_TOKENS, "never.log"))
    ray.kill(pool._actors[0])
    shared = pool.shared()
    assert ids(pool.decode(REQUESTS, how, 4)[0]) == ids(expected(folders["one"]))
    pool.use(folders["two"], "two")
    assert ids(pool.decode(REQUESTS, how, 4)[0]) == ids(expected(folders["two"]))
    pool.use(folders["one"], "one")
    shared.replace(pool.tend())
    assert ids(shared.decode(REQUESTS, how, 4)[0]) == ids(expected(folders["one"])) and len(pool._actors) == 2


def test_a_model_that_does_not_load_is_not_tried_again(workers: Workers, folders: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ClusterError, match="a rollout actor did not start: "):
        RolloutPool(SETTINGS, tmp_path / "nowhere", "x", ROW_TOKENS, tmp_path, said.append)
    assert said == []


def test_what_a_dead_actor_had_in_work_is_done_by_another(pool: RolloutPool, folders: dict[str, Path], said: list[str]) -> None:
    pool._restarts.left = 0
    ray.kill(pool._actors[0])
    found, _ = pool.decode(REQUESTS, decoding_of(folders["one"])[1], 4)
    assert ids(found) == ids(expected(folders["one"]))
    assert len(said) == 1 and said[0].startswith("a rollout actor died, 1 go on with its requests: ")
    ray.kill(pool._actors[0])
    with pytest.raises(ClusterError, match="a rollout actor died"):
        pool.decode(REQUESTS, decoding_of(folders["one"])[1], 4)


def test_a_learner_publishes_what_it_has_learned(
    workers: Workers, calm: RolloutPool, folders: dict[str, Path], tmp_path: Path
) -> None:
    codec, how = decoding_of(folders["one"])
    asked = GrpoSettings(steps=2, group=2, max_tokens=16, row_tokens=128, lr=0.01)
    learner = workers.grpo(folders["one"], asked, Policy(codec.rule, "immediate", 3.0), seed=0)
    rolled, _ = calm.decode(REQUESTS[:4], how, 8)
    walks = [Walk((1, 2), one.ids, one.logprobs, one.banned) for one in rolled]
    report = learner.learn([[0, 1], [2, 3]], [Sampled(walk, (0.5,) * len(walk.ids)) for walk in walks])
    assert report["tokens"] == sum(len(walk.ids) for walk in walks)
    learner.publish(calm, "learned")
    learner.save(tmp_path / "saved")
    found, version = calm.decode(REQUESTS, how, 8)
    assert version == "learned" and ids(found) == ids(expected(tmp_path / "saved")) != ids(expected(folders["one"]))
    learner.close()
    with pytest.raises(ClusterError, match="the GRPO learner died"):
        learner.save(tmp_path / "again")
    with pytest.raises(ClusterError, match="the GRPO learner died"):  # not: a rollout actor
        learner.publish(calm, "never")
    assert ids(calm.decode(REQUESTS, how, 8)[0]) == ids(found)
