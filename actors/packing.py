"""Packs examples into rows of a fixed number of tokens; the learner's collator turns rows into tensors.

Examples in a row cannot see each other: the 4-D mask is causal within an example and positions restart at 0.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pipeline.backtrack.trace import IGNORE

_WAITING = 64  # examples that a row can choose from


@dataclass(frozen=True)
class Example:
    """One training sequence."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """Same length; IGNORE where the token is not a target. Position i's target is predicted from position i - 1."""


def pack(examples: Sequence[Example], row_tokens: int, rows: int, seed: int) -> tuple[list[list[Example]], int]:
    """Fill `rows` rows by going through the shuffled examples as often as needed.

    A row begins with the example that has waited longest and goes on with the longest waiting ones that still fit, so that
    little of it is padding.

    Returns:
        the rows, and how many of the examples are longer than a row and therefore left out.
    """
    fitting = [example for example in examples if 0 < len(example.input_ids) <= row_tokens]
    if not fitting:
        raise ValueError(f"none of {len(examples)} examples fits into a row of {row_tokens} tokens: raise row_tokens")
    order = _forever(fitting, seed)
    waiting = [next(order) for _ in range(min(_WAITING, len(fitting)))]
    packed = []
    for _ in range(rows):
        row: list[Example] = []
        free = row_tokens
        choice: int | None = 0
        while choice is not None:
            free -= len(waiting[choice].input_ids)
            row.append(waiting.pop(choice))
            waiting.append(next(order))
            fits = (i for i, example in enumerate(waiting) if len(example.input_ids) <= free)
            choice = max(fits, key=lambda i: len(waiting[i].input_ids), default=None)
        packed.append(row)
    return packed, len(examples) - len(fitting)


def _forever(examples: Sequence[Example], seed: int) -> Iterator[Example]:
    order = list(examples)
    rng = random.Random(seed)
    while True:
        rng.shuffle(order)
        yield from order


def collate(rows: Sequence[Sequence[Example]], pad_id: int, row_tokens: int) -> dict[str, torch.Tensor]:
    """Tensors of one batch: input_ids, labels, position_ids [rows, tokens] and attention_mask [rows, 1, tokens, tokens]."""
    input_ids = torch.full((len(rows), row_tokens), pad_id)
    labels = torch.full((len(rows), row_tokens), IGNORE)
    position_ids = torch.zeros((len(rows), row_tokens), dtype=torch.long)
    segment = torch.zeros((len(rows), row_tokens), dtype=torch.long)
    for index, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, start=1):
            end = start + len(example.input_ids)
            input_ids[index, start:end] = torch.tensor(example.input_ids)
            labels[index, start:end] = torch.tensor(example.labels)
            labels[index, start] = IGNORE  # its only context would be the example before it
            position_ids[index, start:end] = torch.arange(end - start)
            segment[index, start:end] = number
            start = end
    same = segment.unsqueeze(2) == segment.unsqueeze(1)
    causal = torch.ones(row_tokens, row_tokens, dtype=torch.bool).tril()
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        # Padding sees itself (segment 0), so no row of the softmax is empty.
        "attention_mask": (same & causal).unsqueeze(1),
    }
