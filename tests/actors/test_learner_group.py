"""Trainings shared by two workers, by real Ray Train and gloo: what one process learns, they learn; what goes wrong has a name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from actors.cluster import ClusterError
from actors.learner import Curve, DevCheck, TrainingError, fit
from actors.learner_group import failure_of
from actors.workers import Workers
from pipeline.backtrack.targets import Form
from pipeline.cluster_config import ClusterSettings, SmallActorResources
from pipeline.config import BaseTraining, RunSettings, Settings, SftSettings
from tests.actors.trained import prepared, spoil_token, thirty_traces, weights

pytestmark = pytest.mark.ray

COMMON: dict[str, Any] = {"steps": 6, "rows": 4, "row_tokens": 64, "lr": 1e-2, "log_every": 1, "checkpoint_every": 2}
TWO = Settings(
    run=RunSettings(name="group"),
    cluster=ClusterSettings(learner_workers=2, learner=SmallActorResources(cpus=0.25, threads=1)),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    prepared(folder)
    return folder


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with Workers(TWO, tmp_path_factory.mktemp("logs"), lambda line: None) as started:
        yield started


def assert_same_training(one: tuple[Curve, Path], other: tuple[Curve, Path]) -> None:
    assert [step for step, _ in one[0].losses] == [step for step, _ in other[0].losses]
    for (_, left), (_, right) in zip(one[0].losses, other[0].losses, strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    different = {"losses": 0, "seconds": 0}
    assert asdict(one[0]) | different == asdict(other[0]) | different
    for (name, left), (again, right) in zip(weights(one[1]).items(), weights(other[1]).items(), strict=True):
        assert name == again
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_two_workers_learn_what_one_learns(source: Path, tmp_path: Path, workers: Workers) -> None:
    """Also in parts of steps, with accuracy measured on the way, and gone on from a checkpoint."""
    data, seen = thirty_traces(source, Form("rewind")), []
    settings = BaseTraining(**COMMON, accumulate=2, check_every=3, check_problems=4)
    check = DevCheck(((30, 7), (31, 7)), lambda index, text: len(text) % 2 == 0, 4)
    alone = fit(source, tmp_path / "one", data, settings, 0, Curve(), check)
    shared = workers.fit(source, tmp_path / "two", data, settings, 0, seen.append, check, tmp_path / "resume")
    assert_same_training((alone, tmp_path / "one"), (shared, tmp_path / "two"))
    assert len(alone.checks) == 2


def test_a_loss_that_is_no_number_in_one_worker(source: Path, tmp_path: Path, workers: Workers) -> None:
    """Trace 3 alone begins with token 33; the other worker waits for gradients that never come."""
    spoilt = tmp_path / "spoilt"
    spoil_token(source, spoilt, 33)
    narrow = SftSettings(**COMMON | {"rows": 2, "row_tokens": 32})
    with pytest.raises(TrainingError, match=r"^the loss is nan at step \d+, on traces (\d+, )*3(, \d+)*: lower the learning rate"):
        workers.fit(spoilt, tmp_path / "two", thirty_traces(source), narrow, 0, lambda _: None)
    assert not (tmp_path / "two").exists()


def test_a_worker_that_is_killed_is_named_and_its_run_goes_on(source: Path, tmp_path: Path, workers: Workers) -> None:
    """Killed from outside between two checkpoints; the next call goes on from the last one."""
    # Large steps: the training must not be over before the first look at it.
    large = {"steps": 60, "checkpoint_every": 10, "rows": 96, "row_tokens": 256}
    data, settings = thirty_traces(source), SftSettings(**COMMON | large)
    alone = fit(source, tmp_path / "alone", data, settings, 0, Curve())

    def kill(curve: Curve) -> None:
        if curve.step > 10:
            for process in psutil.process_iter(["cmdline"]):
                if any("RayTrainWorker" in part for part in process.info["cmdline"] or []):
                    process.kill()
                    return

    workers.restarts.left = 0
    with pytest.raises(
        ClusterError, match=r"^worker [01] of the learner died: it was killed from outside, .* raise sft.accumulate"
    ):
        workers.fit(source, tmp_path / "again", data, settings, 0, kill, resume=tmp_path / "resume")
    assert not (tmp_path / "again").exists()
    kept = sorted(int(path.name.partition("-")[2]) for path in (tmp_path / "resume").glob("checkpoint-*"))
    assert kept and kept[0] >= 10
    again = workers.fit(source, tmp_path / "again", data, settings, 0, lambda _: None, resume=tmp_path / "resume")
    assert_same_training((alone, tmp_path / "alone"), (again, tmp_path / "again"))


# ---- which of several errors is told ----


def test_the_error_that_caused_the_others_is_told() -> None:
    lost = UserExceptionWithTraceback(RuntimeError("[..] Connection closed by peer [127.0.0.1]:1"), "")
    gone = WorkerHealthCheckFailedError("", ActorDiedError())
    out = WorkerHealthCheckFailedError("", OutOfMemoryError("Task was killed due to the node running low on memory."))
    own = UserExceptionWithTraceback(TrainingError("the loss is nan"), "")
    bug = UserExceptionWithTraceback(KeyError("name"), "Traceback ..")
    settings = SftSettings()

    def told(**failures: Exception) -> BaseException:
        return failure_of(WorkerGroupError("", {int(rank[1:]): one for rank, one in failures.items()}), settings)

    assert told(w0=lost, w1=own) is own._base_exc
    assert isinstance(told(w0=lost, w1=gone), ClusterError) and str(told(w0=lost, w1=gone)).startswith(
        "worker 1 of the learner died"
    )
    assert str(told(w0=lost, w2=out)).startswith("worker 2 of the learner died: Ray killed it because its node was running out of")
    assert str(told(w0=lost)).startswith("worker 0 of the learner lost another worker")
    assert not isinstance(told(w0=lost, w1=bug), ClusterError) and "worker 1" in str(told(w0=lost, w1=bug))
