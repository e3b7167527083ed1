"""What trains is what was asked for, and what is saved is what was trained: undo row, tying, dtype and logits."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import SFTConfig, SFTTrainer

from actors.engines import Request, Sampling, VllmEngine
from actors.trainable import prepare, save
from actors.weights import check_weights, probe_of_folder
from pipeline.backtrack.embedding import add_undo_token
from pipeline.config import EngineSettings
from pipeline.stages.base import train_tokenizer

U = "<|BACKTRACK|>"
SIZE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
IDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.05}


def llama(rows: int, tied: bool) -> Any:
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **SIZE, **IDS))


def llama_tied(rows: int) -> Any:
    return llama(rows, tied=True)


def llama_untied(rows: int) -> Any:
    return llama(rows, tied=False)


def qwen2_untied(rows: int) -> Any:
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=rows, tie_word_embeddings=False, **SIZE, **IDS))


def gpt2_tied(rows: int) -> Any:
    no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=64, n_layer=2, n_head=2, n_positions=64, **no_dropout, **IDS))


MODELS = [llama_tied, llama_untied, qwen2_untied, gpt2_tied]
each_model = pytest.mark.parametrize("make", MODELS)
each_adapter = pytest.mark.parametrize("what", ["undo_row", "lora"])
Make = Callable[[int], Any]


def with_undo_token(make: Make, spare: int = 0) -> tuple[Any, Any, int]:
    """A model whose matrix had `spare` rows beyond the tokenizer's; without one it has grown."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["Is it wrong? Undo it.\nNo: 1+2=3."] * 2, 300)
    model = make(len(tokenizer) + spare)
    return model, tokenizer, add_undo_token(model, tokenizer, U, "words", ["undo", "wrong"], "undo", 0.02, 0)


def batch(undo_id: int) -> torch.Tensor:
    """Undo tokens as input and as target, among others."""
    return torch.tensor([[5, 6, undo_id, undo_id, 7, 8, 9, undo_id, 10], [9, undo_id, 8, 7, undo_id, undo_id, 6, 5, 4]])


