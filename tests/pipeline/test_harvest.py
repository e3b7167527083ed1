"""Traces from search trees: the best right leaf is the solution; what never came right and shows it is a wrong try."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pipeline.backtrack.harvest import SearchTree, harvest
from pipeline.backtrack.trace import Detour, Role, WrongTry, build_trace
from pipeline.backtrack.undo import UndoRule, Unit, apply_undo

U, END = 9, 0
UNITS: tuple[Unit, ...] = ("token", "step", "all")
Node = tuple[int, tuple[int, ...], float, bool | None]
"""(parent, ids, value, right)"""
ROOT: Node = (-1, (), 0.5, None)


def tree_of(*nodes: Node) -> SearchTree:
    parent, ids, value, right = zip(ROOT, *nodes, strict=True)
    return SearchTree(parent, ids, value, right)


def wrong(ids: tuple[int, ...], *decisions: int) -> WrongTry:
    return WrongTry(ids, tuple(at in decisions for at in range(len(ids))))


# ---- worked examples; node 0 is the root, the others are numbered as they are written ----


def test_the_value_drops_at_once() -> None:
    tree = tree_of((0, (1, 0), 0.9, None), (1, (2, 0), 1.0, True), (1, (3, 0), 0.1, False))
    assert harvest(tree) == ((1, 0, 2, 0), (Detour(2, wrong((3, 0), 0, 1)),))


def test_what_both_steps_begin_with_is_no_decision() -> None:
    """Right `2 4 0`, wrong `2 5 0`: the 2 is right, the rest of the step is wrong."""
    tree = tree_of((0, (2, 4, 0), 1.0, True), (0, (2, 5, 0), 0.0, False))
    assert harvest(tree) == ((2, 4, 0), (Detour(0, wrong((2, 5, 0), 1, 2)),))


def test_the_evidence_comes_two_steps_later() -> None:
    """The value drops at the third step of the branch: the first one is the decision, the others infer from it. Of two ways on
    the one of the higher value is taken, and the branch is not followed beyond its evidence."""
    tree = tree_of(
        (0, (2, 0), 1.0, True),
        (0, (3, 0), 0.7, None),
        (2, (4, 0), 0.4, None),
        (2, (5, 0), 0.6, None),
        (4, (6, 0), 0.2, None),
        (5, (7, 0), 0.0, False),
    )
    assert harvest(tree) == ((2, 0), (Detour(0, wrong((3, 0, 5, 0, 6, 0), 0, 1)),))


def test_how_low_is_a_setting() -> None:
    tree = tree_of((0, (2, 0), 1.0, True), (0, (3, 0), 0.5, None), (2, (4, 0), 0.3, None), (3, (5, 0), 0.1, False))
    tries = {low: harvest(tree, low) for low in (0.5, 0.3, 0.29, 0.05)}
    assert tries == {
        0.5: ((2, 0), (Detour(0, wrong((3, 0), 0, 1)),)),
        0.3: ((2, 0), (Detour(0, wrong((3, 0, 4, 0), 0, 1)),)),
        0.29: ((2, 0), (Detour(0, wrong((3, 0, 4, 0, 5, 0), 0, 1)),)),
        0.05: None,
    }


def test_a_branch_whose_value_never_drops_is_left() -> None:
    tree = tree_of((0, (2, 0), 1.0, True), (0, (3, 0), 0.8, None), (2, (4, 0), 0.7, False), (0, (5, 0), 0.1, False))
    assert harvest(tree) == ((2, 0), (Detour(0, wrong((5, 0), 0, 1)),))


def test_a_branch_that_came_right_anywhere_is_no_error() -> None:
    """However low its value: node 2 has a right leaf two levels below, beside wrong ones."""
    tree = tree_of(
        (0, (2, 0), 1.0, True),
        (0, (3, 0), 0.1, None),
        (2, (4, 0), 0.1, False),
        (2, (5, 0), 0.1, None),
        (4, (6, 0), 0.4, True),
    )
    assert harvest(tree) is None


def test_unfinished_branches_are_no_errors() -> None:
    tree = tree_of((0, (2, 0), 1.0, True), (0, (3, 0), 0.0, None), (2, (4, 0), 0.0, None))
    assert harvest(tree) is None
    assert harvest(replace(tree, right=(None, True, None, False))) == ((2, 0), (Detour(0, wrong((3, 0), 0, 1)),))


def test_several_detours_at_several_places() -> None:
    """Two at the root, one behind the first step, none behind the second; `most` takes the first ones."""
    tree = tree_of(
        (0, (1, 0), 0.9, None),
        (0, (2, 0), 0.1, False),
        (0, (3, 0), 0.2, False),
        (1, (4, 0), 0.9, None),
        (1, (5, 0), 0.0, False),
        (4, (6,), 1.0, True),
    )
    detours = (Detour(0, wrong((2, 0), 0, 1)), Detour(0, wrong((3, 0), 0, 1)), Detour(2, wrong((5, 0), 0, 1)))
    for most in (None, 3, 2, 1):
        assert harvest(tree, most=most) == ((1, 0, 4, 0, 6), detours[:most])


def test_the_solution_is_the_best_right_leaf() -> None:
    """By value, then by its number of steps, then the one found first."""
    wrong_leaf: Node = (0, (8,), 0.0, False)
    assert _solution(tree_of((0, (1,), 0.8, True), (0, (2, 2, 2), 0.9, True), wrong_leaf)) == (2, 2, 2)
    assert _solution(tree_of((0, (1,), 0.9, None), (1, (1,), 0.9, True), (0, (2, 2), 0.9, True), wrong_leaf)) == (2, 2)
    assert _solution(tree_of((0, (1,), 0.9, True), (0, (2,), 0.9, True), wrong_leaf)) == (1,)


def _solution(tree: SearchTree) -> tuple[int, ...]:
    found = harvest(tree)
    assert found
    return found[0]


def test_a_step_that_begins_the_right_one_holds_no_error() -> None:
    assert harvest(tree_of((0, (2, 4, 0), 1.0, True), (0, (2, 4), 0.0, False))) is None


def test_no_right_leaf() -> None:
    assert harvest(tree_of()) is None
    assert harvest(tree_of((0, (1,), 0.9, False), (0, (2,), 0.9, None))) is None
    assert harvest(tree_of((0, (1,), 0.9, True))) is None, "right, and nothing wrong beside it"


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ((-1, -1, 0), "node 1 of a search tree has parent -1"),
        ((-1, 2, 1), "node 1 of a search tree has parent 2"),
        ((-1, 1, 0), "node 1 of a search tree has parent 1"),
        ((0, 0, 0), "node 0 of a search tree has parent 0"),
        ((-1, 0, -2), "node 2 of a search tree has parent -2"),
        ((-1, 0), "differ in length or are empty"),
        ((-1, 0, 0, 0), "differ in length or are empty"),
    ],
    ids=["two roots", "cycle", "its own parent", "no root", "below the root", "too short", "too long"],
)
def test_refused(parent: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchTree(parent, ((), (1,), (2,)), (0.5, 0.5, 0.5), (None, True, False))


@pytest.mark.parametrize("column", ["ids", "value", "right"])
def test_columns_of_other_lengths_are_refused(column: str) -> None:
    good: dict[str, Any] = {"parent": (-1, 0), "ids": ((), (1,)), "value": (0.5, 0.5), "right": (None, True)}
    SearchTree(**good)
    with pytest.raises(ValueError, match="differ in length or are empty"):
        SearchTree(**good | {column: good[column][:1]})
    with pytest.raises(ValueError, match="differ in length or are empty"):
        SearchTree((), (), (), ())


# ---- random trees ----


@st.composite
def trees(draw: st.DrawFn) -> SearchTree:
    """Steps that end with END; siblings may begin alike but differ, as those of a search do; leaves are judged or not."""
    count = draw(st.integers(1, 16))
    parent = [-1] + [draw(st.integers(max(0, node - 6), node - 1)) for node in range(1, count)]
    step = st.lists(st.integers(1, 3), max_size=2)
    ids = [(), *((*draw(step), 10 + node, END) for node in range(1, count))]
    value = [draw(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0])) for _ in range(count)]
    right = [None if node in parent else draw(st.sampled_from([True, False, False, None])) for node in range(count)]
    return SearchTree(tuple(parent), tuple(ids), tuple(value), tuple(right))


def below(tree: SearchTree, node: int) -> set[int]:
    """The node and all its descendants."""
    return {node}.union(*(below(tree, child) for child, above in enumerate(tree.parent) if above == node))


def text_of(tree: SearchTree, node: int) -> tuple[int, ...]:
    return (*text_of(tree, tree.parent[node]), *tree.ids[node]) if node else ()


def steps_to(tree: SearchTree, node: int) -> int:
    return 1 + steps_to(tree, tree.parent[node]) if node else 0


def slow_branches(tree: SearchTree, best: int, low: float) -> list[tuple[int, tuple[int, ...]]]:
    """(place, ids) of every branch that leaves the way to the best leaf, ended, never right, and down to its evidence."""
    way = [node for node in range(len(tree.parent)) if best in below(tree, node)]
    found = []
    for branch in range(1, len(tree.parent)):
        verdicts = {tree.right[node] for node in below(tree, branch)}
        if branch in way or tree.parent[branch] not in way or True in verdicts or False not in verdicts:
            continue
        last = branch
        while tree.value[last] > low and (on := [node for node, above in enumerate(tree.parent) if above == last]):
            last = next(node for node in on if tree.value[node] == max(tree.value[other] for other in on))
        if tree.value[last] <= low:
            place = len(text_of(tree, tree.parent[branch]))
            found.append((place, text_of(tree, last)[place:]))
    return sorted(found, key=lambda one: one[0])


@settings(deadline=None, max_examples=200)
@given(trees(), st.sampled_from([0.0, 0.2, 0.5]), st.sampled_from([None, 1, 2]))
def test_random_trees(tree: SearchTree, low: float, most: int | None) -> None:
    """What a harvest gives is what one finds by looking at every node, and makes a trace with every unit."""
    right = [node for node in range(len(tree.parent)) if tree.right[node]]
    found = harvest(tree, low, most)
    event("harvested" if found else "nothing")
    if not found:
        if right:
            best = max(right, key=lambda node: (tree.value[node], -steps_to(tree, node), -node))
            assert not slow_branches(tree, best, low)
        return
    solution, detours = found
    best_value = max(tree.value[node] for node in right)
    fewest = min(steps_to(tree, node) for node in right if tree.value[node] == best_value)
    best = [node for node in right if (tree.value[node], steps_to(tree, node)) == (best_value, fewest)]
    assert solution == text_of(tree, best[0])
    assert [(one.at, one.wrong_try.ids) for one in detours] == slow_branches(tree, best[0], low)[:most]
    for one in detours:
        marks, rest = one.wrong_try.wrong, solution[one.at :]
        first = marks.index(True)
        assert one.wrong_try.ids[:first] == rest[:first] and one.wrong_try.ids[first] != rest[first : first + 1]
        step = one.wrong_try.ids.index(END) + 1
        assert marks == tuple(first <= at < step for at in range(len(marks)))
    for unit in UNITS:
        rule = UndoRule(U, unit, frozenset({END}))
        trace = build_trace((5, 6), solution, detours, rule)
        assert apply_undo(trace.ids[2:], rule).surviving == solution
        assert trace.roles.count(Role.ERROR) == sum(sum(one.wrong_try.wrong) for one in detours)
