"""A study with real Ray and real training: stopped in the middle, continued by the same command, nothing built twice."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.store import Store
from tests.pipeline.reported import parsed

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent
SMALL = """
task: {train: 48, dev: 12, test: 16, ood: 8, steps: [2, 3], ood_steps: [4, 5]}
base: {train: {steps: 15}}
rollouts: {samples: 1, max_tokens: 48}
engine: {kind: hf}
sft: {steps: 4, control: false, checks: {problems: 12, first_tries: 2}}
evaluate: {max_tokens: 48, modes: [rewind], votes: 0, planted: 0, dev: 4, ood: 2, probes: 4}
report: {rollouts: 2}
study: {seeds: [3], variants: {span: {sft: {mask: span}}, decision: {}}, against: decision}
"""


def states(output: str) -> list[list[str]]:
    """reused or built, stage by stage, for each run that came to its end."""
    tables = output.split("round  stage")[1:]
    return [re.findall(r"^ *\d+  \w+ +\S+ +\S+  (reused|built)$", table, re.MULTILINE) for table in tables]


def test_a_study_that_is_stopped_goes_on_and_builds_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(SMALL)
    files = ["--config", "smoke", "--config", str(tmp_path / "more.yaml")]
    command = [sys.executable, str(ROOT / "run.py"), *files, f"run.root={tmp_path}", "run.name=two"]
    folder = tmp_path / "two"

    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as first:
        assert first.stdout is not None
        said = []
        for line in first.stdout:
            said.append(line)
            if "run 2 of 2" in "".join(said) and line.startswith("[sft]"):
                first.send_signal(signal.SIGINT)
                break
        out, err = first.communicate(timeout=600)
    told = "".join(said) + out
    assert first.returncode == 130, told + err
    assert "study two ends in run 2 of 2, decision-3" in err
    assert states(told) == [["built"] * 8]
    page = json.loads((folder / "study.json").read_text())  # of what there is
    assert [run["evaluated"] for row in page["variants"] for run in row["runs"]] == [False, True]

    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    shared = ["reused"] * 5 + ["built"] * 3
    assert states(done.stdout) == [["reused"] * 8, shared]
    one, other = (Store(folder / f"{name}-3") for name in ("span", "decision"))
    for round, stage in ((0, "problems"), (0, "base"), (1, "rollouts"), (1, "judge"), (1, "traces")):
        assert one.check(round, stage) is None and other.check(round, stage) is None
        for file in one.manifest(round, stage).files:
            assert os.path.samefile(one.path(round, stage) / file, other.path(round, stage) / file)

    found = json.loads((folder / "study.json").read_text())
    assert all(run["evaluated"] for row in found["variants"] for run in row["runs"])
    own = {
        name: next(
            row["accuracy"]
            for row in json.loads((folder / f"{name}-3" / "metrics.json").read_text())["evaluations"]
            if (row["model"], row["mode"], row["split"], row["group"]) == ("sft", "rewind", "test", "all")
        )
        for name in ("span", "decision")
    }
    for row in found["figures"]:
        if row["trained"] and row["group"] == "all":
            assert row["accuracy"]["by_seed"] == {"3": own[row["variant"]]} and row["n"] == 16
    assert [row["variant"] for row in found["differences"] if row["group"] == "all"] == ["span"] and found["cosines"]
    assert {row["seed"] for row in csv.DictReader((folder / "study.csv").open())} == {"3", "mean"}
    parsed((folder / "study.html").read_text())

    again = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert again.stdout.splitlines()[-1] == "2 runs, 16 outputs: 16 to reuse"
