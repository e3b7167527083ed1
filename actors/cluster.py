"""Joins or starts Ray for one run, and says early when the cluster cannot hold what the configuration asks for."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import metrics
from actors.nodes import check_learner_here, check_nodes, check_room, wait_for_room
from actors.placement import ClusterError
from pipeline.cluster_config import ActorResources, ClusterSettings

_STARTS = 3  # of a Ray on this machine: a busy one may need more than the 30 s that Ray gives it, which is no setting there


class LearnerDied(ClusterError):
    """A process that trains is gone; what it had not saved with it. One line."""


def one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:400]


class Restarts:
    """How many processes of a run may still be started again after they died."""

    def __init__(self, left: int, say: Callable[[str], None]) -> None:
        self.left, self._say = left, say

    def take(self, what: str, error: BaseException) -> bool:
        """Whether one more may be; says so."""
        if not self.left:
            return False
        self.left -= 1
        metrics.count("restarts", what=what)
        self._say(f"{what} died and is started again, {self.left} times more at most: {one_line(error)}")
        return True


@dataclass(frozen=True)
class Session:
    """A Ray that a run works on."""

    dashboard: str
    """Its address; "" where there is none."""
    apart: bool
    """Not every node sees the run's folder: what reads or writes there stays on the driver's node."""


@contextmanager
def ray_session(
    cluster: ClusterSettings, shared: Path | None = None, say: Callable[[str], None] = print, may_be_apart: bool = False
) -> Iterator[Session]:
    """Ray for the length of a run. RAY_ADDRESS or cluster.address is joined; otherwise a local Ray starts and ends here.

    Args:
        shared: a folder that every node of a joined cluster has to see,
        may_be_apart: unless this is so, and the learner has its place on this node.

    Raises:
        ClusterError: no Ray at the address, no room for the actors, or a node that cannot be worked with.
    """
    apart = False
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    # Workers import this checkout: inside a job the working directory is on their path already.
    root = str(Path(__file__).resolve().parent.parent)
    python_path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # Ray would start workers at niceness 15; every core of a local run is theirs, and OpenMP stalls when one thread waits.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Workers that a local Ray starts in advance, one a core, are of no use: actors and tasks here have environments of their own.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    joined = _joined(address, {"env_vars": {"PYTHONPATH": python_path}}, say)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler aborts the process
    try:
        # An actor that never fits would stay pending for ever: say so before any work starts.
        if address:
            wait_for_room(cluster, say)
            apart = check_nodes(shared, may_be_apart)
            if apart:
                check_learner_here(cluster)
                say("some nodes do not see the run's folder: the learner stays on this one, engines get models through Ray")
        else:
            check_room(cluster)
        yield Session(joined.dashboard_url or "", apart)
    finally:
        ray.shutdown()


def _joined(address: str | None, runtime_env: dict[str, Any], say: Callable[[str], None], starts: int = _STARTS) -> Any:
    """`ray.init`; what stands of a node that did not come up ends with this process."""
    local: dict[str, Any] = {} if address else {"dashboard_host": "127.0.0.1", "include_dashboard": True}
    try:
        # "local": without an address Ray joins what the last `ray start` of this machine left, dead or somebody else's.
        return ray.init(
            address=address or "local", log_to_driver=True, logging_level=logging.ERROR, runtime_env=runtime_env, **local
        )
    except Exception as error:  # Ray has no narrower one for a node that does not come up
        if address or starts == 1 or "timed out during startup" not in str(error):
            raise ClusterError(f"cannot reach Ray at {address or 'this machine'}: {one_line(error)}") from error
    ray.shutdown()
    say("Ray did not come up in time and is started again")
    return _joined(address, runtime_env, say, starts - 1)


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
        "runtime_env": {"env_vars": environment(threads)},
    }


def on_this_node(options: dict[str, Any]) -> dict[str, Any]:
    """The same options for an actor that has to live where this process does."""
    here = ray.get_runtime_context().get_node_id()
    return options | {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}


def one_node(resources: ActorResources, processes: int) -> PlacementGroup | None:
    """Room on one node for so many processes, a bundle each; None for those that reserve nothing."""
    bundle = {kind: count for kind, count in (("CPU", resources.cpus), ("GPU", resources.gpus)) if count}
    return placement_group([bundle] * processes, strategy="STRICT_PACK") if bundle else None


def environment(threads: int) -> dict[str, str]:
    """Environment of a process that computes with so many threads. One that waits for another soon gives up its core: with the
    patience that GNU's OpenMP has by itself, 300 times as much, training beside two busy processes takes half as long again (on two
    cores; alone on them it is 7 % faster)."""
    return {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "1000", "TOKENIZERS_PARALLELISM": "false"}
