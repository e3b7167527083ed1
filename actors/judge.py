"""Judging as Ray tasks on CPUs. A row that cannot be judged is reported with its error, never dropped or shifted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors import metrics
from pipeline.cluster_config import ActorResources
from pipeline.tasks.problem import Problem
from verifiers.judge import Verdict
from verifiers.task import Attempt
from verifiers.tasks import judge_of


@dataclass(frozen=True)
class Judged:
    """One judged solution."""

    verdict: Verdict
    attempt: Attempt | None
    """The wrong try that a trace can be made of; None for right solutions and for errors without a place."""


def judge_rows(rows: Sequence[tuple[Problem, str]]) -> list[Judged]:
    """Judge (problem, solution text) pairs, in order."""
    judged = []
    for problem, solution in rows:
        judge = judge_of(problem)
        verdict = judge.judge(problem, solution)
        judged.append(Judged(verdict, judge.attempt(problem, solution, verdict)))
    return judged


def judge_all(rows: Sequence[tuple[Problem, str]], batch: int, resources: ActorResources) -> Iterator[list[Judged]]:
    """Yield judged batches in the order of the rows; at most two batches a CPU of the cluster are under way."""
    task: Any = ray.remote(judge_rows).options(num_cpus=resources.cpus, num_gpus=resources.gpus, name=metrics.task("judge"))
    window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    pending: list[Any] = []
    for start in range(0, len(rows), batch):
        metrics.gauge("queue_depth", len(rows) - start, queue="judge")
        if len(pending) == window:
            yield ray.get(pending.pop(0))
        pending.append(task.remote(rows[start : start + batch]))
    while pending:
        metrics.gauge("queue_depth", len(pending) * batch, queue="judge")
        yield ray.get(pending.pop(0))
    metrics.gauge("queue_depth", 0, queue="judge")
