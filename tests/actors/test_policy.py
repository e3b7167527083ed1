"""Log-probabilities of whole groups on their trees: those of a forward for every state, and those the decoder drew by."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.decode import HfDecoder
from actors.policy import Policy, Rows, Sampled, batches, score, trees
from actors.segments import attends_by_segment
from pipeline.backtrack.cursor import DecodeRequest, Decoding
from pipeline.backtrack.layout import action_logprobs, lay_out, rewind
from pipeline.backtrack.tree import Rewinding, Walk, grow
from pipeline.backtrack.undo import UndoRule, Unit
from tests.pipeline.tiny import FORMS, VOCABULARY, U, decisions, forward, plain, rule, tiny_model

ROW = 64


@functools.cache
def model_of(by_segment: bool) -> Any:
    model = tiny_model("llama")
    assert not by_segment or attends_by_segment(model)
    return model


@st.composite
def groups(draw: st.DrawFn) -> tuple[Policy, list[list[int]], list[Sampled]]:
    """Several groups of random walks with undos; what was emitted is never forbidden, anything else may be."""
    unit, rewinding = draw(st.sampled_from(FORMS))
    vocabulary = draw(st.sampled_from([None, VOCABULARY]))
    policy = Policy(rule(unit), rewinding, draw(st.sampled_from([0.0, 1.5, -2.0])), vocabulary)
    numbers, rollouts = [], []
    for prompt in ((5, 2), (5,), (0, 4, 1))[: draw(st.integers(1, 3))]:
        numbers.append(list(range(len(rollouts), len(rollouts) + draw(st.integers(1, 4)))))
        for _ in numbers[-1]:
            ids = draw(st.lists(st.sampled_from([1, 1, 2, 3, 6, U, U]), max_size=10))
            bans = [draw(st.sets(st.sampled_from([0, 1, 2, 6, U, U]), max_size=3)) - {token} for token in ids]
            if policy.rewinding == "deferred" and unit == "token":
                # Behind a run U is forbidden, or the run and a new one could not be told apart.
                bans = [ban | ({U} if at and ids[at - 1] == U != ids[at] else set()) for at, ban in enumerate(bans)]
            last = [at for at, token in enumerate(ids) if token == U and ids[at + 1 : at + 2] != [U]]
            closed = frozenset(at for at in last if draw(st.booleans()))
            values = st.lists(st.floats(-3, 0, width=32), min_size=len(ids), max_size=len(ids))
            walk = Walk(prompt, tuple(ids), tuple(draw(values)), tuple(map(frozenset, bans)), closed=closed)
            rollouts.append(Sampled(walk, tuple(float(at) for at in range(len(ids)))))
    return policy, numbers, rollouts


def slow_score(model: Any, walk: Walk, policy: Policy) -> list[tuple[int, float]]:
    """(id, log-probability) of every action of a walk, from a forward of its own."""
    found, step = [], 0
    for context, token, ends_run in decisions(walk, policy.rule.unit, policy.rewinding):
        if ends_run and step - 1 in walk.closed:
            continue
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context]), use_cache=False).logits[0, -1][: policy.vocabulary]
        logits[policy.rule.undo_id] += policy.undo_bias
        if not ends_run:
            assert walk.banned is not None
            logits[sorted(walk.banned[step])] = -math.inf
            step += 1
        probs = logits.softmax(-1)
        found.append((token, math.log(1 - probs[token] if ends_run else probs[token])))
    return found


def scored(model: Any, rows: Sequence[Rows], policy: Policy) -> dict[int, list[tuple[int, float]]]:
    """By rollout, in the order of its actions: (id, log-probability)."""
    found: dict[int, list[tuple[int, float]]] = {}
    for part in rows:
        with torch.no_grad():
            logprobs, _ = score(model, part, policy)
        for number, token, value in zip(part.rollout.tolist(), part.token.tolist(), logprobs.tolist(), strict=True):
            found.setdefault(number, []).append((token, value))
    return found


def equal(found: list[tuple[int, float]], expected: list[tuple[int, float]], within: float = 1e-5) -> None:
    assert [token for token, _ in found] == [token for token, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected], abs=within)


def rows_of(drawn: Any, row_tokens: int = ROW, rows: int = 8, by_segment: bool = False, dense: int | None = None) -> list[Rows]:
    policy, numbers, rollouts = drawn
    return list(batches(numbers, rollouts, [1.0] * len(rollouts), policy, row_tokens, rows, 0, by_segment, dense))


@pytest.mark.parametrize("by_segment", [False, True])
@settings(deadline=None, max_examples=40)
@given(groups(), st.sampled_from([1, 8]), st.sampled_from([None, 1, 30]))
def test_score_is_that_of_a_forward_for_each_state(by_segment: bool, drawn: Any, rows: int, dense: int | None) -> None:
    policy, _, rollouts = drawn
    found = scored(model_of(by_segment), rows_of(drawn, rows=rows, by_segment=by_segment, dense=dense), policy)
    for number, one in enumerate(rollouts):
        equal(found.get(number, []), slow_score(model_of(False), one.walk, policy))


@settings(deadline=None, max_examples=40)
@given(groups())
def test_score_is_that_of_the_layout(drawn: Any) -> None:
    """Another twin, which knows bans and ends of runs, but no bias and no spare ids."""
    policy, numbers, rollouts = drawn
    policy = replace(policy, undo_bias=0.0, vocabulary=None)
    segments = [rewind(grow([rollouts[n].walk for n in some], policy.rule, policy.rewinding)) for some in numbers]
    layout, model = lay_out([[segment] for segment in segments]), model_of(False)
    with torch.no_grad():
        expected = action_logprobs(forward(model, layout).logits, layout)
    of = [some[action.walk] for some, segment in zip(numbers, segments, strict=True) for action in segment.actions]
    slow: dict[int, list[tuple[int, float]]] = {}
    for number, token, value in zip(of, layout.target.tolist(), expected.tolist(), strict=True):
        slow.setdefault(number, []).append((token, value))
    fast = scored(model, rows_of((policy, numbers, rollouts)), policy)
    assert fast.keys() == slow.keys()
    for number in fast:
        equal(fast[number], slow[number])


def test_ids_beyond_the_vocabulary_have_no_probability() -> None:
    """Spare rows: the undo token is 3 here, and ids from 5 on are never chosen."""
    policy = Policy(UndoRule(3, "token"), "immediate", 0.7, vocabulary=5)
    bans = (frozenset[int](), frozenset({1, 3}), frozenset({3}))
    walk = Walk((4, 2), (1, 2, 0), (0.0,) * 3, bans)
    rows = rows_of((policy, [[0]], [Sampled(walk, (0.0,) * 3)]))
    assert len(rows) == 1
    logits = [plain(model_of(False), (4, 2, *walk.ids[:step]))[-1, :5] + torch.tensor([0, 0, 0, 0.7, 0]) for step in range(3)]
    for step, ban in enumerate(bans):
        logits[step][sorted(ban)] = -math.inf
    expected = [(token, float(some.log_softmax(-1)[token].detach())) for token, some in zip(walk.ids, logits, strict=True)]
    equal(scored(model_of(False), rows, policy)[0], expected)


def test_the_entropy_is_that_of_the_policy_before_any_ban() -> None:
    policy = Policy(rule("token"), "immediate", 1.0)
    walk = Walk((5,), (1, 2), (0.0, 0.0), (frozenset({2}), frozenset()))
    (rows,) = rows_of((policy, [[0]], [Sampled(walk, (0.0, 0.0))]))
    _, entropy = score(model_of(False), rows, policy)
    bias = torch.zeros(VOCABULARY)
    bias[U] = 1.0
    probs = [(plain(model_of(False), context)[-1] + bias).softmax(-1) for context in ((5,), (5, 1))]
    assert entropy.tolist() == pytest.approx([-float((one * one.log()).sum()) for one in probs], abs=1e-5)


# ---- what is known of each action ----


def test_rows_know_the_actions_of_their_rollouts() -> None:
    """A deferred run of two undos that ends by itself: its end has no log-probability, and the advantage of the last undo."""
    policy, ban = Policy(rule("token"), "deferred"), frozenset({U, 2})
    walk = Walk((5,), (1, 2, U, U, 4), (-0.1, -0.2, -0.3, -0.4, -0.5), (*[frozenset[int]()] * 4, ban))
    other = Walk((5,), (1, 6), (-0.6, -0.7), (frozenset(), frozenset({2})))
    drawn = (policy, [[0, 1]], [Sampled(walk, (1.0, 2.0, 3.0, 4.0, 5.0)), Sampled(other, (6.0, 7.0))])
    (rows,) = batches(*drawn[1:], [0.5, 0.25], policy, ROW, 8, 0, False)
    assert rows.token.tolist() == [1, 2, U, U, U, 4, 1, 6]
    assert rows.ends_run.tolist() == [False] * 4 + [True] + [False] * 3
    assert rows.without_undo.tolist() == [False] * 5 + [True] + [False] * 2
    assert rows.banned.tolist() == [[5, 2], [7, 2]]
    assert rows.advantage.tolist() == [1, 2, 3, 4, 4, 5, 6, 7]
    assert rows.behaviour.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4, math.nan, -0.5, -0.6, -0.7], nan_ok=True)
    assert rows.weight.tolist() == [0.5] * 6 + [0.25] * 2 and rows.rollout.tolist() == [0] * 6 + [1] * 2
    assert rows.inputs["input_ids"].tolist() == [[5, 1, 2, U, U, 4, 6]]
    assert len(rows.row) == 5  # places: 5, 1, 2, U, U; 4 and 6 predict nothing


def test_a_closed_run_has_no_end() -> None:
    policy = Policy(rule("token"), "deferred")
    walk = Walk((5,), (1, U, 4), (0.0,) * 3, (frozenset(),) * 2 + (frozenset({U}),), closed=frozenset({1}))
    (rows,) = rows_of((policy, [[0]], [Sampled(walk, (0.0,) * 3)]))
    assert rows.token.tolist() == [1, U, 4] and not rows.ends_run.any()


# ---- packing ----


@settings(deadline=None, max_examples=20)
@given(groups())
def test_a_group_too_long_for_a_row_is_cut_and_scored_alike(drawn: Any) -> None:
    policy, _, rollouts = drawn
    wide, narrow, cheap = (rows_of(drawn, *how) for how in ((256,), (16,), (256, 8, True, 4)))
    assert all(part.inputs["input_ids"].shape[1] <= 16 for part in narrow)
    slow = scored(model_of(False), wide, policy)
    for fast in (scored(model_of(False), narrow, policy), scored(model_of(True), cheap, policy)):
        assert fast.keys() == slow.keys() == {number for number, one in enumerate(rollouts) if one.walk.ids}
        for number in fast:
            equal(fast[number], slow[number])


def test_a_group_is_cut_in_halves() -> None:
    """Those that begin alike stay together."""
    walks = [Walk((5,), (first, *random.Random(seed).choices(range(7), k=8))) for seed, first in enumerate((1, 0, 1, 2, 0))]
    rollouts = [Sampled(walk, (0.0,) * 9) for walk in walks]
    found = trees([[0, 1, 2, 3, 4]], rollouts, Policy(rule("token"), "immediate"), 20)
    assert [len(numbers) for _, numbers in found] == [2, 1, 2]
    assert [walks[number].ids[0] for _, numbers in found for number in numbers] == [0, 0, 1, 1, 2]
    assert all(len(segment.ids) <= 20 for segment, _ in found)


def test_a_group_is_cut_where_that_is_less_work() -> None:
    """Four rollouts of 20 ids that share nothing but the prompt: 81 x (dense + 81) against 4 x 21 x (dense + 21)."""
    policy = Policy(rule("token"), "immediate")
    apart = [Sampled(Walk((5,), (first,) * 20), (0.0,) * 20) for first in (0, 1, 2, 4)]
    together = [Sampled(Walk((5,), (*[1] * 20, last)), (0.0,) * 21) for last in (0, 1, 2, 4)]
    for rollouts, dense, pieces in ((apart, 20, 4), (apart, 10_000, 1), (together, 20, 1), (apart, None, 1)):
        assert len(trees([[0, 1, 2, 3]], rollouts, policy, 100, dense)) == pieces


def test_a_rollout_longer_than_a_row_is_refused() -> None:
    one = Sampled(Walk((5,) * 4, (1,) * 30), (0.0,) * 30)
    with pytest.raises(ValueError, match="takes 34 tokens, rows have 33: raise row_tokens"):
        trees([[0]], [one], Policy(rule("token"), "immediate"), 33)
    assert len(trees([[0]], [one], Policy(rule("token"), "immediate"), 34)) == 1


def test_groups_share_rows_and_all_are_there_once() -> None:
    rollouts = [Sampled(Walk((5,), (1,) * length), (0.0,) * length) for length in (19, 9, 9, 4)]
    found = list(batches([[0], [1], [2], [], [3]], rollouts, [1.0] * 4, Policy(rule("token"), "immediate"), 20, 1, 0, False))
    assert [sorted(set(part.rollout.tolist())) for part in found] == [[0], [1, 2], [3]]
    assert [part.inputs["input_ids"].shape for part in found] == [(1, 20), (1, 20), (1, 5)]


def test_attention_by_segment_needs_no_padding() -> None:
    """As many tokens in a forward pass as the rows have room for, side by side."""
    rollouts = [Sampled(Walk((5,), (1,) * length), (0.0,) * length) for length in (19, 9, 9, 4, 14, 14)]
    policy = Policy(rule("token"), "immediate")
    found = list(batches([[0], [1], [2], [3], [4], [5]], rollouts, [1.0] * 6, policy, 20, 2, 0, True))
    assert [part.inputs["input_ids"].shape for part in found] == [(1, 40), (1, 35)]
    assert sorted({number for part in found for number in part.rollout.tolist()}) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="takes 22 tokens, rows have 20"):  # two rows side by side do not make a longer one
        list(batches([[0]], [Sampled(Walk((5,), (1,) * 21), (0.0,) * 21)], [1.0], policy, 20, 2, 0, True))


# ---- the log-probabilities that rollouts come with ----


def drawn_by_decoder(decoding: Decoding, policy: Policy, prompts: int = 4, group: int = 6) -> Any:
    """Groups of rollouts of the tiny model, and the decoder's log-probabilities."""
    model = model_of(False)
    made = [tuple(random.Random(number).choices(range(7), k=1 + number)) for number in range(prompts)]
    requests = [DecodeRequest(prompt, number * group + sample) for number, prompt in enumerate(made) for sample in range(group)]
    decoded = HfDecoder(model, 8, ROW).decode(requests, decoding)
    walks = [
        Walk(request.prompt_ids, one.ids, one.logprobs, one.banned, closed=one.closed)
        for request, one in zip(requests, decoded, strict=True)
    ]
    rollouts = [Sampled(walk, (0.0,) * len(walk.ids)) for walk in walks]
    return policy, [list(range(at, at + group)) for at in range(0, len(rollouts), group)], rollouts


