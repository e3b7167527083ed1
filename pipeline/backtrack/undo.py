"""What an undo does. The only place in the program that applies undos: rollouts, judges, evaluation and report call it.

It works on token ids of a completion (the prompt is never undone) and knows no tokenizer: step ends are a set of ids.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

Unit = Literal["token", "step", "all"]


@dataclass(frozen=True)
class UndoRule:
    """How undo tokens act.

    Example:
        >>> rule = UndoRule(undo_id=9, unit="step", step_end_ids=frozenset({0}))
        >>> apply_undo([5, 0, 6, 7, 9, 8], rule).surviving
        (5, 0, 8)
    """

    undo_id: int
    """The id of the undo token U."""
    unit: Unit = "token"
    """What one U deletes: the previous token, back to the end of the previous step, or everything so far."""
    step_end_ids: frozenset[int] = frozenset()
    """Ids that end a step (every token that holds a line break); read by unit `step` only."""


@dataclass(frozen=True)
class Undone:
    """The outcome of applying all undos of one completion of n emitted ids."""

    surviving: tuple[int, ...]
    """Ids on the stack at the end, trailing undos applied too."""
    source: tuple[int, ...]
    """For each surviving id, its index among the emitted ids."""
    deleted_by: tuple[int, ...]
    """[n] For each emitted id, the index of the U that deleted it; -1 when it survives or is itself a U."""
    undos: int
    """Number of U tokens, no-ops included."""
    noops: int
    """U tokens that met an empty stack."""


def apply_undo(ids: Sequence[int], rule: UndoRule) -> Undone:
    """Run the stack machine over a completion. Linear time: every id is pushed once and popped at most once."""
    stack: list[int] = []  # indices into ids
    deleted_by = [-1] * len(ids)
    undos = noops = 0
    for index, token in enumerate(ids):
        if token != rule.undo_id:
            stack.append(index)
            continue
        undos += 1
        if not stack:
            noops += 1
            continue
        for _ in range(_pop_count(ids, stack, rule.unit, rule.step_end_ids)):
            deleted_by[stack.pop()] = index
    return Undone(
        surviving=tuple(ids[i] for i in stack),
        source=tuple(stack),
        deleted_by=tuple(deleted_by),
        undos=undos,
        noops=noops,
    )


def _pop_count(ids: Sequence[int], stack: Sequence[int], unit: Unit, step_ends: Collection[int]) -> int:
    """How many entries one U takes from a stack that is not empty."""
    if unit == "token":
        return 1
    if unit == "all":
        return len(stack)
    # A step end on top closes the line being deleted, so it goes too; the search starts below it.
    count = 1
    while count < len(stack) and ids[stack[-1 - count]] not in step_ends:
        count += 1
    return count
