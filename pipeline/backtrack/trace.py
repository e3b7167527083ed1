"""Backtrack traces: a right solution with detours, each a wrong try up to its evidence and the undos that take it back.

A trace is what was emitted and a role for every token; targets.py makes targets of the roles. Pure functions on token ids; no
tokenizer, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from pipeline.backtrack.undo import UndoRule, UndoStream


class Role(IntEnum):
    """What a token is in a trace."""

    PROMPT = 0
    PREFIX = 1
    ERROR = 2
    """A wrong decision."""
    CONSEQUENCE = 3
    """Right inference in a wrong try: it is what shows the error."""
    UNDO = 4
    CORRECTION = 5


@dataclass(frozen=True)
class WrongTry:
    """A wrong step up to its evidence, with errors of its own that were taken back within it."""

    ids: tuple[int, ...]
    wrong: tuple[bool, ...]
    """Same length; True where the token is a wrong decision."""
    inner: tuple[Detour, ...] = ()
    """Second errors on the way, undone before the try as a whole is; their places count from the first token of `ids`."""


@dataclass(frozen=True)
class Detour:
    """A wrong try and where it leaves the right way."""

    at: int
    """How many tokens of the solution (or of the outer try) stand before it."""
    wrong_try: WrongTry


@dataclass(frozen=True)
class Trace:
    """One completion as it was emitted, undos and deleted tokens included, with a role for each token."""

    ids: tuple[int, ...]
    roles: tuple[int, ...]

    @property
    def prompt_length(self) -> int:
        return self.roles.count(Role.PROMPT)


def build_trace(prompt: Sequence[int], solution: Sequence[int], detours: Sequence[Detour], rule: UndoRule) -> Trace:
    """Lay out a trace whose surviving completion is the solution, whatever the unit of undoing.

    Detours at the same place are taken one after the other, in the order given. Behind each stand as many U's as the unit needs to
    be back at its place; what they take along of the right way before it (an unfinished line, or everything) is written again.
    With unit `token` a try's first tokens that the solution has there too are kept, not undone.

    Raises:
        ValueError: an undo token inside any part, an empty try or one without a wrong token, a place outside the solution, or an
            inner try whose undos would take the outer wrong decision along.
    """
    for name, part in (("prompt", prompt), ("solution", solution)):
        if rule.undo_id in part:
            raise ValueError(f"the {name} holds the undo token")
    writer = _Writer(rule)
    writer.ids += prompt
    writer.roles += [Role.PROMPT] * len(prompt)
    first = min((place for place, _, _ in _places(solution, detours, rule)), default=len(solution))
    roles = [Role.PREFIX if at < first else Role.CORRECTION for at in range(len(solution))]
    if not detours:
        roles = [Role.CORRECTION] * len(solution)
    writer.follow(solution, roles, detours)
    return Trace(tuple(writer.ids), tuple(writer.roles))


def wrong_states(trace: Trace, rule: UndoRule) -> tuple[bool, ...]:
    """[tokens] Whether a wrong decision stands when the token has been emitted: labels for a verifier head."""
    start = trace.prompt_length
    stream, stack, states = UndoStream(rule), [False], [False] * start
    for token, role in zip(trace.ids[start:], trace.roles[start:], strict=True):
        if (deleted := stream.take(token)) < 0:
            stack.append(stack[-1] or role == Role.ERROR)
        elif deleted:
            del stack[-deleted:]
        states.append(stack[-1])
    return tuple(states)


def step_labels(trace: Trace, rule: UndoRule, step_ends: frozenset[int]) -> tuple[tuple[int, bool], ...]:
    """(index of its last token, whether it is right) for every step that was emitted, deleted ones too: labels for a process
    reward model. A step ends with a token of `step_ends`, before an undo, or with the completion; a run of undos is no step."""
    states, start = wrong_states(trace, rule), trace.prompt_length
    labels = []
    for at in range(start, len(trace.ids)):
        if trace.roles[at] == Role.UNDO:
            continue
        last = at + 1 == len(trace.ids) or trace.roles[at + 1] == Role.UNDO
        if last or trace.ids[at] in step_ends:
            labels.append((at, not states[at]))
    return tuple(labels)


def last_detour(solution: Sequence[int], detours: Sequence[Detour], rule: UndoRule) -> int:
    """Index of the detour that a trace takes last."""
    last = _places(solution, detours, rule)[-1][2]
    return max(at for at, one in enumerate(detours) if one is last)


class _Writer:
    """Writes tokens as a model would emit them; what stands at each moment is the undo stream's word."""

    def __init__(self, rule: UndoRule) -> None:
        self.ids: list[int] = []
        self.roles: list[Role] = []
        self._rule = rule
        self._stream = UndoStream(rule)
        self._path: list[tuple[int, Role]] = []

    def follow(self, way: Sequence[int], roles: Sequence[Role], detours: Sequence[Detour]) -> None:
        """Write `way`, with its detours in between, behind what stands."""
        start = len(self._path)
        for place, shared, detour in _places(way, detours, self._rule):
            self._push(way, roles, len(self._path) - start, place)
            before, wrong_try = list(self._path), detour.wrong_try
            own = [Role.ERROR if wrong else Role.CONSEQUENCE for wrong in wrong_try.wrong]
            inner = [Detour(one.at - shared, one.wrong_try) for one in wrong_try.inner]
            self.follow(wrong_try.ids[shared:], own[shared:], inner)
            while len(self._path) > len(before):
                self._undo()
            lost = before[len(self._path) :]
            if any(role == Role.ERROR for _, role in lost):
                raise ValueError("an undo inside a wrong try takes its wrong decision along: nothing nests there with this unit")
            again = [Role.CORRECTION if role == Role.PREFIX else role for _, role in lost]
            self._push([token for token, _ in lost], again, 0, len(lost))
        self._push(way, roles, len(self._path) - start, len(way))

    def _push(self, tokens: Sequence[int], roles: Sequence[Role], start: int, end: int) -> None:
        for token, role in zip(tokens[start:end], roles[start:end], strict=True):
            self.ids.append(token)
            self.roles.append(role)
            self._path.append((token, role))
            self._stream.take(token)

    def _undo(self) -> None:
        self.ids.append(self._rule.undo_id)
        self.roles.append(Role.UNDO)
        del self._path[len(self._path) - self._stream.take(self._rule.undo_id) :]


def _places(way: Sequence[int], detours: Sequence[Detour], rule: UndoRule) -> list[tuple[int, int, Detour]]:
    """(place, tokens kept, detour) in the order in which they are taken.

    With unit `token` a try that begins as the way goes on leaves it later: those tokens stand already and are not undone.
    """
    found = []
    for detour in detours:
        wrong_try, shared = detour.wrong_try, 0
        if rule.undo_id in wrong_try.ids:
            raise ValueError("the try holds the undo token")
        if not any(wrong_try.wrong):
            raise ValueError("a try without a wrong token")
        if not 0 <= detour.at <= len(way):
            raise ValueError(f"a detour at {detour.at} of a way of {len(way)} tokens")
        if rule.unit == "token":
            rest = way[detour.at :]
            while shared < min(len(rest), wrong_try.wrong.index(True)) and wrong_try.ids[shared] == rest[shared]:
                shared += 1
            if any(inner.at < shared for inner in wrong_try.inner):
                raise ValueError("an inner try before the outer wrong decision: it belongs to the outer way")
        found.append((detour.at + shared, shared, detour))
    return sorted(found, key=lambda one: one[0])
