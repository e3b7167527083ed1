"""Search in Ray actors: each grows the trees of some problems and asks the shared rollout pool. Results stream as they finish.

A worker gets `search.batch` problems at a time, and which those are does not depend on who gets them or how many workers there
are; so outcomes do not either. What a dead worker had is searched again by another one, from the start, and what it had handed over
is not handed over twice.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors import metrics
from actors.cluster import ClusterError, actor_options
from actors.search import Case, Meter, Searcher
from pipeline.backtrack.searched import Searched
from pipeline.cluster_config import ActorResources
from pipeline.telemetry import redirect_process_output

_NUMBERS = itertools.count()  # a name stays taken for a while after its actor is dead


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


SearchActor: Any = ray.remote(_SearchWorker)


class SearchWorkers:
    """The search workers of one stage. `searcher.pool` must be fit to travel: `RolloutPool.shared()`. Close them at the end."""

    def __init__(
        self, searcher: Searcher, workers: int, resources: ActorResources, log_dir: Path, say: Callable[[str], None] = print
    ) -> None:
        share = resources.model_copy(update={"cpus": resources.cpus / workers, "threads": resources.threads or 1})
        self._batch, self._say = searcher.how.batch, say
        self._actors = [
            SearchActor.options(**actor_options(share, f"search-{next(_NUMBERS)}", workers)).remote(
                searcher, str(log_dir / f"search-{i}.log"), metrics.labels()
            )
            for i in range(workers)
        ]
        self.meter = Meter()
        """What all of them have cost."""

    def search(self, cases: Sequence[Case]) -> Iterator[Searched]:
        """The trees, in the order in which they are finished.

        Raises:
            ClusterError: every worker died, or one failed; a rollout pool without actors is a failure of theirs.
        """
        waiting = deque(cases[start : start + self._batch] for start in range(0, len(cases), self._batch))
        running: dict[Any, tuple[Any, Sequence[Case]]] = {}  # stream of results -> whose, and of what
        handed: set[str] = set()

        def feed(actor: Any) -> None:
            if waiting:
                part = waiting.popleft()
                asked = actor.search.options(num_returns="streaming", name=metrics.task("search"))
                running[asked.remote(part)] = (actor, part)

        for actor in self._actors:
            feed(actor)
        while running:
            metrics.gauge("queue_depth", len(cases) - len(handed), queue="search")
            ready, _ = ray.wait(list(running), num_returns=1, fetch_local=False)
            stream: Any = ready[0]
            actor, part = running[stream]
            try:
                one: Any = ray.get(next(stream))
            except StopIteration:
                del running[stream]
                feed(actor)
            except RayActorError as error:
                del running[stream]
                waiting.appendleft(part)
                self._lose(actor, error)
                busy = {id(other) for other, _ in running.values()}
                for other in self._actors:
                    if id(other) not in busy:
                        feed(other)
            except RayTaskError as error:
                metrics.count("failures", what="search task")
                raise ClusterError(
                    f"a search worker failed: {type(error.cause).__name__}: {' '.join(str(error.cause).split())[:400]}"
                ) from error
            else:
                if isinstance(one, Meter):
                    self.meter.add(one)
                elif one.problem not in handed:
                    handed.add(one.problem)
                    yield one

    def _lose(self, actor: Any, error: RayActorError) -> None:
        self._actors = [one for one in self._actors if one is not actor]
        metrics.count("failures", what="search worker")
        why = " ".join(str(error).split())[:400]
        if not self._actors:
            raise ClusterError(f"every search worker died; the last one: {why}") from error
        self._say(f"a search worker died, {len(self._actors)} go on with its problems: {why}")

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
