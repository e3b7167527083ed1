"""The log of rollouts: whole lines in order, rotation and its limit, what a killed run leaves, a disk that is full."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.rollout_log import Rolled, RolloutLog


def rolled(number: int, tokens: int = 4) -> Rolled:
    return Rolled(f"p#{number}", "p", range(tokens), "stop", "v", "rewind", 1.0, undos=number % 2)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_all_that_is_known(tmp_path: Path) -> None:
    told: list[Rolled] = []
    log = RolloutLog(tmp_path / "logs", "grpo", 2, on_rows=told.extend)
    row = Rolled(
        "p#grpo.3.0", "p", (5, 6), "length", "grpo@2", "rewind", 1.0, 1, (-0.123456, -2.0), 3, correct=False, reward=-0.5,
        components={"outcome": 0.0},
    )  # fmt: skip
    log.write([row])
    assert log.path == tmp_path / "logs" / "grpo-2.jsonl"
    line = read(log.path)[0]
    assert line.pop("at") > 1.7e9
    assert line == {
        "format": 1, "stage": "grpo", "round": 2, "step": 3, "id": "p#grpo.3.0", "problem": "p", "model": None, "version": "grpo@2",
        "mode": "rewind", "temperature": 1.0, "finish": "length", "undos": 1, "correct": False, "reward": -0.5,
        "components": {"outcome": 0.0}, "token_ids": [5, 6], "logprobs": [-0.1235, -2.0],
    }  # fmt: skip
    assert told == [row]


@pytest.mark.parametrize("files", [1, 2, 4])
def test_files_are_rotated_by_size_and_the_oldest_deleted(tmp_path: Path, files: int) -> None:
    log = RolloutLog(tmp_path, "rollouts", 1, most_bytes=3000, files=files)
    for start in range(0, 60, 3):  # writes of three lines, which need not fall together with the files' ends
        log.write([rolled(number) for number in range(start, start + 3)])
    names = ["rollouts-1.jsonl", *(f"rollouts-1.jsonl.{number}" for number in range(1, files))]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)
    assert all((tmp_path / name).stat().st_size <= 3000 for name in names)
    oldest_first = [line["id"] for name in reversed(names) for line in read(tmp_path / name)]
    assert oldest_first == [f"p#{number}" for number in range(60 - len(oldest_first), 60)] and len(oldest_first) >= 4 * files


def test_one_large_write_is_rotated_too(tmp_path: Path) -> None:
    RolloutLog(tmp_path, "rollouts", 1, most_bytes=3000, files=100).write([rolled(number) for number in range(60)])
    files = sorted(tmp_path.iterdir(), key=lambda file: int(file.name.rpartition("jsonl")[2].strip(".") or 0), reverse=True)
    assert len(files) > 3 and all(file.stat().st_size <= 3000 for file in files)
    assert [line["id"] for file in files for line in read(file)] == [f"p#{number}" for number in range(60)]


def test_a_line_longer_than_a_file_is_whole(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, "rollouts", 1, most_bytes=1000, files=3)
    for number in range(3):
        log.write([rolled(number, tokens=2000)])
    assert [len(read(tmp_path / f"rollouts-1.jsonl{end}")) for end in ("", ".1", ".2")] == [1, 1, 1]


def test_a_resumed_run_goes_on_behind_what_is_there(tmp_path: Path) -> None:
    first = RolloutLog(tmp_path, "rollouts", 1)
    first.write([rolled(0), rolled(1)])
    first.close()
    assert first.path is not None
    first.path.write_bytes(first.path.read_bytes()[:-20])  # killed in the middle of a line
    RolloutLog(tmp_path, "rollouts", 1).write([rolled(1)])
    lines = first.path.read_text().splitlines()
    assert json.loads(lines[0])["id"] == "p#0" and json.loads(lines[2])["id"] == "p#1"
    with pytest.raises(ValueError):
        json.loads(lines[1])


def test_a_full_disk_ends_the_log_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = RolloutLog(tmp_path, "rollouts", 1)
    log.write([rolled(0)])
    monkeypatch.setattr(os, "write", full)
    for _ in range(3):
        log.write([rolled(1)])
    assert [record.getMessage() for record in caplog.records] == [
        f"rollouts are not logged any more: {tmp_path / 'rollouts-1.jsonl'}: No space left on device"
    ]


def test_without_a_folder_nothing_is_kept() -> None:
    told: list[Rolled] = []
    log = RolloutLog(None, on_rows=told.extend)
    log.write([rolled(0)])
    assert log.path is None and len(told) == 1
