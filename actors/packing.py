"""What a learner trains on: traces in a context form, packed into rows of a fixed number of tokens.

Sets of traces travel to the learner as ids and roles; trees, masks and targets are made there, a batch at a time.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from actors.segments import NO_MASK, blocks
from pipeline.backtrack.curriculum import Schedule, allowed_traces
from pipeline.backtrack.layout import Layout, Segment, lay_out
from pipeline.backtrack.targets import Form, Targets, segments
from pipeline.backtrack.trace import Role, Trace
from pipeline.backtrack.undo import UndoRule

_WAITING = 64  # examples that a row can choose from


@dataclass(frozen=True)
class TrainingSet:
    """Traces and how they are taught."""

    traces: Sequence[Trace]
    rule: UndoRule
    targets: Targets = field(default_factory=Targets)
    form: Form = field(default_factory=Form)
    together: bool = False
    """Rewind form: one tree for all traces that begin with the same prompt, as far as a row has room."""
    most_undos: Schedule | None = None
    """How many undos a trace may hold, by optimiser step; null allows any number."""
    weights: Sequence[float] | None = None
    """[traces] What each trace counts; all count 1 when None."""

    def segments_of(self, example: Example) -> list[Segment]:
        counts = [self.weights[number] for number in example.numbers] if self.weights else None
        return segments(example.traces, self.rule, self.targets, self.form, counts)


@dataclass(frozen=True)
class Example:
    """What is packed as one: a trace, or in the rewind form several that share a tree."""

    traces: tuple[Trace, ...]
    tokens: int
    """Tokens it takes in a row."""
    undos: int
    """Most undos of any of its traces."""
    numbers: tuple[int, ...] = ()
    """Where its traces stand among those of the training set."""


def examples_of(data: TrainingSet, row_tokens: int) -> tuple[list[Example], int]:
    """Examples that fit into a row, and how many traces are left out because they do not."""
    by_prompt: dict[tuple[object, int], list[int]] = {}
    joins = data.together and data.form.context == "rewind"
    for number, trace in enumerate(data.traces):
        # What shares a tree has as many undos where a schedule may leave some out.
        key = (trace.ids[: trace.prompt_length], _undos(trace) if data.most_undos else 0) if joins else (number, 0)
        by_prompt.setdefault(key, []).append(number)
    fitting: list[Example] = []
    left_out = 0
    waiting = [tuple(group) for group in reversed(by_prompt.values())]
    while waiting:
        numbers = waiting.pop()
        group = tuple(data.traces[number] for number in numbers)
        tokens = _tokens(group, data)
        if tokens <= row_tokens:
            fitting.append(Example(group, tokens, max(map(_undos, group)), numbers))
        elif len(group) == 1:
            left_out += 1
        else:
            waiting += [numbers[len(group) // 2 :], numbers[: len(group) // 2]]
    return fitting, left_out


def _undos(trace: Trace) -> int:
    return trace.roles.count(Role.UNDO)


def _tokens(group: tuple[Trace, ...], data: TrainingSet) -> int:
    if data.form.context != "rewind":
        return len(group[0].ids)
    return len(segments(group, data.rule, data.targets, data.form)[0].ids)


def pack(lengths: Sequence[int], row_tokens: int, rows: int, seed: int) -> list[list[int]]:
    """Fill `rows` rows by going through the shuffled examples as often as needed; indices of examples, row by row.

    A row begins with the example that has waited longest and goes on with the longest waiting ones that still fit, so that
    little of it is padding. No example may be longer than a row.
    """
    order = _forever(range(len(lengths)), seed)
    waiting = [next(order) for _ in range(min(_WAITING, len(lengths)))]
    packed = []
    for _ in range(rows):
        row: list[int] = []
        free = row_tokens
        choice: int | None = 0
        while choice is not None:
            free -= lengths[waiting[choice]]
            row.append(waiting.pop(choice))
            waiting.append(next(order))
            fits = (i for i, example in enumerate(waiting) if lengths[example] <= free)
            choice = max(fits, key=lambda i: lengths[waiting[i]], default=None)
        packed.append(row)
    return packed


def pack_by_phase(
    examples: Sequence[Example], most_undos: Schedule | None, row_tokens: int, steps: int, rows: int, seed: int
) -> list[list[int]]:
    """`steps` x `rows` rows as `pack` makes them, each step's from the examples that the schedule allows there.

    Raises:
        ValueError: no example is left, or none with so few undos as the schedule allows.
    """
    if not examples:
        raise ValueError(f"no example fits into a row of {row_tokens} tokens: raise row_tokens")
    undos = [example.undos for example in examples]
    packed: list[list[int]] = []
    for _, run in itertools.groupby(range(steps), most_undos.at if most_undos else lambda step: 0.0):
        some = list(run)
        phase = allowed_traces(undos, most_undos, some[0]) if most_undos else range(len(examples))
        if not phase:
            raise ValueError(f"sft.most_undos allows no trace at step {some[0]}: every one has more undos")
        found = pack([examples[index].tokens for index in phase], row_tokens, len(some) * rows, seed + len(packed))
        packed += [[phase[index] for index in row] for row in found]
    return packed


def _forever(examples: Sequence[int], seed: int) -> Iterator[int]:
    order = list(examples)
    rng = random.Random(seed)
    while True:
        rng.shuffle(order)
        yield from order


def _segments(rows: Sequence[Sequence[Example]], data: TrainingSet) -> list[list[Segment]]:
    return [[segment for example in row for segment in data.segments_of(example)] for row in rows]


def laid_out(rows: Sequence[Sequence[Example]], data: TrainingSet, pad_id: int, row_tokens: int | None = None) -> Layout:
    """Rows of examples as they stand in a batch, with every action, masked ones too."""
    return lay_out(_segments(rows, data), row_tokens, pad_id)


def collate(
    rows: Sequence[Sequence[Example]], data: TrainingSet, pad_id: int, row_tokens: int | None = None, by_segment: bool = False
) -> dict[str, Any]:
    """Tensors of one batch.

    input_ids and position_ids [rows, tokens], and for each place with a target, every distinct (place, target) once: row, column,
    target, weight (summed over the actions it stands for), ends_run (what is taught is not to emit the target), wrong (most of
    that weight is of wrong decisions) [targets]. Also numbers [traces], to name what a batch was made of. What sees what is in
    `segments` (actors/segments.py), for a model with that attention, or in attention_mask [rows, 1, tokens, tokens].

    Args:
        row_tokens: width of all rows; None takes that of the fullest.
    """
    laid = _segments(rows, data)
    layout = lay_out(laid, row_tokens, pad_id)
    taught = layout.weight > 0
    ends_run = torch.tensor([action.ends_run for action in layout.actions], dtype=torch.long)
    # One number for each (row, column, target, ends_run): unique is several times as fast on numbers as on rows of them.
    width, vocabulary = layout.input_ids.shape[1], 1 + max(layout.target.tolist(), default=0)
    keys = ((layout.row * width + layout.column) * vocabulary + layout.target) * 2 + ends_run
    places, which = torch.unique(keys[taught], return_inverse=True)
    at, target = places // (2 * vocabulary), places // 2 % vocabulary
    weight = torch.zeros(len(places)).index_add_(0, which, layout.weight[taught])
    erring = torch.tensor([one.role == Role.ERROR and one.token != data.rule.undo_id for one in layout.actions], dtype=torch.bool)
    wrong = torch.zeros(len(places)).index_add_(0, which, layout.weight[taught] * erring[taught])
    return {
        "input_ids": layout.input_ids,
        "position_ids": layout.position_ids,
        "attention_mask": NO_MASK if by_segment else layout.attention_mask(),
        **({"segments": blocks(laid, layout.input_ids.shape[1])} if by_segment else {}),
        "row": at // width,
        "column": at % width,
        "target": target,
        "weight": weight,
        "ends_run": (places % 2).bool(),
        "wrong": wrong > weight / 2,
        "numbers": torch.tensor([number for row in rows for example in row for number in example.numbers]),
    }
