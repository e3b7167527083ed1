"""The search of one tree, without an engine: what it asks, what it backs up, and that undos and budgets end."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.mcts import Made, Tree
from pipeline.search_config import SearchSettings
from tests.actors.searched import END, LETTERS, PROMPT, STOP, UNDO, WORDS, Language, grow, settings, slow_values


def tree_of(how: SearchSettings, seed: int = 0, **more: Any) -> Tree:
    return Tree(PROMPT, how, WORDS, seed, **more)


def ends_a_step(how: SearchSettings) -> Any:
    return lambda ids: how.unit == "token" or ids[-1] in (END, STOP)


HOWS = st.fixed_dictionaries(
    {
        "unit": st.sampled_from(["step", "token"]),
        "expand": st.sampled_from(["alternatives", "samples"]),
        "rollout": st.sampled_from(["end", "step"]),
        "undo": st.sampled_from(["forbidden", "model"]),
        "temperature": st.sampled_from([0.7, 1.0]),
        "leaves": st.integers(1, 4),
        "k": st.integers(1, 5),
        "depth": st.integers(1, 12),
        "max_tokens": st.integers(1, 14),
        "simulations": st.integers(1, 30),
        "discount": st.sampled_from([1.0, 0.9]),
        "max_share": st.sampled_from([0.0, 0.5, 1.0]),
        "max_undos": st.integers(0, 4),
        "mass": st.booleans(),
    }
)


@given(HOWS, st.integers(0, 5), st.sampled_from([0.0, 0.3, 0.9]))
def test_values_are_those_of_the_list_of_simulations(how: dict[str, Any], seed: int, p_undo: float) -> None:
    asked = settings(**how)
    tree = tree_of(asked, seed)
    settled, _ = grow(tree, asked, Language(seed, p_undo), lambda ids: ids[0] == LETTERS[seed % 4])
    wanted = slow_values(settled, asked, ends_a_step(asked))
    assert tree.simulations == len(settled) and not tree.waiting and tree.done
    for at, node in enumerate(tree.nodes):
        if at and not node.visits:
            raise AssertionError("a node that no simulation has passed")
        visits, total, best, ends, rights = wanted[tree.surviving(at)]
        assert (node.visits, node.ends, node.rights) == (visits, ends, rights)
        assert (node.total, node.best) == (pytest.approx(total), pytest.approx(best))
        assert tree.value(at) == pytest.approx((1 - asked.max_share) * total / visits + asked.max_share * best)
        assert node.pending == 0 and node.length == len(tree.surviving(at)) <= asked.max_tokens


@given(HOWS, st.integers(0, 5), st.sampled_from([0.0, 0.3]))
def test_the_same_ids_are_one_node_and_what_was_tried_is_not_tried_again(how: dict[str, Any], seed: int, p_undo: float) -> None:
    asked = settings(**how)
    tree = tree_of(asked, seed)
    settled, wants = grow(tree, asked, Language(seed, p_undo), lambda ids: False)
    states = [tree.surviving(at) for at in range(len(tree.nodes))]
    assert len(set(states)) == len(states)
    if asked.expand == "alternatives":
        assert len({one.ids for one in wants}) == len(wants)
        ends = Counter(ids for ids, _, verdict in settled if verdict is not None)
        assert not ends or max(ends.values()) == 1


@given(HOWS, st.integers(0, 3), st.sampled_from([0.0, 0.5]))
def test_what_is_left_untried_is_counted_right(how: dict[str, Any], seed: int, p_undo: float) -> None:
    """`rest` against a sum over all open ways, and never more than the state's whole probability."""
    asked = settings(**how)
    tree = tree_of(asked, seed)
    grow(tree, asked, Language(seed, p_undo), lambda ids: False, rounds=4)

    def slow(at: int) -> float:
        node = tree.nodes[at]
        return min(1.0, sum(node.open or ()) + sum(tree.nodes[c].prior * slow(c) for c in node.children))

    for at in range(len(tree.nodes)):
        assert tree.nodes[at].rest == pytest.approx(slow(at))


