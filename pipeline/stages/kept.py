"""What a stage has made so far, so that a killed run does not make it again: lines of JSON, or columns where rows are many, in the
stage's resume folder.

A part is in its file before the next one is begun; one that the kill has torn is not read.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_SYNC_SECONDS = 1.0
_NUMBER = "number"


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


class KeptRows:
    """Rows with numbers, in any order, which never are all in memory: a file that Arrow reads as a stream.

    What was added survives the death of the process; of a machine, what is older than a second.

    Example:
        with KeptRows(context.resume / "rows.arrow", schema) as kept:
            kept.add([7, 3], {"text": ["seven", "three"]})
            for table in kept.in_order(1000):
                ...
    """

    def __init__(self, file: Path, schema: pa.Schema) -> None:
        """`schema`: of the rows, without their numbers."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._schema = file, schema.insert(0, pa.field(_NUMBER, pa.int64())).remove_metadata()
        self._numbers: list[npt.NDArray[np.int64]] = []
        self._starts: list[int] = []  # of the parts, in the file
        whole = self._read() if file.exists() else 0
        self._file = file.open("r+b" if whole else "wb")
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._file.write(self._schema.serialize())
        self._synced = time.monotonic()

    def _read(self) -> int:
        """The numbers of all whole parts; where the last one ends."""
        whole = 0
        with pa.OSFile(str(self._path)) as source:
            try:
                stream = pa.ipc.open_stream(source)
                whole = source.tell()
                while True:
                    numbers = stream.read_next_batch().column(0).to_numpy().copy()  # else all of the part stays
                    self._numbers.append(numbers)
                    self._starts.append(whole)
                    whole = source.tell()
            except (StopIteration, pa.ArrowInvalid, OSError):  # its end, or a part that is torn
                return whole

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """Of the rows, as they were added."""
        return np.concatenate([np.zeros(0, np.int64), *self._numbers])

    def add(self, numbers: Sequence[int], columns: Mapping[str, Sequence[Any]]) -> None:
        """All of them or, where the run is killed meanwhile, none."""
        batch = pa.RecordBatch.from_pydict({_NUMBER: numbers, **columns}, self._schema)
        self._starts.append(self._file.tell())
        self._numbers.append(np.array(numbers, np.int64))
        self._file.write(batch.serialize())
        self._file.flush()
        if time.monotonic() > self._synced + _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def in_order(self, size: int) -> Iterator[pa.Table]:
        """All rows by their numbers, which are the first column `number`, `size` at a time. What is in memory are the parts that
        these stand in."""
        begins = np.cumsum([0, *map(len, self._numbers)])
        order = np.argsort(self.numbers, kind="stable")
        with pa.OSFile(str(self._path)) as source:

            def part(number: int) -> pa.RecordBatch:
                source.seek(self._starts[number])
                return pa.ipc.read_record_batch(pa.ipc.read_message(source), self._schema)

            for start in range(0, len(order), size):
                places = order[start : start + size]
                inside = np.searchsorted(begins, places, side="right") - 1
                needed, which = np.unique(inside, return_inverse=True)
                parts = [part(number) for number in needed.tolist()]
                at = np.cumsum([0, *map(len, parts)])[which] + places - begins[inside]
                yield pa.Table.from_batches(parts).combine_chunks().take(pa.array(at))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()
