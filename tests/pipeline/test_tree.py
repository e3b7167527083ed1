"""One forward pass over the token tree says what every single decision would have been given on its own."""

from __future__ import annotations

import functools
import random
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from pipeline.backtrack.layout import hard, rewind, soft
from pipeline.backtrack.targets import Targets, trace_walk
from pipeline.backtrack.trace import Role, WrongTry
from pipeline.backtrack.tree import Action, Rewinding, TokenTree, Walk, grow
from pipeline.backtrack.undo import Unit, apply_undo
from tests.pipeline.tiny import FORMS, U, decisions, plain, rule, score, slow_logprobs, tiny_model, trace_at

MODELS = ["llama", "qwen2", "gpt2"]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
model_of = functools.cache(tiny_model)

prompts = st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple)
completions = st.lists(st.sampled_from([0, 1, 2, 3, 3, 6, U, U, U]), max_size=12).map(tuple)
groups = st.builds(lambda prompt, many: [Walk(prompt, ids) for ids in many], prompts, st.lists(completions, min_size=1, max_size=3))
forms = st.sampled_from(FORMS)


def random_walks(count: int, length: int) -> list[Walk]:
    """Few different tokens, so that walks share and branch; the first begins with an undo, and undos are nested."""
    rng = random.Random(0)
    ids = [tuple(rng.choice([0, 1, 1, 3, U, U]) for _ in range(length)) for _ in range(count)]
    return [Walk((5, 2, 4), (U, *ids[0], U, U, U, 0)), *(Walk((5, 2, 4), one) for one in ids[1:])]


@settings(deadline=None)
@given(groups, forms)
def test_nodes_are_the_states_and_no_more(walks: list[Walk], form: tuple[Unit, Rewinding]) -> None:
    """An action's node is its visible context; the nodes are all beginnings of what was ever seen, each once."""
    unit, rewinding = form
    tree = grow(walks, rule(unit), rewinding)
    seen = {walk.prompt for walk in walks}
    expected = []
    for number, walk in enumerate(walks):
        for context, token, ends_run in decisions(walk, unit, rewinding):
            expected.append((number, context, token, ends_run))
            if not ends_run and (token != U or rewinding == "deferred"):
                seen.add((*context, token))
    assert [(a.walk, tree.path(a.node), a.token, a.ends_run) for a in tree.actions] == expected
    paths = [tree.path(node) for node in range(len(tree.parent))]
    assert len(set(paths)) == len(paths)
    assert set(paths) == {context[:end] for context in seen for end in range(1, len(context) + 1)}
    assert [len(path) - 1 for path in paths] == list(tree.depth)
    steps = [(a.walk, a.token) for a in tree.actions if not a.ends_run]
    assert steps == [(number, token) for number, walk in enumerate(walks) for token in walk.ids]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("unit", "rewinding"), FORMS)
def test_tree_equals_plain_forwards(name: str, dtype: torch.dtype, unit: Unit, rewinding: Rewinding) -> None:
    model, walks = model_of(name, dtype), random_walks(3, 12)
    fast = score(model, rewind(grow(walks, rule(unit), rewinding)))
    slow = slow_logprobs(model, walks, unit, rewinding)
    torch.testing.assert_close(fast, slow, rtol=0, atol=TOLERANCE[dtype])


@settings(deadline=None, max_examples=15)
@given(groups, forms, st.sampled_from(MODELS))
def test_tree_equals_plain_forwards_on_any_walks(walks: list[Walk], form: tuple[Unit, Rewinding], name: str) -> None:
    unit, rewinding = form
    fast = score(model_of(name), rewind(grow(walks, rule(unit), rewinding)))
    torch.testing.assert_close(fast, slow_logprobs(model_of(name), walks, unit, rewinding), rtol=0, atol=1e-9)


def test_eager_attention_too() -> None:
    model, walks = model_of("llama", torch.float32, "eager"), random_walks(2, 10)
    slow = slow_logprobs(model, walks, "token", "immediate")
    torch.testing.assert_close(score(model, rewind(grow(walks, rule("token"), "immediate"))), slow, rtol=0, atol=1e-4)


