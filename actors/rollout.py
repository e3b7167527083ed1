"""The pool of rollout actors, each with an engine of its own. Stages hand it requests and get completions in order."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors import metrics
from actors.cluster import ClusterError, actor_options
from actors.engines import Completion, Request, Sampling, make_engine
from actors.weights import Weights, check_weights, probe_of_folder
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.config import Settings
from pipeline.telemetry import redirect_process_output

OnRows = Callable[[int, int], None]

_LOOK_SECONDS = 1.0  # between two looks for actors that hang
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
        self._busy = metrics.busy_actor(metrics.own_name())

    def ready(self) -> str:
        return self._engine.kind

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Batch:
        with self._busy.work():
            return Batch(self._engine.generate(requests, sampling), self._version)

    def decode(self, requests: Sequence[DecodeRequest], decoding: Decoding) -> Batch:
        with self._busy.work():
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


_NUMBERS = itertools.count()
RolloutActor: Any = ray.remote(_Rollout)


class RolloutPool:
    """Rollout actors that live as long as the run; weights are swapped in place between models.

    One that dies, or hangs and is killed, is started again with the weights of now, `cluster.restarts` times in all; what it had in
    work the others do meanwhile.
    """

    def __init__(
        self, settings: Settings, folder: Path, version: str, context: int, log_dir: Path, say: Callable[[str], None] = print
    ) -> None:
        self._settings, self._context, self._log_dir, self._say = settings, context, log_dir, say
        self._timeout = settings.cluster.start_timeout
        self._folder, self._folder_version, self._version = folder, version, version
        self._published: ray.ObjectRef[Weights] | None = None  # where they have taken the place of the folder's
        self._restarts = settings.cluster.restarts
        self._started = 0
        self._heard: set[Any] = set()  # actors that have answered before
        self._actors: list[Any] = [self._start() for _ in range(settings.cluster.rollout_actors)]
        self.kind: str = self._all("ready")[0]

    def _start(self) -> Any:
        """An actor with the weights of now. What it is asked waits until it has them."""
        cluster = self._settings.cluster
        log_file = str(self._log_dir / f"rollout-{self._started}.log")
        self._started += 1
        # Names are unique: that of a dead actor is free only a moment later.
        options = actor_options(cluster.rollout, f"rollout-{next(_NUMBERS)}", cluster.rollout_actors)
        actor = RolloutActor.options(**options).remote(
            str(self._folder), self._folder_version, self._settings, self._context, log_file
        )
        if self._published is not None:
            actor.set_weights.remote(self._published, self._version)
        return actor

    def use(self, folder: Path, version: str) -> None:
        """Make every engine generate with this model from now on; completions carry `version`."""
        if version != self._version:
            self._folder, self._folder_version, self._version, self._published = folder, version, version, None
            self._all("load_weights", str(folder), version)
        metrics.generates_with(version)

    def publish(self, weights: ray.ObjectRef[Weights], version: str) -> None:
        """Put a learner's weights, as it left them in Ray's object store, into every engine.

        Raises:
            ClusterError: an engine did not take them in time, or does not generate with them.
        """
        self._version, self._published = version, weights
        self._all("set_weights", weights, version)
        metrics.generates_with(version)

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
        finished = 0
        limit = self._settings.cluster.batch_timeout
        due: dict[Any, float] = {}  # actor -> when it has to have answered

        def feed(actor: Any) -> None:
            in_flight = sum(busy == actor for _, _, busy in running.values())
            if waiting and in_flight < _BATCHES_IN_FLIGHT:
                if not in_flight:
                    due[actor] = time.monotonic() + limit + (0 if actor in self._heard else self._timeout)  # to start first
                start, part = waiting.popleft()
                asked = getattr(actor, method).options(name=metrics.task(method))
                running[asked.remote(part, how)] = (start, part, actor)

        for actor in self._actors * _BATCHES_IN_FLIGHT:
            feed(actor)
        while running:
            metrics.gauge("queue_depth", len(requests) - finished, queue="rollout")
            ready, _ = ray.wait(list(running), timeout=_LOOK_SECONDS)
            if not ready:
                for actor in {actor for _, _, actor in running.values() if due[actor] < time.monotonic()}:
                    self._say(f"a rollout actor has not answered for cluster.batch_timeout={limit} s and is killed")
                    metrics.count("failures", what="hung rollout actor")
                    due[actor] = math.inf
                    ray.kill(actor)  # its requests come back as those of any dead actor
                continue
            start, part, actor = running.pop(ready[0])
            try:
                result = ray.get(ready[0])
            except RayActorError as error:
                waiting.append((start, part))
                self._lose(actor, error)
                for other in self._actors * _BATCHES_IN_FLIGHT:
                    feed(other)
                continue
            except RayTaskError as error:
                metrics.count("failures", what="rollout task")
                raise _failed(error) from error
            if result.version != self._version or len(result.done) != len(part):
                raise ClusterError(
                    f"a rollout actor answered {len(result.done)} rows of weights {result.version[:12]}; "
                    f"asked were {len(part)} rows of {self._version[:12]}"
                )
            due[actor] = time.monotonic() + limit
            self._heard.add(actor)
            done[start : start + len(part)] = result.done
            finished, new_tokens = finished + len(part), sum(map(tokens, result.done))
            metrics.count("tokens", new_tokens, method=method)
            on_rows(len(part), new_tokens)
            feed(actor)
        metrics.gauge("queue_depth", 0, queue="rollout")
        return done

    def _lose(self, actor: Any, error: RayActorError) -> None:
        """Go on without a dead actor, or with a new one in its place.

        Raises:
            ClusterError: it was the last one, and none may be started again.
        """
        if actor in self._actors:
            self._actors.remove(actor)
            metrics.count("failures", what="rollout actor")
            if error.actor_init_failed:  # a model that does not load will not load the next time either
                raise ClusterError(f"a rollout actor did not start: {_one_line(error)}") from error
            if self._restarts:
                self._restarts -= 1
                self._say(f"a rollout actor died and is started again, {self._restarts} times more at most: {_one_line(error)}")
                metrics.count("restarts", what="rollout actor")
                self._actors.append(self._start())
            elif self._actors:
                self._say(f"a rollout actor died, {len(self._actors)} go on with its requests: {_one_line(error)}")
        if not self._actors:
            raise ClusterError(f"a rollout actor died: {_one_line(error)}") from error

    def shared(self) -> RolloutPool:
        """The same actors, for another process to ask beside this one; only this one may change weights, start actors again, or
        close it."""
        other = copy(self)
        other._actors, other._heard, other._restarts, other._say = list(self._actors), set(self._heard), 0, print
        return other

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def _all(self, method: str, *args: Any) -> list[Any]:
        """What every actor answers; one that is started again in place of another has the weights of now anyway."""
        asked = deque((actor, getattr(actor, method).remote(*args)) for actor in self._actors)
        found, until = [], time.monotonic() + self._timeout
        while asked:
            actor, ref = asked.popleft()
            try:
                found.append(ray.get(ref, timeout=max(0.0, until - time.monotonic())))
            except GetTimeoutError:
                raise ClusterError(
                    f"{len(self._actors)} rollout actors did not finish {method} within cluster.start_timeout={self._timeout} s; "
                    "their logs are in the run's logs folder"
                ) from None
            except RayActorError as error:
                before = set(self._actors)
                self._lose(actor, error)
                asked.extend((new, new.ready.remote()) for new in self._actors if new not in before)
                until = time.monotonic() + self._timeout
            except RayTaskError as error:
                raise _failed(error) from error
        return found


def _failed(error: RayTaskError) -> ClusterError:
    return ClusterError(f"a rollout actor failed: {type(error.cause).__name__}: {_one_line(error.cause)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
