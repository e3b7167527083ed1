"""The undo token's row: a spare one before a new one, a value of its words, and nothing lost by saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pipeline.backtrack.embedding import UndoTokenError, add_undo_token, step_end_ids
from pipeline.stages.base import train_tokenizer

U, WORDS = "<|BACKTRACK|>", ["undo", "wrong"]
SIZE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def tokenizer() -> Any:
    return train_tokenizer(["Is it wrong? Undo it.\nNo: 1+2=3."] * 2, 300)


def tied(rows: int) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=True, initializer_range=0.05, **SIZE)).eval()


def untied(rows: int) -> Any:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=rows, tie_word_embeddings=False, initializer_range=0.05, **SIZE)).eval()


def matrices(model: Any) -> list[torch.Tensor]:
    """Input and output rows, the same matrix twice when they are tied."""
    return [part.weight.detach() for part in (model.get_input_embeddings(), model.get_output_embeddings())]


def add(model: Any, text: Any, init: Any = "words", noise: float = 0.02, seed: int = 0) -> int:
    return add_undo_token(model, text, U, init, WORDS, noise, seed)


each_model = pytest.mark.parametrize("make", [tied, untied])


@each_model
@pytest.mark.parametrize("spare", [1, 20])
def test_a_spare_row_is_used(make: Callable[[int], Any], spare: int) -> None:
    text = tokenizer()
    known = len(text)
    model = make(known + spare)
    before = [matrix.clone() for matrix in matrices(model)]
    undo_id = add(model, text)
    assert undo_id == known and text.convert_tokens_to_ids(U) == undo_id
    for old, new in zip(before, matrices(model), strict=True):
        assert new.shape == old.shape
        changed = (old != new).any(dim=1).nonzero().flatten().tolist()
        assert changed == [undo_id]


@each_model
def test_a_full_matrix_grows_to_a_multiple_of_64(make: Callable[[int], Any]) -> None:
    text = tokenizer()
    model = make(len(text))
    before = [matrix.clone() for matrix in matrices(model)]
    undo_id = add(model, text)
    for old, new in zip(before, matrices(model), strict=True):
        assert new.shape[0] % 64 == 0 and undo_id < new.shape[0] <= undo_id + 64
        assert torch.equal(new[: len(old)], old)
    assert model.config.vocab_size == matrices(model)[0].shape[0]
    assert model(torch.tensor([[1, undo_id]])).logits.shape[-1] == model.config.vocab_size


def test_tied_stays_tied_and_untied_gets_two_rows() -> None:
    one, two = tied(512), untied(512)
    undo_id = add(one, tokenizer())
    assert matrices(one)[0].data_ptr() == matrices(one)[1].data_ptr()
    assert add(two, tokenizer()) == undo_id
    assert not torch.equal(*(matrix[undo_id] for matrix in matrices(two)))


@each_model
@pytest.mark.parametrize("init", ["words", "mean"])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.5])
def test_the_row_is_the_average_and_noise_does_not_drown_it(make: Callable[[int], Any], init: str, noise: float) -> None:
    text = tokenizer()
    ids = {i for word in WORDS for i in text(f" {word}").input_ids} if init == "words" else range(len(text))
    model = make(len(text) + 1)
    means = [torch.stack([matrix[i] for i in ids]).mean(dim=0) for matrix in matrices(model)]
    undo_id = add(model, text, init, noise)
    for mean, matrix in zip(means, matrices(model), strict=True):
        off = (matrix[undo_id] - mean).norm() / mean.norm()
        # The norm of 32 Gaussian numbers is within half of its expectation but once in some 10,000 draws.
        assert 0.5 * noise - 1e-6 <= off <= 1.5 * noise + 1e-6


def test_the_seed_alone_decides_the_noise() -> None:
    rows = []
    for seed in (1, 1, 2):
        model, text = tied(512), tokenizer()
        torch.manual_seed(seed * 100 + len(rows))
        rows.append(matrices(model)[0][add(model, text, seed=seed)])
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_a_known_token_is_refused() -> None:
    text, model = tokenizer(), tied(512)
    before = matrices(model)[0].clone()
    for known in ("<|end|>", "a"):
        with pytest.raises(UndoTokenError, match=r"already has a token .* undo\.token"):
            add_undo_token(model, text, known, "words", WORDS, 0.02, 0)
    add(model, text)
    with pytest.raises(UndoTokenError, match="already has a token"):
        add(model, text)
    assert torch.equal(before[: len(text) - 1], matrices(model)[0][: len(text) - 1])


@each_model
@pytest.mark.parametrize("spare", [0, 5])
def test_saving_keeps_row_logits_and_token(make: Callable[[int], Any], spare: int, tmp_path: Path) -> None:
    text = tokenizer()
    model = make(len(text) + spare)
    undo_id = add(model, text)
    model.save_pretrained(tmp_path)
    text.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    text_again = AutoTokenizer.from_pretrained(tmp_path)
    for old, new in zip(matrices(model), matrices(again), strict=True):
        assert torch.equal(old[undo_id], new[undo_id])
    ids = text_again(f"1+2={U}3\n").input_ids
    assert ids.count(undo_id) == 1 and text_again.decode([undo_id]) == U
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([ids])).logits, again(torch.tensor([ids])).logits)


def test_step_ends_are_the_tokens_that_hold_a_line_break() -> None:
    text = train_tokenizer(["a.\n\nb.\nc"] * 50, 300)
    ends = step_end_ids(text)
    assert {i for i in text("a.\n\nb.\nc 12").input_ids if "\n" in text.decode([i])} <= ends
    assert all(text.decode([i]).count("\n") for i in ends) and text("\n").input_ids[0] in ends
    assert not ends & set(text("abc 12").input_ids)
