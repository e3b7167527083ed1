"""What a search leaves behind: its tree as plain columns, and step values and preference pairs read off it.

Pure functions, like harvest.py, which reads traces off the same trees. Written by the stage search.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.backtrack.preferences import first_steps
from pipeline.backtrack.trace import Detour, WrongTry, build_trace
from pipeline.backtrack.undo import UndoRule

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Searched:
    """The tree of one problem. Columns have one entry a node; parents come before children, node 0 is the root."""

    problem: str
    prompt_ids: Ids
    parent: tuple[int, ...]
    ids: tuple[Ids, ...]
    """Ids of the node's step; of the root none."""
    value: tuple[float, ...]
    """Share of the judged simulations through the node that ended right; where none was judged, `q`."""
    q: tuple[float, ...]
    """The value that the search itself has backed up."""
    samples: tuple[int, ...]
    """Judged simulations through the node."""
    visits: tuple[int, ...]
    prior: tuple[float, ...]
    """P(step | state of the parent) under the model."""
    right: tuple[int, ...]
    """1 and 0: the end of a right and of a wrong solution; -1: no end, or one that could not be judged."""
    undone: tuple[int, ...]
    """Undo actions taken out of the node."""
    solved: bool
    simulations: int
    tokens: int
    """Generated for it, deleted ones included."""
    first_tokens: int = -1
    """Of these, up to the first right end; -1 without one."""

    def path(self, node: int) -> list[int]:
        """Nodes from the first step to this one."""
        found = []
        while node > 0:
            found.append(node)
            node = self.parent[node]
        return found[::-1]

    def surviving(self, node: int) -> Ids:
        return _text(self, self.path(node))

    def children(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.parent]
        for node, parent in enumerate(self.parent[1:], start=1):
            found[parent].append(node)
        return found


@dataclass(frozen=True)
class StepValue:
    """What a step is worth."""

    ids: Ids
    """Surviving ids up to the end of the step."""
    value: float
    q: float
    samples: int


@dataclass(frozen=True)
class Pair:
    """Two ways to go on from the same state."""

    prefix_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    kind: str
    """`step`: a step of high value against one of low value; `undo`: a wrong step taken back and put right against that step gone
    on with; `keep`: right text gone on with to the end of its step against an undo there."""
    margin: float
    """Difference of the Monte-Carlo values; 1 for `keep`."""


def step_values(tree: Searched) -> Iterator[StepValue]:
    """Soft labels for all steps through which a simulation was judged."""
    for node in range(1, len(tree.parent)):
        if tree.samples[node]:
            yield StepValue(tree.surviving(node), tree.value[node], tree.q[node], tree.samples[node])


def pairs(tree: Searched, margin: float, rule: UndoRule, most: int, low: float = 0.2) -> Iterator[Pair]:
    """Preference pairs where siblings first differ by `margin`: the best step against the worst one, then the same further down the
    best one, `most` of each kind.

    An undo pair needs a rejected branch in which nothing ended right. It goes on along the simulated way until its value is at
    `low`: there the undos stand, and behind them the right way to its end. The rejected side goes on to the end of its solution.
    With each comes a keep pair, at a place of chance of that right way: undo pairs alone make undo likelier everywhere.
    """
    children, at, given = tree.children(), 0, 0
    while given < most:
        judged = [child for child in children[at] if tree.samples[child]]
        if not judged:
            return
        best = max(judged, key=lambda child: (tree.value[child], tree.samples[child], -child))
        worst = min(judged, key=lambda child: (tree.value[child], -tree.samples[child], child))
        difference = tree.value[best] - tree.value[worst]
        if difference >= margin and best != worst:
            prefix = tree.surviving(at)
            given += 1
            yield Pair(prefix, tree.ids[best], tree.ids[worst], "step", difference)
            right = _way(tree, children, best, 1)
            undo = right and _undo_pair(tree, children, prefix, right, worst, rule, low)
            if right and undo:
                yield Pair(prefix, *undo, "undo", difference)
                yield _keep_pair(tree, prefix + _text(tree, right), given, rule)
        at = best


def _keep_pair(tree: Searched, solution: Ids, number: int, rule: UndoRule) -> Pair:
    place = random.Random(f"{tree.problem}/keep/{number}").randrange(1, max(2, len(solution)))
    return Pair(solution[:place], first_steps(solution[place:], rule, 1), (rule.undo_id,), "keep", 1.0)


def _undo_pair(
    tree: Searched, children: Sequence[Sequence[int]], prefix: Ids, right: Sequence[int], worst: int, rule: UndoRule, low: float
) -> tuple[Ids, Ids] | None:
    wrong = _way(tree, children, worst, 0)
    if wrong is None or tree.value[worst] > 0:
        return None
    evidence = next(count for count, node in enumerate(wrong, start=1) if tree.value[node] <= low)
    tried = _text(tree, wrong[:evidence])
    solution = prefix + _text(tree, right)
    first = next(
        (i for i, token in enumerate(tried) if i + len(prefix) >= len(solution) or token != solution[len(prefix) + i]), None
    )
    if first is None or first >= len(tree.ids[worst]):
        return None
    marks = tuple(first <= i < len(tree.ids[worst]) for i in range(len(tried)))
    trace = build_trace(tree.prompt_ids, solution, [Detour(len(prefix), WrongTry(tried, marks))], rule)
    return trace.ids[len(tree.prompt_ids) + len(prefix) :], _text(tree, wrong)


def _text(tree: Searched, nodes: Sequence[int]) -> Ids:
    return tuple(token for node in nodes for token in tree.ids[node])


def _way(tree: Searched, children: Sequence[Sequence[int]], node: int, end: int) -> list[int] | None:
    """Nodes from this one to an end of that kind, along the most visited steps that lead to one."""
    if tree.right[node] == end:
        return [node]
    for child in sorted(children[node], key=lambda one: (-tree.visits[one], one)):
        behind = _way(tree, children, child, end)
        if behind is not None:
            return [node, *behind]
    return None
