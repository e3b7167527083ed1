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

U, WORDS, DESCRIPTION = "<|BACKTRACK|>", ["undo", "wrong"], "undo it: it is wrong"
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
    return add_undo_token(model, text, U, init, WORDS, DESCRIPTION, noise, seed)


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
@pytest.mark.parametrize("init", ["mean", "words", "description"])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.5])
def test_the_row_is_the_average_and_noise_has_the_stated_norm(make: Callable[[int], Any], init: str, noise: float) -> None:
    text = tokenizer()
    ids = {
        "mean": list(range(len(text))),
        "words": list({i for word in WORDS for i in text(f" {word}").input_ids}),
        "description": text(DESCRIPTION).input_ids,
    }[init]
    assert init != "description" or len(set(ids)) < len(ids)  # a token that occurs twice counts twice
    model = make(len(text) + 1)
    means = [torch.stack([matrix[i] for i in ids]).mean(dim=0) for matrix in matrices(model)]
    for seed in range(20):
        fresh, known = make(len(text) + 1), tokenizer()
        undo_id = add(fresh, known, init, noise, seed)
        for mean, matrix in zip(means, matrices(fresh), strict=True):
            assert float((matrix[undo_id] - mean).norm() / mean.norm()) == pytest.approx(noise, abs=1e-5)


def test_a_description_may_name_the_token() -> None:
    """Its text is ordinary text there: a row without a value must not be part of the average."""
    model, text = tied(512), tokenizer()
    ids = text(f"{U} takes it back").input_ids
    mean = matrices(model)[0][ids].mean(dim=0)
    undo_id = add_undo_token(model, text, U, "description", WORDS, f"{U} takes it back", 0.0, 0)
    assert undo_id not in ids
    torch.testing.assert_close(matrices(model)[0][undo_id], mean)


@pytest.mark.parametrize(
    ("init", "words", "description"),
    [("words", [], "undo"), ("words", ["", " "], "undo"), ("description", ["undo"], ""), ("description", ["undo"], " \n")],
)
def test_a_text_without_tokens_is_refused(init: Any, words: list[str], description: str) -> None:
    model, text = tied(512), tokenizer()
    before, known = matrices(model)[0].clone(), len(text)
    with pytest.raises(UndoTokenError, match=f"undo.{init} gives no token") as error:
        add_undo_token(model, text, U, init, words, description, 0.02, 0)
    assert "\n" not in str(error.value)
    assert len(text) == known and torch.equal(before, matrices(model)[0])


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
            add_undo_token(model, text, known, "words", WORDS, DESCRIPTION, 0.02, 0)
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
