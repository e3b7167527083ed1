"""Judging as Ray tasks on CPUs. A row that cannot be judged comes back with its error in its place, never dropped or shifted."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

from actors import metrics
from actors.cluster import one_line
from actors.parts import Part, Parts, Quarantined
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


def judge_each(rows: Sequence[tuple[Problem, str]], tries: int) -> list[Judged | Quarantined]:
    """The same, with a Quarantined in the place of a row on which its judge raises, every time of `tries`."""
    found: list[Judged | Quarantined] = []
    for row in rows:
        for left in reversed(range(tries)):
            try:
                found += judge_rows([row])
                break
            except Exception as error:  # people's own judges may raise anything; its traceback is kept
                if not left:
                    found.append(Quarantined(tries, f"{type(error).__name__}: {one_line(error)}", traceback.format_exc()))
    return found


def judge_all(
    rows: Iterable[tuple[Problem, str]], count: int, batch: int, resources: ActorResources, row_tries: int
) -> Iterator[list[Judged | Quarantined]]:
    """Yield judged batches in the order of the rows, of which there are `count`; at most two batches a CPU of the cluster are under
    way, and rows are taken when there is room for them.

    A task whose process dies is started again, and a row that its process dies of every time has a Quarantined in its place.
    """
    task: Any = ray.remote(judge_each).options(
        num_cpus=resources.cpus, num_gpus=resources.gpus, name=metrics.task("judge"), max_retries=0
    )
    window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    parts = Parts(rows, batch, row_tries)
    pending: dict[Any, Part] = {}
    done: dict[int, list[Judged | Quarantined]] = {}
    at = 0

    def feed() -> None:
        # Batches that came before their turn count too; one that is asked for again goes first.
        while (len(pending) + len(done) < window or not pending) and (part := parts.next()):
            pending[task.remote(part.rows, row_tries)] = part

    feed()
    while pending:
        metrics.gauge("queue_depth", count - at, queue="judge")
        ready, _ = ray.wait(list(pending))
        part = pending.pop(ready[0])
        try:
            done[part.start] = ray.get(ready[0])
        except (WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError) as error:
            metrics.count("failures", what="judge task")
            if not parts.failed(part):
                done[part.start] = [Quarantined(row_tries, one_line(error), str(error))]
        while at in done:
            some = done.pop(at)
            at += len(some)
            yield some
        feed()
    metrics.gauge("queue_depth", 0, queue="judge")
