"""The pool of rollout actors, each with an engine of its own. Stages hand it requests and get completions in order."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import metrics
from actors.cluster import ClusterError, Restarts, actor_options, one_line, one_node
from actors.engines import Completion, Request, Sampling
from actors.parcel import Source
from actors.parts import Part, Parts, Quarantine, Quarantined
from actors.rollout_actor import Batch, RolloutActor
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.config import Settings

if TYPE_CHECKING:  # needs torch
    from actors.weights import Probe, Weights

OnRows = Callable[[int, int], None]
Method = Literal["generate", "decode"]

QUARANTINE = "quarantine.jsonl"
"""Rows that failed every time, with tracebacks, in the run's logs."""
_LOOK_SECONDS = 1.0  # between two looks for actors that hang
_BATCHES_IN_FLIGHT = 2  # for each actor: one in work, one waiting, so that the engine never idles and memory stays flat
# A batch that takes less is not worth having another one behind it: both would be made before the driver has fetched the first, and
# a driver that is killed loses what it has not fetched.
_WORTH_WAITING_SECONDS = 0.5


def _silent(rows: int, tokens: int) -> None: ...


@dataclass(frozen=True)
class _Asked:
    """A batch that an actor has."""

    number: int
    """Earlier ones are worked on first."""
    part: Part
    actor: Any


def emitted(one: Completion | Decoded | Quarantined) -> int:
    """Tokens that a row has cost, deleted ones included."""
    return 0 if isinstance(one, Quarantined) else len(one.token_ids if isinstance(one, Completion) else one.ids)


_NUMBERS = itertools.count()