def train(model: Any, undo_id: int, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        model(input_ids=batch(undo_id), labels=batch(undo_id)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(make: Make, what: Any, spare: int = 0) -> tuple[Any, Any, int, Any]:
    """The base model, the trained one, undo id and tokenizer."""
    model, tokenizer, undo_id = with_undo_token(make, spare)
    base = copy.deepcopy(model)
    torch.manual_seed(1)
    adapted = prepare(model, undo_id, what, rank=4, alpha=8.0)
    train(adapted, undo_id)
    return base, adapted, undo_id, tokenizer


def logits(model: Any, undo_id: int) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch(undo_id)).logits


def reload(folder: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def changed_rows(old: torch.Tensor, new: torch.Tensor) -> list[int]:
    return (old != new).flatten(1).any(dim=1).nonzero().flatten().tolist()


def vocabulary_matrices(model: Any) -> set[str]:
    """Names of the input matrix and of the head."""
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    return {f"{name}.weight" for name, module in model.named_modules() if any(module is part for part in parts)}


def frozen(model: Any) -> dict[str, torch.Tensor]:
    """The untrained weights inside a peft model, by their names in the base model."""
    return {
        name.removeprefix("base_model.model.").replace(".token_adapter", "").replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }


@each_model
@pytest.mark.parametrize("spare", [0, 5])
def test_undo_row_changes_the_undo_rows_and_nothing_else(make: Make, spare: int, tmp_path: Path) -> None:
    base, model, undo_id, tokenizer = trained(make, "undo_row", spare)
    save(model, tokenizer, tmp_path, "undo_row")
    before, after = base.state_dict(), reload(tmp_path).state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == vocabulary_matrices(base)
    assert all(changed_rows(before[name], after[name]) == [undo_id] for name in changed)


@each_model
def test_what_trains_is_the_rows_alone_or_rows_and_lora(make: Make) -> None:
    base, model, _, _ = trained(make, "undo_row")
    tied = base.config.tie_word_embeddings
    rows = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [tuple(row.shape) for row in rows] == [(1, 64)] * (1 if tied else 2)
    _, model, _, _ = trained(make, "lora")
    named = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum("trainable_tokens_delta" in name for name in named) == len(rows)
    layers = 4 if make is gpt2_tied else 7  # linear layers of a block
    assert sum("lora_A" in name for name in named) == sum("lora_B" in name for name in named) == 2 * layers
    assert len(named) == len(rows) + 4 * layers and not any("lm_head.lora" in name for name in named)


@each_model
@each_adapter
def test_training_leaves_the_base_weights_alone(make: Make, what: Any) -> None:
    base, model, _, _ = trained(make, what)
    before, after = dict(base.named_parameters()), frozen(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@each_model
def test_lora_changes_linear_layers_and_undo_rows(make: Make, tmp_path: Path) -> None:
    base, model, undo_id, tokenizer = trained(make, "lora")
    save(model, tokenizer, tmp_path, "lora")
    before, after = base.state_dict(), reload(tmp_path).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    of_vocabulary = vocabulary_matrices(base)
    assert of_vocabulary < changed
    assert all(changed_rows(before[name], after[name]) == [undo_id] for name in of_vocabulary)
    assert {name for name in before if before[name].dim() == 2} - {"transformer.wpe.weight"} == changed


@each_model
@pytest.mark.parametrize("what", ["all", "undo_row", "lora"])
@pytest.mark.parametrize("spare", [0, 5])
def test_a_saved_folder_gives_the_trained_logits(make: Make, what: Any, spare: int, tmp_path: Path) -> None:
    base, model, undo_id, tokenizer = trained(make, what, spare)
    wanted = logits(model, undo_id)
    assert not torch.allclose(wanted, logits(base, undo_id), atol=1e-3)
    save(model, tokenizer, tmp_path, what)
    again = reload(tmp_path)
    torch.testing.assert_close(logits(again, undo_id), wanted, rtol=0, atol=1e-5)
    inputs, outputs = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert again.config.tie_word_embeddings == (inputs is outputs) == base.config.tie_word_embeddings
    assert again.config.vocab_size == len(inputs) == len(base.get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(U) == undo_id
    kept, wanted_config = again.generation_config, base.generation_config
    assert (kept.eos_token_id, kept.pad_token_id) == (wanted_config.eos_token_id, wanted_config.pad_token_id) == (1, 0)
    assert not (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "adapter").exists() == (what == "lora")


@each_model
@pytest.mark.parametrize("spare", [0, 5])
def test_the_adapter_on_the_base_model_gives_the_trained_logits(make: Make, spare: int, tmp_path: Path) -> None:
    base, model, undo_id, tokenizer = trained(make, "lora", spare)
    base.save_pretrained(tmp_path / "base")
    save(model, tokenizer, tmp_path / "new", "lora")
    again = PeftModel.from_pretrained(reload(tmp_path / "base"), tmp_path / "new" / "adapter")
    torch.testing.assert_close(logits(again, undo_id), logits(model, undo_id), rtol=0, atol=1e-6)
    for matrix in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(again, matrix)().weight[undo_id], getattr(model, matrix)().weight[undo_id])
    rows = [tensor for name, tensor in load_file(tmp_path / "new/adapter/adapter_model.safetensors").items() if "lora" not in name]
    assert [len(tensor) for tensor in rows] == [1] * (1 if base.config.tie_word_embeddings else 2)  # not the whole matrix
    modules = json.loads((tmp_path / "new/adapter/adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
    assert modules == sorted(modules)


@each_model
@each_adapter
def test_saving_does_not_disturb_training(make: Make, what: Any, tmp_path: Path) -> None:
    _, model, undo_id, tokenizer = trained(make, what)
    _, twin, _, _ = trained(make, what)
    save(model, tokenizer, tmp_path, what)
    train(model, undo_id)
    train(twin, undo_id)
    assert not torch.allclose(logits(model, undo_id), logits(reload(tmp_path), undo_id), atol=1e-3)
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@each_adapter
@pytest.mark.parametrize("make", [llama_tied, qwen2_untied])
def test_the_dtype_is_kept(make: Make, what: Any, tmp_path: Path) -> None:
    model, tokenizer, undo_id = with_undo_token(make)
    adapted = prepare(model.bfloat16(), undo_id, what, rank=4, alpha=8.0)
    train(adapted, undo_id)
    assert all(p.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)  # small updates are not lost
    save(adapted, tokenizer, tmp_path, what)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    again = reload(tmp_path, "auto")
    for matrix in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(again, matrix)().weight[undo_id], getattr(adapted, matrix)().weight[undo_id])


@each_adapter
@pytest.mark.parametrize("make", [llama_tied, qwen2_untied])
def test_the_trainers_fused_head_trains_the_same_rows(make: Make, what: Any, tmp_path: Path) -> None:
    """TRL multiplies by the head's weight without calling the head: it must see the trained row and give it its gradient."""
    model, _, undo_id = with_undo_token(make)
    torch.manual_seed(1)
    by_trainer = prepare(model, undo_id, what, rank=4, alpha=8.0)
    by_hand, ids = copy.deepcopy(by_trainer), batch(undo_id)
    train(by_hand, undo_id, steps=2)
    trainer = SFTTrainer(
        model=by_trainer,
        args=SFTConfig(
            output_dir=str(tmp_path), max_steps=2, max_grad_norm=0, lr_scheduler_type="constant", report_to="none",
            save_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False, use_cpu=True, max_length=None,
            dataloader_pin_memory=False, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_dict({"row": [0] * 32}),
        data_collator=lambda _: {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)},
        processing_class=train_tokenizer(["a b"] * 2, 300),
        optimizers=(torch.optim.SGD([p for p in by_trainer.parameters() if p.requires_grad], lr=0.5), None),
    )  # fmt: skip
    trainer.train()
    for (name, one), (_, other) in zip(by_trainer.named_parameters(), by_hand.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=name)


@each_model
@each_adapter
def test_preparing_changes_no_logits(make: Make, what: Any) -> None:
    """With a mask and positions of its own too, as rows of a tree have them."""
    model, _, undo_id = with_undo_token(make)
    ids = batch(undo_id)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[:, :, 6:, 3:5] = False
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 5]] * 2)
    base = copy.deepcopy(model).eval()
    adapted = prepare(model, undo_id, what, rank=4, alpha=8.0).eval()
    with torch.no_grad():
        wanted = base(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        found = adapted(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert torch.equal(found, wanted) and not torch.equal(wanted, logits(base, undo_id))


def test_all_is_the_model_itself() -> None:
    model, _, undo_id = with_undo_token(llama_tied)
    assert prepare(model, undo_id, "all", rank=4, alpha=8.0) is model
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_bad_input_is_refused_in_one_line() -> None:
    model, _, undo_id = with_undo_token(llama_untied)
    rows = len(model.get_input_embeddings().weight)
    for bad in (-1, rows):
        for what in ("all", "undo_row", "lora"):
            with pytest.raises(ValueError, match=rf"^undo token id {bad} is outside .* {rows} rows$"):
                prepare(model, bad, what, rank=4, alpha=8.0)  # type: ignore[arg-type]
    for rank, alpha in ((0, 8.0), (-1, 8.0), (4, 0.0)):
        with pytest.raises(ValueError, match=r"^LoRA needs rank >= 1 and alpha > 0, not .*$"):
            prepare(model, undo_id, "lora", rank, alpha)
    model.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match=r"^the config says tie_word_embeddings=True, the weights say False$"):
        prepare(model, undo_id, "lora", 4, 8.0)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(rows))
    with pytest.raises(ValueError, match=r"^a head with a bias .*$"):
        prepare(model, undo_id, "undo_row", 4, 8.0)
    assert all(parameter.requires_grad for parameter in model.parameters())  # refused before anything was frozen


@each_adapter
def test_weights_that_are_no_numbers_are_not_saved(what: Any, tmp_path: Path) -> None:
    _, model, _, tokenizer = trained(llama_tied, what)
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        save(model, tokenizer, tmp_path / "new", what)
    assert not (tmp_path / "new").exists()


def test_vllm_generates_with_the_saved_rows(tmp_path: Path) -> None:
    """An untied head and a matrix that has grown: both undo rows, and the padding rows, reach the engine."""
    for what in ("undo_row", "lora"):
        _, model, undo_id, tokenizer = trained(qwen2_untied, what)
        train(model, undo_id, steps=60)
        save(model, tokenizer, tmp_path / what, what)  # type: ignore[arg-type]
    engine = VllmEngine(tmp_path / "lora", EngineSettings(), context=64, seed=0)
    for what in ("lora", "undo_row"):
        if what != "lora":
            engine.load_weights(tmp_path / what)
        check_weights(engine, probe_of_folder(tmp_path / what), "float32", "it")
        prompts = [(5, 6, undo_id), (undo_id, 7, 8), (9, undo_id, undo_id, 10)]
        sampling = Sampling(temperature=0, top_p=1, max_tokens=8, stop_id=1, logprobs=True)
        found = engine.generate([Request(prompt, 0) for prompt in prompts], sampling)
        assert any(undo_id in completion.token_ids for completion in found)
        again = reload(tmp_path / what)
        for prompt, completion in zip(prompts, found, strict=True):
            with torch.no_grad():
                scores = torch.log_softmax(again(torch.tensor([prompt + completion.token_ids])).logits[0], dim=-1)
            wanted = [float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(completion.token_ids)]
            assert completion.logprobs == pytest.approx(wanted, abs=1e-4)
