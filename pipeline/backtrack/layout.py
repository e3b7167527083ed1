"""How trees and walks are laid out for one forward pass, in the three context forms; the learner's batches are made here.

All forms say what is visible with two numbers a token: i sees j exactly when enter[j] <= enter[i] < leave[j]. For a tree these
are the times at which a depth-first walk comes to a node and leaves it for good; for a row, a token's own index and the index
from which on it is hidden. Tokens and positions in, tensors out; no tokenizer, no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.backtrack.tree import Action, TokenTree, Walk
from pipeline.backtrack.undo import UndoRule, apply_undo

IGNORE = -100  # cross entropy skips targets of this value


@dataclass(frozen=True)
class Segment:
    """A tree or a walk laid out from index 0 on; it cannot see other segments of its row."""

    ids: tuple[int, ...]
    positions: Sequence[int]
    enter: Sequence[int]
    leave: Sequence[int]
    """At most the segment's length, which is why segments side by side cannot see each other."""
    actions: tuple[Action, ...]
    """An action's `node` is the index whose logits predict it."""


@dataclass(frozen=True)
class Layout:
    """A batch for one forward pass. Always pass `attention_mask()`: without a mask transformers takes positions that do not
    rise by one for the borders of packed sequences."""

    input_ids: Tensor
    """[rows, tokens]"""
    position_ids: Tensor
    """[rows, tokens]"""
    enter: Tensor
    """[rows, tokens]"""
    leave: Tensor
    """[rows, tokens]"""
    row: Tensor
    """[actions] With `column`: where the logits are that predict the action."""
    column: Tensor
    """[actions]"""
    target: Tensor
    """[actions] The id that was emitted, or that should have been."""
    weight: Tensor
    """[actions] What the target counts in a loss; 0 when it is masked."""
    actions: tuple[Action, ...]
    """What else is known of them; node and walk count from 0 in each segment."""

    def attention_mask(self) -> Tensor:
        """[rows, 1, tokens, tokens] Boolean, for sdpa."""
        return _sees(self.enter.unsqueeze(2), self.enter.unsqueeze(1), self.leave.unsqueeze(1)).unsqueeze(1)

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same mask in linear memory, for `torch.nn.attention.flex_attention.create_block_mask`."""
        enter, leave = self.enter, self.leave

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return _sees(enter[batch, query], enter[batch, key], leave[batch, key])

        return sees

    def labels(self) -> Tensor:
        """[actions] Targets, IGNORE where masked; one to one with `logits[row, column]`, nothing left to shift."""
        return torch.where(self.weight > 0, self.target, IGNORE)


def _sees(enter_query: Tensor, enter_key: Tensor, leave_key: Tensor) -> Tensor:
    return (enter_key <= enter_query) & (enter_query < leave_key)


def intervals(parent: Sequence[int]) -> tuple[list[int], list[int]]:
    """When a depth-first walk enters and leaves each node: j is an ancestor of i or i itself iff enter[j] <= enter[i] < leave[j].

    Needs parents before children, as a TokenTree has them. Linear time.
    """
    size = [1] * len(parent)
    for node in range(len(parent) - 1, 0, -1):
        size[parent[node]] += size[node]
    enter = [0] * len(parent)
    free = [1] * len(parent)  # when the next child of a node is entered
    for node in range(1, len(parent)):
        above = parent[node]
        enter[node] = free[above]
        free[above] += size[node]
        free[node] = enter[node] + 1
    return enter, [began + nodes for began, nodes in zip(enter, size, strict=True)]


def rewind(tree: TokenTree, once: bool = False) -> Segment:
    """Deleted tokens are gone: a token sees its ancestors and itself, positions are depths, shared beginnings are there once.

    `once`: an action that a walk repeats in the same state counts once, with the larger weight. For traces, which with units
    `step` and `all` write a part of the prefix again; a policy's rollouts decided twice.
    """
    actions = tree.actions
    if once:
        kept: dict[tuple[int, int, int, bool], Action] = {}
        for action in actions:
            key = (action.walk, action.node, action.token, action.ends_run)
            if key not in kept or action.weight > kept[key].weight:
                kept[key] = action
        actions = tuple(kept.values())
    return Segment(tree.token, tree.depth, *intervals(tree.parent), actions)


def soft(walk: Walk, number: int = 0) -> Segment:
    """The row as emitted: everything stays visible."""
    count = len(walk.prompt) + len(walk.ids)
    return Segment(walk.prompt + walk.ids, range(count), range(count), [count] * count, _row_actions(walk, number))


def hard(
    walk: Walk, rule: UndoRule, number: int = 0, hide_undos: bool = False, positions: Literal["kept", "depth"] = "kept"
) -> Segment:
    """The row as emitted, in which deleted tokens are hidden from the U that deletes them on: its row already predicts what
    comes instead of them. What earlier rows took from them stays in what those rows pass on (`hide_undos` stops that).

    Args:
        hide_undos: a U is seen by itself alone.
        positions: `depth` is the number of tokens on the stack below the token (for a U: that it leaves), `kept` the index.
    """
    start, ids = len(walk.prompt), walk.prompt + walk.ids
    leave = [len(ids)] * len(ids)
    depths, depth = list(range(start)), start
    popped = [0] * len(walk.ids)
    for index, by in enumerate(apply_undo(walk.ids, rule).deleted_by):
        if by >= 0:
            leave[start + index] = start + by
            popped[by] += 1
    for index, token in enumerate(walk.ids):
        is_undo = token == rule.undo_id
        depth -= popped[index]
        depths.append(depth)
        depth += not is_undo
        if is_undo and hide_undos:
            leave[start + index] = start + index + 1
    places = range(len(ids)) if positions == "kept" else depths
    return Segment(ids, places, range(len(ids)), leave, _row_actions(walk, number))


def _row_actions(walk: Walk, number: int) -> tuple[Action, ...]:
    count, before = len(walk.ids), len(walk.prompt) - 1
    targets = walk.targets or walk.ids
    weights = walk.weights or (1.0,) * count
    roles = walk.roles or (-1,) * count
    logprobs = walk.logprobs or (None,) * count
    banned = walk.banned or (frozenset[int](),) * count
    of_prompt = range(1, len(walk.prompt)) if walk.prompt_weight else ()
    return (
        *(Action(at - 1, walk.prompt[at], number, at - len(walk.prompt), walk.prompt_weight) for at in of_prompt),
        *(
            Action(before + step, targets[step], number, step, weights[step], roles[step], False, logprobs[step], banned[step])
            for step in range(count)
        ),
    )


def lay_out(rows: Sequence[Sequence[Segment]], tokens: int | None = None, pad_id: int = 0) -> Layout:
    """Put segments side by side into rows of `tokens` tokens (None: as many as the fullest row has); positions restart.

    Raises:
        ValueError: a row that does not fit.
    """
    lengths = [sum(len(segment.ids) for segment in row) for row in rows]
    width = max(lengths, default=0) if tokens is None else tokens
    if max(lengths, default=0) > width:
        raise ValueError(f"row {lengths.index(max(lengths))} holds {max(lengths)} tokens, a row has room for {width}")
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    enter: list[list[int]] = []
    leave: list[list[int]] = []
    actions: list[Action] = []
    places: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        for values in (ids, positions, enter, leave):
            values.append([])
        start = 0
        for segment in row:
            ids[-1] += segment.ids
            positions[-1] += segment.positions
            enter[-1] += [start + at for at in segment.enter]
            leave[-1] += [start + at for at in segment.leave]
            actions += segment.actions
            places += [(number, start + action.node) for action in segment.actions]
            start += len(segment.ids)
        padding = range(start, width)  # sees itself, so that no row of the softmax is empty
        ids[-1] += [pad_id] * len(padding)
        positions[-1] += [0] * len(padding)
        enter[-1] += padding
        leave[-1] += [at + 1 for at in padding]
    place = torch.tensor(places, dtype=torch.long).view(-1, 2)
    input_ids, position_ids, entered, left = (
        torch.tensor(values, dtype=torch.long).view(len(rows), width) for values in (ids, positions, enter, leave)
    )
    return Layout(
        input_ids=input_ids,
        position_ids=position_ids,
        enter=entered,
        leave=left,
        row=place[:, 0],
        column=place[:, 1],
        target=torch.tensor([action.token for action in actions], dtype=torch.long),
        weight=torch.tensor([action.weight for action in actions], dtype=torch.float),
        actions=tuple(actions),
    )


def action_logprobs(logits: Tensor, layout: Layout) -> Tensor:
    """[actions] Log-probabilities from logits [rows, tokens, vocabulary]; what was banned has none, the rest is renormalised."""
    chosen = logits[layout.row, layout.column]
    banned = [(index, token) for index, action in enumerate(layout.actions) for token in action.banned]
    if banned:
        where = torch.zeros_like(chosen, dtype=torch.bool)
        where[tuple(torch.tensor(banned, device=chosen.device).T)] = True
        chosen = chosen.masked_fill(where, -torch.inf)
    logprobs = chosen.log_softmax(-1).gather(-1, layout.target.to(chosen.device).unsqueeze(-1)).squeeze(-1)
    ends_run = [index for index, action in enumerate(layout.actions) if action.ends_run]
    if ends_run:
        logprobs = logprobs.index_copy(
            0, torch.tensor(ends_run, device=logprobs.device), torch.log(-torch.expm1(logprobs[ends_run]))
        )
    return logprobs
