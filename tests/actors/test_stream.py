"""The pool's stream against actors of this process that die, raise and lose results by chance; real ones: test_rollout_pool.py."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from actors import rollout
from actors.cluster import ClusterError, Restarts
from actors.parts import Quarantine, Quarantined
from actors.rollout import RolloutPool
from actors.rollout_actor import Batch
from pipeline.config import Settings


class Ref:
    """A result to come: a value, or an error to be raised."""

    def __init__(self, actor: Actor, rows: Any) -> None:
        self.actor, self.rows, self.outcome = actor, rows, None
        self.done = False

    def settle(self, outcome: Any) -> None:
        self.outcome, self.done = outcome, True


class Answer(int):
    """What is made of a row here: a number, which has cost no tokens."""

    ids = ()


class Method:
    def __init__(self, actor: Actor) -> None:
        self.actor = actor

    def options(self, name: str) -> Method:
        return self

    def remote(self, rows: Any = (), how: Any = None) -> Ref:
        ref = Ref(self.actor, rows)
        if self.actor.dead:
            ref.settle(RayActorError())
        else:
            self.actor.queue.append(ref)
        return ref


class Actor:
    def __init__(self) -> None:
        self.queue: list[Ref] = []
        self.dead = False
        self.decode = self.ready = Method(self)

    def die(self) -> None:
        self.dead = True
        for ref in self.queue:
            ref.settle(RayActorError())
        self.queue = []


class FakeRay:
    """The four functions that the pool calls. Which actor is next and what becomes of its batch is a matter of chance."""

    def __init__(self, chance: random.Random, deaths: float, raising: set[int], deadly: set[int]) -> None:
        self.chance, self.deaths, self.raising, self.deadly = chance, deaths, raising, deadly
        self.lost: set[int] = set()

    def wait(self, refs: list[Ref], timeout: float, num_returns: int = 1) -> tuple[list[Ref], list[Ref]]:
        if timeout == 0:
            return [ref for ref in refs if ref.done], [ref for ref in refs if not ref.done]
        while not any(ref.done for ref in refs):
            self._work(self.chance.choice([ref.actor for ref in refs if ref.actor.queue]))
        ready = self.chance.choice([ref for ref in refs if ref.done])
        return [ready], [ref for ref in refs if ref is not ready]

    def _work(self, actor: Actor) -> None:
        ref = actor.queue[0]
        if ref.rows == ():  # whether it is ready
            actor.queue.pop(0).settle("hf")
            return
        if self.deadly & set(ref.rows) or self.chance.random() < self.deaths:
            actor.die()
            return
        actor.queue.pop(0)
        if self.raising & set(ref.rows):
            ref.settle(RayTaskError("decode", "Traceback: no", ValueError("no")))
        elif self.chance.random() < self.deaths:
            ref.settle(ObjectLostError("0" * 56, None, ""))
        else:
            ref.settle(Batch([Answer(-row) for row in ref.rows], "v"))

    def get(self, ref: Ref, timeout: float | None = None) -> Any:
        assert ref.done
        if isinstance(ref.outcome, Exception):
            raise ref.outcome
        return ref.outcome

    def kill(self, actor: Actor) -> None:
        actor.die()


def pool_of(actors: int, folder: Path, restarts: int = 10_000, most: int = 99) -> RolloutPool:
    pool = RolloutPool.__new__(RolloutPool)
    pool._settings, pool._say, pool._timeout, pool._version = Settings(), lambda line: None, 1.0, "v"
    pool._coming, pool._groups, pool._asleep, pool._restarts = {}, {}, False, Restarts(restarts, pool._say)
    pool._start = Actor  # type: ignore[method-assign]
    pool._actors = [Actor() for _ in range(actors)]
    pool._heard = set(pool._actors)
    pool.quarantine = Quarantine(most, folder / "quarantine.jsonl")
    return pool


@pytest.fixture(autouse=True)
def always_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches under way, though those of this file take no time."""
    monkeypatch.setattr(rollout, "_WORTH_WAITING_SECONDS", 0.0)


PLACES = st.sets(st.integers(0, 39), max_size=2)


@given(
    st.integers(0, 40), st.integers(1, 9), st.integers(1, 4), st.sampled_from([0.0, 0.05, 0.3]), PLACES, PLACES, st.integers(0, 999)
)
def test_every_row_comes_once_whatever_dies(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    batch: int,
    actors: int,
    deaths: float,
    raising: set[int],
    deadly: set[int],
    seed: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "ray", FakeRay(random.Random(seed), deaths, raising, deadly))
        pool = pool_of(actors, tmp_path_factory.getbasetemp())
        found: dict[int, Any] = {}
        for start, part in pool.stream("decode", iter(range(rows)), None, batch):
            for at, one in enumerate(part.done, start):
                assert at not in found
                found[at] = one
    assert sorted(found) == list(range(rows))
    lost = {at for at, one in found.items() if isinstance(one, Quarantined)}
    assert all(found[at] == -at for at in found if at not in lost)
    bad = (raising | deadly) & set(range(rows))
    assert bad <= lost
    if not deaths:
        assert lost == bad and pool.quarantine.rows == len(bad)


def test_who_only_waited_in_a_dead_actor_is_not_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One actor with two batches of one row: the first kills it each time, the second stands behind it."""
    monkeypatch.setattr(rollout, "ray", FakeRay(random.Random(0), 0.0, set(), {0}))
    pool = pool_of(1, tmp_path)
    found = dict(pool.stream("decode", iter(range(4)), None, 1))
    assert isinstance(found[0].done[0], Quarantined) and [found[at].done for at in (1, 2, 3)] == [[-1], [-2], [-3]]
    assert pool._restarts and pool._restarts.left == 10_000 - 3


def test_the_last_actor_to_die_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "ray", FakeRay(random.Random(0), 0.0, set(), {5}))
    with pytest.raises(ClusterError, match="a rollout actor died"):
        list(pool_of(2, tmp_path, restarts=0).stream("decode", iter(range(9)), None, 1))


@pytest.mark.parametrize(("seconds", "most"), [(0.0, 2), (60.0, 1)], ids=["slow", "fast"])
def test_no_more_is_under_way_than_two_batches_an_actor(
    seconds: float, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than one of an actor that is done with it in less than these seconds."""
    monkeypatch.setattr(rollout, "_WORTH_WAITING_SECONDS", seconds)
    monkeypatch.setattr(rollout, "ray", FakeRay(random.Random(0), 0.0, set(), set()))
    taken: Counter[str] = Counter()

    def source() -> Any:
        for row in range(10**4):
            taken["rows"] += 1
            yield row

    for got, _ in enumerate(pool_of(3, tmp_path).stream("decode", source(), None, 5), start=1):
        assert taken["rows"] <= 5 * (got + most * 3)
    assert taken["rows"] == 10**4