def test_all_solutions_of_a_small_language_are_found_once_in_order_of_probability() -> None:
    asked = settings(k=256, simulations=10_000, c_puct=1000.0, max_undos=0)
    tree, language = tree_of(asked), Language(3)
    settled, _ = grow(tree, asked, language, lambda ids: False)
    assert len(settled) == len(LETTERS) ** 6 and tree.nodes[0].rest == 0 and tree.wants() == []
    assert len({ids for ids, _, _ in settled}) == len(settled)
    first = settled[0][0]

    def logprob(ids: tuple[int, ...]) -> float:
        return sum(language.logprobs(ids[:at])[token] for at, token in enumerate(ids))

    likely = sorted((ids for ids, _, _ in settled), key=logprob, reverse=True)
    early, late = settled[: len(settled) // 4], settled[-len(settled) // 4 :]
    assert logprob(first) >= logprob(likely[len(likely) // 4])
    assert sum(logprob(ids) for ids, _, _ in early) > sum(logprob(ids) for ids, _, _ in late)


def test_a_tree_prior_is_the_policys() -> None:
    asked, language = settings(), Language(1)
    tree = tree_of(asked)
    grow(tree, asked, language, lambda ids: False)
    for at, node in enumerate(tree.nodes):
        if at:
            before = tree.surviving(node.parent)
            found = sum(language.logprobs(before + node.ids[:i])[token] for i, token in enumerate(node.ids))
            assert math.log(node.prior) == pytest.approx(found)


def test_a_right_end_stops_the_search() -> None:
    asked = settings(after_right=0)
    tree = tree_of(asked)
    settled, _ = grow(tree, asked, Language(0), lambda ids: ids[0] == LETTERS[0])
    assert [verdict for _, _, verdict in settled].count(True) == 1 and settled[-1][2]
    assert tree.solved_at == len(settled) and tree.first_tokens == tree.tokens
    more = settings(after_right=3)
    tree = tree_of(more)
    assert len(grow(tree, more, Language(0), lambda ids: ids[0] == LETTERS[0])[0]) == len(settled) + 3


def test_values_lead_the_search() -> None:
    """Where one first letter is always right, visits go there once it is known, whatever the prior says of it."""
    asked = settings(simulations=60, c_puct=1.0)
    tree, language = tree_of(asked), Language(1)
    unlikely = sorted(LETTERS, key=lambda token: language.logprobs(())[token])[-2]
    grow(tree, asked, language, lambda ids: ids[0] == unlikely)
    visits = {
        letter: sum(tree.nodes[c].visits for c in tree.nodes[0].children if tree.nodes[c].ids[0] == letter) for letter in LETTERS
    }
    assert visits[unlikely] > 30 > max(count for letter, count in visits.items() if letter != unlikely)


def test_virtual_loss_spreads_the_leaves_of_a_round() -> None:
    asked = settings(leaves=6, virtual_loss=5.0)
    tree, language = tree_of(asked), Language(2)
    grow(tree, asked, language, lambda ids: False, rounds=3)
    wants = tree.wants()
    assert len(wants) == 6 and len({one.ids for one in wants}) == 6
    assert tree.wants() == [] and tree.nodes[0].pending == 6


@pytest.mark.parametrize("more", [{"tokens": 30}, {"simulations": 3}])
def test_budgets(more: dict[str, Any]) -> None:
    asked = settings(**more)
    tree = tree_of(asked)
    settled, _ = grow(tree, asked, Language(0), lambda ids: False)
    if "tokens" in more:
        assert 30 <= tree.tokens < 30 + 10
    else:
        assert len(settled) == 3


def test_the_budget_in_seconds() -> None:
    now = iter(range(100))
    asked = settings(seconds=5.0)
    tree = tree_of(asked, clock=lambda: float(next(now)))
    assert 0 < len(grow(tree, asked, Language(0), lambda ids: False)[0]) < 5


def test_a_completion_without_ids_is_a_simulation_and_ends_that_way() -> None:
    tree = tree_of(settings())
    (wanted,) = tree.wants()
    nodes, ending = tree.observe(wanted, Made((), ()))
    assert (nodes, ending) == ([0], "open")
    assert tree.settle(wanted, 0, None) == 0.0
    assert tree.done and tree.wants() == [] and tree.simulations == 1


def test_steps_of_a_step_end_alone_are_states_of_their_own_and_do_not_go_on_for_ever() -> None:
    asked = settings(max_tokens=10, simulations=50)
    tree = tree_of(asked)
    for _ in range(60):
        for wanted in tree.wants():
            rest = asked.max_tokens - len(wanted.ids)
            nodes, ending = tree.observe(wanted, Made((END,) * (rest + 5), (-0.1,) * (rest + 5)))
            assert ending == "length"
            tree.settle(wanted, nodes[-1], False)
    assert len(tree.nodes) == 11 and tree.done


def test_values_that_are_no_number_are_not_taken() -> None:
    asked = settings(state_weight=1.0)
    tree = tree_of(asked)
    (wanted,) = tree.wants()
    nodes, _ = tree.observe(wanted, Made((3, END, 4), (-1.0, 0.0, -1.0)))
    value = tree.settle(wanted, nodes[-1], None, {nodes[0]: 0.25, nodes[1]: math.nan})
    assert value == 0.0 and tree.value(nodes[0]) == 0.25 and tree.value(nodes[1]) == 0.0
    assert math.isfinite(tree.value(0))


def test_the_models_undo_ends_a_way_and_counts() -> None:
    asked = settings(undo="model")
    tree = tree_of(asked)
    (wanted,) = tree.wants()
    top = (((3, -0.1), (4, -2.5)), ((0, 0.0),), ((UNDO, -0.2), (5, -1.7)))
    nodes, ending = tree.observe(wanted, Made((3, END, UNDO), (-0.1, 0.0, -0.2), top))
    assert (ending, tree.surviving(nodes[-1])) == ("open", (3, END))
    assert tree.settle(wanted, nodes[-1], None) == 0.0
    behind = tree.nodes[nodes[-1]]
    assert behind.undone == 1 and behind.right == -1 and math.log(behind.undo_prior) == pytest.approx(-0.2)
    assert [[tree.lead(way) for way in node.ways or ()] for node in (behind, tree.nodes[0])] == [[(5,)], [(4,)]]


def test_undo_is_chosen_where_the_policy_asks_for_it_and_never_in_circles() -> None:
    asked = settings(max_undos=3, simulations=30, c_puct=5.0)
    tree, language = tree_of(asked), Language(2)
    grow(tree, asked, language, lambda ids: False, rounds=3)
    before = [node.undone for node in tree.nodes]
    for node in tree.nodes[1:]:
        node.undo_prior = 1.0
    wants = tree.wants()
    assert len(wants) == 1 and sum(node.undone for node in tree.nodes) > sum(before)
    assert not grow_on(tree, asked, language)


def grow_on(tree: Tree, asked: SearchSettings, language: Language) -> bool:
    """Whether anything is still waited for after the search has gone to its end with every undo wanted."""
    for wanted in [one for one in tree.wants()]:
        tree.observe(wanted, Made((), ()))
        tree.settle(wanted, wanted.node, None)
    return bool(tree.wants())


def test_walking_back_counts_as_undo() -> None:
    asked = settings(after_right=100, simulations=2)
    tree = tree_of(asked)
    settled, wants = grow(tree, asked, Language(1), lambda ids: False)
    end = next(at for at in range(len(tree.nodes)) if tree.surviving(at) == settled[0][0])
    left = [at for at in tree.path(end) if at not in tree.path(wants[1].node)]
    assert left and all(tree.nodes[at].undone == 1 for at in left)
    assert sum(node.undone for node in tree.nodes) == len(left)


@pytest.mark.parametrize(
    ("prompt", "made", "why"),
    [
        ((), None, "needs a prompt"),
        ((9, UNDO), None, "the undo token is no part"),
        ((9,), Made((3, 4), (-1.0,)), "2 ids with 1 logprobs"),
        ((9,), Made((3,), (-1.0,), ((), ())), "1 ids with 1 logprobs and 2 top"),
    ],
)
def test_bad_input(prompt: tuple[int, ...], made: Made | None, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        tree = Tree(prompt, settings(), WORDS, 0)
        assert made is not None
        tree.observe(tree.wants()[0], made)


def test_what_is_not_waited_for_is_refused() -> None:
    tree = tree_of(settings())
    (wanted,) = tree.wants()
    tree.observe(wanted, Made((3, STOP), (-1.0, 0.0)))
    tree.settle(wanted, 2, False) if len(tree.nodes) > 2 else tree.settle(wanted, 1, False)
    with pytest.raises(ValueError, match="not waited for"):
        tree.observe(wanted, Made((3,), (-1.0,)))
