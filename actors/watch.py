"""Where a training's figures go while it runs: a line of JSON a record, TensorBoard, and Ray's metrics on the dashboard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from ray.util.metrics import Gauge
from torch.utils.tensorboard import SummaryWriter


class Watch:
    """A context manager. Figures of records go to `folder`/NAME.jsonl, to TensorBoard's events in `folder`/tensorboard/NAME, and to
    Ray's gauges retract_FIGURE with the tag `training`: NAME.

    A training that goes on from a checkpoint writes the steps behind it again: the last record of a step counts.
    """

    def __init__(self, folder: Path, name: str, first_step: int = 0) -> None:
        """`first_step`: where the training begins, or goes on; TensorBoard drops what stood there and behind."""
        folder.mkdir(parents=True, exist_ok=True)
        plain = name.replace("/", "-")
        self._name = name
        self._lines = (folder / f"{plain}.jsonl").open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "tensorboard" / plain), purge_step=first_step)
        self._gauges: dict[str, Gauge] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._events.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """One record with a `step`; nested figures get names such as components.outcome.mean."""
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in flat(record):
            if name == "step":
                continue
            self._events.add_scalar(name, value, record["step"])
            gauge = f"retract_{name.replace('.', '_')}"
            if gauge not in self._gauges:
                self._gauges[gauge] = Gauge(gauge, f"{name} of a training.", tag_keys=("training",))
            self._gauges[gauge].set(value, {"training": self._name})
        self._events.flush()


def flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record, nested ones too, by dotted names."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield prefix + name, float(value)
