"""Looks at every node of a cluster before work starts: room for the actors, the same code and versions, disks.

actors/cluster.py calls it when a run joins a Ray that it did not start itself.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import worker as ray_worker
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.placement import ClusterError, Node, asks_of, bundles_of, missing, taken
from pipeline.cluster_config import ClusterSettings

ANSWER_SECONDS = 30.0  # for a node to start a worker and look at itself
LEAST_FREE = 256 << 20  # bytes on a node's disk for Ray's session; Ray itself stops when a disk is 95 % full
_SAY_AFTER = 2  # seconds
_PACKAGES = ("ray", "torch", "transformers")
_CODE = ("pipeline", "actors", "rewards", "verifiers")


@dataclass(frozen=True)
class Facts:
    """What has to be the same everywhere, and what may be short."""

    versions: Mapping[str, str]
    """Of Python, of packages and of this program's own code."""
    free: int
    """Bytes on the disk of Ray's session."""
    sees: bool
    """Whether the run's folder is there."""


def nodes() -> list[Node]:
    """The living nodes with what is free on each."""
    free = ray._private.state.available_resources_per_node()
    found = []
    for one in ray.nodes():
        if one["Alive"]:
            total, now = one["Resources"], free.get(one["NodeID"], {})
            part = [resources.get(kind, 0.0) for resources in (total, now) for kind in ("CPU", "GPU")]
            found.append(Node(_name(one), *part))
    return found


def check_room(cluster: ClusterSettings) -> None:
    """For a Ray of our own, which nobody else uses and no node joins.

    Raises:
        ClusterError: the actors do not fit.
    """
    if lacks := missing(asks_of(cluster), nodes()):
        raise ClusterError(lacks)


def wait_for_room(cluster: ClusterSettings, say: Callable[[str], None]) -> None:
    """Wait until all actors could have their place at the same time, while nodes join and other jobs end.

    Ray's own scheduler answers: it is asked to reserve the places, which are given back at once.

    Raises:
        ClusterError: not within cluster.place_timeout seconds; says what is missing.
    """
    asks = asks_of(cluster)
    bundles = bundles_of(asks)
    if not bundles:
        return
    limit = cluster.place_timeout

    def lacks() -> str:
        found = nodes()
        return missing(asks, found) or taken(asks, found)

    group = placement_group(bundles, strategy="PACK")
    try:
        if not group.wait(min(_SAY_AFTER, limit)):
            say(f"waiting up to cluster.place_timeout={limit} s: {lacks()}")
            if not group.wait(max(1, limit - _SAY_AFTER)):
                raise ClusterError(f"{lacks()} (waited cluster.place_timeout={limit} s)")
    finally:
        remove_placement_group(group)


def check_nodes(shared: Path | None, may_be_blind: bool = False) -> bool:
    """Compare every node with this process.

    Args:
        shared: the run's folder, which every node has to see; None asks nothing of them.
        may_be_blind: nor does this.

    Returns:
        Whether there are nodes that do not see `shared`.

    Raises:
        ClusterError: a node does not answer or cannot run this code, has other versions, a full disk, or does not see `shared`.
    """
    with _marked(shared) as mark:
        found = _ask_nodes(mark)
    if wrong := differences(facts(None), found, None if may_be_blind else shared):
        raise ClusterError(wrong)
    return not all(one.sees for _, one in found)


@contextmanager
def _marked(shared: Path | None) -> Iterator[str | None]:
    """A file that only those see who see the same folder: another node may have one of the same name."""
    if shared is None:
        yield None
        return
    shared.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=shared.resolve(), prefix=".seen-") as mark:
        yield mark.name


