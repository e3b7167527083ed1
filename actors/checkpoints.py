"""Checkpoints of a training under way, so that a killed run goes on from the last one and ends with the same weights, bit for bit.

The trainer saves weights, optimiser, schedule and random states; this adds what it does not know (the curve, the best weights so
far) and a mark without which a checkpoint counts for nothing: it is set last. The learner calls it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from actors.ranks import is_first, wait_for_all

KEPT = 2  # the newest one may be half-written when the run is killed
_WHOLE = "whole.json"
_TENSORS = "kept.safetensors"
_ASKED = "asked.json"


@dataclass(frozen=True)
class Snapshot:
    """What a training knows beside the trainer's own state."""

    values: dict[str, Any]
    """JSON values."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Training(Protocol):
    """What can be saved and restored."""

    def snapshot(self) -> Snapshot: ...

    def restore(self, snapshot: Snapshot) -> None: ...


class Checkpoints(TrainerCallback):
    """Completes each checkpoint of a trainer whose output folder is `folder`."""

    def __init__(self, folder: Path, training: Training) -> None:
        self._folder, self._training = folder, training

    def resume(self) -> Path | None:
        """Restore the newest whole checkpoint and remove the others; its folder, None where training begins anew."""
        found = {int(path.name.split("-")[1]): path for path in self._folder.glob("checkpoint-*") if (path / _WHOLE).is_file()}
        newest = found[max(found)] if found else None
        wait_for_all()  # before any process sees less than the others
        if is_first():
            for path in self._folder.glob("checkpoint-*"):
                if path != newest:
                    shutil.rmtree(path)
        wait_for_all()
        if newest:
            tensors = load_file(newest / _TENSORS) if (newest / _TENSORS).is_file() else {}
            self._training.restore(Snapshot(json.loads((newest / _WHOLE).read_text()), tensors))
        return newest

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= args.max_steps:
            return  # nothing is left to be done from here on, and a trainer cannot resume at its end
        path = self._folder / f"checkpoint-{state.global_step}"
        snapshot = self._training.snapshot()
        wait_for_all()  # each process has written its part by now
        if not is_first():
            return
        if snapshot.tensors:
            save_file({name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}, path / _TENSORS)
        part = path / f"{_WHOLE}.part"
        with part.open("w") as file:
            json.dump(snapshot.values, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path / _WHOLE)


def claim(folder: Path, asked: Mapping[str, Any]) -> None:
    """Let a folder hold the checkpoints of this training alone, which is told by `asked`, JSON values.

    Raises:
        ValueError: what stands there is of another one.
    """
    file = folder / _ASKED
    if file.is_file():
        kept = json.loads(file.read_text())
        for key in sorted(kept.keys() | asked.keys()):
            was, now = kept.get(key), asked.get(key)
            if was != now:
                raise ValueError(f"the checkpoints in {folder} are of another training: {key} was {was}, is {now}")
    elif is_first():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{_ASKED}.part"
        part.write_text(json.dumps(dict(asked)))
        part.replace(file)


def save_step(kept: Path, step: int, write: Callable[[Path], None]) -> None:
    """A checkpoint of a loop of our own: what `write` puts into a folder, in place of the one before. Complete or not there: the
    folder gets its name last."""
    folder = kept / f"step-{step}"
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    for file in part.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    part.rename(folder)
    for old in kept.glob("step-*"):
        if old != folder:
            shutil.rmtree(old)


def newest_step(kept: Path) -> Path | None:
    """The folder that `save_step` has left; None where there is none."""
    found = [path for path in kept.glob("step-*") if path.suffix != ".part"]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)
