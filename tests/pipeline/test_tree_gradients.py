"""What training on the tree does to the weights: masked decisions teach nothing, and the rest is what clean training would do.

Everything in fp64 and with losses summed, unless a test says otherwise.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from pipeline.backtrack.layout import IGNORE, Layout, Segment, hard, lay_out, rewind, soft
from pipeline.backtrack.targets import Targets, trace_walk
from pipeline.backtrack.trace import Trace, WrongTry
from pipeline.backtrack.tree import Rewinding, Walk, grow
from pipeline.backtrack.undo import Unit, apply_undo
from tests.pipeline.tiny import U, forward, plain, rule, tiny_model, trace_at

UNITS: list[Unit] = ["token", "step", "all"]
PROMPT, PREFIX, CORRECTION = [5, 2], [1, 3], [6, 0, 3]
TRIES = [WrongTry((4, 2, 0), (True, True, False)), WrongTry((2,), (True,))]
ERRORS = {4, 2}  # wrong decisions of the tries, all in states of their own
model_of = functools.cache(tiny_model)


def trace(unit: Unit) -> Trace:
    return trace_at(PROMPT, PREFIX, TRIES, CORRECTION, rule(unit))


def taught(unit: Unit, rewinding: Rewinding = "immediate") -> Segment:
    return rewind(grow([trace_walk(trace(unit), rule(unit), Targets())], rule(unit), rewinding), once=True)


def loss_of(logits: torch.Tensor, layout: Layout, labels: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
    chosen = logits[layout.row, layout.column]
    return torch.nn.functional.cross_entropy(chosen, labels, ignore_index=IGNORE, reduction=reduction)


def gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("form", ["rewind", "soft"])
def test_masked_decisions_have_no_logit_gradient_but_are_seen(name: str, unit: Unit, form: str) -> None:
    """Exactly zero where only masked targets are predicted; the hidden state there still serves what comes after it.

    With unit `token` and immediate rewinding there is no such place: in each wrong state a U is taught. Hence deferred.
    """
    model = model_of(name)
    layout = lay_out([[taught(unit, "deferred") if form == "rewind" else soft(trace_walk(trace(unit), rule(unit), Targets()))]])
    out = forward(model, layout, output_hidden_states=True)
    out.logits.retain_grad()
    out.hidden_states[1].retain_grad()  # behind the first of two layers
    loss_of(out.logits, layout, layout.labels()).backward()
    model.zero_grad()
    carrying = set(layout.column[layout.weight > 0].tolist())
    masked = set(layout.column[layout.weight == 0].tolist()) - carrying
    assert masked
    for place in masked:
        assert torch.equal(out.logits.grad[0, place], torch.zeros_like(out.logits.grad[0, place]))
        assert out.hidden_states[1].grad[0, place].abs().max() > 1e-6
    assert all(out.logits.grad[0, place].abs().max() > 1e-6 for place in carrying)


@pytest.mark.parametrize("unit", UNITS)
def test_undo_looks_at_the_error(unit: Unit) -> None:
    """d log p(U) / d embedding of the wrong token it takes back is not zero: there is something to detect it by."""
    model, segment = model_of("llama"), taught(unit)
    layout = lay_out([[segment]])
    embeddings = model.get_input_embeddings()(layout.input_ids).detach().requires_grad_()
    logprobs = forward(model, layout, inputs_embeds=embeddings).logits.log_softmax(-1)
    undos = [action.node for action in segment.actions if action.token == U]
    assert undos
    sees = layout.attention_mask()[0, 0]
    for node in undos:
        (grad,) = torch.autograd.grad(logprobs[0, node, U], embeddings, retain_graph=True)
        norms = grad[0].norm(dim=-1)
        wrong = [at for at in range(len(segment.ids)) if at >= 4 and segment.ids[at] in ERRORS and sees[node, at]]
        assert wrong and all(norms[at] > 1e-6 for at in wrong)
        assert torch.equal(norms[~sees[node]], torch.zeros_like(norms[~sees[node]]))  # and at nothing it cannot see


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_full_gradient_is_masked_plus_error(reduction: str) -> None:
    """True of sums. Means divide by numbers of targets that differ, so masking then also turns up what is left."""
    model = model_of("llama")
    layout = lay_out([[soft(trace_walk(trace("step"), rule("step"), Targets()))]])
    logits = forward(model, layout).logits
    error = torch.where(layout.weight > 0, IGNORE, layout.target)
    full, masked, of_error = (
        gradient(model, loss_of(logits, layout, labels, reduction)) for labels in (layout.target, layout.labels(), error)
    )
    gap = (full - masked - of_error).abs().max()
    assert gap < 1e-10 if reduction == "sum" else gap > 1e-3


def clean_ids(unit: Unit) -> tuple[int, ...]:
    one = trace(unit)
    return one.ids[: one.prompt_length] + apply_undo(one.ids[one.prompt_length :], rule(unit)).surviving


def clean_loss(model: Any, ids: tuple[int, ...], start: int) -> torch.Tensor:
    logprobs = plain(model, ids)
    return -torch.stack([logprobs[at - 1, ids[at]] for at in range(start, len(ids))]).sum()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("unit", UNITS)
def test_rewind_loss_is_clean_loss_plus_detection_loss(name: str, unit: Unit) -> None:
    """Loss and gradient: the ordinary fine-tuning of the surviving text, and the states that hold an error on top."""
    model, layout = model_of(name), lay_out([[taught(unit)]])
    loss = loss_of(forward(model, layout).logits, layout, layout.labels())
    tree = grow([trace_walk(trace(unit), rule(unit), Targets())], rule(unit), "immediate")
    right = clean_ids(unit)
    parts = [clean_loss(model, right, len(PROMPT))]
    detected = {
        (tree.path(a.node), a.token) for a in tree.actions if a.weight and tree.path(a.node) != right[: tree.depth[a.node] + 1]
    }
    parts += [-plain(model, context)[-1, token] for context, token in sorted(detected)]
    assert len(parts) == 1 + {"token": 5, "step": 3, "all": 3}[unit]  # the U's, and the consequence 0
    slow = torch.stack(parts).sum()
    torch.testing.assert_close(loss, slow, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient(model, loss), gradient(model, slow), rtol=0, atol=1e-9)


def test_only_rewinding_gives_the_clean_gradient() -> None:
    """On the correction's tokens: soft and hard rows show the model something that decoding from the clean state would not."""
    model, walk = model_of("llama"), trace_walk(trace("token"), rule("token"), Targets())
    first = len(walk.ids) - len(CORRECTION)
    right = clean_ids("token")
    clean = gradient(model, clean_loss(model, right, len(right) - len(CORRECTION)))

    def cosine(segment: Segment) -> float:
        layout = lay_out([[segment]])
        wanted = torch.tensor([action.step >= first and not action.ends_run for action in layout.actions])
        labels = torch.where(wanted, layout.target, IGNORE)
        found = gradient(model, loss_of(forward(model, layout).logits, layout, labels))
        return torch.nn.functional.cosine_similarity(clean, found, dim=0).item()

    assert cosine(rewind(grow([walk], rule("token")))) > 1 - 1e-12
    assert cosine(rewind(grow([walk], rule("token"), "immediate"))) > 1 - 1e-12
    assert cosine(soft(walk)) < 0.99
    assert cosine(hard(walk, rule("token"))) < 0.99
    assert cosine(soft(Walk(right[:2], right[2:]))) <= 1 + 1e-12
