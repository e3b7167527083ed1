"""Log-probabilities of whole groups of rollouts under a policy, by one forward over the token tree of each group.

The policy is what the decoder draws from: the model's distribution with the bias on U and without what was forbidden in each state.
The learner of actors/grpo.py trains on it; nothing here knows rewards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from actors.learner import logits_only_at
from actors.segments import NO_MASK, blocks
from pipeline.backtrack.layout import Segment, lay_out, rewind
from pipeline.backtrack.trace import Role
from pipeline.backtrack.tree import Rewinding, Walk, grow
from pipeline.backtrack.undo import UndoRule

_NO_TOKEN = -1


@dataclass(frozen=True)
class Policy:
    """How the decoder turned logits into choices, see pipeline/backtrack/cursor.py."""

    rule: UndoRule
    rewinding: Rewinding
    undo_bias: float = 0.0
    vocabulary: int | None = None
    rewinds: bool = True
    """False: deleted text stays in the context (form soft); undo is a token like any other there."""

    def grown(self, walks: Sequence[Walk]) -> Segment:
        """The tree of several walks as this policy sees them, with all actions that count, and wrong decisions."""
        rule = self.rule if self.rewinds else replace(self.rule, undo_id=_NO_TOKEN)
        segment = rewind(grow(walks, rule, self.rewinding))
        return replace(segment, actions=tuple(one for one in segment.actions if one.weight or one.role == Role.ERROR))


@dataclass(frozen=True)
class Sampled:
    """One rollout to learn from."""

    walk: Walk
    """With the log-probabilities under the policy that emitted it, and what was forbidden."""
    advantages: tuple[float, ...]
    """[n] Of each emitted id."""
    counts: bool = True
    """False: it is left out of the loss."""


@dataclass(frozen=True)
class Rows:
    """Trees of several groups in one forward pass, and the actions taken in them."""

    inputs: dict[str, Any]
    """What the model is called with."""
    row: Tensor
    """[places] With `column`: where logits are needed, each place once."""
    column: Tensor
    """[places]"""
    place: Tensor
    """[actions] Which place predicts the action."""
    token: Tensor
    """[actions] The id that was emitted."""
    ends_run: Tensor
    """[actions] bool: the action is not to emit U."""
    without_undo: Tensor
    """[actions] bool: U was forbidden."""
    banned: Tensor
    """[bans, 2] (action, id) of all that was forbidden but U."""
    behaviour: Tensor
    """[actions] Log-probability under the policy that emitted it; nan where that is not known."""
    advantage: Tensor
    """[actions]"""
    weight: Tensor
    """[actions] What the action counts in the loss."""
    rollout: Tensor
    """[actions] Number of its rollout among those of the step."""
    role: Tensor
    """[actions] What the emitted id is in a trace; -1 when not known."""

    def to(self, device: Any) -> Rows:
        if torch.device(device).type == "cpu":
            return self
        moved = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in vars(self).items()}
        inputs = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in self.inputs.items()}
        if "segments" in inputs:
            given: Any = inputs["segments"]
            masks = [None if part is None else part.to(device) for part in given["masks"]]
            places = [part.to(device) for part in given["places"]]
            inputs["segments"] = {"places": places, "masks": masks, "back": given["back"].to(device)}
        return Rows(**moved | {"inputs": inputs})


Tree = tuple[Segment, list[int]]
"""A tree, and the numbers of the rollouts in it."""


def trees(
    groups: Sequence[Sequence[int]], rollouts: Sequence[Sampled], policy: Policy, most: int, dense: int | None = None
) -> list[Tree]:
    """One tree a group, and the numbers of its rollouts; a group whose tree has more than `most` tokens is cut in halves.

    Args:
        dense: how many visible tokens cost as much in attention as a token's linear layers do. A group is then cut where its
            halves are less work as well: what they share is there twice, but a tree's mask spans all its branches.

    Raises:
        ValueError: a single rollout is longer.
    """

    def size_of(some: list[tuple[int, int]]) -> int:
        """At most so many tokens has their tree; only ids that come again behind an undo make it smaller."""
        number, _ = some[0]
        first = len(rollouts[number].walk.prompt) + len(rollouts[number].walk.ids)
        return first + sum(added for _, added in some[1:])

    def work(size: int, dense: int) -> int:
        return size * (dense + size)

    found: list[Tree] = []
    waiting = [_in_order(group, rollouts) for group in reversed(groups) if group]
    while waiting:
        some = waiting.pop()
        half, size = len(some) // 2, size_of(some)
        halves = [some[half:], some[:half]]
        if half and size <= most and dense is not None and sum(work(size_of(one), dense) for one in halves) < work(size, dense):
            waiting += halves
            continue
        numbers = [number for number, _ in some]
        segment = policy.grown([rollouts[number].walk for number in numbers])
        if len(segment.ids) <= most:
            found.append((segment, numbers))
        elif half:
            waiting += halves
        else:
            raise ValueError(f"a rollout with its prompt takes {len(segment.ids)} tokens, rows have {most}: raise row_tokens")
    return found


def _in_order(group: Sequence[int], rollouts: Sequence[Sampled]) -> list[tuple[int, int]]:
    """(number, ids that the one before does not begin with) of each rollout, those that begin alike together."""
    found: list[tuple[int, int]] = []
    before: tuple[int, ...] = ()
    for number in sorted(group, key=lambda number: rollouts[number].walk.ids):
        ids = rollouts[number].walk.ids
        differs = (at for at, (one, other) in enumerate(zip(before, ids, strict=False)) if one != other)
        found.append((number, len(ids) - next(differs, min(len(before), len(ids)))))
        before = ids
    return found


def batches(
    groups: Sequence[Sequence[int]], rollouts: Sequence[Sampled], weights: Sequence[float], policy: Policy, row_tokens: int,
    rows: int, pad_id: int, by_segment: bool, dense: int | None = None,
) -> Iterator[Rows]:  # fmt: skip
    """All trees in packed rows, `rows` of them at a time.

    Args:
        groups: for each group the numbers of its rollouts.
        weights: [rollouts] what one action of each counts, times the weight that it has in its walk.
        dense: see `trees`; for attention by segment, which does not span whole rows.
    """
    packed: list[list[Tree]] = []
    free: list[int] = []
    found = trees(groups, rollouts, policy, row_tokens, dense)
    if by_segment:  # attention does not span rows, so all of them are one, without padding
        row_tokens, rows = row_tokens * rows, 1
    for tree in sorted(found, key=lambda one: -len(one[0].ids)):
        size = len(tree[0].ids)
        at = next((index for index, room in enumerate(free) if size <= room), None)
        if at is None:
            packed.append([])
            free.append(row_tokens)
            at = len(packed) - 1
        packed[at].append(tree)
        free[at] -= size
    for start in range(0, len(packed), rows):
        yield _rows(packed[start : start + rows], rollouts, weights, policy, pad_id, by_segment)


def _rows(
    packed: Sequence[Sequence[Tree]], rollouts: Sequence[Sampled], weights: Sequence[float], policy: Policy,
    pad_id: int, by_segment: bool,
) -> Rows:  # fmt: skip
    segments = [[segment for segment, _ in row] for row in packed]
    layout = lay_out(segments, None, pad_id)
    numbers = [numbers[action.walk] for row in packed for segment, numbers in row for action in segment.actions]
    undo_id, actions = policy.rule.undo_id, layout.actions
    width = layout.input_ids.shape[1]
    places, place = torch.unique(layout.row * width + layout.column, return_inverse=True)
    # The end of a run is worth what its last U is.
    credited = [action.step - action.ends_run for action in actions]
    banned = [(i, token) for i, action in enumerate(actions) for token in action.banned if token != undo_id]
    unknown = float("nan")
    return Rows(
        inputs={
            "input_ids": layout.input_ids,
            "position_ids": layout.position_ids,
            "attention_mask": NO_MASK if by_segment else layout.attention_mask(),
            **({"segments": blocks(segments, width)} if by_segment else {}),
        },
        row=places // width,
        column=places % width,
        place=place,
        token=layout.target,
        ends_run=torch.tensor([action.ends_run for action in actions], dtype=torch.bool),
        without_undo=torch.tensor([undo_id in action.banned for action in actions], dtype=torch.bool),
        banned=torch.tensor(banned, dtype=torch.long).reshape(-1, 2),
        behaviour=torch.tensor([unknown if action.logprob is None else action.logprob for action in actions]),
        advantage=torch.tensor([rollouts[n].advantages[at] for n, at in zip(numbers, credited, strict=True)]),
        weight=torch.tensor([weights[n] * action.weight for n, action in zip(numbers, actions, strict=True)]),
        rollout=torch.tensor(numbers, dtype=torch.long),
        role=torch.tensor([action.role for action in actions], dtype=torch.long),
    )


def score(model: Any, rows: Rows, policy: Policy) -> tuple[Tensor, Tensor]:
    """Log-probability [actions] of each action under the policy, and the policy's entropy [places] in nats before any ban."""
    logits_PV = logits_of(model, rows, policy)
    logprobs_A, norm_P = logprobs_of(logits_PV, rows, policy)
    with torch.no_grad():
        probs_PV = (logits_PV - norm_P.unsqueeze(1)).exp()
        entropy_P = norm_P - (probs_PV * logits_PV).sum(-1)
    return logprobs_A, entropy_P


