"""Two processes that share each step learn what one learns: whole models, adapters, shards of both, bfloat16, parts of steps."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learner import Curve, TrainingError, fit
from pipeline.backtrack.targets import Form
from pipeline.config import SftSettings
from tests.actors.trained import prepared, spoil_token, thirty_traces, weights

COMMON: dict[str, Any] = {"steps": 6, "rows": 4, "row_tokens": 64, "lr": 1e-2, "log_every": 1, "checkpoint_every": 2}
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "parts": {"accumulate": 2, "gradient_checkpointing": True},
    "lora": {"trainable": "lora", "gradient_checkpointing": True},
    "undo_row": {"trainable": "undo_row"},
    "narrow": {"rows": 2, "row_tokens": 32},
    "coarse": {"dtype": "bfloat16"},
    "fsdp": {"fsdp": {}},
    "fsdp lora": {"fsdp": {"activation_checkpointing": True}, "trainable": "lora", "accumulate": 2},
}


def in_two_processes(*arguments: str) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": ".", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    ends = []
    for process in running:
        out, err = process.communicate(timeout=500)
        ends.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return ends


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    prepared(folder)
    return folder


@pytest.fixture(scope="module")
def shared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, trained by two processes, all in one start of them."""
    folder = tmp_path_factory.mktemp("shared")
    for end in in_two_processes("all", str(source), str(folder)):
        assert end.returncode == 0, end.stderr[-3000:]
    return folder


def settings_of(case: str, alone: bool = False) -> SftSettings:
    without = {"fsdp": None} if alone else {}
    return SftSettings(**COMMON | CASES[case] | without)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(case: str, source: Path, shared: Path, tmp_path: Path) -> None:
    one = fit(source, tmp_path / "one", thirty_traces(source, Form("rewind")), settings_of(case, alone=True), 0, Curve())
    two = json.loads((shared / f"{case}.json").read_text())
    assert two["steps"] == two["step"] == 6
    # In bfloat16 each process rounds its own gradients before they are added.
    tolerance = 2e-3 if case == "coarse" else 1e-5
    assert [loss for _, loss in two["losses"]] == pytest.approx([loss for _, loss in one.losses], rel=tolerance)
    assert (two["tokens"], two["target_tokens"], two["left_out"]) == (one.tokens, one.target_tokens, one.left_out)
    alone, together = weights(tmp_path / "one"), weights(shared / case)
    assert alone.keys() == together.keys()
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=2e-2 if case == "coarse" else 1e-5)


def test_a_loss_that_is_no_number_in_one_process(source: Path, tmp_path: Path) -> None:
    """Trace 3 alone begins with token 33 and stands in one of the step's two rows: the other process has a good loss."""
    spoil_token(source, tmp_path / "spoilt", 33)
    ends = in_two_processes("narrow", str(tmp_path / "spoilt"), str(tmp_path))
    said = [end.stderr.rpartition("TrainingError: ")[2] for end in ends if "TrainingError: " in end.stderr]
    assert len(said) == 1 and said[0].startswith("the loss is nan at step ")
    named = said[0].partition("on traces ")[2].partition(":")[0]
    assert "3" in named.split(", ")
    assert not (tmp_path / "narrow").exists()


def _train(source: Path, folder: Path, cases: list[str]) -> None:
    torch.distributed.init_process_group("gloo")
    for case in cases:
        data = thirty_traces(source, Form("rewind"))
        curve = fit(source, folder / case, data, settings_of(case), 0, Curve(), resume=folder / "resume" / case)
        if torch.distributed.get_rank() == 0:
            (folder / f"{case}.json").write_text(json.dumps(asdict(curve)))


if __name__ == "__main__":
    wanted, source_folder, target_folder = sys.argv[1:]
    try:
        _train(Path(source_folder), Path(target_folder), list(CASES) if wanted == "all" else [wanted])
    except TrainingError as error:
        print(f"TrainingError: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # the other process waits for this one's gradients until the connection ends
    torch.distributed.destroy_process_group()
