"""One training shared by several processes: Ray Train starts them, joins them by torch.distributed and each runs the same `fit`.

The group is an actor like the learner: it is asked for `fit` and polled for `progress`, and needs no CPU of its own.
"""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import get_context
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from actors.checks import HeldOut
from actors.cluster import ClusterError, LearnerDied, environment
from actors.learner import Curve, DevCheck, TrainingError, fit
from actors.memory import how_to_save, killed
from actors.packing import TrainingSet
from pipeline.cluster_config import ActorResources
from pipeline.config import TrainSettings
from pipeline.telemetry import redirect_process_output

_REPORT_SECONDS = 1.0


@dataclass(frozen=True)
class _Job:
    """What every worker is given."""

    source: str
    target: str
    data: TrainingSet
    settings: TrainSettings
    seed: int
    check: DevCheck | None
    resume: str | None
    held_out: HeldOut | None
    log_dir: str
    group: Any
    """Handle of the group, for the first worker's reports."""


def _work(given: dict[str, Any]) -> None:
    """One worker's training; the first one tells the group how far it is."""
    job: _Job = ray.get(given["job"])
    rank = get_context().get_world_rank()
    redirect_process_output(Path(job.log_dir) / f"learner-{rank}.log")
    curve, done = Curve(), threading.Event()
    reporter = threading.Thread(target=_report, args=(job.group, curve, done), daemon=True)
    if rank == 0:
        reporter.start()
    resume = Path(job.resume) if job.resume else None
    try:
        fit(Path(job.source), Path(job.target), job.data, job.settings, job.seed, curve, job.check, resume, job.held_out)
    finally:
        done.set()
    if rank == 0:
        reporter.join()
        ray.get(job.group.report.remote(curve))


def _report(group: Any, curve: Curve, done: threading.Event) -> None:
    while not done.wait(_REPORT_SECONDS):
        ray.get(group.report.remote(curve))


class _LearnerGroup:
    def __init__(self, workers: int, resources: ActorResources, log_dir: str) -> None:
        redirect_process_output(Path(log_dir) / "learner.log")
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # prints errors of its own at every start
        self._workers, self._resources, self._log_dir = workers, resources, log_dir
        self._curve = Curve()

    def fit(self, source: str, target: str, data: TrainingSet, settings: TrainSettings, seed: int,
            check: DevCheck | None = None, resume: str | None = None, held_out: HeldOut | None = None) -> Curve:  # fmt: skip
        """See actors/learner.py.

        Raises:
            TrainingError: as one of the workers raised it.
            ClusterError: a worker died, or they could not be started.
        """
        self._curve = Curve()
        me = ray.get_runtime_context().current_actor
        job = _Job(source, target, data, settings, seed, check, resume, held_out, self._log_dir, me)
        wanted, gpus = self._resources, self._resources.gpus
        threads = wanted.threads or max(1, round(wanted.cpus), (os.cpu_count() or 1) // self._workers)
        with tempfile.TemporaryDirectory() as folder:  # Ray Train keeps its own notes there, no checkpoint
            trainer = TorchTrainer(
                _work,
                train_loop_config={"job": ray.put(job)},
                scaling_config=ScalingConfig(
                    num_workers=self._workers, use_gpu=gpus > 0, resources_per_worker={"CPU": wanted.cpus, "GPU": gpus}
                ),
                run_config=RunConfig(
                    storage_path=folder,
                    logging_config=LoggingConfig(log_level="ERROR"),
                    failure_config=FailureConfig(max_failures=0),  # the next run goes on from the last checkpoint
                    worker_runtime_env={"env_vars": environment(threads)},
                ),
            )
            try:
                trainer.fit()
            except TrainingFailedError as error:
                raise failure_of(error, settings) from None
        return self._curve

    def report(self, curve: Curve) -> None:
        self._curve = curve

    def progress(self) -> Curve:
        return self._curve


def failure_of(error: TrainingFailedError, settings: TrainSettings) -> BaseException:
    """The one error that says what happened: when one worker fails, the others lose their connection to it."""
    if not isinstance(error, WorkerGroupError):
        return ClusterError(f"the learner's workers could not be started: {_line(getattr(error, 'controller_failure', error))}")
    causes = {rank: _cause(failure) for rank, failure in sorted(error.worker_failures.items())}
    for cause in causes.values():
        if isinstance(cause, TrainingError):
            return cause
    for rank, cause in causes.items():
        if isinstance(cause, RayError):
            return LearnerDied(f"worker {rank} of the learner died: {killed(cause, how_to_save(settings)) or _line(cause)}")
    rank, cause = min(causes.items(), key=lambda one: _lost(one[1]))
    if _lost(cause):
        return LearnerDied(f"worker {rank} of the learner lost another worker: {_line(cause)}")
    return RuntimeError(f"worker {rank} of the learner failed: {error.worker_failures[rank]}")


def _lost(cause: BaseException) -> bool:
    """Whether this worker only saw that another one was gone."""
    return any(words in str(cause) for words in ("Connection closed by peer", "Connection reset by peer"))


def _cause(failure: Exception) -> BaseException:
    """The worker's own error out of what Ray Train wraps it in."""
    if isinstance(failure, UserExceptionWithTraceback):
        return failure._base_exc
    return failure.health_check_failure if isinstance(failure, WorkerHealthCheckFailedError) else failure


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


# One thread trains, the others answer.
LearnerGroupActor: Any = ray.remote(num_cpus=0, max_concurrency=4)(_LearnerGroup)  # type: ignore[call-overload]
