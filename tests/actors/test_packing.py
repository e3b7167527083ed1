"""Packed rows teach what their examples alone would teach: same tokens, same targets, same logits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTTrainer

from actors.learner import PlainHeadTrainer, _arguments
from actors.packing import Example, collate, pack
from pipeline.backtrack.trace import IGNORE
from pipeline.config import ScratchModel, TrainSettings
from pipeline.stages.base import new_model, train_tokenizer

PAD = 0


@st.composite
def example_lists(draw: st.DrawFn) -> list[Example]:
    """Examples of distinct tokens, so that each can be found again."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    found, token = [], 1
    for length in lengths:
        ids = tuple(range(token, token + length))
        taught = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        found.append(Example(ids, tuple(id if yes else IGNORE for id, yes in zip(ids, taught, strict=True))))
        token += length
    return found


@settings(deadline=None)
@given(example_lists(), st.integers(6, 20), st.integers(1, 12), st.integers(0, 3))
def test_rows_hold_every_fitting_example(examples: list[Example], row_tokens: int, rows: int, seed: int) -> None:
    fitting = [one for one in examples if len(one.input_ids) <= row_tokens]
    if not fitting:
        with pytest.raises(ValueError, match=f"none of {len(examples)} examples fits.*{row_tokens}.*row_tokens"):
            pack(examples, row_tokens, rows, seed)
        return
    packed, left_out = pack(examples, row_tokens, rows, seed)
    assert left_out == len(examples) - len(fitting)
    assert len(packed) == rows and all(packed)
    assert all(sum(len(one.input_ids) for one in row) <= row_tokens for row in packed)
    flat = [one for row in packed for one in row]
    assert set(flat) <= set(fitting)
    if rows >= len(fitting):  # the one that has waited longest begins the next row, so none waits for ever
        assert set(flat) == set(fitting)
    assert pack(examples, row_tokens, rows, seed) == (packed, left_out)


def test_rows_are_filled_with_what_fits() -> None:
    examples = [Example((i,) * length, (i,) * length) for i, length in enumerate([60, 40, 70, 30, 50] * 20)]
    packed, _ = pack(examples, 100, 50, seed=0)
    filled = sum(len(one.input_ids) for row in packed for one in row)
    assert filled > 0.97 * 50 * 100


def test_the_seed_shuffles() -> None:
    examples = [Example((i,), (i,)) for i in range(1, 30)]
    orders = {tuple(pack(examples, 29, 1, seed)[0][0]) for seed in range(3)}
    assert len(orders) == 3


@settings(deadline=None)
@given(example_lists(), st.integers(12, 30), st.integers(1, 4))
def test_every_token_lands_with_its_label(examples: list[Example], row_tokens: int, rows: int) -> None:
    packed, _ = pack(examples, row_tokens, rows, 0)
    batch = collate(packed, PAD, row_tokens)
    ids, labels, positions = (batch[name].tolist() for name in ("input_ids", "labels", "position_ids"))
    for index, row in enumerate(packed):
        at = 0
        for example in row:
            for place, (token, label) in enumerate(zip(example.input_ids, example.labels, strict=True)):
                assert ids[index][at] == token and positions[index][at] == place
                # A label is predicted from the token before it; the first of an example has none.
                assert labels[index][at] == (label if place else IGNORE)
                at += 1
        assert ids[index][at:] == [PAD] * (row_tokens - at)
        assert labels[index][at:] == [IGNORE] * (row_tokens - at)


@settings(deadline=None)
@given(example_lists(), st.integers(12, 30))
def test_who_sees_whom(examples: list[Example], row_tokens: int) -> None:
    packed, _ = pack(examples, row_tokens, 2, 0)
    mask = collate(packed, PAD, row_tokens)["attention_mask"]
    assert mask.shape == (2, 1, row_tokens, row_tokens) and mask.dtype == torch.bool
    for index, row in enumerate(packed):
        owner = [number for number, one in enumerate(row) for _ in one.input_ids]
        for i in range(row_tokens):
            sees = {j for j in range(row_tokens) if mask[index, 0, i, j]}
            assert i in sees and max(sees) == i
            if i < len(owner):
                assert sees == {j for j in range(i + 1) if owner[j] == owner[i]}
            else:
                assert min(sees) >= len(owner)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=6), st.integers(0, 99))
def test_logits_and_loss_equal_those_of_the_examples_alone(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.3,
        )
    ).eval()
    drawn = [tuple(torch.randint(1, 40, (length,)).tolist()) for length in lengths]
    examples = [Example(ids, tuple(id if id % 3 else IGNORE for id in ids)) for ids in drawn]
    row_tokens = sum(lengths[: len(lengths) // 2 + 1]) + 12
    packed, _ = pack(examples, row_tokens, 2, seed)
    batch = collate(packed, PAD, row_tokens)
    losses = []
    with torch.no_grad():
        out = model(**batch)
        for index, row in enumerate(packed):
            at = 0
            for example in row:
                alone = model(torch.tensor([example.input_ids])).logits[0]
                together = out.logits[index, at : at + len(example.input_ids)]
                torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
                logprobs = alone.log_softmax(dim=-1)
                losses += [-logprobs[i - 1, label] for i, label in enumerate(example.labels) if i and label != IGNORE]
                at += len(example.input_ids)
    if losses:
        torch.testing.assert_close(out.loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


def test_the_plain_loss_of_small_vocabularies_equals_that_of_trl(tmp_path: Path) -> None:
    """The first step's loss and gradient norm, with TRL's own head and with the plain one."""
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    model = new_model(ScratchModel(layers=1, width=32, heads=2, vocab=300), tokenizer, 0)
    rows, _ = pack([Example(tuple(range(2, 30)), (IGNORE,) * 5 + tuple(range(7, 30)))], 64, 4, 0)
    logs = []
    for kind in (SFTTrainer, PlainHeadTrainer):
        trainer = kind(
            model=copy.deepcopy(model),
            args=_arguments(TrainSettings(steps=1, rows=4, row_tokens=64, log_every=1), 0, str(tmp_path)),
            train_dataset=Dataset.from_dict({"row": list(range(4))}),
            data_collator=lambda batch: collate([rows[item["row"]] for item in batch], 0, 64),
            processing_class=tokenizer,
        )
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for figure in ("loss", "grad_norm"):
        assert logs[0][figure] == pytest.approx(logs[1][figure], rel=1e-5)
