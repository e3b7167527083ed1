"""Every rollout as a line of JSON in a run's logs, rotated by size. Stages write, pages and people read; docs/monitoring.md has
the format. Knows files, neither Ray nor what a rollout is good for.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FORMAT = 1
"""Raised when a field changes its meaning; new fields may come at any time."""
_CHUNK = 1 << 20  # bytes of one write, at most, unless a line alone is longer
_logger = logging.getLogger("retract.rollout_log")


@dataclass(frozen=True)
class Rolled:
    """One rollout, as far as the stage knows it."""

    id: str
    """The same for the same rollout of the same stage and round, also when a resumed run makes it again."""
    problem: str
    token_ids: Sequence[int]
    """As emitted: undo tokens and what they deleted included, the prompt not."""
    finish: str
    """stop or length."""
    version: str
    """Of the weights that made it."""
    mode: str
    """How undo was decided: forbidden, rewind, soft, .."""
    temperature: float
    undos: int = 0
    """Undo tokens, no-ops included."""
    logprobs: Sequence[float] = ()
    """[token_ids], or empty where they are not kept."""
    step: int | None = None
    """Of the training, from 1; 0 is before the first one."""
    model: str | None = None
    """Under evaluation."""
    correct: bool | None = None
    """The verdict; None where it comes later, or never."""
    reward: float | None = None
    components: Mapping[str, float] = field(default_factory=dict)
    """Of the reward, by name, before their weights."""


class RolloutLog:
    """The lines of one stage in one round: FOLDER/STAGE-ROUND.jsonl, what was before in .1 and so on, .1 the newest of them.

    A folder of None keeps nothing. Where a line cannot be written, a full disk for instance, the log ends with a warning and the
    run goes on.

    Args:
        most_bytes: of one file.
        files: kept, the one that is written included; older ones are deleted.
        on_rows: called with the rows of each write.
    """

    def __init__(
        self,
        folder: Path | None,
        stage: str = "",
        round: int = 0,
        most_bytes: int = 64 << 20,
        files: int = 8,
        on_rows: Callable[[Sequence[Rolled]], None] | None = None,
    ) -> None:
        self._folder, self._stage, self._round = folder, stage, round
        self._most_bytes, self._files, self._on_rows = most_bytes, files, on_rows
        self._file: int | None = None
        self._size = 0

    @property
    def path(self) -> Path | None:
        """The file that is written now."""
        return self._folder and self._folder / f"{self._stage}-{self._round}.jsonl"

    def write(self, rows: Sequence[Rolled]) -> None:
        """Append these: one line each, whole, in their order."""
        if self._on_rows and rows:
            self._on_rows(rows)
        if self._folder is None:
            return
        head = {"format": FORMAT, "at": round(time.time(), 3), "stage": self._stage, "round": self._round}
        try:
            chunk = bytearray()
            for row in rows:
                line = _line(head, row)
                if chunk and (len(chunk) + len(line) > _CHUNK or self._size + len(chunk) + len(line) > self._most_bytes):
                    self._append(chunk)
                    chunk.clear()
                chunk += line
            if chunk:
                self._append(chunk)
        except OSError as error:
            _logger.warning(f"rollouts are not logged any more: {self.path}: {error.strerror or error}")
            self._folder = None
            self.close()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, chunk: bytearray) -> None:
        file = self._opened(len(chunk))
        left = memoryview(chunk)
        while left:
            left = left[os.write(file, left) :]
        self._size += len(chunk)

    def _opened(self, more: int) -> int:
        if self._file is None:
            self._open()
        if self._size and self._size + more > self._most_bytes:
            self._rotate()
        assert self._file is not None
        return self._file

    def _open(self) -> None:
        path = self.path
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._size = os.fstat(self._file).st_size
        if self._size and os.pread(self._file, 1, self._size - 1) != b"\n":  # a killed run's last line: no JSON, and alone
            self._size += os.write(self._file, b"\n")

    def _rotate(self) -> None:
        path = self.path
        assert path is not None
        self.close()
        for number in range(self._files - 1, 0, -1):
            source = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
            if source.exists():
                source.replace(path.with_name(f"{path.name}.{number}"))
        if self._files == 1:
            path.unlink()
        self._open()


def _line(head: Mapping[str, object], row: Rolled) -> bytes:
    values = {
        **head,
        "step": row.step,
        "id": row.id,
        "problem": row.problem,
        "model": row.model,
        "version": row.version,
        "mode": row.mode,
        "temperature": row.temperature,
        "finish": row.finish,
        "undos": row.undos,
        "correct": row.correct,
        "reward": row.reward,
        "components": dict(row.components),
    }
    # Nearly all of a line is numbers, and formatting them at once is much faster than the json module.
    ids = ("%d," * len(row.token_ids) % tuple(row.token_ids))[:-1]
    logprobs = ("%.4f," * len(row.logprobs) % tuple(row.logprobs))[:-1].replace("inf", "Infinity").replace("nan", "NaN")
    return f'{json.dumps(values, separators=(",", ":"))[:-1]},"token_ids":[{ids}],"logprobs":[{logprobs}]}}\n'.encode()
