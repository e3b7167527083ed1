"""Preferences: two ways to go on from the same text, one of which is better. Pure functions on token ids; no tokenizer, no model.

Kind `undo`: an error taken back where it can be seen, against the same error continued. Kind `step`: a right step against a wrong
one. Kind `keep`: a right way gone on with, against undo; without it undo becomes likelier everywhere. The stage dpo makes pairs of
judged rollouts here, search writes its own; the learners score both sides as walks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, get_args

from pipeline.backtrack.trace import Role, Trace
from pipeline.backtrack.tree import Walk
from pipeline.backtrack.undo import UndoRule, apply_undo

Kind = Literal["undo", "step", "keep"]
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Two sides that begin behind the same prompt and prefix.

    What both sides begin with belongs to no side: it is the same in both sums of a preference and cancels there. In a pair of kind
    `undo` that is the error with its consequences, so nothing makes an error likelier, and U is preferred at the evidence alone.

    Example:
        >>> pair = Pair((5,), (1,), (2, 9, 3), (2, 4), "undo")
        >>> pair.shared
        1
    """

    prompt_ids: Ids
    prefix_ids: Ids
    """Right text before the sides."""
    chosen_ids: Ids
    """As emitted, undo tokens and what they delete included."""
    rejected_ids: Ids
    kind: Kind
    margin: float = 1.0
    """By how much the chosen side is better, 0 to 1: 1 where one is right and the other wrong."""
    wrong: tuple[bool, ...] = ()
    """[chosen] Which tokens are wrong decisions; () where that is not known beyond what is shared."""

    @property
    def shared(self) -> int:
        """How many tokens both sides begin with."""
        together = zip(self.chosen_ids, self.rejected_ids, strict=False)
        return sum(1 for _ in takewhile(lambda two: two[0] == two[1], together))


def flaw(pair: Pair, rule: UndoRule, vocabulary: int) -> str | None:
    """Why a pair cannot be learned from, in one word for a count; None where it can.

    Args:
        vocabulary: ids from this one on mean nothing.
    """
    undo_id = rule.undo_id
    ids = (*pair.prompt_ids, *pair.prefix_ids, *pair.chosen_ids, *pair.rejected_ids)
    checks = {
        "unknown_kind": pair.kind not in get_args(Kind),
        "empty_prompt": not pair.prompt_ids,
        "empty_side": not pair.chosen_ids or not pair.rejected_ids,
        "equal_sides": pair.chosen_ids == pair.rejected_ids,
        "unknown_id": not all(0 <= token < vocabulary for token in ids),
        "undo_in_prompt": undo_id in pair.prompt_ids,
        "undo_in_prefix": undo_id in pair.prefix_ids,
        "no_margin": not math.isfinite(pair.margin),
        "one_side_begins_the_other": pair.shared in (len(pair.chosen_ids), len(pair.rejected_ids)),
        # Making the rejected token less likely would make this one likelier.
        "error_where_the_sides_part": any(pair.wrong[pair.shared : pair.shared + 1]),
        "undo_without_undo": pair.kind == "undo" and undo_id not in pair.chosen_ids,
        "undo_without_error": pair.kind == "undo" and not pair.shared,
    }
    return next((name for name, wrong in checks.items() if wrong), None)


def walks(pair: Pair) -> tuple[Walk, Walk]:
    """The chosen and the rejected side. An action counts where the sides differ, but not a wrong decision of the chosen one."""
    start = len(pair.prefix_ids)
    shared, wrong = pair.shared, pair.wrong or (False,) * len(pair.chosen_ids)

    def side(ids: Ids, errors: Sequence[bool]) -> Walk:
        weights = [0.0] * start + [float(at >= shared and not error) for at, error in enumerate(errors)]
        roles = [Role.PREFIX] * start + [Role.ERROR if error else Role.CORRECTION for error in errors]
        return Walk(pair.prompt_ids, pair.prefix_ids + ids, weights=tuple(weights), roles=tuple(roles))

    return side(pair.chosen_ids, wrong), side(pair.rejected_ids, (False,) * len(pair.rejected_ids))


def undo_pair(trace: Trace, emitted: Ids, rule: UndoRule, horizon: int | None = None) -> Pair | None:
    """The error of a trace taken back, against how the model went on.

    Args:
        trace: one detour and its correction.
        emitted: the whole completion in which the model made the error.
        horizon: steps kept behind the undos, and of the continuation behind what both sides share; None keeps all.

    Returns:
        None where the completion does not begin with the trace's prefix.
    """
    start, cut = _places(trace)
    prefix, chosen = trace.ids[start:cut], trace.ids[cut:]
    if emitted[: len(prefix)] != prefix:
        return None
    rejected = emitted[len(prefix) :]
    wrong = tuple(role == Role.ERROR for role in trace.roles[cut:])
    pair = Pair(trace.ids[:start], prefix, chosen, rejected, "undo", wrong=wrong)
    if horizon is None:
        return pair
    undone = [at for at, role in enumerate(trace.roles[cut:]) if role == Role.UNDO]
    # Unit `all` writes the prefix again: that is no step of the correction.
    stands = len(apply_undo(prefix + chosen[: undone[-1] + 1], rule).surviving)
    begun = undone[-1] + 1 + max(0, len(prefix) - stands)
    chosen = chosen[:begun] + first_steps(chosen[begun:], rule, horizon)
    rejected = rejected[: pair.shared] + first_steps(rejected[pair.shared :], rule, horizon)
    return Pair(pair.prompt_ids, prefix, chosen, rejected, "undo", wrong=wrong[: len(chosen)])


def step_pair(trace: Trace, emitted: Ids, rule: UndoRule) -> Pair | None:
    """The right step of a trace behind its prefix, against the step in which the model went wrong; None as for `undo_pair`."""
    start, cut = _places(trace)
    prefix = trace.ids[start:cut]
    if emitted[: len(prefix)] != prefix:
        return None
    right = apply_undo(trace.ids[start:], rule).surviving[len(prefix) :]
    return Pair(trace.ids[:start], prefix, first_steps(right, rule, 1), first_steps(emitted[len(prefix) :], rule, 1), "step")


def keep_pair(trace: Trace, rule: UndoRule, at: int) -> Pair:
    """The right way of a trace gone on with to the end of the step, against undo behind its first `at` tokens."""
    right = apply_undo(trace.ids[trace.prompt_length :], rule).surviving
    return Pair(trace.ids[: trace.prompt_length], right[:at], first_steps(right[at:], rule, 1), (rule.undo_id,), "keep")


def _places(trace: Trace) -> tuple[int, int]:
    """Where the completion begins, and where its first wrong try."""
    tried = (Role.ERROR, Role.CONSEQUENCE)
    return trace.prompt_length, next(at for at, role in enumerate(trace.roles) if role in tried)


def first_steps(ids: Ids, rule: UndoRule, count: int) -> Ids:
    """The first so many steps, their ends included."""
    ends = [at for at, token in enumerate(ids) if token in rule.step_end_ids]
    return ids[: ends[count - 1] + 1] if len(ends) >= count else ids
