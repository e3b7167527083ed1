"""Where an undo is asked for, how traces become segments, and the predictor of dynamic masking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pipeline.backtrack.layout import hard, rewind, soft
from pipeline.backtrack.targets import ErrorPredictor, Form, Targets, Weights, dynamic_weights, segments, trace_walk
from pipeline.backtrack.trace import Detour, Role, Trace, WrongTry, build_trace
from pipeline.backtrack.tree import Rewinding, Walk, grow
from pipeline.backtrack.undo import Unit
from tests.pipeline.tiny import END, FORMS, U, decisions, rule

WRONG = (4, 5)
"""Tokens of wrong decisions, and of nothing else: a state is wrong when one of them stands in it."""
right_tokens = st.sampled_from([0, 1, 2, END])


# ---- where undos are asked for ----


@st.composite
def traces(draw: st.DrawFn, unit: Unit) -> Trace:
    """Tries leave the right way within the line at which they begin, as those of the judge do."""

    def detour(way: Sequence[int], start: int, nested: bool) -> Detour:
        at = draw(st.integers(start, len(way)))
        line = next((place for place in range(at, len(way)) if way[place] == END), len(way))
        same = tuple(way[at : draw(st.integers(at, line))])
        rest = draw(st.lists(st.sampled_from([0, 1, 2, END, *WRONG]), max_size=4))
        ids = (*same, draw(st.sampled_from(WRONG)), *rest)
        inner = (detour(ids, len(same) + 1, False),) if nested and unit == "token" and draw(st.booleans()) else ()
        return Detour(at, WrongTry(ids, tuple(token in WRONG for token in ids), inner))

    solution = draw(st.lists(right_tokens, max_size=6))
    return build_trace((6,), solution, [detour(solution, 0, True) for _ in range(draw(st.integers(1, 3)))], rule(unit))


def due(stack: Sequence[int], detect_at: str) -> bool:
    """Whether U is due in a state, by what stands in it."""
    error = next((at for at, token in enumerate(stack) if token in WRONG), None)
    if error is None:
        return False
    return detect_at == "first" or END in stack[error:]


@pytest.mark.parametrize("detect_at", ["first", "step_end", "evidence"])
@pytest.mark.parametrize(("unit", "rewinding"), FORMS)
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_where_the_tree_asks_for_undos(detect_at: Any, unit: Unit, rewinding: Rewinding, data: st.DataObject) -> None:
    """In a wrong state behind the detection point every trained action is U; in a right state none is."""
    trace = data.draw(traces(unit))
    (segment,) = segments([trace], rule(unit), Targets(detect_at=detect_at), Form("rewind", rewinding))
    tree = grow([trace_walk(trace, rule(unit), Targets(detect_at=detect_at))], rule(unit), rewinding)
    asked, emitted = set(), set()
    for action in segment.actions:
        if action.weight == 0:
            assert action.token in WRONG
            continue
        path = tree.path(action.node)
        stack = path[: next((at for at, token in enumerate(path) if token == U), len(path))]  # without a run's U's
        wrong = any(token in WRONG for token in stack)
        if action.ends_run:
            assert wrong and stack != path
        elif action.token == U:
            assert wrong
            asked.add(path)
        else:
            assert action.token not in WRONG
            assert stack == path and (detect_at == "evidence" or not due(path, detect_at))
    for context, token, ends_run in decisions(Walk((6,), trace.ids[1:]), unit, rewinding):
        if token == U and not ends_run or detect_at != "evidence" and not ends_run and due(context, detect_at):
            emitted.add(context)
    event("more than the evidence" if len(asked) > trace.ids.count(U) else "as emitted")
    assert asked == emitted


def test_detection_by_hand() -> None:
    """`4 1 END 0` goes wrong at its first token: U behind the 4, behind END, or at the end of the try."""
    some = WrongTry((4, 1, END, 0), (True, False, False, False))
    trace = build_trace((6,), (2,), [Detour(0, some)], rule("all"))
    assert trace.ids == (6, 4, 1, END, 0, U, 2)
    wanted = {
        name: trace_walk(trace, rule("all"), Targets(detect_at=name)).targets for name in ("first", "step_end", "evidence")
    }  # fmt: skip
    assert wanted == {"first": (4, U, U, U, U, 2), "step_end": (4, 1, END, U, U, 2), "evidence": (4, 1, END, 0, U, 2)}


def test_an_early_undo_weighs_what_an_undo_weighs() -> None:
    trace = build_trace((6,), (2,), [Detour(0, WrongTry((4, 5, 1), (True, True, False)))], rule("all"))
    targets = Targets(detect_at="first", weights=Weights(undo=3.0, consequence=0.5, correction=0.25))
    assert trace_walk(trace, rule("all"), targets).weights == (0, 3, 3, 3, 0.25)
    assert trace_walk(trace, rule("all"), replace(targets, detect_at="evidence")).weights == (0, 0, 0.5, 3, 0.25)


# ---- layouts ----


@pytest.mark.parametrize(("unit", "rewinding"), FORMS)
def test_segments_of_each_form(unit: Unit, rewinding: Rewinding) -> None:
    """One tree of all traces, or a row for each, with the settings of the form."""
    some = [
        build_trace((6, 2), (1, 0), [Detour(1, WrongTry((4, 2), (True, False)))], rule(unit)),
        build_trace((6, 2), (1, 1), (), rule(unit)),
    ]
    targets = Targets("span", "first", True)
    walks = [trace_walk(trace, rule(unit), targets) for trace in some]

    def laid(form: Form) -> Any:
        return segments(some, rule(unit), targets, form)

    assert laid(Form("rewind", rewinding)) == [rewind(grow(walks, rule(unit), rewinding), once=True)]
    assert laid(Form("soft")) == [soft(walk) for walk in walks]
    for hide in (False, True):
        for positions in ("kept", "depth"):
            form = Form("hard", hide_undos=hide, positions=positions)  # type: ignore[arg-type]
            expected = [hard(walk, rule(unit), hide_undos=hide, positions=form.positions) for walk in walks]
            assert laid(form) == expected
    assert [segment.ids for segment in laid(Form("soft"))] == [trace.ids for trace in some]
    assert len(laid(Form("rewind", rewinding))[0].ids) < sum(len(trace.ids) for trace in some)


@pytest.mark.parametrize("context", ["soft", "hard", "rewind"])
@pytest.mark.parametrize(("unit", "rewinding"), FORMS)
def test_an_error_at_position_0_is_masked_in_every_form(context: Any, unit: Unit, rewinding: Rewinding) -> None:
    trace = build_trace((6, 2), (1, 0), [Detour(0, WrongTry((4, 1), (True, False)))], rule(unit))
    (segment,) = segments([trace], rule(unit), Targets(), Form(context, rewinding))
    behind_the_prompt = [(action.token, action.weight) for action in segment.actions if action.node == 1]
    assert (4, 0.0) in behind_the_prompt
    if context == "rewind":
        assert behind_the_prompt == [(4, 0.0), (1, 1.0)]
    assert sum(action.weight for action in segment.actions if action.token == U and not action.ends_run) == trace.ids.count(U)


@pytest.mark.parametrize("unit", ["token", "step", "all"])
def test_an_empty_error_is_refused(unit: Unit) -> None:
    for wrong_try in (WrongTry((), ()), WrongTry((1, 2), (False, False))):
        with pytest.raises(ValueError, match="a try without a wrong token"):
            build_trace((6,), (1, 0), [Detour(1, wrong_try)], rule(unit))


@pytest.mark.parametrize("context", ["soft", "hard", "rewind"])
def test_an_undo_token_in_the_prompt_is_refused(context: Any) -> None:
    with pytest.raises(ValueError, match="the prompt holds the undo token"):
        build_trace((6, U), (1,), (), rule("token"))
    with pytest.raises(ValueError, match="the prompt of walk 1 holds the undo token"):
        grow([Walk((6, 2), (1,)), Walk((6, U), (1,))], rule("token"))
    forged = Trace((6, U, 1), (Role.PROMPT, Role.PROMPT, Role.CORRECTION))
    if context == "rewind":
        with pytest.raises(ValueError, match="the prompt of walk 0 holds the undo token"):
            segments([forged], rule("token"), Targets(), Form(context))


def test_a_trace_without_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="without a prompt"):
        segments([build_trace((), (1,), (), rule("token"))], rule("token"), Targets(), Form())


# ---- dynamic masking ----


def separable(count: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States and tokens that disagree in sign along one direction where the token is wrong: neither alone says so."""
    torch.manual_seed(0)
    hidden, embedding = torch.randn(2, count, width)
    wrong = torch.rand(count) < 0.5
    hidden[:, 0] = torch.where(torch.rand(count) < 0.5, 3.0, -3.0)
    embedding[:, 0] = torch.where(wrong, -hidden[:, 0], hidden[:, 0])
    return hidden, embedding, wrong


