"""A learner that is killed while it trains is started again, goes on from its checkpoint and ends with the same model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from actors.cluster import ClusterError
from actors.learner import Curve
from actors.workers import Workers
from pipeline.cluster_config import ClusterSettings, SmallActorResources
from pipeline.config import RunSettings, Settings, SftSettings
from tests.actors.trained import content, prepared, thirty_traces

pytestmark = pytest.mark.ray

SETTINGS = Settings(
    run=RunSettings(name="restarts"), cluster=ClusterSettings(restarts=2, learner=SmallActorResources(cpus=0.25, threads=1))
)
# Large steps: the training must not be over before the first look at it.
LONG = SftSettings(steps=40, checkpoint_every=10, rows=32, row_tokens=256, lr=1e-2, log_every=1)
SAID: list[str] = []


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with Workers(SETTINGS, tmp_path_factory.mktemp("logs"), SAID.append) as started:
        yield started


def kill_learner() -> None:
    for process in psutil.Process().children(recursive=True):
        if any(part.startswith("ray::_Learner") for part in process.cmdline()):
            process.kill()


def test_a_killed_learner_goes_on_from_its_checkpoint_as_often_as_allowed(tmp_path: Path, workers: Workers) -> None:
    prepared(tmp_path / "source")
    data, hit = thirty_traces(tmp_path / "source"), list[int]()
    # By the same actor: in a process with more threads sums are added in another order.
    whole = workers.fit(tmp_path / "source", tmp_path / "whole", data, LONG, 0, lambda curve: None)

    def once(curve: Curve) -> None:
        if curve.step > 10 and not hit:
            hit.append(curve.step)
            kill_learner()

    again = workers.fit(tmp_path / "source", tmp_path / "again", data, LONG, 0, once, resume=tmp_path / "resume")
    assert content(tmp_path / "again") == content(tmp_path / "whole") and again.losses == whole.losses
    told = [line for line in SAID if "died" in line]
    assert hit and len(told) == 1 and told[0].startswith("the learner died and is started again, 1 times more at most: ")
    with pytest.raises(ClusterError, match=r"^the learner died: "):
        workers.fit(tmp_path / "source", tmp_path / "none", data, LONG, 0, lambda curve: kill_learner())
    assert not (tmp_path / "none").exists()
