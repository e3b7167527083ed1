"""GSM8K, from the hub or from local jsonl files with `question` and `answer`; bad lines are named by file and number."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.task_config import Gsm8kTask
from pipeline.tasks.problem import Problem, TaskError
from pipeline.tasks.seen import Seen

_FINAL = re.compile(r"^####\s*(\S.*?)\s*$", re.MULTILINE)


def load(task: Gsm8kTask, seed: int) -> tuple[Iterator[Problem], int]:
    """All problems, read anew as they are taken, and how many bad rows were skipped. The dev split is drawn from the training rows.

    Raises:
        TaskError: a missing file, a bad row (with on_bad_row: fail), or too few rows.
    """
    train = _Split(task, "train", task.train_file, task.max_train and task.max_train + task.dev)
    test = _Split(task, "test", task.test_file, task.max_test)
    count = sum(1 for _ in train) - sum(problem.question in train.seen for problem in test)
    if count <= task.dev:
        raise TaskError(f"task.dev={task.dev} leaves nothing of {count} training problems that are not in the test split")
    dev = set(random.Random(seed).sample(range(count), task.dev))

    def problems() -> Iterator[Problem]:
        own = (problem for problem in train if problem.question not in test.seen)
        yield from (_with_split(problem, "dev" if i in dev else "train") for i, problem in enumerate(own))
        yield from test

    return problems(), train.bad + test.bad


def read(task: Gsm8kTask, split: str, file: str | None, most: int | None = None) -> tuple[list[Problem], int]:
    """The first problems of one of its splits, each question once, and how many bad rows were skipped.

    Raises:
        TaskError: a missing file, a bad row (with on_bad_row: fail), or no usable row.
    """
    found = _Split(task, split, file, most)
    return list(found), found.bad


class _Split:
    """The same, one after the other and read again each time, so that none is in memory."""

    def __init__(self, task: Gsm8kTask, split: str, file: str | None, most: int | None) -> None:
        self._task, self._split, self._file, self._most = task, split, file, most
        self.seen, self.bad = Seen(), 0
        """Questions, and bad rows that were skipped, as far as it was read the last time."""

    def __iter__(self) -> Iterator[Problem]:
        task, file, self.seen, self.bad = self._task, self._file, Seen(), 0
        for where, row in _file_rows(Path(file)) if file else _hub_rows(task.hub_id, self._split):
            try:
                problem = _problem(row, self._split, len(self.seen))
            except TaskError as error:
                if task.on_bad_row == "fail":
                    raise TaskError(f"{where}: {error} (task.on_bad_row=skip passes over such rows)") from None
                self.bad += 1
                continue
            if self.seen.add(problem.question):
                yield problem
            if len(self.seen) == self._most:
                break
        if not self.seen:
            raise TaskError(f"{file or task.hub_id}: no usable row in the {self._split} split ({self.bad} bad ones)")


def _file_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield f"{file}:{number}", json.loads(line)
                    except (json.JSONDecodeError, RecursionError):
                        yield f"{file}:{number}", None
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read {file}: {error}") from error


def _hub_rows(hub_id: str, split: str) -> Iterable[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(hub_id, "main", split=split)
    except Exception as error:  # the hub client raises many unrelated types; all mean that there are no rows
        raise TaskError(
            f"task.hub_id: cannot load {hub_id} from the hub ({type(error).__name__}); "
            "set task.train_file and task.test_file to local jsonl files"
        ) from error
    return ((f"{hub_id}/{split} row {number}", row) for number, row in enumerate(rows))


def _problem(row: Any, split: str, index: int) -> Problem:
    if not isinstance(row, Mapping):
        raise TaskError("not a JSON object")
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise TaskError(f"{key!r} is missing, empty or no text")
    finals = _FINAL.findall(row["answer"])
    if not finals:
        raise TaskError("the answer has no line '#### number'")
    answer = finals[-1].replace(",", "").removeprefix("$")
    if not re.fullmatch(r"-?\d+(\.\d+)?", answer):
        raise TaskError(f"the gold answer {finals[-1][:40]!r} is no number")
    return Problem(f"gsm8k/{split}/{index}", split, "gsm8k", False, row["question"].strip(), row["answer"].strip(), answer)


def _with_split(problem: Problem, split: str) -> Problem:
    return Problem(**{**problem.__dict__, "split": split, "id": problem.id.replace("/train/", f"/{split}/")})
