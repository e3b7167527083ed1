"""What a stage has made so far, so that a killed run does not make it again: lines of JSON in the stage's resume folder.

A line is on the disk before the next one is begun; one that the kill has torn is not read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Kept:
    """Values by key, in the order in which they were added. JSON makes lists of tuples: `tuples` makes tuples of them again.

    Example:
        with Kept(context.resume / "rollouts.jsonl") as kept:
            kept.add({"row 1": [1, 2]})
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = {}
        whole = 0
        self._file = file.open("a+b")
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self.found |= json.loads(line)
            whole += len(line)
        self._file.truncate(whole)

    def add(self, values: Mapping[str, Any]) -> None:
        """All of them or, where the run is killed meanwhile, none."""
        self.found |= values
        self._file.write(json.dumps(values).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def tuples(value: Any) -> Any:
    return tuple(map(tuples, value)) if isinstance(value, list) else value
