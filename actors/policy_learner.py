"""What the learners of grpo.py and dpo.py have in common: a model, its optimiser, its reference, checkpoints. It knows no loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.learner import TrainingError
from actors.policy import Policy
from actors.segments import attends_by_segment
from actors.trainable import prepare, save
from pipeline.dpo_config import DpoSettings
from pipeline.grpo_config import GrpoSettings

_STATE = "learner.pt"


class LearningError(TrainingError):
    """Learning cannot go on; one line."""


class PolicyLearner:
    """A model whose learning rate falls in a straight line over `updates` optimiser steps."""

    def __init__(
        self, folder: Path, settings: GrpoSettings | DpoSettings, policy: Policy, seed: int, updates: int, referred: bool
    ) -> None:
        """`referred`: a loss compares it with the model it started from."""
        self.policy, self.step = policy, 0
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._section = "grpo" if isinstance(settings, GrpoSettings) else "dpo"
        self._trainable, self._max_norm = settings.trainable, settings.max_grad_norm
        torch.manual_seed(seed)  # adapters begin at random
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._by_segment = attends_by_segment(plain)
        self._width = plain.config.get_text_config().hidden_size
        self.model: Any = prepare(plain, policy.rule.undo_id, settings.trainable, settings.lora.rank, settings.lora.alpha)
        self.model.to(self._device).train()
        self._reference: Any = None
        if referred and settings.trainable == "all":  # adapters are switched off instead
            self._reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self._reference.to(self._device).eval()
            attends_by_segment(self._reference)
        self._trained = [part for part in self.model.parameters() if part.requires_grad]
        self._optimiser = torch.optim.AdamW(self._trained, settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay)
        rise, total = settings.warmup + 1, updates or math.inf
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimiser, lambda step: min(1.0, (step + 1) / rise) * max(0.0, 1 - step / total)
        )

    def _update(self, accumulate: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """One optimiser step on the gradients that `accumulate` leaves: the loss that it gives, and their norm.

        Raises:
            LearningError: the gradient is no number.
        """
        self._optimiser.zero_grad()
        loss = accumulate()
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, self._max_norm))
        if not math.isfinite(norm):
            raise LearningError(f"the gradient is {norm} at step {self.step + 1}: lower {self._section}.lr")
        self._optimiser.step()
        self._schedule.step()
        return loss, norm

    def _backward(self, loss: Tensor) -> None:
        """Raises: LearningError: the loss is no number."""
        if not loss.isfinite():
            raise LearningError(f"the loss is {loss.item()} at step {self.step + 1}: lower {self._section}.lr")
        loss.backward()  # type: ignore[no-untyped-call]

    @property
    def learning_rate(self) -> float:
        return float(self._optimiser.param_groups[0]["lr"])

    @contextmanager
    def _referring(self) -> Iterator[Any]:
        """The model it started from."""
        with torch.no_grad():
            if self._reference is not None:
                yield self._reference
            else:
                with self.model.disable_adapter():
                    yield self.model

    def save(self, folder: Path) -> None:
        """An ordinary Hugging Face folder."""
        save(self.model.eval(), self.tokenizer, folder, self._trainable)
        self.model.train()

    def checkpoint(self, folder: Path) -> None:
        trained = {name: part for name, part in self.model.named_parameters() if part.requires_grad}
        state = {"trained": trained, "optimiser": self._optimiser.state_dict(), "schedule": self._schedule.state_dict()}
        torch.save({**state, "step": self.step, "random": torch.get_rng_state()}, folder / _STATE)

    def restore(self, folder: Path) -> None:
        state = torch.load(folder / _STATE, map_location=self._device, weights_only=True)
        self.model.load_state_dict(state["trained"], strict=False)  # tied weights have two names
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
        torch.set_rng_state(state["random"].cpu())
