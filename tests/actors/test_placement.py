"""What is said of a cluster that cannot hold the actors: the sum, a single actor, one kind, others' jobs; and of unlike nodes."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors import nodes
from actors.cluster import ray_session
from actors.nodes import LEAST_FREE, Facts, code_digest, differences
from actors.placement import ClusterError, Node, asks_of, bundles_of, missing, taken
from pipeline.cluster_config import ClusterSettings


def asked(**settings: object) -> ClusterSettings:
    return ClusterSettings.model_validate(settings)


def node(name: str, cpus: float, gpus: float = 0, free: float = 1.0) -> Node:
    return Node(name, cpus, gpus, cpus * free, gpus * free)


def test_the_smallest_machine_holds_the_defaults() -> None:
    asks = asks_of(ClusterSettings())
    assert missing(asks, [node("a", 2)]) is None
    assert bundles_of(asks) == [{"CPU": 1.0}, {"CPU": 0.5}, {"CPU": 0.5}]


def test_too_few_in_sum_names_all_three_settings() -> None:
    said = missing(asks_of(asked(rollout_actors=4)), [node("a", 2), node("b", 2)])
    assert said == (
        "the cluster has 4 CPUs, but 4 rollout actors (cluster.rollout.cpus) beside the learner (cluster.learner.cpus) and "
        "a judge (cluster.judge.cpus) need 5; lower these settings"
    )


def test_gpus_that_are_not_there() -> None:
    said = missing(asks_of(asked(rollout={"gpus": 1.0})), [node("a", 8)])
    assert said and said.startswith("the cluster has 0 GPUs, but 1 rollout actor (cluster.rollout.gpus)") and "need 1;" in said


def test_no_single_node_can_hold_what_the_sum_can() -> None:
    said = missing(asks_of(asked(rollout={"gpus": 2.0, "cpus": 1.0})), [node("a", 4, 1), node("b", 4, 1)])
    assert said == (
        "a rollout actor (cluster.rollout) needs 1 CPUs and 2 GPUs on one node, and no node has them: "
        "a 4 CPUs and 1 GPUs, free 4 CPUs and 1 GPUs; b 4 CPUs and 1 GPUs, free 4 CPUs and 1 GPUs"
    )


def test_an_engine_of_several_processes_needs_one_node() -> None:
    two = asks_of(asked(tensor_parallel=2, rollout={"gpus": 1.0, "cpus": 1.0}))
    said = missing(two, [node("a", 4, 1), node("b", 4, 1)])
    assert said and said.startswith("a rollout actor (cluster.rollout) needs 2 CPUs and 2 GPUs on one node, and no node has them")
    assert missing(two, [node("a", 4, 2)]) is None and bundles_of(two)[0] == {"CPU": 2.0, "GPU": 2.0}


def test_room_for_some_of_a_kind() -> None:
    said = missing(asks_of(asked(rollout_actors=3, rollout={"gpus": 2.0})), [node("a", 8, 3), node("b", 8, 3)])
    assert said and "3 rollout actors (cluster.rollout)" in said and "the nodes have room for 2: " in said


def test_shares_of_a_gpu_add_up_without_rounding_errors() -> None:
    tenths = asked(rollout_actors=10, rollout={"gpus": 0.1, "cpus": 0.1}, learner={"cpus": 0.5}, judge={"cpus": 0.5})
    assert missing(asks_of(tenths), [node("a", 2, 1)]) is None


def test_what_other_jobs_hold() -> None:
    asks = asks_of(asked(rollout_actors=2, rollout={"gpus": 1.0}))
    nodes = [node("a", 4, 1), node("b", 4, 1, free=0)]
    assert missing(asks, nodes) is None
    assert taken(asks, nodes) == "2 GPUs are needed, and 1 of the cluster's 2 are free: other jobs hold the rest"


def test_pieces_that_do_not_fit_beside_one_another() -> None:
    asks = asks_of(asked(rollout={"cpus": 3.0}, learner={"cpus": 2.0}, judge={"cpus": 0.5}))
    nodes = [Node("a", 3, 0, 3, 0), Node("b", 3, 0, 2.5, 0)]
    assert missing(asks, nodes) is None
    assert taken(asks, [replace(nodes[0], free_cpus=3.5), nodes[1]]).startswith("no way was found to place 1 rollout actor, the")


HERE = Facts({"Python": "3.11.9", "torch": "2.13.0", "retract's code": "abc"}, LEAST_FREE, True)


def test_like_nodes_pass() -> None:
    assert differences(HERE, [("a", HERE), ("b", HERE)], Path("/runs")) is None


def test_another_version_is_named_with_its_node() -> None:
    other = replace(HERE, versions={**HERE.versions, "torch": "2.12.1", "retract's code": "fff"})
    assert differences(HERE, [("a", HERE), ("b", other), ("c", other)], None) == (
        "node b does not run what the driver runs: torch 2.12.1 (driver: 2.13.0), retract's code fff (driver: abc) "
        "(and 1 more nodes)"
    )


@pytest.mark.parametrize(
    "change, said",
    [
        ({"sees": False}, "node b cannot see /runs: run.root must lie on a disk that all nodes share, or be a URL"),
        ({"free": 7}, f"the disk of node b is full: 7 bytes are free for Ray's session, {LEAST_FREE:,} are needed"),
    ],
)
def test_a_node_with_a_disk_of_its_own_or_a_full_one(change: dict[str, object], said: str) -> None:
    assert differences(HERE, [("a", HERE), ("b", replace(HERE, **change))], Path("/runs")) == said  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, None),
        (
            {"learner_workers": 2},
            "cluster.learner_workers is 2, which needs run.cache on a disk that all nodes see: without one the",
        ),
        (
            {"learner": {"gpus": 1}},
            "the learner (cluster.learner) needs 1 GPUs on the driver's node here, which has 0, since other",
        ),
    ],
)
def test_a_learner_that_has_to_stay_with_the_driver(
    settings: dict[str, object], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other node has what it needs, but not the run's disk."""
    two = [
        {"NodeID": name, "NodeName": name, "Resources": has} for name, has in (("here", {"CPU": 1}), ("far", {"CPU": 9, "GPU": 8}))
    ]
    monkeypatch.setattr(nodes, "ray", SimpleNamespace(nodes=lambda: two, get_runtime_context=lambda: Here))
    if said is None:
        nodes.check_learner_here(asked(**settings))
    else:
        with pytest.raises(ClusterError, match="^" + re.escape(said)):
            nodes.check_learner_here(asked(**settings))


