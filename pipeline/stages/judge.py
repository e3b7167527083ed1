"""Stage `judge`: a verdict for every rollout, and for wrong ones the first error, in characters and tokens, with its evidence.

Rollouts, texts and verdicts are in memory some at a time; rows that are done stand in the stage's resume folder.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from actors.judge import judge_all
from actors.parts import Quarantined
from pipeline.stages.graph import samples_prefixes
from pipeline.stages.io import CHUNK, Codec, Text, read_problems, read_rows, write_rows
from pipeline.stages.judged import FEATURES, columns_of, row_of
from pipeline.stages.kept import KeptRows
from pipeline.stages.localised import ROWS as LOCALISED
from pipeline.stages.localised import localise
from pipeline.stages.lookup import ById
from pipeline.stages.stage import Context
from pipeline.tasks.problem import Problem
from verifiers.tasks import judge_of

_Read = tuple[int, str, Problem, Text]
"""Number, id, problem and text of a rollout."""


def run(context: Context) -> None:
    codec = Codec(context.inputs["model"], context.settings.undo, context.settings.base.prompt)
    problems = ById(read_problems(context.inputs["problems"], "train"))
    rollouts = read_rows(context.inputs["rollouts"])
    context.workers.start()
    with ExitStack() as files:
        kept = files.enter_context(KeptRows(context.resume / "verdicts.arrow", FEATURES.arrow_schema))
        new = _judge(context, codec, problems, rollouts, kept)
        rows = _rows(kept)
        if samples_prefixes(context.settings):
            file = context.resume / "localised.arrow"
            if new:
                file.unlink(missing_ok=True)  # how often the model is right, which searches start from, was of fewer rows
            localised = files.enter_context(KeptRows(file, LOCALISED))
            localise(context, codec, problems, rollouts, kept, localised)
            rows = _replaced(rows, _rows(localised))
        counts: Counter[str] = Counter()
        write_rows(_counted(rows, counts), FEATURES, context.out)
    if counts.pop("localised"):
        context.counts.update({name: counts[name] for name in ("completions", "completion_tokens")})
    context.counts.update({name: counts[name] for name in ("rows", "right", "wrong", "located", "right_with_a_wrong_step")})


def _judge(context: Context, codec: Codec, problems: ById, rollouts: Dataset, kept: KeptRows) -> int:
    """Put the rows of all rollouts that can be judged into `kept`, but for those that a killed run had left there; how many.

    The others are counted and named: nothing is learned from them, in neither direction.
    """
    settings = context.settings
    missing = np.setdiff1d(np.arange(len(rollouts)), kept.numbers)
    under_way: deque[tuple[int, str, Problem, array[int]]] = deque()  # number, id, problem, and where each token ends

    def pairs() -> Iterator[tuple[Problem, str]]:
        for number, name, problem, text in _texts(codec, problems, rollouts, missing):
            under_way.append((number, name, problem, array("I", (end for _, end in text.offsets))))
            yield problem, text.text

    quarantine = context.workers.quarantine()
    done, new = len(rollouts) - len(missing), 0
    with context.terminal.stage("judge", len(rollouts)) as progress:
        for batch in judge_all(pairs(), len(missing), settings.judge.batch, settings.cluster.judge, settings.cluster.row_tries):
            numbers, rows, lost = [], [], []
            for one in batch:
                number, name, problem, ends = under_way.popleft()
                if isinstance(one, Quarantined):
                    lost.append((name, one))
                    continue
                numbers.append(number)
                offsets = tuple(itertools.pairwise((0, *ends)))
                rows.append(row_of(name, problem.id, offsets, one, "exact" if judge_of(problem).exact else "symbolic"))
            kept.add(numbers, columns_of(rows))
            done, new = done + len(batch), new + len(rows)
            progress.update(done)
            for name, why in lost:
                context.terminal.warn(f"judge: {name} is left out after {why.tries} tries (cluster.row_tries): {why.why}")
                quarantine.add("judge", name, why)
    if quarantine.rows:
        context.counts["quarantined"] = quarantine.rows
    return new


def _texts(codec: Codec, problems: ById, rollouts: Dataset, numbers: npt.NDArray[np.int64]) -> Iterator[_Read]:
    rows = rollouts.select_columns(["id", "problem", "token_ids"])
    for start in range(0, len(numbers), CHUNK):
        some = numbers[start : start + CHUNK].tolist()
        read = rows[some]
        found = problems.find(read["problem"])
        for number, name, problem, ids in zip(some, read["id"], read["problem"], read["token_ids"], strict=True):
            yield number, name, found[problem], codec.decode(ids)


def _rows(kept: KeptRows) -> Iterator[dict[str, Any]]:
    for table in kept.in_order(CHUNK):
        yield from table.to_pylist()


def _replaced(rows: Iterator[dict[str, Any]], others: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows by their number, the other one where there are two. Both in order."""
    other = next(others, None)
    for row in rows:
        if other and other["number"] == row["number"]:
            row, other = other, next(others, None)
        yield row


def _counted(rows: Iterator[dict[str, Any]], counts: Counter[str]) -> Iterator[Mapping[str, Any]]:
    """The rows, counted as they go by."""
    for row in rows:
        counts["rows"] += 1
        counts["right" if row["correct"] else "wrong"] += 1
        counts["located"] += row["try_start"] >= 0
        counts["right_with_a_wrong_step"] += row["correct"] and row["error_step"] >= 0
        counts["localised"] += "completions" in row
        for name in ("completions", "completion_tokens"):
            counts[name] += row.get(name, 0)
        yield row
