"""Two Ray nodes on one host: actors spread over both, and what is said when a cluster cannot be worked with."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray
from datasets import load_from_disk
from ray._private.services import find_bootstrap_address
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from actors.engines import Request, Sampling
from actors.judge import judge_rows
from actors.scripted import ScriptedEngine
from benchmarks.chaos import KINDS
from pipeline.config import UndoSettings
from pipeline.stages.io import Codec, read_problems
from pipeline.stages.rollouts import row_seed
from pipeline.store import Store
from pipeline.store.remote import Remote
from pipeline.store.url import UrlStore

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent


SECRET = "hf_keepthistoyourself"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and a second node with a CPU each. All of its processes have a token in their environment."""
    os.environ["HF_TOKEN"] = SECRET
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": port, "node_name": "head"}
    found = Cluster(initialize_head=True, head_node_args=head)
    found.add_node(num_cpus=1, node_name="second")
    yield found
    found.shutdown()
    del os.environ["HF_TOKEN"]


@contextmanager
def started(cluster: Cluster, folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(ROOT / "run.py"), "--config", "smoke", f"run.root={folder}", *arguments]
    env = {**os.environ, "RAY_ADDRESS": cluster.address}
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=env)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def run(cluster: Cluster, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with started(cluster, folder, *arguments) as driver:
        said, errors = driver.communicate(timeout=500)
        return subprocess.CompletedProcess(driver.args, driver.returncode, said, errors)


def session(cluster: Cluster) -> Path:
    """Where Ray's own logs of both nodes are."""
    return Path(cluster.head_node.get_logs_dir_path())


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1, done.stdout + done.stderr
    return lines[0]


def test_rollout_actors_of_one_run_work_on_both_nodes(cluster: Cluster, tmp_path: Path) -> None:
    small = ["base.train.steps=2", "base.train.check_every=2", "engine.kind=hf", "rollouts.batch=8", "rollouts.max_tokens=16"]
    # Two of these engines have no room on one node.
    parts = ["cluster.rollout.cpus=0.75", "cluster.learner.cpus=0.25", "cluster.judge.cpus=0.25"]
    done = run(cluster, tmp_path, "--until", "rollouts", "cluster.rollout_actors=2", *parts, *small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Store(tmp_path / "smoke").manifest(1, "rollouts").counts["rows"] == 128  # type: ignore[union-attr]
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        actors = [one for one in list_actors(detail=True) if one["class_name"] == "_Rollout"]
    finally:
        ray.shutdown()
    assert len(actors) == 2 and len({one["node_id"] for one in actors}) == 2
    assert cluster.webui_url.startswith("127.0.0.1:")
    written = [file for folder in (tmp_path, session(cluster)) for file in folder.rglob("*") if file.is_file()]
    assert any(file.name == "config.yaml" for file in written) and any(file.name == "gcs_server.out" for file in written)
    assert [file for file in written if SECRET.encode() in file.read_bytes()] == []
    assert SECRET not in done.stdout + done.stderr
    assert all((tmp_path / "smoke" / "logs" / f"rollout-{number}.log").is_file() for number in (0, 1))


def test_what_the_cluster_lacks_is_said_and_not_awaited_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    done = run(cluster, tmp_path, "cluster.place_timeout=3", "cluster.rollout.gpus=1")
    error = error_of(done)
    assert "the cluster has 0 GPUs, but 1 rollout actor (cluster.rollout.gpus) beside" in error
    assert "(waited cluster.place_timeout=3 s)" in error and "waiting up to cluster.place_timeout=3 s: " in done.stdout
    assert not (tmp_path / "smoke" / "0" / "base").exists()


def test_cpus_that_another_job_holds(cluster: Cluster, tmp_path: Path) -> None:
    hold = (
        "import ray, sys\n"
        "ray.init(logging_level='ERROR')\n"
        "group = ray.util.placement_group([{'CPU': 1}])\n"
        "assert group.wait(60)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    env = {**os.environ, "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        try:
            error = error_of(run(cluster, tmp_path, "cluster.place_timeout=3"))
        finally:
            other.communicate("")
    assert "2 CPUs are needed, and 1 of the cluster's 2 are free: other jobs hold the rest" in error


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


def test_the_death_of_a_node_with_its_actors(cluster: Cluster, tmp_path: Path) -> None:
    """An actor of either kind may be there; what is left has no room for a second rollout actor, and the run ends all the same."""
    folder = tmp_path / "smoke"
    settings = [
        *("engine.kind=scripted", f"engine.script={folder}/0/problems", "base.train.steps=2", "base.train.check_every=2"),
        *("rollouts.samples=32", "rollouts.batch=8", "judge.batch=64", "cluster.rollout_actors=2", "cluster.rollout.cpus=0.6"),
        *("cluster.learner.cpus=0.2", "cluster.judge.cpus=0.2"),
    ]
    try:
        with started(cluster, tmp_path, "--until", "judge", *settings) as driver:
            kept = (folder / ".resume").glob
            while not any(file.stat().st_size for file in kept("1-rollouts/*/rows.arrow")) and driver.poll() is None:
                time.sleep(0.05)
            (second,) = cluster.worker_nodes
            there = psutil.Process(second.all_processes["raylet"][0].process.pid).children(recursive=True)
            working = [one for one in there if re.match(KINDS["rollout"][0], " ".join(one.cmdline()))]
            for one in working:
                one.suspend()  # with batches that it shall not finish before its end
            cluster.remove_node(second, allow_graceful=False)
            for one in working:
                one.kill()
            said, errors = driver.communicate(timeout=500)
    finally:
        cluster.add_node(num_cpus=1, node_name="second")
    assert driver.returncode == 0, said + errors
    assert len(working) == 1 and "a rollout actor died and is started again" in said
    rows = load_from_disk(folder / "1" / "rollouts")
    codec = Codec(folder / "0" / "base", UndoSettings(), "{question}\n")
    problems = {one.id: one for one in read_problems(folder / "0" / "problems")}
    asked = [Request(tuple(row["prompt_ids"]), row_seed(0, row["id"])) for row in rows]
    engine = ScriptedEngine(folder / "0" / "base", folder / "0" / "problems")
    made = engine.generate(asked, Sampling(1.0, 1.0, 96, codec.stop_id, logprobs=True))
    assert [tuple(ids) for ids in rows["token_ids"]] == [one.token_ids for one in made] and len(set(rows["id"])) == 64 * 32
    judged = judge_rows([(problems[row["problem"]], codec.decode(row["token_ids"]).text) for row in rows])
    assert load_from_disk(folder / "1" / "judge")["correct"] == [one.verdict.correct for one in judged]


@contextmanager
def blind_node(cluster: Cluster, hidden: Path, cpus: int) -> Iterator[None]:
    """A third node, for which nothing is in this folder: it has a file system of its own there."""
    command = f"mount -t tmpfs none {hidden} && exec {sys.executable} -m ray.scripts.scripts start --address {cluster.address} "
    command += f"--num-cpus {cpus} --node-ip-address 127.0.0.2 --node-name blind --block --disable-usage-stats"
    with subprocess.Popen(["unshare", "-m", "bash", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as node:
        try:
            ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
            until = time.monotonic() + 60
            while not any(one["Alive"] and one["NodeName"] == "blind" for one in ray.nodes()):
                assert node.poll() is None and time.monotonic() < until, "the node does not start"
                time.sleep(0.2)
            ray.shutdown()
            yield
        finally:
            ray.shutdown()
            children = psutil.Process(node.pid).children(recursive=True)
            for one in (*children, psutil.Process(node.pid)):
                one.kill()


def can_hide() -> bool:
    """Whether this process may give another one a view of the disk of its own."""
    hide = ["unshare", "-m", "bash", "-c", "mount -t tmpfs none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(hide, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_hide(), reason="needs the right to mount (unshare -m): a node that does not see the run's disk")
def test_a_node_that_does_not_see_the_disk_of_a_run_at_a_url(cluster: Cluster, tmp_path: Path) -> None:
    """Its engine has the model through Ray; the learner, which writes, stays with the driver."""
    cache = tmp_path / "cache"
    cache.mkdir()
    small = ["base.train.steps=2", "base.train.check_every=2", "engine.kind=hf", "rollouts.batch=32", "rollouts.max_tokens=16"]
    parts = ["cluster.rollout.cpus=1.5", "cluster.learner.cpus=0.25", "cluster.judge.cpus=0.25"]  # only there is room for it
    with blind_node(cluster, tmp_path, 2):
        plain = error_of(run(cluster, tmp_path, "--until", "rollouts", *parts, *small))
        assert (
            f"node blind cannot see {tmp_path}/smoke/logs: run.root must lie on a disk that all nodes share, or be a URL" in plain
        )
        url = [f"run.root=file://{tmp_path}/there", f"run.cache={cache}"]
        done = run(cluster, tmp_path, "--until", "rollouts", *parts, *small, *url)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "some nodes do not see the run's folder" in done.stdout
    there = UrlStore(Remote(f"file://{tmp_path}/there/smoke"))
    assert there.manifest(1, "rollouts").counts["rows"] == 128  # type: ignore[union-attr]


def test_without_an_address_a_run_has_a_ray_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    """The machine remembers the address of its last cluster, which may be gone: joining it would wait for ever."""
    code = (
        "import ray\n"
        "from actors.cluster import ray_session\n"
        "from pipeline.cluster_config import ClusterSettings\n"
        "with ray_session(ClusterSettings()): print(ray.get_runtime_context().gcs_address)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
    assert re.fullmatch(r"[\d.]+:\d+", found := done.stdout.splitlines()[-1]), done.stderr
    assert find_bootstrap_address(None) == cluster.address != found
