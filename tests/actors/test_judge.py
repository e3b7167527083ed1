"""Judging in Ray tasks: what raises or kills its process is found, what is beside it is judged, in order."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import judge
from actors.judge import Judged, judge_all, judge_each, judge_rows
from actors.parts import Quarantined
from pipeline.cluster_config import ActorResources
from tests.pipeline.saved import PROBLEMS

pytestmark = pytest.mark.ray

ROWS = [(problem, problem.solution if place % 2 else problem.solution[:-1]) for place, problem in enumerate(PROBLEMS)] * 2
BAD = 7


class Poison(str):
    """A text on which judging fails: str is what it is for anyone else."""

    kind: str

    def __new__(cls, kind: str) -> Poison:
        made = super().__new__(cls, "#### 1")
        made.kind = kind
        return made

    def __reduce__(self) -> Any:
        return Poison, (self.kind,)

    def splitlines(self, *given: Any) -> Any:
        if self.kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("unreadable")

    strip = split = partition = rpartition = rfind = find = splitlines  # type: ignore[assignment]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    root = str(Path(__file__).resolve().parents[2])
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    yield
    ray.shutdown()


def with_poison(kind: str) -> list[Any]:
    return [*ROWS[:BAD], (ROWS[BAD][0], Poison(kind)), *ROWS[BAD + 1 :]]


def test_a_row_whose_judge_raises_has_its_traceback_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    bad = (ROWS[BAD][0], ROWS[BAD][1])  # a row of its own: others are equal to it

    def failing(rows: Any) -> Any:
        if rows[0] is bad:
            tries.append(1)
            raise ValueError("unreadable")
        return judge_rows(rows)

    monkeypatch.setattr(judge, "judge_rows", failing)
    found = judge_each([*ROWS[:BAD], bad, *ROWS[BAD + 1 :]], 3)
    lost = found.pop(BAD)
    assert isinstance(lost, Quarantined) and (lost.tries, lost.why, len(tries)) == (3, "ValueError: unreadable", 3)
    assert "in failing" in lost.traceback
    assert found == judge_rows(ROWS[:BAD] + ROWS[BAD + 1 :])


@pytest.mark.parametrize("kind", ["raises", "dies"])
def test_what_is_beside_a_bad_row_is_judged(cluster: None, kind: str) -> None:
    rows = with_poison(kind)
    found = [one for batch in judge_all(iter(rows), len(rows), 6, ActorResources(cpus=1), 2) for one in batch]
    lost = found.pop(BAD)
    assert isinstance(lost, Quarantined) and lost.tries == 2
    assert found == judge_rows(ROWS[:BAD] + ROWS[BAD + 1 :]) and all(isinstance(one, Judged) for one in found)
