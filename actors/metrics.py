"""Ray metrics of a run: one table of them, and the few functions that feed it. Called from the driver and from actors.

A metric never fails a run and never holds it up: what goes wrong here is logged once and forgotten. Prometheus sees each name with
`ray_` before it, and counters with `_total` behind it. Rates (tokens/s, rows/s) are Prometheus's to make of counters: a rate that
a process sets would stand on when the process has nothing to do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import ray
from ray.util.metrics import Counter, Gauge

from pipeline.rollout_log import Rolled

_logger = logging.getLogger("metrics")
_BUSY_SECONDS = 5.0  # over which the busy share is taken


@dataclass(frozen=True)
class Metric:
    """A line of the table."""

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    tags: tuple[str, ...]
    what: str

    @property
    def exported(self) -> str:
        """The name that Prometheus sees."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


_HERE = ("run", "stage")
TABLE = {
    metric.name.removeprefix("retract_"): metric
    for metric in (
        Metric("retract_rows", "counter", "rows, or `unit`", (*_HERE, "unit"), "What a stage has finished: rows, steps, .."),
        Metric("retract_tokens", "counter", "tokens", (*_HERE, "method"), "Emitted by engines, deleted ones included."),
        Metric("retract_queue_depth", "gauge", "rows", (*_HERE, "queue"), "Handed over or waiting: rollout, judge, search."),
        Metric("retract_busy_share", "gauge", "share", ("run", "actor"), "Of the last 5 seconds, in which an actor was at work."),
        Metric("retract_weight_step", "gauge", "steps", ("run",), "Step of the training whose weights generate; 0: a saved model."),
        Metric("retract_weight_version", "gauge", "1", ("run", "version"), "1 for the weights that generate now, 0 for others."),
        Metric("retract_rollouts", "counter", "rollouts", (*_HERE, "mode"), "Written to logs/rollouts."),
        Metric("retract_undo_rate", "gauge", "share", (*_HERE, "mode"), "Rollouts with an undo, of those written last."),
        Metric("retract_accuracy", "gauge", "share", (*_HERE, "mode"), "Right ones, of those written last that have a verdict."),
        Metric("retract_reward", "gauge", "reward", (*_HERE, "component"), "Mean over those written last, before its weight."),
        Metric("retract_training", "gauge", "the figure's", ("run", "training", "figure"), "Newest value of a training's figure."),
        Metric("retract_failures", "counter", "failures", (*_HERE, "what"), "Actors that died, hung or raised, by kind."),
        Metric("retract_restarts", "counter", "restarts", (*_HERE, "what"), "Actors started in the place of dead ones."),
    )
}


@dataclass(frozen=True)
class Labels:
    """Where a process is at work; the driver's travel to actors that feed metrics of their own."""

    run: str = ""
    stage: str = ""
    round: int = 0


_labels = Labels()
_made: dict[str, Any] = {}
_failed = False


def begin(labels: Labels) -> None:
    """From now on this process works at this."""
    global _labels
    _labels = labels


def labels() -> Labels:
    return _labels


def named(what: str) -> str:
    """A name for the dashboard's pages, with that of the run."""
    return f"{_labels.run}/{what}" if _labels.run else what


def task(method: str) -> str:
    """A name for a task of the stage at work: RUN/STAGE.METHOD."""
    return named(f"{_labels.stage}.{method}" if _labels.stage else method)


def count(name: str, value: float = 1.0, **tags: str) -> None:
    """Add to a counter of the table; run and stage are those of this process unless given."""
    if value > 0:
        _record(name, value, tags)


def gauge(name: str, value: float, **tags: str) -> None:
    """Set a gauge of the table; run and stage are those of this process unless given."""
    _record(name, value, tags)


def _record(name: str, value: float, tags: dict[str, str]) -> None:
    global _failed
    try:
        if not ray.is_initialized():
            return
        metric = TABLE[name]
        if name not in _made:
            kind = Counter if metric.kind == "counter" else Gauge
            _made[name] = kind(metric.name, f"{metric.what} [{metric.unit}]", metric.tags)
        if "run" not in tags:
            tags["run"] = _labels.run
        if "stage" in metric.tags and "stage" not in tags:
            tags["stage"] = _labels.stage
        if metric.kind == "counter":
            _made[name].inc(value, tags)
        else:
            _made[name].set(value, tags)
    except Exception:  # whatever it is: a run does not end for its metrics
        if not _failed:
            _logger.warning("metrics are incomplete", exc_info=True)
        _failed = True


# What stages and actors tell


def progressed(stage: str, unit: str, new: int) -> None:
    """A stage, or a part of one, has finished so many more; see Terminal."""
    count("rows", new, stage=stage, unit=unit)


def generates_with(version: str) -> None:
    """Engines have these weights now. Of a training's, as grpo@12, the step is behind the @."""
    global _version
    step = version.rpartition("@")[2] if "@" in version else ""
    gauge("weight_step", float(step) if step.isdecimal() else 0.0)
    if _version != version:
        gauge("weight_version", 0.0, version=_version[:_VERSION_LETTERS])
    _version = version
    gauge("weight_version", 1.0, version=version[:_VERSION_LETTERS])


_VERSION_LETTERS = 40  # enough to tell digests apart
_version = ""


def rolled(rows: Sequence[Rolled]) -> None:
    """Rollouts were written; see RolloutLog."""
    for mode in {one.mode for one in rows}:
        some = [one for one in rows if one.mode == mode]
        count("rollouts", len(some), mode=mode)
        gauge("undo_rate", fmean(one.undos > 0 for one in some), mode=mode)
        if judged := [one.correct for one in some if one.correct is not None]:
            gauge("accuracy", fmean(judged), mode=mode)
    for name in {name for one in rows for name in one.components}:
        gauge("reward", fmean(one.components[name] for one in rows if name in one.components), component=name)


class Busy:
    """How much of the time something is at work. One thread works, another may ask.

    Example:
        busy = Busy()
        with busy.work():
            engine.generate(...)
        busy.share()  # since the last call
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._since: float | None = None  # when the work in hand began, or was last counted
        self._busy = 0.0
        self._asked = clock()

    @contextmanager
    def work(self) -> Iterator[None]:
        with self._lock:
            self._since = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._count()
                self._since = None

    def share(self) -> float:
        """Of the time since the last call, or since the beginning; 0 .. 1."""
        with self._lock:
            self._count()
            now = self._clock()
            passed, busy = now - self._asked, self._busy
            self._asked, self._busy = now, 0.0
        return min(1.0, busy / passed) if passed > 0 else 0.0

    def _count(self) -> None:
        if self._since is not None:
            now = self._clock()
            self._busy += now - self._since
            self._since = now


def busy_actor(actor: str) -> Busy:
    """For an actor's process: its busy share goes to Ray's metrics for as long as it lives.

    Args:
        actor: its name on the dashboard, RUN/NAME.
    """
    busy = Busy()
    if not actor:
        return busy
    run = actor.partition("/")[0]

    def tell() -> None:
        while True:
            time.sleep(_BUSY_SECONDS)
            gauge("busy_share", busy.share(), run=run, actor=actor)

    threading.Thread(target=tell, name="busy", daemon=True).start()
    return busy


def own_name() -> str:
    """The name of the actor that runs in this process; "" where there is none."""
    if not ray.is_initialized():  # tests use the same classes without Ray
        return ""
    return str(ray.get_runtime_context().get_actor_name() or "")