def logits_of(model: Any, rows: Rows, policy: Policy) -> Tensor:
    """[places, vocabulary] of the policy, before any ban."""
    with logits_only_at(model, rows.row, rows.column):
        logits_PV: Tensor = model(**rows.inputs, use_cache=False).logits.float()
    if policy.vocabulary is not None and policy.vocabulary < logits_PV.shape[1]:
        logits_PV = logits_PV[:, : policy.vocabulary]
    if policy.undo_bias:
        bias = torch.zeros(logits_PV.shape[1], device=logits_PV.device)
        bias[policy.rule.undo_id] = policy.undo_bias
        logits_PV = logits_PV + bias
    return logits_PV


def logprobs_of(logits_PV: Tensor, rows: Rows, policy: Policy) -> tuple[Tensor, Tensor]:
    """Log-probability [actions] of each action, and the logarithm [places] of the sum of exp(logits)."""
    undo_id = policy.rule.undo_id
    norm_P = logits_PV.logsumexp(-1)
    others_P = norm_P  # without U, where an action needs it
    apart = rows.place[rows.ends_run | rows.without_undo].unique()
    if len(apart):
        undo = torch.tensor([undo_id], device=logits_PV.device)
        others_P = norm_P.index_put((apart,), logits_PV[apart].index_fill(1, undo, -math.inf).logsumexp(-1))
    chosen_A = logits_PV[rows.place, rows.token]
    norm_A = torch.where(rows.without_undo, others_P[rows.place], norm_P[rows.place])
    if len(rows.banned):
        # The few actions with tried ids in their state.
        some, which = torch.unique(rows.banned[:, 0], return_inverse=True)
        open_SV = logits_PV[rows.place[some]]
        forbidden_SV = torch.zeros_like(open_SV, dtype=torch.bool)
        forbidden_SV[which, rows.banned[:, 1]] = True
        forbidden_SV[:, undo_id] |= rows.without_undo[some]
        norm_A = norm_A.index_put((some,), open_SV.masked_fill(forbidden_SV, -math.inf).logsumexp(-1))
    logprobs_A = torch.where(rows.ends_run, (others_P - norm_P)[rows.place], chosen_A - norm_A)
    return logprobs_A, norm_P
