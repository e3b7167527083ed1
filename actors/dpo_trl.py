"""DPO on linear rows by TRL's DPOTrainer: the form soft with the loss dpo. Pairs come as ids; nothing is tokenised again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from actors.checkpoints import KEPT, Checkpoints, Snapshot
from actors.memory import out_of_memory
from actors.policy_learner import LearningError
from actors.trainable import prepare, save
from pipeline.backtrack.preferences import Pair
from pipeline.dpo_config import DpoSettings

Record = dict[str, float]
_FIGURES = {
    "loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected", "grad_norm": "grad_norm", "learning_rate": "lr",
}  # fmt: skip


class PairTrainer(DPOTrainer):
    """DPOTrainer whose examples are ids already."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = found[0] if return_outputs else found
        if not loss.isfinite():
            raise LearningError(f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower dpo.lr")
        return found


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's collator; wrong decisions of a chosen side, counted in `left_out` from its beginning, are taken out of the sum."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        for row, one in enumerate(examples):
            for at in one["left_out"]:
                batch["completion_mask"][row, len(one["prompt_ids"]) + at] = 0
        return batch


def examples_of(pairs: Sequence[Pair]) -> Dataset:
    """What both sides begin with is a part of the prompt: it cancels."""
    rows = []
    for pair in pairs:
        shared = pair.shared
        wrong = [at - shared for at, error in enumerate(pair.wrong) if error and at >= shared]
        prompt = [*pair.prompt_ids, *pair.prefix_ids, *pair.chosen_ids[:shared]]
        sides = {"chosen_ids": list(pair.chosen_ids[shared:]), "rejected_ids": list(pair.rejected_ids[shared:])}
        rows.append({"prompt_ids": prompt, **sides, "left_out": wrong})
    return Dataset.from_list(rows)


class _Notes(TrainerCallback):
    """Hands the trainer's figures on under the names that they have here; a checkpoint holds them."""

    def __init__(self, note: Callable[[Record], None]) -> None:
        self._note, self._records = note, list[Record]()

    def keep(self, record: Record) -> None:
        self._records.append(record)
        self._note(record)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs, step = kwargs["logs"], state.global_step
        for prefix, ours in (("", ""), ("eval_", "held_out_")):
            found = {ours + name: float(logs[prefix + key]) for key, name in _FIGURES.items() if prefix + key in logs}
            if ours + "accuracy" in found:
                self.keep({"step": step} | found)

    def snapshot(self) -> Snapshot:
        return Snapshot({"records": self._records})

    def restore(self, snapshot: Snapshot) -> None:
        for record in snapshot.values["records"]:
            self.keep(record)


def trainer_of(source: Path, pairs: Sequence[Pair], held_out: Sequence[Pair], settings: DpoSettings, undo_id: int, seed: int,
               folder: Path) -> Any:  # fmt: skip
    """A trainer of the model of `source`, whose reference is that model; checkpoints go to `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model, reference = (AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32) for _ in range(2))
    torch.manual_seed(seed)  # adapters begin at random
    size = next(size for size in range(min(settings.batch, settings.rows), 0, -1) if settings.batch % size == 0)
    args = DPOConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        gradient_accumulation_steps=settings.batch // size,
        beta=settings.beta,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=settings.max_grad_norm,
        max_length=None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if held_out else "no",
        eval_steps=settings.check_every,
        eval_on_start=bool(held_out),
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=KEPT,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    return PairTrainer(
        model=prepare(model, undo_id, settings.trainable, settings.lora.rank, settings.lora.alpha),
        ref_model=reference,
        args=args,
        data_collator=PairCollator(pad_token_id=tokenizer.pad_token_id or 0),
        train_dataset=examples_of(pairs),
        eval_dataset=examples_of(held_out) if held_out else None,
        processing_class=tokenizer,
    )


def fit_by_trl(
    source: Path, target: Path, pairs: Sequence[Pair], held_out: Sequence[Pair], settings: DpoSettings, undo_id: int, seed: int,
    resume: Path, note: Callable[[Record], None],
) -> None:  # fmt: skip
    """As `fit` of actors/dpo.py."""
    resume.mkdir(parents=True, exist_ok=True)
    trainer = trainer_of(source, pairs, held_out, settings, undo_id, seed, resume)
    notes = _Notes(note)
    checkpoints = Checkpoints(resume, notes)
    for callback in (notes, checkpoints):
        trainer.add_callback(callback)
    newest = checkpoints.resume()
    try:
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise LearningError(f"out of memory at step {trainer.state.global_step + 1}: lower dpo.rows") from error
    save(trainer.accelerator.unwrap_model(trainer.model).eval(), trainer.processing_class, target, settings.trainable)
