"""Rollouts that no stage stores but that a run's logs hold, line by line: those of reinforcement learning, with their rewards.

`logs/rollouts/grpo-ROUND.jsonl` is the newest file, `.1` the one before it and so on. Lines are read once for a few columns; what
is shown is read again from its place in its file. A line that is no such rollout, like the last one of a killed run, is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.backtrack.tree import Rewinding
from pipeline.config import UndoSettings
from pipeline.stages.io import Codec
from pipeline.view.sources import UNKNOWN, VERDICTS, Columns, Taken

FOLDER = Path("logs", "rollouts")


@dataclass(frozen=True)
class _Line:
    """What is kept of a line."""

    file: Path
    start: int
    """Byte."""
    problem: str
    texts: tuple[str, str, str, str, str]
    """Model, mode, temperature, verdict, end."""
    undos: int
    tokens: int
    reward: float


class LoggedSource:
    """What a stage has logged in one round. A row that was made twice, by a resumed run, is there once."""

    prompt = ""
    rewinding: Rewinding = "immediate"
    inputs: Mapping[str, str] = {}  # weights change with every step and are not kept: nobody can be asked

    def __init__(self, folder: Path, stage: str, round: int, undo: UndoSettings) -> None:
        self.stage, self.round, self.undo = stage, round, undo
        self.bad = 0
        """Lines left out."""
        found: dict[str, _Line] = {}
        for file in log_files(folder, stage, round):
            start = 0
            with file.open("rb") as lines:
                for text in lines:
                    if text.strip():
                        try:
                            row = json.loads(text)
                            found[str(row["id"])] = _line(row, file, start)
                        except (ValueError, TypeError, KeyError, AttributeError):
                            self.bad += 1
                    start += len(text)
        self._lines = list(found.values())
        self.count = len(self._lines)

    def columns(self, codec: Codec) -> Columns:
        names = ("model", "mode", "temperature", "verdict", "finish")
        texts = zip(*(line.texts for line in self._lines), strict=True) if self._lines else [()] * len(names)
        facets = {name: pa.array(column, pa.string()).dictionary_encode() for name, column in zip(names, texts, strict=True)}
        facets["first"] = pa.array([UNKNOWN] * self.count, pa.string()).dictionary_encode()
        return Columns(
            facets,
            pa.chunked_array([[line.problem for line in self._lines]], pa.string()),
            np.array([line.undos for line in self._lines], np.int32),
            np.array([line.tokens for line in self._lines], np.int32),
            np.array([line.reward for line in self._lines], np.float32),
        )

    def take(self, at: int) -> Taken:
        line = self._lines[at]
        try:
            with line.file.open("rb") as file:
                file.seek(line.start)
                row = json.loads(file.readline())
            if row["problem"] != line.problem:
                raise ValueError
        except (OSError, ValueError, TypeError, KeyError):  # the run has moved on, and with it the names of the files
            return Taken(line.problem, (), None)
        components = tuple((str(name), float(value)) for name, value in row["components"].items())
        return Taken(line.problem, tuple(row["token_ids"]), None, components=components, step=row["step"])

    def model_of(self, model: str) -> tuple[str, str]:
        return "", ""


def log_files(folder: Path, stage: str, round: int) -> list[Path]:
    """The files of a stage in a round, the oldest first."""
    newest = folder / f"{stage}-{round}.jsonl"
    older = [path for path in folder.glob(f"{newest.name}.*") if path.suffix[1:].isascii() and path.suffix[1:].isdigit()]
    found = [*sorted(older, key=lambda path: -int(path.suffix[1:])), newest]
    return [path for path in found if path.is_file() and not path.is_symlink()]


def _line(row: dict[str, Any], file: Path, start: int) -> _Line:
    """
    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is no rollout of this format.
    """
    correct, reward = row["correct"], row["reward"]
    verdict = UNKNOWN if correct is None else VERDICTS[bool(correct)]
    texts = (str(row["model"] or row["stage"]), str(row["mode"]), f"{float(row['temperature']):g}", verdict, str(row["finish"]))
    ids = row["token_ids"]
    # What is shown later is checked here.
    if not all(type(token) is int and token >= 0 for token in ids) or not isinstance(row["step"], int | None):
        raise TypeError
    if not all(isfinite(float(value)) for value in row["components"].values()):
        raise ValueError
    undos = int(row["undos"])
    return _Line(file, start, str(row["problem"]), texts, undos, len(ids), float("nan") if reward is None else float(reward))
