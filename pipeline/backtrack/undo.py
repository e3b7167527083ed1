"""What an undo does. The only place in the program that applies undos: rollouts, judges, evaluation and report call it.

It works on token ids of a completion (the prompt is never undone) and knows no tokenizer: step ends are a set of ids.
`UndoStream` is the definition, id by id; `apply_undo` runs it over a whole completion; `apply_undo_batch` is a closed form
for many rows, for where only the outcome counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

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

    @property
    def place(self) -> tuple[int, ...]:
        """[n] For each emitted id, its index among the surviving ids; -1 when it is deleted or a U. The inverse of `source`."""
        places = [-1] * len(self.deleted_by)
        for place, index in enumerate(self.source):
            places[index] = place
        return tuple(places)


@dataclass(frozen=True, slots=True)
class Append:
    """The reader sees one more token."""

    id: int


@dataclass(frozen=True, slots=True)
class Delete:
    """The reader's last `count` tokens go; 0 for an undo on an empty stack."""

    count: int


class UndoStream:
    """The stack machine, fed as ids arrive. At every moment it holds what `apply_undo` gives for the ids so far.

    Example:
        >>> stream = UndoStream(UndoRule(undo_id=9))
        >>> stream.feed([5, 6, 9])
        [Append(id=5), Append(id=6), Delete(count=1)]
        >>> stream.surviving
        (5,)
    """

    def __init__(self, rule: UndoRule) -> None:
        self.rule = rule
        self.undos = 0
        """U tokens so far, no-ops included."""
        self.noops = 0
        """U tokens so far that met an empty stack."""
        self._stack: list[int] = []

    @property
    def surviving(self) -> tuple[int, ...]:
        """Ids on the stack. A copy: follow the events rather than read it after every id."""
        return tuple(self._stack)

    def feed(self, ids: Iterable[int]) -> list[Append | Delete]:
        """Take the next ids; one event for each."""
        return [Append(token) if (deleted := self.take(token)) < 0 else Delete(deleted) for token in ids]

    def take(self, token: int) -> int:
        """Take one id without making an event: how many tokens it deletes, -1 when it is no undo. Constant time on average."""
        if token != self.rule.undo_id:
            self._stack.append(token)
            return -1
        self.undos += 1
        if not self._stack:
            self.noops += 1
            return 0
        count = self._pop_count()
        del self._stack[-count:]
        return count

    def _pop_count(self) -> int:
        """How many entries one U takes from the stack, which is not empty."""
        stack, rule = self._stack, self.rule
        if rule.unit == "token":
            return 1
        if rule.unit == "all":
            return len(stack)
        # A step end on top closes the line being deleted, so it goes too; the search starts below it.
        count = 1
        while count < len(stack) and stack[-1 - count] not in rule.step_end_ids:
            count += 1
        return count


def apply_undo(ids: Sequence[int], rule: UndoRule) -> Undone:
    """Run the stack machine over a completion. Linear time: every id is pushed once and popped at most once."""
    stream = UndoStream(rule)
    source: list[int] = []
    deleted_by = [-1] * len(ids)
    for index, token in enumerate(ids):
        deleted = stream.take(token)
        if deleted < 0:
            source.append(index)
            continue
        for _ in range(deleted):
            deleted_by[source.pop()] = index
    return Undone(stream.surviving, tuple(source), tuple(deleted_by), stream.undos, stream.noops)


def apply_undo_batch(ids: npt.ArrayLike, lengths: npt.ArrayLike, rule: UndoRule) -> npt.NDArray[np.bool_]:
    """Which tokens of many completions survive, without a Python loop over rows or tokens.

    Undos are matching parentheses. What one U deletes is a group: one token, a line, or all since the last U. A token opens a
    group when nothing precedes it, or a U, or (unit `step`) a step end, or (unit `token`) anything: after a U the stack always
    ends at a border, so this shows in the emitted ids. Count +1 where a group opens and -1 at each U. A group opened at
    count c is closed by the first later U that brings the count below c; a U on an empty stack reaches a new minimum and closes
    nothing. So a token survives exactly when no later count is below its own: a running sum forwards, a running minimum
    backwards, O(rows x tokens) in whole-array operations.

    Args:
        ids: [rows, tokens] completions, padded at the end with anything; numpy or a torch tensor in main memory.
        lengths: [rows] tokens of each row without padding.

    Returns:
        [rows, tokens] True where the token survives; False for deleted tokens, undo tokens and padding.

    Raises:
        ValueError: shapes that do not fit, or a length outside 0 .. tokens.
    """
    ids_BT, lengths_B = np.asarray(ids), np.asarray(lengths)
    if ids_BT.ndim != 2 or lengths_B.shape != ids_BT.shape[:1]:
        raise ValueError(f"ids must be [rows, tokens] and lengths [rows], are {ids_BT.shape} and {lengths_B.shape}")
    rows, tokens = ids_BT.shape
    if rows and not 0 <= lengths_B.min() <= lengths_B.max() <= tokens:
        raise ValueError(f"lengths must lie in 0 .. {tokens}, are {lengths_B.min()} .. {lengths_B.max()}")
    inside_BT = np.arange(tokens) < lengths_B[:, None]
    undo_BT = ids_BT == rule.undo_id
    push_BT = inside_BT & ~undo_BT
    opens_BT = push_BT.copy()
    if rule.unit != "token":
        borders_BT = undo_BT
        if rule.unit == "step":
            borders_BT = undo_BT | np.isin(ids_BT, sorted(rule.step_end_ids))
        opens_BT[:, 1:] &= borders_BT[:, :-1]
    count_BT = np.cumsum(opens_BT.astype(np.int32) - (undo_BT & inside_BT), axis=1, dtype=np.int32)
    lowest_BT = np.minimum.accumulate(count_BT[:, ::-1], axis=1)[:, ::-1]  # from each token to the end
    keep_BT: npt.NDArray[np.bool_] = push_BT & (lowest_BT >= count_BT)
    return keep_BT
