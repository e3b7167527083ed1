"""Rows with labels at some of their places, packed for one forward pass: what learned verifiers are trained on and asked about.

A row is a layout of its own, a solution or a tree of states; several share a packed row and cannot see each other. It knows no
problems and no models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.segments import NO_MASK, blocks
from pipeline.backtrack.layout import Segment, lay_out

_TOKENS = 16_384  # of one forward without gradients, padding included


class LabelError(ValueError):
    """Rows that no verifier can learn from; one line."""


@dataclass(frozen=True)
class Labelled:
    """A row and the places at which something is asked or known.

    Raises:
        LabelError: no place, a place outside the row, a label that is missing, no number or outside 0 .. 1.
    """

    segment: Segment
    at: tuple[int, ...]
    """[places] Rising indices into the segment's ids: the verifier reads the state behind each of these."""
    labels: tuple[float, ...] | None = None
    """[places] 0 .. 1, soft or hard; None where they are only asked for."""

    def __post_init__(self) -> None:
        count = len(self.segment.ids)
        if not self.at:
            raise LabelError(f"a row of {count} tokens without a place to read")
        if list(self.at) != sorted(set(self.at)) or not 0 <= self.at[0] <= self.at[-1] < count:
            raise LabelError(f"places must rise within a row of {count} tokens, are {list(self.at)!r:.80}")
        if self.labels is None:
            return
        if len(self.labels) != len(self.at):
            raise LabelError(f"{len(self.at)} places need as many labels, there are {len(self.labels)}")
        for label in self.labels:
            if label is None or not (math.isfinite(label) and 0 <= label <= 1):
                raise LabelError(f"a label must be a number of 0 to 1, is {label!r:.40}")


def linear(ids: Sequence[int]) -> Segment:
    """An ordinary row: each token sees those before it."""
    count = len(ids)
    return Segment(tuple(ids), range(count), range(count), [count] * count, ())


def step_ends(ids: Sequence[int], step_end_ids: frozenset[int], stop_id: int) -> tuple[int, ...]:
    """Indices of the last token of every step of surviving ids: the last of each run of line breaks, and the last token of all
    that is not the stop id. Nothing for an empty solution; line breaks before the first step are none.

    Example:
        >>> step_ends([5, 0, 6, 0, 0, 7, 9], frozenset({0}), stop_id=9)
        (1, 4, 5)
    """
    count = len(ids) - (len(ids) > 0 and ids[-1] == stop_id)
    found = []
    for at in range(count):
        ends = ids[at] in step_end_ids and not (at + 1 < count and ids[at + 1] in step_end_ids)
        if ends or at + 1 == count:
            found.append(at)
    return tuple(found)


@dataclass(frozen=True)
class Batch:
    """Packed rows."""

    inputs: dict[str, Any]
    """What a model is called with."""
    labels: Tensor
    """[rows, tokens] 0 where nothing is known."""
    scored: Tensor
    """[rows, tokens] bool: the places of the rows."""

    def to(self, device: Any) -> Batch:
        if torch.device(device).type == "cpu":
            return self
        return Batch(_moved(self.inputs, device), self.labels.to(device), self.scored.to(device))


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    if isinstance(value, list):
        return [_moved(part, device) for part in value]
    return value.to(device) if isinstance(value, Tensor) else value


def collate(rows: Sequence[Sequence[Labelled]], pad_id: int, by_segment: bool) -> Batch:
    """Tensors of packed rows; `by_segment` for a model whose attention reads segments (actors/segments.py)."""
    segments = [[one.segment for one in row] for row in rows]
    layout = lay_out(segments, None, pad_id)
    labels, scored = torch.zeros(layout.input_ids.shape), torch.zeros(layout.input_ids.shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = 0
        for one in row:
            places = torch.tensor(one.at) + start
            scored[number, places] = True
            if one.labels is not None:
                labels[number, places] = torch.tensor(one.labels)
            start += len(one.segment.ids)
    inputs = {
        "input_ids": layout.input_ids,
        "position_ids": layout.position_ids,
        "attention_mask": NO_MASK if by_segment else layout.attention_mask(),
        **({"segments": blocks(segments, layout.input_ids.shape[1])} if by_segment else {}),
    }
    return Batch(inputs, labels, scored)


def by_length(rows: Sequence[Labelled], tokens: int = _TOKENS) -> Iterator[list[int]]:
    """Indices of rows of like length, as many at a time as one forward without gradients takes."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].segment.ids))
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(rows[order[end]].segment.ids) <= tokens:
            end += 1
        yield order[start:end]
        start = end
