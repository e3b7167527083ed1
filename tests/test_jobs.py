"""`ray job submit -- python run.py` against a local cluster, with token authentication as Ray asks for it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node of its own, with home and token in a temporary folder. Yields the environment of its clients."""
    home = tmp_path_factory.mktemp("home")
    env = {**os.environ, "HOME": str(home), "RAY_AUTH_MODE": "token", "PATH": f"{BIN}:{os.environ['PATH']}"}
    env.pop("RAY_ADDRESS", None)
    call(env, "ray", "get-auth-token", "--generate")
    ports = []
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{ports[1]}"  # where `ray job` and `ray list` look
    start = ["ray", "start", "--head", "--block", "--dashboard-host", "127.0.0.1", "--num-cpus", "2", "--disable-usage-stats"]
    for option, port in zip(("port", "dashboard-port", "dashboard-agent-listen-port"), ports, strict=True):
        start += [f"--{option}", port]
    # Not `ray stop`, which would end every Ray of the machine: `--block` ends its own.
    with subprocess.Popen(start, env=env, stdout=subprocess.DEVNULL) as head:
        try:
            for _ in range(100):
                with socket.socket() as tried:
                    if head.poll() is not None or not tried.connect_ex(("127.0.0.1", int(ports[1]))):
                        break
                time.sleep(0.5)
            yield env
        finally:
            head.terminate()


def call(env: dict[str, str], *command: str, not_yet: str = "") -> str:
    """What it says; asked again as long as it fails with `not_yet`."""
    for _ in range(60):
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
        if done.returncode == 0 or not not_yet or not_yet not in done.stdout + done.stderr:
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def submit(env: dict[str, str], runs: Path, *overrides: str, wait: bool = True) -> str:
    how = [] if wait else ["--no-wait"]
    run = ["python", "run.py", "--config", "smoke", f"run.root={runs}", *overrides]
    # Ray's own agent, which takes jobs, is there some seconds after the dashboard.
    return call(env, "ray", "job", "submit", "--working-dir", ".", *how, "--", *run, not_yet="No available agent")


def test_a_job_is_stopped_leaves_no_actor_and_is_continued(cluster: dict[str, str], tmp_path: Path) -> None:
    log = submit(cluster, tmp_path, "base.train.steps=100000", wait=False)
    found = re.search(r"raysubmit_\w+", log)
    assert found, log
    job = found[0]
    for _ in range(120):
        log = call(cluster, "ray", "job", "logs", job)
        if re.search(r"\[base\].*loss", log):
            break
        time.sleep(1)
    assert re.search(r"\[problems\] 104 rows", log) and re.search(r"\[base\].*loss", log), log
    call(cluster, "ray", "job", "stop", job)
    for _ in range(60):
        actors = call(cluster, "ray", "list", "actors", "--filter", "state=ALIVE")
        if "LearnerActor" not in actors and "_Learner" not in actors:
            break
        time.sleep(1)
    assert "_Learner" not in actors, actors
    log = submit(cluster, tmp_path, "--until", "base")
    assert re.search(r"^ *0  problems +104 +\S+  reused$", log, re.MULTILINE), log
    assert re.search(r"^ *0  base +\S+ +\S+  built$", log, re.MULTILINE), log
    assert (tmp_path / "smoke" / "0" / "base" / "manifest.json").is_file()
    token = (Path(cluster["HOME"]) / ".ray" / "auth_token").read_text().strip()
    assert token and token not in log
    assert [file for file in tmp_path.rglob("*") if file.is_file() and token.encode() in file.read_bytes()] == []


def test_the_upload_of_this_checkout_is_small(tmp_path: Path) -> None:
    """What git does not keep is not sent either: runs, environments and caches."""
    for folder in ("runs", ".venv", ".git", "build", "pipeline"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_bytes(bytes(1000))
    shutil.copy(ROOT / ".rayignore", tmp_path)
    package = tmp_path / "package.zip"
    create_package(str(tmp_path), package, include_gitignore=True, excludes=["package.zip"])
    with zipfile.ZipFile(package) as opened:
        assert [name for name in opened.namelist() if name.endswith("file")] == ["pipeline/file"]
