"""Values that change over training: how many undos a trace may hold, what a reward weighs, how large a budget is.

One type for all of them. Stages read a schedule from their settings with `parse_schedule` and ask it for the value at a step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """A value for every step from 0 on.

    Example:
        >>> most_undos = Schedule(((0, 2), (500, 5), (1000, 10)))
        >>> [most_undos.at(step) for step in (0, 499, 500, 5000)]
        [2, 2, 5, 10]
        >>> Schedule(((0, 1.0), (100, 0.0)), "linear").at(25)
        0.75

    Raises:
        ValueError: no points, steps that do not begin at 0 and rise, or a value that is not finite.
    """

    points: tuple[tuple[int, float], ...]
    """(from_step, value) pairs by rising step; the first step is 0, the last value stays for ever."""
    between: Literal["constant", "linear"] = "constant"
    """Between two points: the earlier value, or a straight line."""

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("needs at least one [step, value]")
        if self.points[0][0] != 0:
            raise ValueError(f"the first step must be 0, is {self.points[0][0]}")
        for index, (step, value) in enumerate(self.points):
            if index and step <= (before := self.points[index - 1][0]):
                raise ValueError(f"steps must rise, but step {step} follows step {before}")
            if not math.isfinite(value):
                raise ValueError(f"the value at step {step} must be finite, is {value}")

    def at(self, step: int) -> float:
        """The value at a step.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        index = bisect_right(self.points, step, key=lambda point: point[0]) - 1
        start, value = self.points[index]
        if self.between == "constant" or index + 1 == len(self.points):
            return value
        end, then = self.points[index + 1]
        share = (step - start) / (end - start)
        return (1 - share) * value + share * then


def parse_schedule(
    key: str,
    given: object,
    between: Literal["constant", "linear"] = "constant",
    least: float = -math.inf,
) -> Schedule:
    """Read a schedule from its form in a yaml file: `[[0, 2], [500, 5], [1000, 10]]`. No value may be below `least`.

    Raises:
        ValueError: one line that names the key, the entry and what is allowed.
    """
    if not isinstance(given, list | tuple):
        raise ValueError(f"{key}: must be a list of [step, value], not {given!r}")
    points: list[tuple[int, float]] = []
    for index, entry in enumerate(given):
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise ValueError(f"{key}[{index}]: must be [step, value], not {entry!r}")
        step, value = entry
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"{key}[{index}]: the step must be a whole number, not {step!r}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{key}[{index}]: the value must be a number, not {value!r}")
        if value < least:
            raise ValueError(f"{key}[{index}]: the value must be at least {least}, is {value}")
        points.append((step, value))
    try:
        return Schedule(tuple(points), between)
    except (ValueError, OverflowError) as error:  # a whole number may be too large for a float
        raise ValueError(f"{key}: {error}") from None


def allowed_traces(undos: Sequence[int], most: Schedule, step: int) -> tuple[int, ...]:
    """Indices of the traces that may be trained on at a step.

    Args:
        undos: for each trace its number of undo tokens; a clean row has 0.
        most: how many undos a trace may hold, at most.
    """
    limit = most.at(step)
    return tuple(index for index, count in enumerate(undos) if count <= limit)


_PARTS = 1000


def over_training(points: Sequence[tuple[float, float]], between: Literal["constant", "linear"] = "constant") -> Schedule:
    """A schedule over the whole of training, from (share of training done, value) pairs; ask it at `part_of(share)`.

    Its steps are thousandths of the training. Raises ValueError as `Schedule` does.

    Example:
        >>> budget = over_training([(0, 512), (0.8, 256)], "linear")
        >>> [budget.at(part_of(share)) for share in (0, 0.4, 1)]
        [512.0, 384.0, 256]
    """
    return Schedule(tuple((part_of(share), value) for share, value in points), between)


def part_of(share: float) -> int:
    """A share of the training as the step of such a schedule."""
    return round(share * _PARTS)