@pytest.mark.parametrize("ban_tried", [True, False])
@pytest.mark.parametrize("bias", [0.0, 2.0])
@pytest.mark.parametrize(("unit", "rewinding"), FORMS)
def test_rollouts_were_drawn_from_the_policy(unit: Unit, rewinding: Rewinding, bias: float, ban_tried: bool) -> None:
    """Every action that has a log-probability has that of the policy: at temperature 1, with bias and bans."""
    decoding = Decoding(
        "rewind", 1.0, 1.0, 24, 0, rule(unit), rewinding, None, bias, ban_tried, max_undos=6, max_undos_per_state=2, vocabulary=8
    )
    drawn = drawn_by_decoder(decoding, Policy(rule(unit), rewinding, bias, 8))
    known = undone = tried = 0
    for by_segment in (False, True):
        for rows in rows_of(drawn, by_segment=by_segment):
            with torch.no_grad():
                logprobs, _ = score(model_of(by_segment), rows, drawn[0])
            knows = ~rows.behaviour.isnan()
            assert (knows | rows.ends_run).all()
            torch.testing.assert_close(logprobs[knows], rows.behaviour[knows].to(logprobs.dtype), rtol=0, atol=1e-4)
            known, undone, tried = known + int(knows.sum()), undone + int((rows.token == U).sum()), tried + len(rows.banned)
    assert known > 100 and undone > 10 and (tried > 0 or not ban_tried)


