"""The mask is the ancestor relation, however it is written; segments of a row stay apart; targets are where they belong."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from pipeline.backtrack.layout import IGNORE, Segment, action_logprobs, hard, intervals, lay_out, rewind, soft
from pipeline.backtrack.targets import Targets, trace_walk
from pipeline.backtrack.trace import WrongTry
from pipeline.backtrack.tree import ROOT, TokenTree, Walk, grow
from tests.pipeline.tiny import VOCABULARY, U, forward, rule, score, slow_logprobs, tiny_model, trace_at

model_of = functools.cache(tiny_model)
parents = st.lists(st.integers(0, 10**6), max_size=24).map(
    lambda draws: (ROOT, *(draw % node for node, draw in enumerate(draws, start=1)))
)
WALKS = [Walk((5, 2), (1, 0, U, U, 4, 1, U, 6)), Walk((5, 2), (1, 0, 2)), Walk((5, 2), (U, 1, U, 3))]


def tree_of(parent: tuple[int, ...]) -> TokenTree:
    return TokenTree(parent, tuple(node % VOCABULARY for node in range(len(parent))))


def ancestors(parent: tuple[int, ...]) -> torch.Tensor:
    """[nodes, nodes] By walking up."""
    sees = torch.zeros(len(parent), len(parent), dtype=torch.bool)
    for node in range(len(parent)):
        above = node
        while above != ROOT:
            sees[node, above] = True
            above = parent[above]
    return sees


def ancestors_by_squaring(parent: tuple[int, ...]) -> torch.Tensor:
    sees = torch.eye(len(parent))
    for node, above in enumerate(parent[1:], start=1):
        sees[node, above] = 1
    for _ in range(len(parent).bit_length()):
        sees = (sees @ sees).clamp(max=1)
    return sees.bool()


def several(segments: list[tuple[int, ...]], tokens: int) -> torch.Tensor:
    """Block by block; padding sees itself."""
    blocks = [ancestors(parent) for parent in segments]
    rest = tokens - sum(len(block) for block in blocks)
    return torch.block_diag(*blocks, torch.eye(rest, dtype=torch.bool)) if rest else torch.block_diag(*blocks)


@settings(deadline=None)
@given(parents)
def test_mask_is_the_ancestor_relation(parent: tuple[int, ...]) -> None:
    layout = lay_out([[rewind(tree_of(parent))]])
    slow = ancestors(parent)
    assert layout.attention_mask().shape == (1, 1, len(parent), len(parent))
    assert torch.equal(layout.attention_mask()[0, 0], slow)
    assert torch.equal(ancestors_by_squaring(parent), slow)
    assert torch.equal(layout.position_ids[0], slow.sum(1) - 1)
    enter, leave = intervals(parent)
    assert sorted(enter) == list(range(len(parent)))
    assert [end - start for start, end in zip(enter, leave, strict=True)] == slow.sum(0).tolist()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(parents, min_size=1, max_size=3), min_size=1, max_size=3), st.integers(0, 5))
def test_rows_of_several_trees(rows: list[list[tuple[int, ...]]], spare: int) -> None:
    """Block-diagonal, and flex attention's form of the mask is the dense one."""
    width = max(sum(len(parent) for parent in row) for row in rows) + spare
    layout = lay_out([[rewind(tree_of(parent)) for parent in row] for row in rows], width, pad_id=7)
    mask = layout.attention_mask()
    for number, row in enumerate(rows):
        assert torch.equal(mask[number, 0], several(row, width))
        positions = [depth for parent in row for depth in tree_of(parent).depth]
        assert layout.position_ids[number].tolist() == positions + [0] * (width - len(positions))
        assert layout.input_ids[number, len(positions) :].tolist() == [7] * (width - len(positions))
    assert torch.equal(create_mask(layout.mask_mod(), len(rows), 1, width, width, device="cpu"), mask)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_takes_the_mask() -> None:
    layout = lay_out([[rewind(grow(WALKS, rule("token")))], [soft(WALKS[0]), hard(WALKS[2], rule("token"))]])
    rows, width = layout.input_ids.shape
    torch.manual_seed(0)
    query, key, value = torch.randn(3, rows, 2, width, 16).unbind()
    block_mask = create_block_mask(layout.mask_mod(), rows, None, width, width, device="cpu")
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=layout.attention_mask())
    torch.testing.assert_close(flex_attention(query, key, value, block_mask=block_mask), dense)


