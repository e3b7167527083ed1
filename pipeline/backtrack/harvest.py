"""Traces from search trees: the best right leaf is the solution, branches that never came out right are the wrong tries.

Pure functions; search workers and any other tree search hand their trees over in this form.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.backtrack.trace import Detour, WrongTry
from pipeline.backtrack.tree import ROOT


@dataclass(frozen=True)
class SearchTree:
    """A tree of steps that search has grown from one prompt. Parents come before their children; node 0 is the root.

    Raises:
        ValueError: lengths that differ, no node, a second root, or a parent that does not come before its child.
    """

    parent: tuple[int, ...]
    """[nodes] ROOT (-1) for node 0."""
    ids: tuple[tuple[int, ...], ...]
    """[nodes] Tokens of the step; those of the root are not read."""
    value: tuple[float, ...]
    """[nodes] Estimated share of continuations that end right, 0 to 1."""
    right: tuple[bool | None, ...]
    """[nodes] Whether the finished solution is right; None where the node is not the end of one."""

    def __post_init__(self) -> None:
        if not self.parent or len({len(self.parent), len(self.ids), len(self.value), len(self.right)}) != 1:
            raise ValueError("a search tree whose parent, ids, value and right differ in length or are empty")
        for node, parent in enumerate(self.parent):
            if not (parent == ROOT and node == 0) and not 0 <= parent < node:
                raise ValueError(f"node {node} of a search tree has parent {parent}, which does not come before it")

    @classmethod
    def of_columns(
        cls, parent: Iterable[int], ids: Iterable[Iterable[int]], value: Iterable[float], right: Iterable[int]
    ) -> SearchTree:
        """From the columns of a dataset, in which `right` is 1, 0, or -1 where the node is not the end of a solution."""
        return cls(tuple(parent), tuple(map(tuple, ids)), tuple(value), tuple(None if end < 0 else bool(end) for end in right))


def harvest(tree: SearchTree, low: float = 0.2, most: int | None = None) -> tuple[tuple[int, ...], tuple[Detour, ...]] | None:
    """The solution of a tree and the wrong tries beside it.

    The solution is the right leaf of the highest value, of the fewest steps among equals. A wrong try leaves it at any of its nodes
    by a child with finished descendants none of which is right. It goes on along the child of the highest value until its value
    has dropped to `low`: that is where the error can be seen. A branch whose value never drops that far shows no evidence and is
    left. The wrong decision is all of its first step from the first token on that the solution does not have there.

    Returns:
        (ids of the solution, detours in the order of their places); None without a right leaf or without a wrong try.
    """
    children: list[list[int]] = [[] for _ in tree.parent]
    for node, parent in enumerate(tree.parent[1:], start=1):
        children[parent].append(node)
    ended, ended_right = [one is not None for one in tree.right], [one is True for one in tree.right]
    for node in range(len(tree.parent) - 1, 0, -1):
        ended[tree.parent[node]] |= ended[node]
        ended_right[tree.parent[node]] |= ended_right[node]
    leaves = [node for node, one in enumerate(tree.right) if one]
    if not leaves:
        return None
    path = _path(tree, max(leaves, key=lambda node: (tree.value[node], -len(_path(tree, node)), -node)))
    solution = [token for node in path[1:] for token in tree.ids[node]]
    detours, place = [], 0
    for node, following in itertools.pairwise(path):
        for child in children[node]:
            if child != following and ended[child] and not ended_right[child]:
                wrong_try = _try(tree, children, child, solution[place:], low)
                if wrong_try:
                    detours.append(Detour(place, wrong_try))
        place += len(tree.ids[following])
    return (tuple(solution), tuple(detours[:most])) if detours else None


def _try(tree: SearchTree, children: Sequence[Sequence[int]], first: int, rest: Sequence[int], low: float) -> WrongTry | None:
    """The branch from `first` on until its value has dropped to `low`."""
    ids, node = list(tree.ids[first]), first
    while tree.value[node] > low:
        if not children[node]:
            return None
        node = max(children[node], key=lambda child: (tree.value[child], -child))
        ids += tree.ids[node]
    step = len(tree.ids[first])
    same = next((at for at in range(step) if at >= len(rest) or ids[at] != rest[at]), step)
    if same == step:
        return None  # the step begins the solution's own: nothing in it is wrong
    return WrongTry(tuple(ids), tuple(same <= at < step for at in range(len(ids))))


def _path(tree: SearchTree, node: int) -> list[int]:
    path = [node]
    while tree.parent[path[-1]] != ROOT:
        path.append(tree.parent[path[-1]])
    return path[::-1]
