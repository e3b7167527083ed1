"""The part of the stage judge that asks the model: first errors of wrong solutions by what it makes of their prefixes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from actors.engines import Sampling
from actors.judge import Judged
from actors.localise import Case, Found, Localiser
from actors.rollout import RolloutPool
from pipeline.config import Settings
from pipeline.stages.io import CHUNK, Codec, Text
from pipeline.stages.judged import FEATURES, columns_of, row_of, verdict_of
from pipeline.stages.kept import KeptRows
from pipeline.stages.lookup import ById
from pipeline.stages.rollouts import context_length
from pipeline.stages.stage import Context
from pipeline.tasks.problem import Problem
from verifiers.judge import FirstError, Verdict
from verifiers.localise import BinarySearch, PosteriorSearch, Search, symbolic_prior
from verifiers.tasks import judge_of

ROWS = pa.schema([*FEATURES.arrow_schema, ("completions", pa.int64()), ("completion_tokens", pa.int64())])
"""Rows as the stage writes them; what was sampled for all that were searched together counts on the first of them."""
_BATCHES = 4
"""Batches of completions an engine, at the least, that the first round of searches asks for."""


@dataclass(frozen=True)
class _Wrong:
    """A wrong solution whose first error is searched."""

    row: Mapping[str, Any]
    """As it was judged, with its number."""
    problem: Problem
    prompt: Sequence[int]
    text: Text
    verdict: Verdict


def localise(context: Context, codec: Codec, problems: ById, rollouts: Dataset, judged: KeptRows, found: KeptRows) -> None:
    """Search the first errors of wrong solutions with the model that wrote them.

    Their rows go into `found`, some at a time, but for those that are there already. What a search asks has seeds of its own, so it
    does not matter which ones are searched together.
    """
    settings = context.settings
    open_ones = np.ones(len(rollouts), bool)
    open_ones[found.numbers] = False
    groups = _groups(_unsure(settings, judged, open_ones), _together(settings))
    first = next(groups, None)
    if first is None:
        return
    solve_rate = sum(pc.sum(table["correct"]).as_py() for table in judged.in_order(CHUNK)) / len(judged.numbers)
    pool = context.workers.pool(context.inputs["model"], context.digests["model"], context_length(context))
    made = 0
    with context.terminal.stage("judge/localise", None, "completions") as progress:

        def telling(before: int) -> Callable[[int], None]:
            return lambda more: progress.update(before + more)

        for rows in itertools.chain([first], groups):
            group = _read(codec, problems, rollouts, rows)
            localiser = _localiser(settings, codec, pool, group, telling(made))
            cases = [case_of(one.row["id"], one.prompt, one.text, one.verdict) for one in group]
            searches = [_search(settings, case, one.verdict, solve_rate) for one, case in zip(group, cases, strict=True)]
            places = localiser.locate(cases, searches)
            located = [_located(settings, codec, *one) for one in zip(group, cases, places, strict=True)]
            rest = [0] * (len(group) - 1)
            asked = {"completions": [localiser.completions, *rest], "completion_tokens": [localiser.tokens, *rest]}
            found.add([one.row["number"] for one in group], columns_of(located) | asked)
            made += localiser.completions


def _unsure(settings: Settings, judged: KeptRows, open_ones: npt.NDArray[np.bool_]) -> Iterator[dict[str, Any]]:
    """Rows of wrong solutions, but for those that a task has decided exactly where the method is auto."""
    for table in judged.in_order(CHUNK):
        for row in table.to_pylist():
            exact = settings.judge.method == "auto" and row["method"] == "exact"
            if not row["correct"] and row["steps"] and not exact and open_ones[row["number"]]:
                yield row


def _together(settings: Settings) -> int:
    """How many solutions are searched side by side: every round of searches ends with engines that wait for the last one."""
    return max(CHUNK, _BATCHES * settings.cluster.rollout_actors * settings.rollouts.batch // settings.judge.samples)


def _groups(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while some := list(itertools.islice(rows, size)):
        yield some


def _read(codec: Codec, problems: ById, rollouts: Dataset, rows: Sequence[Mapping[str, Any]]) -> list[_Wrong]:
    named = problems.find(row["problem"] for row in rows)
    read = rollouts.select_columns(["prompt_ids", "token_ids"])[[row["number"] for row in rows]]
    group = []
    for row, prompt, ids in zip(rows, read["prompt_ids"], read["token_ids"], strict=True):
        text = codec.decode(ids)
        group.append(_Wrong(row, named[row["problem"]], prompt, text, verdict_of(row, text.text)))
    return group


def _localiser(
    settings: Settings, codec: Codec, pool: RolloutPool, group: Sequence[_Wrong], on_rows: Callable[[int], None]
) -> Localiser:
    asked = settings.rollouts
    undo = (codec.rule.undo_id, *codec.spare_ids)
    sampling = Sampling(asked.temperature, asked.top_p, asked.max_tokens, codec.stop_id, undo)

    def is_right(case: int, ids: Sequence[int]) -> bool:
        problem = group[case].problem
        return judge_of(problem).correct(problem, codec.decode(ids).text)

    return Localiser(pool, sampling, settings.judge.samples, asked.batch, settings.run.seed, is_right, on_rows)


def case_of(name: str, prompt: Sequence[int], text: Text, verdict: Verdict) -> Case:
    """A wrong solution, cut before each of its steps."""
    cuts = [text.token_at(step.start) for step in verdict.steps]
    return Case(name, tuple(prompt), ((), *(text.ids[:cut] for cut in cuts[1:])))


def _search(settings: Settings, case: Case, verdict: Verdict, solve_rate: float) -> Search:
    if settings.judge.method == "rollouts":
        return BinarySearch(len(case.prefixes))
    return PosteriorSearch(symbolic_prior(verdict), solve_rate, settings.judge.sure, settings.judge.budget)


def _located(settings: Settings, codec: Codec, one: _Wrong, case: Case, found: Found) -> dict[str, Any]:
    """Its row with the error where the search found it."""
    verdict = _relocated(one.verdict, one.text, case, found)
    judged = Judged(verdict, judge_of(one.problem).attempt(one.problem, one.text.text, verdict))
    method = "combined" if settings.judge.method == "auto" else settings.judge.method
    return row_of(one.row["id"], one.problem.id, one.text.offsets, judged, method, found.right[0] if found.right else ())


def _relocated(verdict: Verdict, text: Text, case: Case, found: Found) -> Verdict:
    """The verdict with the error where the search found it; a symbolic span within that step stays."""
    error = verdict.error
    if error and error.step == found.step:
        return replace(verdict, error=replace(error, evidence=f"{error.evidence}; {found.evidence}"))
    step = verdict.steps[found.step]
    own = text.ids[len(case.prefixes[found.step]) :]
    # The span starts at the first token that no right continuation shares.
    shared = max((_shared(own, other) for other in found.right), default=0)
    start = min(max(step.start, text.offsets[len(text.ids) - len(own) + shared][0] if shared < len(own) else 0), step.end - 1)
    return replace(verdict, error=FirstError(found.step, start, step.end, "rollouts", found.evidence))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
