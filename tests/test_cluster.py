"""Two Ray nodes on one host: actors spread over both, and what is said when a cluster cannot be worked with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from pipeline.store import Store

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with 2 CPUs and a node with 1."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True, "node_name": "head"})
    found.add_node(num_cpus=1, node_name="second")
    yield found
    found.shutdown()


def run(cluster: Cluster, folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run.py"), "--config", "smoke", f"run.root={folder}", *arguments]
    env = {**os.environ, "RAY_ADDRESS": cluster.address, **more}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=folder, env=env)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1, done.stdout + done.stderr
    return lines[0]


def test_rollout_actors_of_one_run_work_on_both_nodes(cluster: Cluster, tmp_path: Path) -> None:
    small = ["base.train.steps=2", "base.train.check_every=2", "engine.kind=hf", "rollouts.batch=8", "rollouts.max_tokens=16"]
    done = run(cluster, tmp_path, "--until", "rollouts", "cluster.rollout_actors=2", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Store(tmp_path / "smoke").manifest(1, "rollouts").counts["rows"] == 128  # type: ignore[union-attr]
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        actors = [one for one in list_actors(detail=True) if one["class_name"] == "_Rollout"]
    finally:
        ray.shutdown()
    assert len(actors) == 2 and len({one["node_id"] for one in actors}) == 2
    assert all((tmp_path / "smoke" / "logs" / f"rollout-{number}.log").is_file() for number in (0, 1))


@pytest.mark.parametrize(
    "asked, said",
    [
        (["cluster.rollout.gpus=1"], "the cluster has 0 GPUs, but 1 rollout actor (cluster.rollout.gpus) beside"),
        (
            ["cluster.rollout.cpus=3", "cluster.learner.cpus=0", "cluster.judge.cpus=0"],
            "on one node, and no node has them: head 2 CPUs",
        ),
    ],
    ids=["no GPU", "no single node"],
)
def test_what_the_cluster_lacks_is_said_and_not_awaited_for_ever(
    cluster: Cluster, tmp_path: Path, asked: list[str], said: str
) -> None:
    done = run(cluster, tmp_path, "cluster.place_timeout=3", *asked)
    assert said in error_of(done) and "(waited cluster.place_timeout=3 s)" in error_of(done)
    assert "waiting up to cluster.place_timeout=3 s: " in done.stdout
    assert not (tmp_path / "smoke" / "0" / "base").exists()


def test_cpus_that_another_job_holds(cluster: Cluster, tmp_path: Path) -> None:
    hold = (
        "import ray, sys\n"
        "ray.init(logging_level='ERROR')\n"
        "group = ray.util.placement_group([{'CPU': 2}])\n"
        "assert group.wait(60)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    env = {**os.environ, "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as other:
        assert other.stdout and "held" in iter(other.stdout.readline, "").__next__()
        try:
            error = error_of(run(cluster, tmp_path, "cluster.place_timeout=3"))
        finally:
            other.communicate("")
    assert "2 CPUs are needed, and 1 of the cluster's 3 are free: other jobs hold the rest" in error


def test_a_driver_with_other_code_than_the_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """Nodes import from where PYTHONPATH says first; a job's upload and a stale checkout on a node part in the same way."""
    code = (
        "import sys, json\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from actors import nodes\n"
        "from actors.cluster import ray_session\n"
        "from actors.placement import ClusterError\n"
        "from pipeline.cluster_config import ClusterSettings\n"
        "nodes.code_digest = lambda root: '0' * 64\n"
        "try:\n"
        "    with ray_session(ClusterSettings()): print(json.dumps('joined'))\n"
        "except ClusterError as error: print(json.dumps(str(error)))\n"
    )
    env = {**os.environ, "RAY_ADDRESS": cluster.address}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
    said = json.loads(done.stdout.splitlines()[-1])
    assert "does not run what the driver runs: retract's code " in said and "(driver: 000000000000)" in said, done.stderr
