"""Who in a group of rollouts earns its rewards: an advantage for each emitted id. Pure functions on ids and rewards.

Groups are rollouts of one problem. A deleted id never gets a positive advantage, whatever the kind of credit: what comes after an
undo did not come of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from pipeline.backtrack.tree import Rewinding, Walk, grow
from pipeline.backtrack.undo import UndoRule, apply_undo
from rewards.rollout import UndoRun

Credit = Literal["sequence", "segment", "tree"]
_EPSILON = 1e-4  # added to standard deviations, as TRL does


@dataclass(frozen=True)
class Episode:
    """One rollout and what it earned."""

    walk: Walk
    reward: float
    runs: tuple[UndoRun, ...] = ()
    """Its runs of undos, judged."""


def spread(rewards: Sequence[float]) -> float:
    """Standard deviation with n - 1, as GRPO takes it; 0 for one reward."""
    return stdev(rewards) if len(rewards) > 1 else 0.0


def advantages(
    group: Sequence[Episode], rule: UndoRule, kind: Credit, scale: float | None = None, undo_credit: float = 0.0,
    rewinding: Rewinding = "deferred",
) -> list[tuple[float, ...]]:  # fmt: skip
    """[rollouts][ids] The advantage of each emitted id.

    `sequence`: (reward - mean of the group) / scale for every id (Shao et al. 2024, GRPO).
    `segment`: the same, but wrong text that was taken back counts as the worst reward of the group.
    `tree`: the mean of what lies below a choice minus the mean of what lies below its parent, where the group has made different
    choices; on the way from there to the next such place the same. A place from which an undo turns back from an error is an end of
    its own, with the worst reward of the group; an undo is worth what came of the rollouts that made it there.

    Args:
        scale: what differences are divided by; None takes the group's own standard deviation, 1 leaves them as they are.
        undo_credit: added to each U of a run, times the run's improvement.
    """
    rewards = [one.reward for one in group]
    divisor = spread(rewards) + _EPSILON if scale is None else scale
    mean, worst = fmean(rewards), min(rewards)
    if kind == "tree":
        raw = _by_tree(group, rule, rewinding, mean, worst)
    else:
        raw = [_by_rollout(one, rule, kind, mean, worst) for one in group]
    found = []
    for one, values in zip(group, raw, strict=True):
        scaled = [value / divisor for value in values]
        for run in one.runs:
            for index in range(run.start, run.end):
                scaled[index] += undo_credit * run.improvement
        deleted_by = apply_undo(one.walk.ids, rule).deleted_by
        found.append(tuple(min(value, 0.0) if by >= 0 else value for value, by in zip(scaled, deleted_by, strict=True)))
    return found


def _by_rollout(one: Episode, rule: UndoRule, kind: Credit, mean: float, worst: float) -> list[float]:
    values = [one.reward - mean] * len(one.walk.ids)
    if kind == "segment":
        for index, by in enumerate(apply_undo(one.walk.ids, rule).deleted_by):
            if by >= 0 and _turns_from_error(one, by):
                values[index] = worst - mean
    return values


def _turns_from_error(one: Episode, undo: int) -> bool:
    return any(run.start <= undo < run.end and not run.before for run in one.runs)


def _by_tree(group: Sequence[Episode], rule: UndoRule, rewinding: Rewinding, mean: float, worst: float) -> list[list[float]]:
    tree = grow([one.walk for one in group], rule, rewinding)
    taken = [action for action in tree.actions if action.step >= 0 and not action.ends_run]
    # Ends below each node: (sum of their values, how many).
    below = [(0.0, 0)] * len(tree.parent)
    child = {(parent, token): node for node, (parent, token) in enumerate(zip(tree.parent, tree.token, strict=True))}
    emitted = [one.walk.ids for one in group]
    last = {action.walk: action for action in taken}  # of each rollout
    for action in taken:
        one, is_undo = group[action.walk], emitted[action.walk][action.step] == rule.undo_id
        at = child.get((action.node, action.token), action.node)
        if is_undo:
            # Only the first of a deferred run stands where the error is; the others stand on U's.
            value = worst if _turns_from_error(one, action.step) else one.reward
            below[action.node] = _plus(below[action.node], value)
        elif action is last[action.walk]:
            below[at] = _plus(below[at], one.reward)
    for node in range(len(tree.parent) - 1, 0, -1):
        total, count = below[node]
        before, ends = below[tree.parent[node]]
        below[tree.parent[node]] = (before + total, ends + count)
    choices: defaultdict[int, dict[int, tuple[float, int]]] = defaultdict(dict)  # node -> token -> (worth, rollouts that chose it)
    for action in taken:
        token = emitted[action.walk][action.step]
        worth, times = choices[action.node].get(token, (0.0, 0))
        if token == rule.undo_id:
            choices[action.node][token] = (worth + group[action.walk].reward, times + 1)
        else:
            total, count = below[child[action.node, token]]
            choices[action.node][token] = (total / count * (times + 1), times + 1)
    values: list[list[float]] = [[0.0] * len(ids) for ids in emitted]
    arriving: dict[tuple[int, int], float] = {}  # (rollout, node) -> advantage of the choice that led there
    for action in taken:
        token, offered = emitted[action.walk][action.step], choices[action.node]
        if len(offered) > 1:
            worth, times = offered[token]
            expected = sum(total for total, _ in offered.values()) / sum(count for _, count in offered.values())
            value = worth / times - expected
        elif token == rule.undo_id:
            value = group[action.walk].reward - mean  # nobody has done otherwise there
        else:
            value = arriving.get((action.walk, action.node), 0.0)
        values[action.walk][action.step] = value
        if token != rule.undo_id:
            arriving[action.walk, child[action.node, token]] = value
    return values


def _plus(ends: tuple[float, int], value: float) -> tuple[float, int]:
    return ends[0] + value, ends[1] + 1
