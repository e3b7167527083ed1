"""A file of solutions, judged: JSON lines in, one verdict a line out, in the same order and whatever a line holds.

Called by `python -m verifiers judge`. Knows files and processes; must not know what makes a verdict.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from verifiers.answers import gold_number
from verifiers.judge import judge

METHODS = ("symbolic",)
MAX_LINE = 2_000_000  # bytes; a longer one gives an error row
CHUNK_ROWS = 64
CHUNK_BYTES = 500_000  # a chunk ends with the line that passes them
AHEAD = 3  # chunks a worker that are read and not yet written

Line = tuple[int, bytes | None]
"""Number in the file, from 1, and text; None stands for one that is too long."""


class WorkerDied(Exception):
    """A worker process ended before its work was done."""


class BadRow(ValueError):
    """What is wrong with a row; `id` is its own where it has one."""

    def __init__(self, problem: str, id: str | int | None = None) -> None:
        super().__init__(problem)
        self.id = id


@dataclass(frozen=True)
class Counts:
    """What became of the rows; `located` ones have a first error with a place, `errors` have no verdict."""

    rows: int = 0
    right: int = 0
    wrong: int = 0
    located: int = 0
    errors: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.rows + other.rows,
            self.right + other.right,
            self.wrong + other.wrong,
            self.located + other.located,
            self.errors + other.errors,
        )


@dataclass(frozen=True)
class Row:
    """One solution to judge. Example: steps ["a", "", "b"] are the solution "a\\n\\nb" with starts (0, 2, 3)."""

    id: str | int
    question: str
    gold_solution: str
    gold_answer: str
    solution: str
    starts: tuple[int, ...] | None
    """First characters of the given steps; None where the solution came as one text."""


def judge_file(source: Path, target: Path, workers: int, advance: Callable[[int], None]) -> Counts:
    """Judge the rows of `source` into `target`, which stands there whole or not at all; memory does not grow with the rows.

    `advance` hears how many more rows are written. Raises OSError and WorkerDied.
    """
    total, draft = Counts(), partial(target)
    with source.open("rb") as lines, draft.open("wb") as out:
        try:
            with processes(workers) as pool:
                for text, counts in in_order(pool, chunks(numbered(lines)), AHEAD * workers):
                    out.write(text)
                    total += counts
                    advance(counts.rows)
            out.flush()
            os.fsync(out.fileno())
            draft.replace(target)
        except BaseException as error:
            draft.unlink(missing_ok=True)
            if isinstance(error, BrokenProcessPool):
                raise WorkerDied(f"a worker process died after {total.rows} rows; is the memory enough?") from error
            raise
    return total


def partial(target: Path) -> Path:
    """Where the verdicts stand until all are written."""
    return target.with_name(target.name + ".partial")


def numbered(file: BinaryIO) -> Iterator[Line]:
    """The lines that are not blank; never holds more than MAX_LINE bytes of one."""
    number = 0
    while raw := file.readline(MAX_LINE + 1):
        number += 1
        if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE)
            yield number, None
        elif raw.strip():
            yield number, raw


def chunks(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Lines in groups of a size that is worth the way to another process."""
    chunk: list[Line] = []
    size = 0
    for line in lines:
        chunk.append(line)
        size += len(line[1] or b"")
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextmanager
def processes(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Worker processes that Ctrl-C does not reach and that end with this one; None when it judges by itself."""
    if workers == 1:
        yield None
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin) as pool:
        held = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for _ in range(workers):
                pool.submit(int)  # starts a process, which inherits that SIGINT is ignored
        finally:
            signal.signal(signal.SIGINT, held)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a process that was started later, in place of the first ones
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def in_order(pool: ProcessPoolExecutor | None, work: Iterable[list[Line]], ahead: int) -> Iterator[tuple[bytes, Counts]]:
    """The verdicts of each chunk, in order, with at most `ahead` chunks under way."""
    if pool is None:
        yield from map(judge_chunk, work)
        return
    waiting: deque[Future[tuple[bytes, Counts]]] = deque()
    for chunk in work:
        waiting.append(pool.submit(judge_chunk, chunk))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def judge_chunk(lines: list[Line]) -> tuple[bytes, Counts]:
    """The verdicts of some lines as JSON lines, and their counts."""
    written, total = [], Counts()
    for number, raw in lines:
        try:
            row = read_row(raw)
        except BadRow as error:
            verdict: dict[str, object] = {"id": error.id, "line": number, "error": str(error)}
            total += Counts(rows=1, errors=1)
        else:
            verdict, counts = judge_row(row)
            total += counts
        written.append(json.dumps(verdict) + "\n")
    return "".join(written).encode(), total


def judge_row(row: Row) -> tuple[dict[str, object], Counts]:
    verdict = judge(row.solution, row.gold_solution, row.gold_answer, row.question)
    error = verdict.error
    step = -1
    if error is not None:
        step = error.step if row.starts is None else bisect_right(row.starts, error.start) - 1
    written: dict[str, object] = {
        "id": row.id,
        "answer": verdict.answer,
        "correct": verdict.correct,
        "first_error_step": step,
        "span": [error.start, error.end] if error else None,
        "method": METHODS[0],
        "evidence": error.evidence if error else None,
    }
    return written, Counts(1, int(verdict.correct), int(not verdict.correct), int(error is not None))


def read_row(raw: bytes | None) -> Row:
    """One line of the file. Raises BadRow."""
    if raw is None:
        raise BadRow(f"the line is longer than {MAX_LINE:,} bytes")
    try:
        fields = json.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise BadRow("not JSON that can be read: nested too deep") from None
    except ValueError as error:
        raise BadRow(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadRow("the line is JSON, but not an object")
    id = fields.get("id")
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise BadRow("id is not a string or an integer" if "id" in fields else "id is missing")
    try:
        return _row(id, fields)
    except ValueError as error:
        raise BadRow(str(error), id) from None


def _row(id: str | int, fields: dict[str, Any]) -> Row:
    starts, steps = None, fields.get("steps")
    if steps is None and fields.get("solution") is None:
        raise ValueError("solution or steps is missing")
    if steps is None:
        solution = _text(fields, "solution")
    elif fields.get("solution") is not None:
        raise ValueError("solution and steps are both there")
    else:
        if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            raise ValueError("steps is not a list of strings")
        solution = "\n".join(steps)
        starts = tuple(accumulate((len(step) + 1 for step in steps), initial=0))[: len(steps)]
    gold_solution = "" if fields.get("gold_solution") is None else _text(fields, "gold_solution")
    gold_answer = _text(fields, "gold_answer")
    gold_number(gold_answer)
    return Row(id, _text(fields, "question"), gold_solution, gold_answer, solution, starts)


def _text(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        raise ValueError(f"{name} is missing")
    if not isinstance(fields[name], str):
        raise ValueError(f"{name} is {_kind(fields[name])}, not a string")
    text: str = fields[name]
    return text


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else "a number"
