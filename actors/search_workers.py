"""Search in Ray actors: each grows the trees of some problems and asks the shared rollout pool. Results stream as they finish.

A worker gets `search.batch` problems at a time, and which those are does not depend on who gets them or how many workers there
are; so outcomes do not either. What a dead worker had is searched again by another one, from the start, and what it had handed over
is not handed over twice.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from actors import metrics
from actors.cluster import ClusterError, Restarts, actor_options, one_line
from actors.parts import Part, Parts, Quarantine, Quarantined
from actors.rollout import RolloutPool
from actors.search import Case, Meter, Searcher, SearchError
from pipeline.backtrack.searched import Searched
from pipeline.cluster_config import ActorResources
from pipeline.telemetry import redirect_process_output

_NUMBERS = itertools.count()  # a name stays taken for a while after its actor is dead


_LOOK_SECONDS = 1.0  # between two looks after the rollout actors that the workers ask


class _SearchWorker:
    """Owns the trees that it grows."""

    def __init__(self, searcher: Searcher, log_file: str, labels: metrics.Labels) -> None:
        redirect_process_output(Path(log_file))
        metrics.begin(labels)
        self._busy = metrics.busy_actor(metrics.own_name())
        self._searcher = searcher

    def search(self, cases: Sequence[Case]) -> Iterator[Searched | Meter]:
        """The trees of these problems, and last what they have cost."""
        searcher = replace(self._searcher, meter=Meter())
        with self._busy.work():
            yield from searcher.search(cases)
        yield searcher.meter

    @ray.method(concurrency_group="beside")
    def ask(self, rollout_actors: list[Any]) -> None:
        """Have completions made by these from now on; is heard while it searches."""
        assert isinstance(self._searcher.pool, RolloutPool)
        self._searcher.pool.replace(rollout_actors)


SearchActor: Any = ray.remote(concurrency_groups={"beside": 1})(_SearchWorker)  # type: ignore[call-overload]


class SearchWorkers:
    """The search workers of one stage. Close them at the end. A worker that dies is started again as long as `restarts` allow.

    Args:
        searcher: its pool must be fit to travel: `RolloutPool.shared()`.
        pool: where the shared one comes from, tended while the workers ask it; None where they ask something else.
    """

    def __init__(
        self,
        searcher: Searcher,
        workers: int,
        resources: ActorResources,
        log_dir: Path,
        say: Callable[[str], None] = print,
        pool: RolloutPool | None = None,
        restarts: Restarts | None = None,
        row_tries: int = 3,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._share = resources.model_copy(update={"cpus": resources.cpus / workers, "threads": resources.threads or 1})
        self._searcher, self._workers, self._log_dir, self._say = searcher, workers, log_dir, say
        self._pool, self._restarts, self._row_tries, self._quarantine = pool, restarts or Restarts(0, say), row_tries, quarantine
        self._asked = pool.tend() if pool else []
        self._started = 0
        self._actors = [self._start() for _ in range(workers)]
        self.meter = Meter()
        """What all of them have cost."""

    def _start(self) -> Any:
        options = actor_options(self._share, f"search-{next(_NUMBERS)}", self._workers)
        log_file = str(self._log_dir / f"search-{self._started}.log")
        self._started += 1
        searcher = replace(self._searcher, pool=self._pool.shared()) if self._pool else self._searcher
        return SearchActor.options(**options).remote(searcher, log_file, metrics.labels())

    def search(self, cases: Sequence[Case]) -> Iterator[Searched]:
        """The trees, in the order in which they are finished; those of problems that could not be searched are left out, and
        counted in the meter.

        Raises:
            ClusterError: every worker died, or one failed; a rollout pool without actors is a failure of theirs.
        """
        parts = Parts(cases, self._searcher.how.batch, self._row_tries)
        running: dict[Any, tuple[Any, Part]] = {}  # stream of results -> whose, and of what
        handed: set[str] = set()
        look = time.monotonic() + _LOOK_SECONDS

        def feed(actor: Any) -> None:
            if part := parts.next():
                task = actor.search.options(num_returns="streaming", name=metrics.task("search"))
                running[task.remote(part.rows)] = (actor, part)

        for actor in self._actors:
            feed(actor)
        while running:
            metrics.gauge("queue_depth", len(cases) - len(handed), queue="search")
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_SECONDS, fetch_local=False)
            if time.monotonic() > look:
                self._tend()
                look = time.monotonic() + _LOOK_SECONDS
            if not ready:
                continue
            stream: Any = ready[0]
            actor, part = running[stream]
            try:
                one: Any = ray.get(next(stream))
            except StopIteration:
                del running[stream]
                feed(actor)
            except RayActorError as error:
                del running[stream]
                self._lose(actor, error)
                self._failed(parts, part, one_line(error), str(error), handed)
                busy = {other for other, _ in running.values()}
                for other in self._actors:
                    if other not in busy:
                        feed(other)
            except RayTaskError as error:
                metrics.count("failures", what="search task")
                why = f"{type(error.cause).__name__}: {one_line(error.cause)}"
                if isinstance(error.cause, ClusterError | SearchError):  # not the fault of a problem
                    raise ClusterError(f"a search worker failed: {why}") from error
                del running[stream]
                self._failed(parts, part, why, str(error), handed)
                feed(actor)
            except ObjectLostError:
                del running[stream]
                parts.untried(part)
                feed(actor)
            else:
                if isinstance(one, Meter):
                    self.meter.add(one)
                elif one.problem not in handed:
                    handed.add(one.problem)
                    yield one

    def _failed(self, parts: Parts, part: Part, why: str, traceback: str, handed: Container[str]) -> None:
        if parts.failed(part) or part.rows[0].problem.id in handed:
            return
        case: Case = part.rows[0]
        self.meter.note("quarantined", f"{case.problem.id}: {why}")
        if self._quarantine:
            self._quarantine.add("search", case.problem.id, Quarantined(self._row_tries, why, traceback))

    def _tend(self) -> None:
        """Let the workers know of rollout actors that were started in the place of dead ones."""
        now = self._pool.tend() if self._pool else []
        if now != self._asked:
            self._asked = now
            for actor in self._actors:
                actor.ask.remote(now)

    def _lose(self, actor: Any, error: RayActorError) -> None:
        self._actors = [one for one in self._actors if one != actor]
        metrics.count("failures", what="search worker")
        if not error.actor_init_failed and self._restarts.take("a search worker", error):
            self._actors.append(self._start())
            return
        if not self._actors:
            raise ClusterError(f"every search worker died; the last one: {one_line(error)}") from error
        self._say(f"a search worker died, {len(self._actors)} go on with its problems: {one_line(error)}")

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
