"""Who in a group of rollouts earns its rewards: an advantage for each emitted id. Pure functions on ids and rewards.

Groups are rollouts of one problem. A deleted id never gets a positive advantage, whatever the kind of credit: what comes after an
undo did not come of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean, stdev
from typing import Literal

from pipeline.backtrack.tree import ROOT, Rewinding, Walk, grow
from pipeline.backtrack.undo import UndoRule, apply_undo
from rewards.rollout import UndoRun

Credit = Literal["sequence", "segment", "tree"]
EPSILON = 1e-4
"""Added to standard deviations, as TRL does."""


@dataclass(frozen=True)
class Episode:
    """One rollout and what it earned."""

    walk: Walk
    reward: float
    correct: bool
    """Whether it ended right."""
    runs: tuple[UndoRun, ...] = ()
    """Its runs of undos, judged."""
    wrong: tuple[int, ...] = ()
    """Indices of the emitted ids that the judge finds wrong."""


def spread(rewards: Sequence[float]) -> float:
    """Standard deviation with n - 1, as GRPO takes it; 0 for one reward."""
    return stdev(rewards) if len(rewards) > 1 else 0.0


def advantages(
    group: Sequence[Episode], rule: UndoRule, kind: Credit, scale: float | None = None, undo_credit: float = 0.0,
    rewinding: Rewinding = "deferred", blame_deleted: bool = True, error_credit: float = 0.0,
) -> list[tuple[float, ...]]:  # fmt: skip
    """[rollouts][ids] The advantage of each emitted id.

    `sequence`: (reward - mean of the group) / scale for every id (Shao et al. 2024, GRPO).
    `segment`: the same, but wrong text that was taken back counts as the worst reward of the group.
    `tree`: what a choice is worth minus the mean worth of the choices that the group made in that state, each as often as it was
    made there, and 0 where all have chosen alike: the right consequences of a wrong choice are not blamed for it. Worth is the
    mean reward of the ends below it. A rollout ends where its surviving ids end; a run of undos is one more end where it begins,
    with the worst reward of the group if it turns back from an error. An undo, and with deferred rewinding the end of a run, is
    worth what the rollouts earned that made it there.

    Args:
        scale: what differences are divided by; None takes the group's own standard deviation, 1 leaves them as they are.
        undo_credit: added to each U of a run, times `own_credit`.
        blame_deleted: whether a deleted id may have a negative advantage; otherwise it has none. Blame without praise wears away
            whatever gets deleted, the right consequences that show a choice to be wrong as well.
        error_credit: taken from the advantage of each wrong id, times the share of the group that ended right: what the state
            was worth before it. Where nobody gets there, another choice would have been as wrong.
    """
    rewards = [one.reward for one in group]
    blame = error_credit * fmean(one.correct for one in group)
    divisor = spread(rewards) + EPSILON if scale is None else scale
    mean, worst = fmean(rewards), min(rewards)
    if kind == "tree":
        raw = _by_tree(group, rule, rewinding, worst)
    else:
        raw = [_by_rollout(one, rule, kind, mean, worst) for one in group]
    found = []
    for one, values in zip(group, raw, strict=True):
        scaled = [value / divisor for value in values]
        for run in one.runs:
            for index in range(run.start, run.end):
                scaled[index] += undo_credit * own_credit(run, one.correct)
        for index in one.wrong:
            scaled[index] -= blame
        deleted_by = apply_undo(one.walk.ids, rule).deleted_by
        least = -inf if blame_deleted else 0.0
        found.append(tuple(max(min(value, 0.0), least) if by >= 0 else value for value, by in zip(scaled, deleted_by, strict=True)))
    return found


def own_credit(run: UndoRun, correct: bool) -> int:
    """What a run of undos did. 1: it made a wrong state right that could be seen to be wrong, and the rollout ended right: an undo
    is worth what comes of it. -1: it made a right state wrong, or removed right text alone. Undoing what nothing speaks against
    yet is a guess at how often choices are wrong: 0."""
    if run.improvement > 0:
        return int(run.seen and correct)
    return run.improvement or -(run.unnecessary > 0)


def _by_rollout(one: Episode, rule: UndoRule, kind: Credit, mean: float, worst: float) -> list[float]:
    values = [one.reward - mean] * len(one.walk.ids)
    if kind == "segment":
        for index, by in enumerate(apply_undo(one.walk.ids, rule).deleted_by):
            if by >= 0 and _turns_from_error(one, by):
                values[index] = worst - mean
    return values


def _turns_from_error(one: Episode, undo: int) -> bool:
    return any(run.start <= undo < run.end and not run.before for run in one.runs)


def _by_tree(group: Sequence[Episode], rule: UndoRule, rewinding: Rewinding, worst: float) -> list[list[float]]:
    tree, emitted = grow([one.walk for one in group], rule, rewinding), [one.walk.ids for one in group]
    child = {edge: node for node, edge in enumerate(zip(tree.parent, tree.token, strict=True))}
    taken = [action for action in tree.actions if action.step >= 0]
    below = [(0.0, 0)] * len(tree.parent)  # (sum of the rewards of the ends, how many)
    for one in group:
        node = ROOT
        for token in one.walk.prompt + apply_undo(one.walk.ids, rule).surviving:
            node = child[node, token]
        below[node] = _plus(below[node], one.reward)
    for action in taken:
        one, ids = group[action.walk], emitted[action.walk]
        begins = action.step == 0 or ids[action.step - 1] != rule.undo_id
        if action.token == rule.undo_id and not action.ends_run and begins:
            below[action.node] = _plus(below[action.node], worst if _turns_from_error(one, action.step) else one.reward)
    for node in range(len(tree.parent) - 1, 0, -1):
        above = tree.parent[node]
        below[above] = _plus(below[above], *below[node])
    # node -> (token, whether it is the end of a run) -> (sum of what it was worth, how often it was chosen)
    choices: defaultdict[int, dict[tuple[int, bool], tuple[float, int]]] = defaultdict(dict)
    for action in taken:
        total, ends = group[action.walk].reward, 1
        if action.token != rule.undo_id:
            total, ends = below[child[action.node, action.token]]
        offered, choice = choices[action.node], (action.token, action.ends_run)
        offered[choice] = _plus(offered.get(choice, (0.0, 0)), total / ends)
    values: list[list[float]] = [[0.0] * len(ids) for ids in emitted]
    for action in taken:
        offered = choices[action.node]
        if len(offered) > 1 and not action.ends_run:
            worth, times = offered[action.token, False]
            expected = sum(total for total, _ in offered.values()) / sum(count for _, count in offered.values())
            values[action.walk][action.step] = worth / times - expected
    return values


def _plus(ends: tuple[float, int], total: float, count: int = 1) -> tuple[float, int]:
    return ends[0] + total, ends[1] + count