@pytest.mark.parametrize("unit", ["step", "all", "token"])
def test_rollouts_of_a_threshold_that_is_at_times_turned_round(unit: Unit) -> None:
    """The behaviour decides U by the threshold or, with probability eps, against it; the id is drawn without U.

    So the policy's log-probability of an id other than U, renormalised without U, is the behaviour's without that of the
    decision, log(1 - eps) or log(eps); and U's is that of the decision alone. Where U was not possible the two are the same.
    """
    eps, threshold = 0.3, 0.12
    how = {"max_undos": 6, "max_undos_per_state": 2, "undo_epsilon": eps, "vocabulary": 8}
    decoding = Decoding("rewind", 1.0, 1.0, 24, 0, rule(unit), "immediate", threshold, **how)  # type: ignore[arg-type]
    policy, numbers, rollouts = drawn_by_decoder(decoding, Policy(rule(unit), "immediate", 0.0, 8))
    parts = rows_of((policy, numbers, rollouts))
    possible = turned = 0
    for rows in parts:
        with torch.no_grad():
            logprobs, _ = score(model_of(False), rows, policy)
            undo, _ = score(model_of(False), replace(rows, token=torch.full_like(rows.token, U), banned=rows.banned[:0]), policy)
        assert not rows.behaviour.isnan().any()
        for at, token in enumerate(rows.token.tolist()):
            behaviour, p_undo = float(rows.behaviour[at]), float(undo[at].exp())
            if rows.without_undo[at]:
                assert token != U and behaviour == pytest.approx(float(logprobs[at]), abs=1e-4)
                continue
            possible += 1
            against = (p_undo > threshold) != (token == U)
            turned += against
            decision = math.log(eps if against else 1 - eps)
            if token == U:
                assert behaviour == pytest.approx(decision, abs=1e-6)
                continue
            bans = [int(other) for action, other in rows.banned.tolist() if action == at]
            banned = torch.tensor([[at, other] for other in bans]).reshape(-1, 2)
            without = replace(rows, without_undo=torch.ones_like(rows.without_undo), banned=banned)
            with torch.no_grad():
                renormalised, _ = score(model_of(False), without, policy)
            assert behaviour == pytest.approx(float(renormalised[at]) + decision, abs=1e-4)
    assert possible > 40 and turned > 10
