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
from actors.engines import Completion, Request, Sampling, make_engine
from actors.weights import Weights, check_weights, probe_of_folder
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.config import Settings
from pipeline.telemetry import redirect_process_output

OnRows = Callable[[int, int], None]

_BATCHES_IN_FLIGHT = 2  # for each actor: one in work, one waiting, so that the engine never idles and memory stays flat


def _silent(rows: int, tokens: int) -> None: ...


@dataclass(frozen=True)
class Batch:
    """What an actor made of one batch."""

    done: list[Any]
    version: str
    """Digest of the weights that generated it."""


class _Rollout:
    """Holds one engine."""

    def __init__(self, folder: str, version: str, settings: Settings, context: int, log_file: str) -> None:
        redirect_process_output(Path(log_file))
        self._engine = make_engine(Path(folder), settings.engine, context, settings.run.seed)
        self._dtype = settings.engine.dtype
        self._version = version
        self._check_folder(folder)

    def ready(self) -> str:
        return self._engine.kind

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Batch:
        return Batch(self._engine.generate(requests, sampling), self._version)

    def decode(self, requests: Sequence[DecodeRequest], decoding: Decoding) -> Batch:
        return Batch(self._engine.decode(requests, decoding), self._version)

    def load_weights(self, folder: str, version: str) -> None:
        self._engine.load_weights(Path(folder))
        self._check_folder(folder)
        self._version = version

    def set_weights(self, weights: Weights, version: str) -> None:
        self._engine.set_weights(weights.tensors())
        check_weights(self._engine, weights.probe, self._dtype, version)
        self._version = version

    def _check_folder(self, folder: str) -> None:
        check_weights(self._engine, probe_of_folder(Path(folder)), self._dtype, folder)


RolloutActor: Any = ray.remote(_Rollout)


class RolloutPool:
    """Rollout actors that live as long as the run; weights are swapped in place between models."""

    def __init__(
        self, settings: Settings, folder: Path, version: str, context: int, log_dir: Path, say: Callable[[str], None] = print
    ) -> None:
        cluster, self._say = settings.cluster, say
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

    def publish(self, weights: ray.ObjectRef[Weights], version: str) -> None:
        """Put a learner's weights, as it left them in Ray's object store, into every engine.

        Raises:
            ClusterError: an engine did not take them in time, or does not generate with them.
        """
        self._all("set_weights", weights, version)
        self._version = version

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, batch: int, on_rows: OnRows = _silent
    ) -> tuple[list[Completion], str]:
        """All completions in the order of the requests, and the version of the weights that made them.

        Args:
            batch: requests handed to an actor at a time.
            on_rows: called with the rows and tokens of each batch that comes back.

        Raises:
            ClusterError: every actor died, or one answered with other weights or fewer rows than asked for.
        """
        return self._spread("generate", requests, sampling, batch, lambda one: len(one.token_ids), on_rows), self._version

    def decode(
        self, requests: Sequence[DecodeRequest], decoding: Decoding, batch: int, on_rows: OnRows = _silent
    ) -> tuple[list[Decoded], str]:
        """The same for decoding with undo."""
        return self._spread("decode", requests, decoding, batch, lambda one: len(one.ids), on_rows), self._version

    def _spread(
        self, method: str, requests: Sequence[Any], how: Any, batch: int, tokens: Callable[[Any], int], on_rows: OnRows
    ) -> list[Any]:
        """Rows have seeds of their own, so what a dead actor had in work another one does again, with the same outcome."""
        waiting = deque((start, requests[start : start + batch]) for start in range(0, len(requests), batch))
        running: dict[Any, tuple[int, Sequence[Any], Any]] = {}  # result -> where it belongs, what was asked, of whom
        done: list[Any] = [None] * len(requests)

        def feed(actor: Any) -> None:
            if waiting:
                start, part = waiting.popleft()
                running[getattr(actor, method).remote(part, how)] = (start, part, actor)

        for actor in self._actors * _BATCHES_IN_FLIGHT:
            feed(actor)
        while running:
            (ref,), _ = ray.wait(list(running))
            start, part, actor = running.pop(ref)
            try:
                result = ray.get(ref)
            except RayActorError as error:
                waiting.append((start, part))
                self._lose(actor, error)
                for other in self._actors:
                    feed(other)
                continue
            except RayTaskError as error:
                raise _failed(error) from error
            if result.version != self._version or len(result.done) != len(part):
                raise ClusterError(
                    f"a rollout actor answered {len(result.done)} rows of weights {result.version[:12]}; "
                    f"asked were {len(part)} rows of {self._version[:12]}"
                )
            done[start : start + len(part)] = result.done
            on_rows(len(part), sum(map(tokens, result.done)))
            feed(actor)
        return done

    def _lose(self, actor: Any, error: RayActorError) -> None:
        """Go on without a dead actor.

        Raises:
            ClusterError: it was the last one.
        """
        if actor in self._actors:
            self._actors.remove(actor)
            if self._actors:
                self._say(f"a rollout actor died, {len(self._actors)} go on with its requests: {_one_line(error)}")
        if not self._actors:
            raise ClusterError(f"a rollout actor died: {_one_line(error)}") from error

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def _all(self, method: str, *args: Any) -> list[Any]:
        try:
            return self._get([getattr(actor, method).remote(*args) for actor in self._actors], self._timeout)
        except GetTimeoutError:
            raise ClusterError(
                f"{len(self._actors)} rollout actors did not finish {method} within cluster.start_timeout={self._timeout} s; "
                "their logs are in the run's logs folder"
            ) from None

    def _get(self, ref: Any, timeout: float | None = None) -> Any:
        try:
            return ray.get(ref, timeout=timeout)
        except RayActorError as error:
            raise ClusterError(f"a rollout actor died: {_one_line(error)}") from error
        except RayTaskError as error:
            raise _failed(error) from error


def _failed(error: RayTaskError) -> ClusterError:
    return ClusterError(f"a rollout actor failed: {type(error.cause).__name__}: {_one_line(error.cause)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
