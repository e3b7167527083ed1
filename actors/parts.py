"""Work cut into parts that are done again when they fail, and the rows that fail every time: asks nobody.

The rollout pool, the search workers and the judge hand out parts; what to do with a row that nothing can be made of, stages decide.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from math import ceil, sqrt
from pathlib import Path
from typing import Any, TypeVar

from actors.cluster import ClusterError

T = TypeVar("T")

_WHOLE_TRIES = 2  # of a part with several rows, before it is cut: a process that dies by chance is not the fault of a row


class TooManyQuarantined(ClusterError):
    """More rows failed every time than `cluster.quarantine` allows. One line."""


@dataclass(frozen=True)
class Quarantined:
    """Takes the place of the result of a row that failed every time it was tried alone."""

    tries: int
    why: str
    """The last failure in one line."""
    traceback: str = ""
    """All of it, where there is one: a process that died has left none."""


@dataclass(frozen=True)
class Part:
    """Rows that are worked on together."""

    start: int
    """Place of the first one among all rows."""
    rows: tuple[Any, ...]
    failures: int = 0

    def again(self, row_tries: int) -> list[Part]:
        """What to do after one more failure; nothing for a row alone that has now failed `row_tries` times.

        Several rows are tried twice, then cut into about the square root of their number, and those cut at each failure, so that a
        row that kills its process is alone after five deaths where it was one of 256.
        """
        failures, size = self.failures + 1, len(self.rows)
        if size == 1:
            return [Part(self.start, self.rows, failures)] if failures < row_tries else []
        if failures < _WHOLE_TRIES:
            return [Part(self.start, self.rows, failures)]
        step = ceil(sqrt(size)) if size > 2 else 1
        smaller = [self.rows[at : at + step] for at in range(0, size, step)]
        return [Part(self.start + at * step, rows, _WHOLE_TRIES - 1 if len(rows) > 1 else 0) for at, rows in enumerate(smaller)]


class Parts:
    """What is left to do: parts that failed come first, rows are taken from their source only when they are wanted."""

    def __init__(self, rows: Iterable[Any], size: int, row_tries: int) -> None:
        self._fresh, self._again, self._row_tries = _cut(rows, size), deque[Part](), row_tries

    def next(self) -> Part | None:
        return self._again.popleft() if self._again else next(self._fresh, None)

    def untried(self, part: Part) -> None:
        """It came back without having been worked on, or what was made of it was lost: no fault of its own."""
        self._again.appendleft(part)

    def failed(self, part: Part) -> bool:
        """Whether it will be tried again."""
        smaller = part.again(self._row_tries)
        self._again.extendleft(reversed(smaller))
        return bool(smaller)


def _cut(rows: Iterable[Any], size: int) -> Iterator[Part]:
    source, start = iter(rows), 0
    while some := tuple(islice(source, size)):
        yield Part(start, some)
        start += len(some)


class Quarantine:
    """Counts the rows of one stage that failed every time, and keeps what is known of them in a file of the run's logs."""

    def __init__(self, most: int, file: Path) -> None:
        self._most, self._file = most, file
        self.rows = 0

    def add(self, what: str, row: Any, one: Quarantined) -> None:
        """
        Raises:
            TooManyQuarantined: there are more of them than allowed.
        """
        self.rows += 1
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            told = {"time": time.time(), "what": what, "row": repr(row), **asdict(one)}
            file.write(json.dumps(told) + "\n")
        if self.rows > self._most:
            raise TooManyQuarantined(
                f"{self.rows} rows failed {one.tries} times each (cluster.row_tries), more than cluster.quarantine={self._most}; "
                f"the last one, in {what}: {one.why}; tracebacks are in {self._file}"
            )


def all_there(rows: Iterable[T | Quarantined]) -> list[T]:
    """
    Raises:
        ClusterError: a row could not be done.
    """
    found: list[T] = []
    for row in rows:
        if isinstance(row, Quarantined):
            raise ClusterError(f"row {len(found) + 1} failed {row.tries} times (cluster.row_tries): {row.why}")
        found.append(row)
    return found
