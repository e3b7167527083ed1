"""Whether the actors of a configuration fit on the nodes of a cluster, and what is missing where they do not. Knows no Ray.

actors/nodes.py asks it with the nodes that Ray names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.cluster_config import ClusterSettings

_KINDS = (("CPU", "cpus"), ("GPU", "gpus"))


class ClusterError(RuntimeError):
    """The cluster cannot run what is asked for, or an actor died. One line."""


@dataclass(frozen=True)
class Ask:
    """Actors of one kind, all of which live at the same time."""

    what: str
    """All of them in words."""
    one: str
    """One of them."""
    key: str
    """Their section of the settings."""
    count: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Node:
    """One node's resources, and what of them nobody holds now."""

    name: str
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float


def asks_of(cluster: ClusterSettings) -> tuple[Ask, ...]:
    """What has to have its place at the same time: all rollout actors, the learner or its workers, and a judge."""
    rollouts, workers = cluster.rollout_actors, cluster.learner_workers
    processes = cluster.tensor_parallel  # of a rollout actor, all on one node
    return (
        Ask(
            _many(rollouts, "rollout actor"),
            "a rollout actor",
            "cluster.rollout",
            rollouts,
            processes * cluster.rollout.cpus,
            processes * cluster.rollout.gpus,
        ),
        Ask(
            "the learner" if workers == 1 else f"{workers} learner workers",
            "the learner" if workers == 1 else "a learner worker",
            "cluster.learner",
            workers,
            cluster.learner.cpus,
            cluster.learner.gpus,
        ),
        Ask("a judge", "a judge", "cluster.judge", 1, cluster.judge.cpus, cluster.judge.gpus),
    )


def bundles_of(asks: Iterable[Ask]) -> list[dict[str, float]]:
    """One bundle of Ray resources an actor; those that need nothing are left out."""
    bundles = [{"CPU": ask.cpus, "GPU": ask.gpus} for ask in asks for _ in range(ask.count)]
    return [positive for bundle in bundles if (positive := {kind: n for kind, n in bundle.items() if n})]


def missing(asks: Sequence[Ask], nodes: Sequence[Node]) -> str | None:
    """What the nodes could not hold even if nothing else ran there; None where nothing is found that forbids it.

    Sums, single actors and the actors of each kind alone are looked at, not how the kinds share nodes.
    """
    for kind, key in _KINDS:
        needed, there = _needed(asks, key), sum(getattr(node, key) for node in nodes)
        if needed > there:
            rollouts, learner, judge = asks
            return (
                f"the cluster has {there:g} {kind}s, but {rollouts.what} (cluster.rollout.{key}) beside {learner.what} "
                f"(cluster.learner.{key}) and {judge.what} (cluster.judge.{key}) need {needed:g}; lower these settings"
            )
    for ask in asks:
        room = sum(_room(ask, node) for node in nodes)
        each = _amount(ask.cpus, ask.gpus)
        if not room:
            return f"{ask.one} ({ask.key}) needs {each} on one node, and no node has them: {_list(nodes)}"
        if room < ask.count:
            return f"{ask.what} ({ask.key}) need {each} each, on one node, and the nodes have room for {room}: {_list(nodes)}"
    return None


def taken(asks: Sequence[Ask], nodes: Sequence[Node]) -> str:
    """Why actors that the nodes could hold have no place now."""
    for kind, key in _KINDS:
        free = sum(getattr(node, f"free_{key}") for node in nodes)
        if _needed(asks, key) > free:
            return (
                f"{_needed(asks, key):g} {kind}s are needed, and {free:g} of the cluster's "
                f"{sum(getattr(node, key) for node in nodes):g} are free: other jobs hold the rest"
            )
    return f"no way was found to place {', '.join(ask.what for ask in asks)} on the nodes: {_list(nodes)}"


def _needed(asks: Sequence[Ask], key: str) -> float:
    return sum(ask.count * getattr(ask, key) for ask in asks)


def _room(ask: Ask, node: Node) -> int:
    """How many of these a node can hold; a rounding error makes no actor fit less."""
    return min((int(getattr(node, key) / getattr(ask, key) + 1e-9) for _, key in _KINDS if getattr(ask, key)), default=ask.count)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _amount(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


def _list(nodes: Sequence[Node], most: int = 4) -> str:
    named = [
        f"{node.name} {_amount(node.cpus, node.gpus)}, free {_amount(node.free_cpus, node.free_gpus)}" for node in nodes[:most]
    ]
    return "; ".join([*named, *([f"{len(nodes) - most} more"] if len(nodes) > most else [])])
