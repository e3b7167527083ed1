"""The pool of rollout actors, each with an engine of its own. Stages hand it requests and get completions in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.cluster import ClusterError, actor_options
from actors.engines import Completion, Request, Sampling, check_weights, make_engine
from pipeline.config import Settings
from pipeline.telemetry import redirect_process_output

_BATCHES_IN_FLIGHT = 2  # for each actor: one in work, one waiting, so that the engine never idles and memory stays flat


@dataclass(frozen=True)
class Batch:
    """What an actor made of one batch."""

    completions: list[Completion]
    version: str
    """Digest of the weights that generated it."""


class _Rollout:
    """Holds one engine."""

    def __init__(self, folder: str, version: str, settings: Settings, context: int, log_file: str) -> None:
        redirect_process_output(Path(log_file))
        self._engine = make_engine(Path(folder), settings.engine, context, settings.run.seed)
        self._dtype = settings.engine.dtype
        self._version = version
        check_weights(self._engine, Path(folder), self._dtype)

    def ready(self) -> str:
        return self._engine.kind

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Batch:
        return Batch(self._engine.generate(requests, sampling), self._version)

    def load_weights(self, folder: str, version: str) -> None:
        self._engine.load_weights(Path(folder))
        check_weights(self._engine, Path(folder), self._dtype)
        self._version = version


RolloutActor: Any = ray.remote(_Rollout)


class RolloutPool:
    """Rollout actors that live as long as the run; weights are swapped in place between models."""

    def __init__(self, settings: Settings, folder: Path, version: str, context: int, log_dir: Path) -> None:
        cluster = settings.cluster
        self._timeout = cluster.start_timeout
        self._version = version
        self._actors: list[Any] = [
            RolloutActor.options(**actor_options(cluster.rollout, f"rollout-{i}", cluster.rollout_actors)).remote(
                str(folder), version, settings, context, str(log_dir / f"rollout-{i}.log")
            )
            for i in range(cluster.rollout_actors)
        ]
        self.kind: str = self._all("ready")[0]

    def use(self, folder: Path, version: str) -> None:
        """Make every engine generate with this model from now on; completions carry `version`."""
        if version != self._version:
            self._all("load_weights", str(folder), version)
            self._version = version

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        batch: int,
        on_rows: Callable[[int, int], None] = lambda rows, tokens: None,
    ) -> tuple[list[Completion], str]:
        """All completions in the order of the requests, and the version of the weights that made them.

        Args:
            batch: requests handed to an actor at a time.
            on_rows: called with the rows and tokens of each batch that comes back.

        Raises:
            ClusterError: an actor died, or answered with other weights or fewer rows than asked for.
        """
        waiting = deque((start, requests[start : start + batch]) for start in range(0, len(requests), batch))
        running: dict[Any, tuple[int, int, Any]] = {}  # result -> where it belongs, how long it is, whose it is
        done: list[Completion | None] = [None] * len(requests)

        def feed(actor: Any) -> None:
            if waiting:
                start, part = waiting.popleft()
                running[actor.generate.remote(part, sampling)] = (start, len(part), actor)

        for actor in self._actors * _BATCHES_IN_FLIGHT:
            feed(actor)
        while running:
            (ref,), _ = ray.wait(list(running))
            start, size, actor = running.pop(ref)
            result = self._get(ref)
            if result.version != self._version or len(result.completions) != size:
                raise ClusterError(
                    f"a rollout actor answered {len(result.completions)} rows of weights {result.version[:12]}; "
                    f"asked were {size} rows of {self._version[:12]}"
                )
            done[start : start + size] = result.completions
            on_rows(size, sum(len(completion.token_ids) for completion in result.completions))
            feed(actor)
        return [completion for completion in done if completion is not None], self._version

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def _all(self, method: str, *args: Any) -> list[Any]:
        try:
            return self._get([getattr(actor, method).remote(*args) for actor in self._actors], self._timeout)
        except GetTimeoutError:
            raise ClusterError(
                f"rollout actors did not finish {method} within cluster.start_timeout={self._timeout} s; "
                "their logs are in the run's logs folder"
            ) from None

    def _get(self, ref: Any, timeout: float | None = None) -> Any:
        try:
            return ray.get(ref, timeout=timeout)
        except RayActorError as error:
            raise ClusterError(f"a rollout actor died: {' '.join(str(error).split())[:400]}") from error
        except RayTaskError as error:
            cause = error.cause
            raise ClusterError(f"a rollout actor failed: {type(cause).__name__}: {' '.join(str(cause).split())[:400]}") from error
