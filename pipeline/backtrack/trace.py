"""Backtrack traces in the soft form: prefix, wrong tries each followed by its undo tokens, correction; a role for every token.

Targets follow from roles alone. Pure functions on token ids; no tokenizer, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from pipeline.backtrack.undo import UndoRule

IGNORE = -100  # cross entropy skips targets of this value


class Role(IntEnum):
    """What a token is in a trace."""

    PROMPT = 0
    PREFIX = 1
    ERROR = 2
    """A wrong decision: never a target."""
    CONSEQUENCE = 3
    """Right inference in a wrong try: a target, since it is what shows the error."""
    UNDO = 4
    CORRECTION = 5


@dataclass(frozen=True)
class WrongTry:
    """A wrong step up to its evidence."""

    ids: tuple[int, ...]
    wrong: tuple[bool, ...]
    """Same length; True where the token is a wrong decision."""


@dataclass(frozen=True)
class Trace:
    """One training sequence with a role for each token."""

    ids: tuple[int, ...]
    roles: tuple[int, ...]

    @property
    def prompt_length(self) -> int:
        return self.roles.count(Role.PROMPT)


def build_trace(
    prompt: Sequence[int],
    prefix: Sequence[int],
    tries: Sequence[WrongTry],
    correction: Sequence[int],
    rule: UndoRule,
) -> Trace:
    """Lay out a trace whose surviving completion is `prefix + correction`, whatever the unit of undoing.

    Unit `step` and `all` need one U for each deleted line, or one in all; unit `token` needs one for each token behind the
    last one that the try shares with the correction.

    Raises:
        ValueError: a try without tokens or without a wrong one, or an undo token inside any part.
    """
    for name, part in (
        ("prompt", prompt),
        ("prefix", prefix),
        ("correction", correction),
        *(("try", t.ids) for t in tries),
    ):
        if rule.undo_id in part:
            raise ValueError(f"the {name} holds the undo token")
    if not all(any(wrong_try.wrong) for wrong_try in tries):
        raise ValueError("a try without a wrong token")
    ids, roles = list(prompt), [Role.PROMPT] * len(prompt)

    def add(part: Sequence[int], role: Role) -> None:
        ids.extend(part)
        roles.extend([role] * len(part))

    add(prefix, Role.PREFIX)
    kept = 0  # unit token: how many tokens of the correction stand already, since the undone try began with them
    for shared, wrong_try in sorted(((_shared(t, correction, rule), t) for t in tries), key=lambda pair: pair[0]):
        add(wrong_try.ids[kept:shared], Role.CORRECTION)  # no undo takes these back
        ids.extend(wrong_try.ids[shared:])
        roles.extend(Role.ERROR if wrong else Role.CONSEQUENCE for wrong in wrong_try.wrong[shared:])
        kept = shared
        add([rule.undo_id] * _undos(wrong_try.ids[shared:], rule), Role.UNDO)
        add(_lost(prefix, rule), Role.CORRECTION)
    add(correction[kept:], Role.CORRECTION)
    return Trace(tuple(ids), tuple(roles))


def targets(trace: Trace, mask: Literal["decision", "span"]) -> tuple[int, ...]:
    """Targets of a trace: its ids, IGNORE on the prompt and on wrong decisions (`decision`) or on all that is deleted (`span`)."""
    masked = {Role.PROMPT, Role.ERROR} | ({Role.CONSEQUENCE} if mask == "span" else set())
    return tuple(IGNORE if role in masked else token for token, role in zip(trace.ids, trace.roles, strict=True))


def _lost(prefix: Sequence[int], rule: UndoRule) -> Sequence[int]:
    """The part of the prefix that undoing a try takes along and that is written again: an unfinished line, or everything."""
    if rule.unit == "token":
        return ()
    start = len(prefix)
    while start and (rule.unit == "all" or prefix[start - 1] not in rule.step_end_ids):
        start -= 1
    return prefix[start:]


def _undos(deleted: Sequence[int], rule: UndoRule) -> int:
    if rule.unit == "token":
        return len(deleted)
    if rule.unit == "all":
        return 1
    # An unfinished line is one step; every finished one before it is another.
    return sum(token in rule.step_end_ids for token in deleted[:-1]) + 1


def _shared(wrong_try: WrongTry, correction: Sequence[int], rule: UndoRule) -> int:
    """How many first tokens of a try stay: those that the correction begins with too, for unit `token` alone."""
    count = 0
    if rule.unit == "token":
        while count < min(len(correction), wrong_try.wrong.index(True)) and wrong_try.ids[count] == correction[count]:
            count += 1
    return count
