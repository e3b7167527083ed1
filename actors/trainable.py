"""Which weights a learner trains, and folders that load without peft. Learners call it; it knows no examples and no losses.

What peft 0.21 does that one has to know:

- `TrainableTokensConfig` puts a tuner layer on the head. `head.weight` is then the untrained matrix, so TRL's fused head would
  score with a stale undo row; TRL's trainers refuse such a model. `trainable_token_indices` of a `LoraConfig` wraps the same
  layer so that `head.weight` holds the trained row; it is used for both kinds here, without a LoRA layer for `undo_row`.
- That wrapper has no attribute `bias`, which TRL's fused head reads, and drops the bias of a head that has one.
- Only the input row is trained unless an untied head is named too. Whether the two are tied it takes from the config, not
  from the weights.
- The row is trained as a value, not as a difference: weight decay pulls it towards zero, not towards its first value.
- Each forward copies the embedding matrix (the gradient has its size as well): it saves optimiser state, not activations.
- `merge_adapter` and `unmerge_adapter` add and subtract: the base weights come back rounded. Hence the copy in `merged`.
- `save_pretrained` compares the vocabulary with the base model's, by hub if need be, and after a resize writes all rows.
- "all-linear" is a set, whose order in adapter_config.json changes from process to process.
- vLLM's LoRA loader does not know trained rows: engines get the merged folder, never the adapter.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers.pytorch_utils import Conv1D

Trainable = Literal["all", "undo_row", "lora"]

ADAPTER = "adapter"  # folder of the adapter within a model folder


def prepare(model: Any, undo_id: int, what: Trainable, rank: int, alpha: float) -> Any:
    """The model to train: only the weights that `what` names require gradients, and logits are those of `model`.

    `all` is the model itself. `undo_row` is a peft model in which the undo token's input row, and an untied head's output
    row, train. `lora` adds LoRA of that rank, scaled by alpha / rank, on all linear layers but the head. `model` becomes
    part of the peft model and is not to be used on its own any more.

    Raises:
        ValueError: a bad rank, alpha or undo id, or a head that peft would train wrongly.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = embedding.weight.shape[0]
    if not 0 <= undo_id < rows:
        raise ValueError(f"undo token id {undo_id} is outside the embedding matrix, which has {rows} rows")
    if what == "all":
        return model
    if what == "lora" and (rank < 1 or alpha <= 0):
        raise ValueError(f"LoRA needs rank >= 1 and alpha > 0, not rank {rank} and alpha {alpha}")
    if head.bias is not None:
        raise ValueError("a head with a bias cannot be trained by rows: peft leaves the bias out")
    tied = head.weight is embedding.weight
    if tied != bool(model.config.tie_word_embeddings):
        raise ValueError(f"the config says tie_word_embeddings={model.config.tie_word_embeddings}, the weights say {tied}")
    names = {id(module): name for name, module in model.named_modules()}
    trained_rows = {names[id(part)]: [undo_id] for part in ([embedding] if tied else [embedding, head])}
    if what == "lora":
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # a float works as well
            target_modules="all-linear",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            trainable_token_indices=trained_rows,
        )
    else:
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=DUMMY_TARGET_MODULES, trainable_token_indices=trained_rows)
    trained = get_peft_model(model, config)
    if what == "lora":
        config.target_modules = sorted(config.target_modules or [])  # the same bytes in every process
    trained.get_output_embeddings().bias = None
    return trained


def merged(model: Any, what: Trainable) -> Any:
    """The model without peft, which stays as it is and can be trained on: the model itself for `all`, otherwise a merged copy.

    In bfloat16 merging rounds LoRA's part to that dtype.

    Raises:
        ValueError: merged weights that are no numbers.
    """
    return model if what == "all" else copy.deepcopy(model.base_model).merge_and_unload(safe_merge=True)


def save(model: Any, tokenizer: Any, folder: Path, what: Trainable) -> None:
    """Write an ordinary Hugging Face folder, adapters merged; for `lora` also the adapter, in `folder/adapter`.

    The adapter is for the base model that was trained, undo token included.

    Raises:
        ValueError: as `merged`.
    """
    merged(model, what).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if what == "lora":
        model.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