class Here:
    get_node_id = staticmethod(lambda: "here")


def test_the_code_digest_is_that_of_the_text(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for name in ("pipeline", "actors"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("1")
    before = code_digest(tmp_path)
    (tmp_path / "actors" / "notes.txt").write_text("no code")
    assert code_digest(tmp_path) == before
    (tmp_path / "actors" / "a.py").write_text("2")
    assert code_digest(tmp_path) != before


@pytest.mark.parametrize(("late", "tries"), [(0, 1), (2, 3), (3, 3)])
def test_a_ray_that_comes_up_late_is_started_again(monkeypatch: pytest.MonkeyPatch, late: int, tries: int) -> None:
    tried, said = [], []

    def init(**options: object) -> SimpleNamespace:
        tried.append(options["address"])
        if len(tried) <= late:
            raise Exception("The current node timed out during startup. This\ncould happen because ...")
        return SimpleNamespace(dashboard_url="here")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("actors.cluster.check_room", lambda cluster: None)
    with (
        pytest.raises(ClusterError, match=r"^cannot reach Ray at this machine: .* during startup. This could")
        if late == 3
        else nullcontext(),
        ray_session(ClusterSettings(), say=said.append) as found,
    ):
        assert found.dashboard == "here"
    assert tried == ["local"] * tries
    assert said == ["Ray did not come up in time and is started again"] * (tries - 1)


def test_a_ray_elsewhere_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def init(**options: object) -> None:
        tried.append(options["address"])
        raise Exception("timed out during startup")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(ClusterError, match="cannot reach Ray at there:6379"), ray_session(asked(address="there:6379")):
        pass
    assert tried == ["there:6379"]