def test_the_predictor_learns_what_can_be_told_apart() -> None:
    hidden, embedding, wrong = separable(400, 8)
    predictor = ErrorPredictor(8)
    optimizer = torch.optim.Adam(predictor.parameters(), 0.02)
    before = float(predictor.loss(predictor(hidden[:200], embedding[:200]), wrong[:200]).detach())
    for _ in range(150):
        optimizer.zero_grad()
        loss = predictor.loss(predictor(hidden[:200], embedding[:200]), wrong[:200])
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1 < before
    unseen = predictor(hidden[200:], embedding[200:])
    assert unseen.shape == (200,)
    assert ((unseen > 0) == wrong[200:]).float().mean() > 0.9
    weights = dynamic_weights(unseen)
    assert weights[~wrong[200:]].mean() > 0.8 > 0.2 > weights[wrong[200:]].mean()


def test_the_loss_is_cross_entropy_against_the_roles() -> None:
    logits, wrong = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([True, False, False])
    probs = torch.sigmoid(logits)
    by_hand = -torch.stack([probs[0].log(), (1 - probs[1]).log(), (1 - probs[2]).log()]).mean()
    torch.testing.assert_close(ErrorPredictor(4).loss(logits, wrong), by_hand)


def test_the_predictor_teaches_the_model_nothing() -> None:
    hidden, embedding, wrong = separable(12, 8)
    model = torch.nn.Linear(8, 8)
    states, rows = model(hidden), torch.nn.Parameter(embedding)
    predictor = ErrorPredictor(8)
    predictor.loss(predictor(states, rows), wrong).backward()
    assert model.weight.grad is None and rows.grad is None
    assert all(part.grad is not None and part.grad.abs().max() > 0 for part in predictor.parameters())


@given(st.lists(st.floats(-15, 15), min_size=1, max_size=8))
def test_dynamic_weights(values: list[float]) -> None:
    """Between 0 and 1, falling with the logit, and no gradient comes back through them."""
    logits = torch.tensor(values, requires_grad=True)
    weights = dynamic_weights(logits * 1.0)
    assert weights.shape == logits.shape and not weights.requires_grad
    assert ((weights > 0) & (weights < 1)).all()
    torch.testing.assert_close(weights, 1 / (1 + logits.detach().exp()), rtol=1e-3, atol=1e-6)
    order = logits.detach().argsort()
    assert (weights[order].diff() <= 0).all()
    loss = (weights * torch.ones(len(values), requires_grad=True)).sum()
    loss.backward()
    assert logits.grad is None
