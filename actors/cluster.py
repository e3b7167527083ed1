"""Joins or starts Ray for one run, and says early when the cluster cannot hold what the configuration asks for."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from actors import metrics
from pipeline.cluster_config import ActorResources, ClusterSettings


class ClusterError(RuntimeError):
    """The cluster cannot run what is asked for, or an actor died. One line."""


@contextmanager
def ray_session(cluster: ClusterSettings) -> Iterator[str]:
    """Ray for the length of a run; yields the dashboard's address, "" where there is none.

    RAY_ADDRESS or cluster.address is joined; otherwise a local Ray starts and ends here.

    Raises:
        ClusterError: no Ray at the address, or too few resources for the actors.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    # Workers import this checkout: inside a job the working directory is on their path already.
    root = str(Path(__file__).resolve().parent.parent)
    python_path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    local: dict[str, Any] = {} if address else {"dashboard_host": "127.0.0.1", "include_dashboard": True}
    # Ray would start workers at niceness 15; every core of a local run is theirs, and OpenMP stalls when one thread waits.
    os.environ.setdefault("RAY_worker_niceness", "0")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        joined = ray.init(
            address=address,
            log_to_driver=True,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": python_path}},
            **local,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(f"cannot reach Ray at {address or 'this machine'}: {' '.join(str(error).split())[:300]}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler aborts the process
    try:
        _check_resources(cluster)
        yield joined.dashboard_url or ""
    finally:
        ray.shutdown()


def _check_resources(cluster: ClusterSettings) -> None:
    """An actor that never fits would stay pending for ever: say so before any work starts."""
    total = ray.cluster_resources()
    rollouts, workers = cluster.rollout_actors, cluster.learner_workers
    learner = "the learner" if workers == 1 else f"{workers} learner workers"
    # All three stay or run at the same time.
    together = ((rollouts, cluster.rollout), (workers, cluster.learner), (1, cluster.judge))
    for kind, key in (("CPU", "cpus"), ("GPU", "gpus")):
        needed = sum(count * getattr(part, key) for count, part in together)
        if needed > total.get(kind, 0):
            raise ClusterError(
                f"the cluster has {total.get(kind, 0):g} {kind}s, but {rollouts} rollout actors (cluster.rollout.{key}) beside "
                f"{learner} (cluster.learner.{key}) and a judge (cluster.judge.{key}) need {needed:g}; lower these settings"
            )


def actor_options(resources: ActorResources, name: str, sharing: int) -> dict[str, Any]:
    """Ray options of an actor: its resources, a name for the dashboard (RUN/NAME), its share of the node's threads.

    Args:
        sharing: how many actors of this kind divide the node's cores when `threads` is 0.
    """
    threads = resources.threads or max(1, round(resources.cpus), (os.cpu_count() or 1) // sharing)
    return {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "name": metrics.named(name),
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}},
    }
