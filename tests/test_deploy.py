"""What configs/cluster holds for Slurm and Kubernetes: the script run with stand-ins that work locally, the manifest's shape."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli import run_folder
from pipeline.settings_file import load_settings

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs" / "cluster"
BIN = Path(sys.executable).parent

# Options are dropped, the command runs here; what was asked of whom is written down.
SRUN = """#!/bin/bash
asked=()
while [[ $1 == --* ]]; do asked+=("$1"); shift; done
echo "${asked[*]} : ${*##*/}" >>"$ASKED"
if [ "$1" = hostname ]; then echo 127.0.0.1; exit; fi
exec "$@"
"""
SCONTROL = '#!/bin/bash\nprintf "one\\ntwo\\n"\n'
# In the place of the driver: waits until both nodes are there.
DRIVER = """
import os, sys, time
import ray
ray.init(logging_level="ERROR", log_to_driver=False)
for _ in range(120):
    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) == 2:
        break
    time.sleep(1)
print("driver", sys.argv[1:], len(alive), "nodes", ray.cluster_resources()["CPU"], os.environ["RAY_ADDRESS"], flush=True)
ray.shutdown()
sys.exit(3)
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("driver", f"#!{sys.executable}\n{DRIVER}")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SUBMIT_DIR": str(ROOT),
        "JOB_NODELIST": "n[1-2]",
        "JOB_ID": str(os.getpid()),
        "CPUS_PER_TASK": "1",
        "JOB_NUM_NODES": "2",
    }
    return {
        **os.environ,
        **{f"SLURM_{key}": value for key, value in slurm.items()},
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "ASKED": str(tmp_path / "asked"),
        "PYTHON": str(tmp_path / "driver"),
        "RAY": str(BIN / "ray"),
    }


def test_the_slurm_script_starts_a_ray_over_its_nodes_and_takes_it_down(env: dict[str, str], tmp_path: Path) -> None:
    script = FOLDER / "slurm.sbatch"
    done = subprocess.run(
        ["bash", str(script), "--config", "smoke", "a=b c"], capture_output=True, text=True, timeout=400, env=env, cwd=tmp_path
    )
    assert done.returncode == 3, done.stdout + done.stderr  # the driver's own
    port = 20000 + int(env["SLURM_JOB_ID"]) % 20000
    assert f"driver ['run.py', '--config', 'smoke', 'a=b c'] 2 nodes 2.0 127.0.0.1:{port}" in done.stdout
    asked = (tmp_path / "asked").read_text().splitlines()
    assert ["--nodelist=one" in line for line in asked] == [True, True, False] and "--nodes=1 --exclude=one" in asked[2]
    assert "--dashboard-host=127.0.0.1" in asked[1]
    token = (tmp_path / ".ray" / "auth_token").read_text().strip()
    assert token and token not in done.stdout + done.stderr + "".join(asked)
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    command = [str(BIN / "ray"), "health-check", "--address", f"127.0.0.1:{port}"]
    assert subprocess.run(command, env={**env, "RAY_AUTH_MODE": "token"}, capture_output=True, timeout=100).returncode != 0


def fields(value: Any, *known: str) -> None:
    assert value.keys() <= set(known), value.keys() - set(known)


def test_the_manifest_is_a_rayjob_of_fields_that_kuberay_knows() -> None:
    """Names and types as of ray.io/v1; no operator is asked."""
    job = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    fields(job["spec"], "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec")
    cluster = job["spec"]["rayClusterSpec"]
    fields(cluster, "rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs")
    assert cluster["authOptions"] == {"mode": "token"} and cluster["rayVersion"].startswith("2.60.")
    fields(cluster["headGroupSpec"], "rayStartParams", "template")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        fields(group, "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template")
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        fields(pod, "securityContext", "containers", "volumes")
        (container,) = pod["containers"]
        fields(container, "name", "image", "env", "resources", "volumeMounts")
        assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
        assert all("value" not in one or "TOKEN" not in one["name"] for one in container["env"])  # secrets stand elsewhere


def test_the_manifest_asks_for_what_its_configuration_needs() -> None:
    job = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())["spec"]
    python, file, _, name, *overrides = shlex.split(job["entrypoint"])
    assert (python, file) == ("python", "/opt/retract/run.py")
    settings = load_settings(ROOT / "configs" / f"{name}.yaml", overrides)
    pods = job["rayClusterSpec"]["workerGroupSpecs"]
    mounts = pods[0]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert any(run_folder(settings).is_relative_to(one["mountPath"]) for one in mounts)
    limits = [(group["replicas"], group["template"]["spec"]["containers"][0]["resources"]["limits"]) for group in pods]
    gpus = sum(count * int(limit["nvidia.com/gpu"]) for count, limit in limits)
    cluster = settings.cluster
    assert gpus == cluster.rollout_actors * cluster.rollout.gpus + cluster.learner_workers * cluster.learner.gpus
