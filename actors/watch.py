"""Where a training's figures go while it runs: a line of JSON a record, TensorBoard, Ray's metrics on the dashboard, and wandb or
trackio where they are asked for."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from torch.utils.tensorboard import SummaryWriter

from actors import metrics

_logger = logging.getLogger("retract.watch")


class Curve(Protocol):
    """What the trainings of TRL's trainer and of verifiers keep of themselves: points of (step, value)."""

    losses: list[tuple[int, float]]
    checks: list[tuple[int, float]]


class Watch:
    """A context manager. Figures of records go to `folder`/NAME.jsonl, to TensorBoard's events in `folder`/tensorboard/NAME, and to
    Ray's gauge retract_training with the tags `training`: NAME and `figure`.

    A training that goes on from a checkpoint writes the steps behind it again: the last record of a step counts.

    Args:
        first_step: where the training begins, or goes on; TensorBoard drops what stood there and behind.
        report_to: modules with `init`, `log` and `finish` as wandb and trackio have them; each gets a run RUN/NAME.
    """

    def __init__(self, folder: Path, name: str, first_step: int = 0, report_to: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        plain = name.replace("/", "-")
        self._name = name
        self._lines = (folder / f"{plain}.jsonl").open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "tensorboard" / plain), purge_step=first_step)
        self._told = [0, 0, 0]  # points of a curve: losses, checks, probes
        self._others: list[Any] = []
        for module in report_to:
            self._other(module, partial(self._begun, module))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._events.close()
        for other in self._others:
            self._other(other.__name__, other.finish)

    def write(self, record: Mapping[str, Any]) -> None:
        """One record with a `step`; nested figures get names such as components.outcome.mean."""
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()
        figures = {name: value for name, value in flat(record) if name != "step"}
        for name, value in figures.items():
            self._events.add_scalar(name, value, record["step"])
            metrics.gauge("training", value, training=self._name, figure=name)
        self._events.flush()
        for other in [*self._others]:
            if not self._other(other.__name__, partial(other.log, figures, step=record["step"])):
                self._others.remove(other)

    def curve(self, curve: Curve, check: str = "dev_accuracy") -> None:
        """The points of a curve that have come since the last call; `check` is the name of its checks."""
        points: list[Any] = [curve.losses, curve.checks, getattr(curve, "probes", [])]  # verifiers have no probes
        losses, checks, probes = (some[told:] for some, told in zip(points, self._told, strict=True))
        self._told = [len(some) for some in points]
        found: dict[int, dict[str, Any]] = {}
        for name, some in (("loss", losses), (check, checks)):
            for step, value in some:
                found.setdefault(step, {})[name] = value
        for probe in probes:
            found.setdefault(probe.step, {})[f"{probe.group}.{probe.name}"] = probe.value
        for step in sorted(found):
            self.write({"step": step} | found[step])

    def _begun(self, module: str) -> None:
        other = importlib.import_module(module)
        other.init(project="retract", name=metrics.named(self._name))
        self._others.append(other)

    def _other(self, module: str, call: Callable[[], object]) -> bool:
        """Whether it went well. A service that does not answer is no reason to end a training."""
        try:
            call()
        except Exception as error:
            _logger.warning(f"{self._name} is not reported to {module} any more: {' '.join(str(error).split())[:200]}")
            return False
        return True


def missing(report_to: Sequence[str]) -> str | None:
    """What is not installed of what is asked for, and how to get it; None where all is there."""
    for module in report_to:
        if importlib.util.find_spec(module) is None:
            return f"monitor.report_to: {module} is not installed: .venv/bin/python -m pip install {module}"
    return None


def flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record, nested ones too, by dotted names."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield prefix + name, float(value)