def _ask_nodes(mark: str | None) -> list[tuple[str, Facts]]:
    """Name and facts of every node."""
    ask: Any = ray.remote(num_cpus=0, max_retries=0)(facts)
    asked = {
        ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=one["NodeID"], soft=False), name="look at node"
        ).remote(mark): _name(one)
        for one in ray.nodes()
        if one["Alive"]
    }
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    if late:
        raise ClusterError(f"{_names([asked[one] for one in late])} did not answer within {ANSWER_SECONDS:g} s: see `ray status`")
    found = []
    for one in done:
        try:
            found.append((asked[one], ray.get(one)))
        except RayError as error:
            last = " ".join(str(error).split())[-300:]
            raise ClusterError(f"node {asked[one]} cannot run this program: {last}") from error
    return found


def check_learner_here(cluster: ClusterSettings) -> None:
    """
    Raises:
        ClusterError: the learner cannot be placed on the node of this process.
    """
    if cluster.learner_workers > 1:
        raise ClusterError(
            f"cluster.learner_workers is {cluster.learner_workers}, which needs run.cache on a disk that all nodes see: "
            "without one the learner stays on the driver's node"
        )
    key = ray.get_runtime_context().get_node_id()
    name, there = next((_name(one), one["Resources"]) for one in ray.nodes() if one["NodeID"] == key)
    for kind, needed in (("CPU", cluster.learner.cpus), ("GPU", cluster.learner.gpus)):
        if needed > (has := there.get(kind, 0)):
            raise ClusterError(
                f"the learner (cluster.learner) needs {needed:g} {kind}s on the driver's node {name}, which has {has:g}, since "
                "other nodes do not see run.cache: start the driver elsewhere, or put run.cache on a disk that all nodes see"
            )


def differences(here: Facts, found: Sequence[tuple[str, Facts]], shared: Path | None) -> str | None:
    """One line on the nodes, by name, that this process cannot work with; None where there are none.

    Args:
        shared: what each has to see; None asks nothing of them.
    """
    others = [(name, _other(here, one)) for name, one in found]
    if differing := [(name, other) for name, other in others if other]:
        more = f" (and {len(differing) - 1} more nodes)" if len(differing) > 1 else ""
        return f"node {differing[0][0]} does not run what the driver runs: {differing[0][1]}{more}"
    if shared and (blind := [name for name, one in found if not one.sees]):
        return f"{_names(blind)} cannot see {shared.resolve()}: run.root must lie on a disk that all nodes share, or be a URL"
    if full := [(name, one.free) for name, one in found if one.free < LEAST_FREE]:
        name, free = full[0]
        return f"the disk of node {name} is full: {free:,} bytes are free for Ray's session, {LEAST_FREE:,} are needed"
    return None


def _other(here: Facts, there: Facts) -> str:
    pairs = [(what, value, here.versions[what]) for what, value in there.versions.items()]
    return ", ".join(f"{what} {value} (driver: {own})" for what, value, own in pairs if value != own)


def facts(mark: str | None) -> Facts:
    """Of the machine and the code that run this; `mark` is a file that it should see."""
    versions = {"Python": platform.python_version()}
    for package in _PACKAGES:
        # A node with GPUs has another build of the same version.
        versions[package] = importlib.metadata.version(package).partition("+")[0]
    versions["retract's code"] = code_digest(Path(__file__).resolve().parent.parent)[:12]
    node = ray_worker._global_node
    session = node.get_session_dir_path() if node else "/"
    return Facts(versions, shutil.disk_usage(session).free, mark is None or Path(mark).is_file())


def code_digest(root: Path) -> str:
    """sha256 over this program's own files."""
    digest = hashlib.sha256()
    for file in sorted(file for part in _CODE for file in (root / part).rglob("*") if file.suffix in (".py", ".j2")):
        digest.update(f"{file.relative_to(root).as_posix()}\n{file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _name(node: Mapping[str, Any]) -> str:
    return str(node.get("NodeName") or node["NodeManagerAddress"])


def _names(names: Sequence[str]) -> str:
    return f"node {names[0]}" if len(names) == 1 else f"nodes {', '.join(sorted(names)[:4])}{' ..' if len(names) > 4 else ''}"