def decode(model: Any, walk: Walk, unit: Unit, rewinding: Rewinding) -> torch.Tensor:
    """Step by step with a KV cache that is cropped at each undo; the token on top goes in again for its logits."""
    cache, out = DynamicCache(config=model.config), []

    def feed(ids: tuple[int, ...]) -> torch.Tensor:
        begin = cache.get_seq_length()
        places = torch.arange(begin, begin + len(ids)).unsqueeze(0)
        logits = model(input_ids=torch.tensor([ids]), position_ids=places, past_key_values=cache, use_cache=True).logits
        return logits[0, -1].log_softmax(-1)  # type: ignore[no-any-return]

    def crop(ids: tuple[int, ...]) -> torch.Tensor:
        top = walk.prompt + apply_undo(ids, rule(unit)).surviving
        cache.crop(len(top) - 1)
        assert cache.get_seq_length() == len(top) - 1
        return feed(top[-1:])

    with torch.no_grad():
        logprobs = feed(walk.prompt)
        for step, token in enumerate(walk.ids):
            if rewinding == "deferred" and token != U and step and walk.ids[step - 1] == U:
                out.append((1 - logprobs[U].exp()).log())
                logprobs = crop(walk.ids[:step])
            out.append(logprobs[token])
            rewinds = token == U and rewinding == "immediate"
            logprobs = crop(walk.ids[: step + 1]) if rewinds else feed((token,))
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("unit", "rewinding"), FORMS)
def test_tree_equals_decoding_with_a_cropped_cache(name: str, dtype: torch.dtype, unit: Unit, rewinding: Rewinding) -> None:
    model, walks = model_of(name, dtype), random_walks(3, 12)
    slow = torch.cat([decode(model, walk, unit, rewinding) for walk in walks])
    fast = score(model, rewind(grow(walks, rule(unit), rewinding)))
    torch.testing.assert_close(fast, slow, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", MODELS)
def test_soft_equals_a_plain_forward(name: str) -> None:
    for walk in random_walks(3, 12):
        logprobs = plain(model_of(name), walk.prompt + walk.ids)
        slow = torch.stack([logprobs[len(walk.prompt) + step - 1, token] for step, token in enumerate(walk.ids)])
        torch.testing.assert_close(score(model_of(name), soft(walk)), slow, rtol=0, atol=1e-9)


def slow_hard(model: Any, walk: Walk, unit: Unit, hide_undos: bool, positions: str) -> torch.Tensor:
    """The mask token by token: of what was emitted, a token sees what still stands after it, perhaps undos, and itself."""
    start, ids = len(walk.prompt), walk.prompt + walk.ids
    mask = torch.eye(len(ids), dtype=torch.bool)
    places = list(range(len(ids)))
    for i in range(len(ids)):
        undone = apply_undo(walk.ids[: max(0, i + 1 - start)], rule(unit))
        if positions == "depth" and i >= start:
            places[i] = start + len(undone.surviving) - (ids[i] != U)
        for j in range(i):
            stands = j < start or j - start in undone.source
            mask[i, j] = stands or (ids[j] == U and j >= start and not hide_undos)
    logits = model(
        torch.tensor([ids]), position_ids=torch.tensor([places]), attention_mask=mask[None, None], use_cache=False
    ).logits
    logprobs = logits[0].log_softmax(-1)
    return torch.stack([logprobs[start + step - 1, token] for step, token in enumerate(walk.ids)])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("unit", ["token", "step", "all"])
@pytest.mark.parametrize("hide_undos", [False, True])
@pytest.mark.parametrize("positions", ["kept", "depth"])
def test_hard_equals_a_mask_from_the_definition(
    name: str, unit: Unit, hide_undos: bool, positions: Literal["kept", "depth"]
) -> None:
    model = model_of(name)
    for walk in random_walks(3, 10):
        fast = score(model, hard(walk, rule(unit), hide_undos=hide_undos, positions=positions))
        with torch.no_grad():
            slow = slow_hard(model, walk, unit, hide_undos, positions)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-9)


def test_a_trace_becomes_a_wrong_and_a_right_branch() -> None:
    tries = [WrongTry((1, 2, 4), (True, False, True)), WrongTry((6,), (True,))]
    trace = trace_at([5], [2, 3], tries, [0, 3], rule("step"))
    walk = trace_walk(trace, rule("step"), Targets())
    tree = grow([walk], rule("step"))
    assert [tree.path(node) for node in (5, 6, 8)] == [(5, 2, 3, 1, 2, 4), (5, 2, 3, 6), (5, 2, 3, 0, 3)]
    assert [(a.node, a.token) for a in tree.actions] == [
        (0, 2), (1, 3), (2, 1), (3, 2), (4, 4), (5, U), (2, 6), (6, U), (2, 0), (7, 3),
    ]  # fmt: skip
    span = grow([trace_walk(trace, rule("step"), Targets("span"))], rule("step"))
    errors = [step for step, role in enumerate(trace.roles[1:]) if role == Role.ERROR]
    assert [a.step for a in tree.actions if not a.weight] == errors == [2, 4, 6]
    assert [a.step for a in span.actions if not a.weight] == [2, 3, 4, 6]


def test_what_is_known_of_a_walk_travels_with_its_actions() -> None:
    walk = Walk((5,), (1, U, 2), (-0.5, -1.0, -2.0), (frozenset(), frozenset({3}), frozenset({1, U})), weights=(0, 1, 0))
    end = Action(2, U, 0, 2, 1, -1, True)
    last = Action(0, 2, 0, 2, 0, -1, False, -2.0, frozenset({1, U}))
    first = [Action(0, 1, 0, 0, 0, -1, False, -0.5), Action(1, U, 0, 1, 1, -1, False, -1.0, frozenset({3}))]
    assert grow([walk], rule("token"), "deferred").actions == (*first, end, last)
    assert grow([walk], rule("token"), "immediate").actions == (*first, last)


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ((), "a tree of 0 tokens"),
        ((-1, 0, -1), "two roots, nodes 0 and 2"),
        ((-1, 2, 1), "node 1 has parent 2, which does not come before it"),
        ((-1, 1), "node 1 has parent 1"),
        ((0,), "node 0 has parent 0"),
        ((1, -1), "node 0 has parent 1"),
        ((-1, -2), "node 1 has parent -2"),
    ],
)
def test_refused(parent: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenTree(parent, (0,) * len(parent))


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="2 tokens with 1 parents"):
        TokenTree((-1,), (0, 1))
    with pytest.raises(ValueError, match="an action at node 1 of a tree of 1 nodes"):
        TokenTree((-1,), (0,), (Action(1, 0),))
    with pytest.raises(ValueError, match="without a prompt"):
        Walk((), (1,))
    with pytest.raises(ValueError, match="2 ids with 1 logprobs"):
        Walk((0,), (1, 2), logprobs=(0.5,))
    with pytest.raises(ValueError, match="begin with the same token"):
        grow([Walk((0,), ()), Walk((1,), ())], rule("token"))