class RolloutPool:
    """Rollout actors that live as long as the run; weights are swapped in place between models.

    One that dies, or hangs and is killed, is started again with the weights of now as long as `restarts` allow; what it had in work
    the others do meanwhile. Nothing waits for one that is being started while another lives: where a node is gone, there may be no
    place for it.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        version: str,
        context: int,
        log_dir: Path,
        say: Callable[[str], None] = print,
        restarts: Restarts | None = None,
        apart: bool = False,
    ) -> None:
        """`apart`: there are nodes that do not see model folders."""
        self._settings, self._context, self._log_dir, self._say = settings, context, log_dir, say
        self._timeout = settings.cluster.start_timeout
        self._apart, self._version = apart, version
        self._source = self._source_of(folder)
        # Where weights have taken the place of the folder's: those of now, for an actor that begins.
        self._published: Callable[[], ray.ObjectRef[Weights]] | None = None
        self._held: Weights | None = None
        self._restarts: Restarts | None = restarts or Restarts(settings.cluster.restarts, say)
        self._pings: dict[Any, Any] = {}
        self.new_stage()
        self._started = 0
        self._heard: set[Any] = set()  # actors that have answered before
        self._coming: dict[Any, Any] = {}  # those that have not -> what they will answer once they are ready
        self._asleep = False
        self._groups: dict[Any, Any] = {}  # actors whose engines have several processes -> the placement group that holds these
        self._actors: list[Any] = [self._start() for _ in range(settings.cluster.rollout_actors)]
        self.kind: str = self._all("ready")[0]
        self._heard.update(self._actors)

    def _start(self) -> Any:
        """An actor with the weights of now. What it is asked waits until it has them."""
        cluster = self._settings.cluster
        log_file = str(self._log_dir / f"rollout-{self._started}.log")
        self._started += 1
        # Names are unique: that of a dead actor is free only a moment later.
        processes = cluster.tensor_parallel
        options = actor_options(cluster.rollout, f"rollout-{next(_NUMBERS)}", cluster.rollout_actors * processes)
        group = one_node(cluster.rollout, processes) if processes > 1 else None
        if group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        actor = RolloutActor.options(**options).remote(self._source, self._settings, self._context, log_file)
        if group is not None:
            self._groups[actor] = group
        if self._published is not None:
            actor.set_weights.remote(self._published(), self._version)
        return actor

    def _source_of(self, folder: Path) -> Source:
        """Of the version of now."""
        return (Source.apart if self._apart else Source)(str(folder), self._version)

    @property
    def version(self) -> str:
        """Of the weights of now."""
        return self._version

    def sleep(self) -> None:
        """With engine.sleep: leave the GPUs to the learner until something is asked of the engines; nothing may be under way."""
        if self._settings.engine.sleep and self.kind == "vllm" and not self._asleep:
            self._all("sleep")
            self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self._asleep = False
            self._all("wake")

    def new_stage(self) -> None:
        """Rows that cannot be done are counted anew."""
        self.quarantine = Quarantine(self._settings.cluster.quarantine, self._log_dir / QUARANTINE)

    def use(self, folder: Path, version: str) -> None:
        """Make every engine generate with this model from now on; completions carry `version`."""
        self.wake()
        if version != self._version:
            self._version = version
            self._source = self._source_of(folder)
            self._published = self._held = None
            self._all("load_weights", self._source)
        metrics.generates_with(version)

    def publish(self, weights: ray.ObjectRef[Weights], version: str) -> None:
        """Put a learner's weights, as it left them in Ray's object store, into every engine.

        Raises:
            ClusterError: an engine did not take them in time, or does not generate with them.
        """
        self.wake()
        self._version, self._published = version, lambda: weights
        # A copy on the driver's node: the one on the learner's node is lost with that node, and others still have to start from it.
        self._held = ray.get(weights, timeout=self._timeout)
        self._all("set_weights", weights, version)
        metrics.generates_with(version)

    def transfer(self, send: Callable[[list[Any]], Probe], again: Callable[[], ray.ObjectRef[Weights]], version: str) -> None:
        """Have a learner's weights sent into every engine, from GPU to GPU.

        Args:
            send: does it, given the actors; returns what tells the weights from others.
            again: the same weights through Ray's object store, for an actor that is started again.

        Raises:
            ClusterError: an engine died meanwhile, or does not generate with them.
        """
        self.wake()
        self._all("ready")  # a dead one would keep the others waiting in a transfer that never ends
        able = self._able()
        self._version, self._published, self._held = version, again, None
        for actor in set(self._actors) - set(able):
            actor.set_weights.remote(again(), version)
        self._all("transferred", send(able), version)
        metrics.generates_with(version)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, batch: int, on_rows: OnRows = _silent
    ) -> tuple[list[Completion | Quarantined], str]:
        """All completions in the order of the requests, and the version of the weights that made them. A row that failed every
        time has a Quarantined in its place; whoever cannot do without it asks `all_there`.

        Args:
            batch: requests handed to an actor at a time.
            on_rows: called with the rows and tokens of each batch that comes back.

        Raises:
            ClusterError: every actor died, or one answered with other weights or fewer rows than asked for.
            TooManyQuarantined: more than cluster.quarantine rows in one stage.
        """
        return self._collected("generate", requests, sampling, batch, on_rows), self._version

    def decode(
        self, requests: Sequence[DecodeRequest], decoding: Decoding, batch: int, on_rows: OnRows = _silent
    ) -> tuple[list[Decoded | Quarantined], str]:
        """The same for decoding with undo."""
        return self._collected("decode", requests, decoding, batch, on_rows), self._version

    def _collected(self, method: Method, requests: Sequence[Any], how: Any, batch: int, on_rows: OnRows) -> list[Any]:
        done: list[Any] = [None] * len(requests)
        for start, result in self.stream(method, requests, how, batch):
            done[start : start + len(result.done)] = result.done
            on_rows(len(result.done), sum(map(emitted, result.done)))
        return done

    def stream(self, method: Method, requests: Iterable[Any], how: Any, batch: int) -> Iterator[tuple[int, Batch]]:
        """Batches of results as they come, each with the place of its first row among the requests; every place comes once.

        Requests are taken one batch after the other, when an actor has room for them, so that there may be any number of them:
        two batches an actor are under way, those that wait to be taken from here included; one, where it is done in no time.
        Rows have seeds of their own, so what a dead actor had in work another one does again, with the same outcome. A batch that
        fails again and again is cut until the row that is to blame is alone; that one has a Quarantined in its place at last.

        Args:
            how: Sampling for `generate`, Decoding for `decode`.

        Raises:
            ClusterError: every actor died, or one answered with other weights or fewer rows than asked for.
            TooManyQuarantined: see `generate`.
        """
        self.wake()
        cluster = self._settings.cluster
        parts = Parts(requests, batch, cluster.row_tries)
        running: dict[Any, _Asked] = {}
        busy: Counter[Any] = Counter()  # batches that an actor has
        due: dict[Any, float] = {}  # actor -> when it has to have answered
        began: dict[Any, float] = {}  # actor -> when it could begin with what it has in work
        took: dict[Any, float] = {}  # actor -> seconds of its last batch
        numbers, limit = itertools.count(), cluster.batch_timeout

        def feed(actors: list[Any]) -> None:
            for actor in actors * _BATCHES_IN_FLIGHT:
                most = _BATCHES_IN_FLIGHT if took.get(actor, 0.0) >= _WORTH_WAITING_SECONDS else 1
                if busy[actor] < most and (part := parts.next()):
                    if not busy[actor]:
                        began[actor] = time.monotonic()
                        due[actor] = time.monotonic() + limit + (0 if actor in self._heard else self._timeout)  # to start first
                    task = getattr(actor, method).options(name=metrics.task(method))
                    running[task.remote(part.rows, how)] = _Asked(next(numbers), part, actor)
                    busy[actor] += 1

        def take(ref: Any) -> _Asked:
            asked = running.pop(ref)
            busy[asked.actor] -= 1
            return asked

        feed(self._able())
        look = time.monotonic() + _LOOK_SECONDS
        while running:
            if time.monotonic() > look:
                feed(self._able())  # one that was being started may be ready
                look = time.monotonic() + _LOOK_SECONDS
            metrics.gauge("queue_depth", sum(len(one.part.rows) for one in running.values()), queue="rollout")
            ready, _ = ray.wait(list(running), timeout=_LOOK_SECONDS)
            if not ready:
                for actor in {asked.actor for asked in running.values() if due[asked.actor] < time.monotonic()}:
                    self._say(f"a rollout actor has not answered for cluster.batch_timeout={limit} s and is killed")
                    metrics.count("failures", what="hung rollout actor")
                    due[actor] = math.inf
                    ray.kill(actor)  # its requests come back as those of any dead actor
                continue
            asked = take(ready[0])
            try:
                result = ray.get(ready[0])
            except RayActorError as error:
                lost = [asked, *(take(ref) for ref, one in list(running.items()) if one.actor == asked.actor and _is_lost(ref))]
                first, *others = sorted(lost, key=lambda one: one.number)
                for one in reversed(others):
                    parts.untried(one.part)
                self._lose(asked.actor, error)
                yield from self._failed(method, parts, first.part, one_line(error), str(error))  # it had begun with that one
                feed(self._able())
            except RayTaskError as error:
                metrics.count("failures", what="rollout task")
                why = f"{type(error.cause).__name__}: {one_line(error.cause)}"
                yield from self._failed(method, parts, asked.part, why, str(error))
                feed([asked.actor])
            except ObjectLostError:  # its node died behind it
                parts.untried(asked.part)
                feed(self._able())
            else:
                if result.version != self._version or len(result.done) != len(asked.part.rows):
                    raise ClusterError(
                        f"a rollout actor answered {len(result.done)} rows of weights {result.version[:12]}; "
                        f"asked were {len(asked.part.rows)} rows of {self._version[:12]}"
                    )
                now = time.monotonic()
                took[asked.actor], began[asked.actor], due[asked.actor] = now - began[asked.actor], now, now + limit
                self._heard.add(asked.actor)
                feed([asked.actor])
                metrics.count("tokens", sum(map(emitted, result.done)), method=method)
                yield asked.part.start, result
        metrics.gauge("queue_depth", 0, queue="rollout")

    def _able(self) -> list[Any]:
        """The actors that are ready; all, where none is."""
        for actor in self._actors:
            if actor not in self._heard and actor not in self._coming:
                self._coming[actor] = actor.ready.remote()
        answered, _ = ray.wait(list(self._coming.values()), num_returns=len(self._coming), timeout=0) if self._coming else ([], [])
        for actor in [actor for actor, ref in self._coming.items() if ref in answered]:
            ref = self._coming.pop(actor)
            try:
                ray.get(ref)
                self._heard.add(actor)
            except RayActorError as error:
                self._lose(actor, error)
        return [actor for actor in self._actors if actor in self._heard] or self._actors

    def _failed(self, method: str, parts: Parts, part: Part, why: str, traceback: str) -> Iterator[tuple[int, Batch]]:
        if not parts.failed(part):
            one = Quarantined(self._settings.cluster.row_tries, why, traceback)
            self._say(f"a row is left out after {one.tries} tries (cluster.row_tries) of {method}: {why}")
            self.quarantine.add(method, part.rows[0], one)
            yield part.start, Batch([one], self._version)

    def _lose(self, actor: Any, error: RayActorError) -> None:
        """Go on without a dead actor, or with a new one in its place.

        Raises:
            ClusterError: it was the last one, and none may be started again.
        """
        self._end(actor)  # one that only cannot be reached shall not come back
        if actor in self._actors:
            self._actors = [one for one in self._actors if one != actor]
            metrics.count("failures", what="rollout actor")
            if error.actor_init_failed:  # a model that does not load will not load the next time either
                raise ClusterError(f"a rollout actor did not start: {one_line(error)}") from error
            if self._restarts is not None and self._restarts.take("a rollout actor", error):
                self._actors = [*self._actors, self._start()]
            elif self._actors:
                self._say(f"a rollout actor died, {len(self._actors)} go on with its requests: {one_line(error)}")
        until = time.monotonic() + self._timeout
        while self._restarts is None and not self._actors and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)  # whoever has started the actors starts others, and another thread gets to know
        if not self._actors:
            raise ClusterError(f"a rollout actor died: {one_line(error)}") from error

    def shared(self) -> RolloutPool:
        """The same actors, for another process to ask beside this one, which goes on to `tend` them: only this one may change
        weights, start actors again, or close it."""
        other = copy(self)
        other._heard, other._restarts, other._say, other._held = set(self._heard), None, print, None
        other._pings, other._coming = {}, {}
        return other

    def tend(self) -> list[Any]:
        """The actors of now, those that have died started again: for as long as others ask them and this process does not."""
        for actor in self._actors:
            if actor not in self._pings:
                self._pings[actor] = actor.ready.remote()
        answered, _ = ray.wait(list(self._pings.values()), num_returns=len(self._pings), timeout=0)
        for actor, ref in list(self._pings.items()):
            if ref in answered:
                del self._pings[actor]
                try:
                    ray.get(ref)
                except RayActorError as error:
                    self._lose(actor, error)
        return self._actors

    def replace(self, actors: list[Any]) -> None:
        """Ask these from now on; for one that is shared."""
        self._actors = actors

    def close(self) -> None:
        for actor in self._actors:
            self._end(actor)

    def _end(self, actor: Any) -> None:
        ray.kill(actor)
        if group := self._groups.pop(actor, None):
            remove_placement_group(group)

    def _all(self, method: str, *args: Any) -> list[Any]:
        """What every actor answers. One that is being started does the same before anything else it is asked for, and is not waited
        for; one that is started again in place of another has the weights of now anyway."""
        able = self._able()
        asked = deque((actor, getattr(actor, method).remote(*args)) for actor in able)
        for actor in self._actors:
            if actor not in able:
                getattr(actor, method).remote(*args)
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
                if not asked and not found:  # nobody else lives
                    asked.extend((new, new.ready.remote()) for new in self._actors if new not in before)
                    until = time.monotonic() + self._timeout
            except RayTaskError as error:
                raise _failed(error) from error
        return found


def _failed(error: RayTaskError) -> ClusterError:
    return ClusterError(f"a rollout actor failed: {type(error.cause).__name__}: {one_line(error.cause)}")


def _is_lost(ref: Any) -> bool:
    """Whether an actor that is dead has left no answer here."""
    try:
        ray.get(ref)
    except RayActorError:
        return True
    except (RayTaskError, ObjectLostError):
        return False
    return False