def test_a_small_tree_by_hand() -> None:
    """5 -> 1 -> 2, taken back, then 3: the place behind 1 carries the wrong token, the place behind 2 the undo."""
    layout = lay_out([[rewind(grow([Walk((5,), (1, 2, U, 3))], rule("token"), "immediate"))]])
    assert layout.input_ids.tolist() == [[5, 1, 2, 3]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 2]]
    assert layout.attention_mask().int()[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert (layout.row.tolist(), layout.column.tolist(), layout.target.tolist()) == ([0] * 4, [0, 1, 2, 1], [1, 2, U, 3])


def test_hard_by_hand() -> None:
    """Row 1 2 U 3 after 5: from the U on, the 2 is hidden; the U is seen unless undos are hidden too."""
    walk = Walk((5,), (1, 2, U, 3))
    for hide, undo_seen in ((False, 1), (True, 0)):
        layout = lay_out([[hard(walk, rule("token"), hide_undos=hide, positions="depth")]])
        assert layout.position_ids.tolist() == [[0, 1, 2, 2, 2]]
        assert layout.attention_mask().int()[0, 0].tolist() == [
            [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, undo_seen, 1],
        ]  # fmt: skip
    assert lay_out([[hard(walk, rule("token"))]]).position_ids.tolist() == [[0, 1, 2, 3, 4]]


def test_company_changes_nothing() -> None:
    """What shares the batch with a segment leaves its log-probabilities alone."""
    model = model_of("llama")
    segments: list[Segment] = [
        rewind(grow(WALKS, rule("token"))),
        rewind(grow([Walk((0, 4), (2, U, 6))], rule("step"))),
        *(soft(walk, number) for number, walk in enumerate(WALKS)),
        *(hard(walk, rule("all"), number, True, "depth") for number, walk in enumerate(WALKS)),
    ]
    alone = torch.cat([score(model, segment) for segment in segments])
    layout = lay_out([segments[:3], segments[3:4], segments[4:]], 64)
    with torch.no_grad():
        together = action_logprobs(forward(model, layout).logits, layout)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_a_target_off_by_one_is_noticed() -> None:
    """The equality with plain forwards is no accident of forgiving numbers: one place to either side breaks it."""
    model, tree = model_of("llama"), grow(WALKS, rule("token"))
    layout = lay_out([[rewind(tree)]])
    with torch.no_grad():
        logprobs = forward(model, layout).logits.log_softmax(-1)
    plain_actions = torch.tensor([not action.ends_run for action in layout.actions])
    slow = slow_logprobs(model, WALKS, "token", "deferred")[plain_actions]
    width = layout.input_ids.shape[1]
    for shift in (-1, 0, 1):
        column = (layout.column + shift).clamp(0, width - 1)
        error = (logprobs[layout.row, column, layout.target][plain_actions] - slow).abs()
        assert (error.max() < 1e-9) if shift == 0 else (error.median() > 0.1)


def test_bans_are_renormalised() -> None:
    model = model_of("llama")
    banned = (frozenset({0, U}), frozenset[int](), frozenset({2}), frozenset({U}))
    walk = Walk((5,), (1, 2, U, 3), banned=banned)
    got = score(model, rewind(grow([walk], rule("token"), "immediate")))
    contexts = [(5,), (5, 1), (5, 1, 2), (5, 1)]
    for logprob, context, token, ban in zip(got, contexts, walk.ids, banned, strict=True):
        with torch.no_grad():
            probs = model(torch.tensor([context])).logits[0, -1].softmax(-1)
        left = sum(probs[id] for id in range(VOCABULARY) if id not in ban)
        torch.testing.assert_close(logprob, (probs[token] / left).log(), rtol=0, atol=1e-9)


def test_labels_of_traces_and_repeats() -> None:
    """Unit `all` writes the prefix again, in the same states: on the tree it is taught once, in a row it is another place."""
    walk = trace_walk(trace_at([5], [1, 2], [WrongTry((4,), (True,))], [6], rule("all")), rule("all"), Targets())
    assert walk.ids == (1, 2, 4, U, 1, 2, 6)
    twice = lay_out([[rewind(grow([walk], rule("all")))]])
    once = lay_out([[rewind(grow([walk], rule("all")), once=True)]])
    assert twice.labels().tolist() == lay_out([[soft(walk)]]).labels().tolist() == [1, 2, IGNORE, U, 1, 2, 6]
    assert once.labels().tolist() == [1, 2, IGNORE, U, 6]


def test_a_row_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="row 1 holds 20 tokens, a row has room for 12"):
        lay_out([[soft(WALKS[0])], [soft(WALKS[0]), soft(WALKS[0])]], 12)
    empty = lay_out([])
    assert empty.input_ids.shape == (0, 0) and not empty.actions
