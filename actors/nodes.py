"""Looks at every node of a cluster before work starts: room for the actors, the same code and versions, disks.

actors/cluster.py calls it when a run joins a Ray that it did not start itself.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
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


def check_nodes(shared: Path | None) -> None:
    """Compare every node with this process.

    Args:
        shared: the run's folder, which every node has to see; None asks nothing of them.

    Raises:
        ClusterError: a node does not answer or cannot run this code, has other versions, a full disk, or does not see `shared`.
    """
    here = facts(None)
    ask: Any = ray.remote(num_cpus=0, max_retries=0)(facts)
    path = str(shared.resolve()) if shared else None
    asked = {
        ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=one["NodeID"], soft=False), name="look at node"
        ).remote(path): _name(one)
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
    if wrong := differences(here, found, path):
        raise ClusterError(wrong)


def differences(here: Facts, found: Sequence[tuple[str, Facts]], shared: str | None) -> str | None:
    """One line on the nodes, by name, that this process cannot work with; None where there are none."""
    others = [(name, _other(here, one)) for name, one in found]
    if differing := [(name, other) for name, other in others if other]:
        more = f" (and {len(differing) - 1} more nodes)" if len(differing) > 1 else ""
        return f"node {differing[0][0]} does not run what the driver runs: {differing[0][1]}{more}"
    if blind := [name for name, one in found if not one.sees]:
        return f"{_names(blind)} cannot see {shared}: run.root must lie on a disk that all nodes share"
    if full := [(name, one.free) for name, one in found if one.free < LEAST_FREE]:
        name, free = full[0]
        return f"the disk of node {name} is full: {free:,} bytes are free for Ray's session, {LEAST_FREE:,} are needed"
    return None


def _other(here: Facts, there: Facts) -> str:
    pairs = [(what, value, here.versions[what]) for what, value in there.versions.items()]
    return ", ".join(f"{what} {value} (driver: {own})" for what, value, own in pairs if value != own)


def facts(shared: str | None) -> Facts:
    """Of the machine and the code that run this."""
    versions = {"Python": platform.python_version()}
    for package in _PACKAGES:
        # A node with GPUs has another build of the same version.
        versions[package] = importlib.metadata.version(package).partition("+")[0]
    versions["retract's code"] = code_digest(Path(__file__).resolve().parent.parent)[:12]
    node = ray_worker._global_node
    session = node.get_session_dir_path() if node else "/"
    return Facts(versions, shutil.disk_usage(session).free, shared is None or Path(shared).is_dir())


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
