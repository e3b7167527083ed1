"""The GRPO learner: policy gradients on the actions of rollouts with undos, one tree a group, inside one Ray actor.

The loss is TRL's (GRPOTrainer._compute_loss), which a test compares it with; docs/grpo.md says why the loop is not. It knows
rollouts and advantages, not where they come from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from actors.handover import Sender
from actors.memory import out_of_memory
from actors.policy import Policy, Rows, Sampled, batches, score
from actors.policy_learner import LearningError, PolicyLearner
from actors.trainable import merged
from actors.weights import Probe, Weights, probe_of
from pipeline.grpo_config import GrpoSettings
from pipeline.telemetry import redirect_process_output

Report = dict[str, float]
# Visible tokens, per unit of width, that cost as much as a token's linear layers: 6 by the count of multiplications (12 width^2
# against 2 width), 4.4 as measured on CPUs.
_DENSE = 4


@dataclass(frozen=True)
class Step:
    """Rollouts as they are learnt from, and what is known of them before the first update."""

    parts: Sequence[Rows]
    """One for each forward pass."""
    olds: Sequence[Tensor | None]
    """[parts][actions] Log-probabilities under the policy before the first update; None: the same as under that of now."""
    references: Sequence[Tensor | None]
    """[parts][actions] Log-probabilities under the reference; None without a KL term."""
    undone: Tensor
    """[rollouts] bool: it holds an undo."""
    kept: Tensor | None
    """[rollouts] 0 for those whose policy is too far away; None where tokens are weighted, or nothing is."""


class Grpo(PolicyLearner):
    """A model that learns from the rollouts of groups."""

    def __init__(self, folder: Path, settings: GrpoSettings, policy: Policy, seed: int) -> None:
        super().__init__(folder, settings, policy, seed, settings.steps * settings.updates, bool(settings.beta))
        self.settings = settings
        self._dense = _DENSE * self._width if self._by_segment else None

    def learn(self, groups: Sequence[Sequence[int]], rollouts: Sequence[Sampled]) -> Report:
        """One step, of `settings.updates` optimiser steps, on groups of rollouts given by their numbers.

        Raises:
            LearningError: a loss or a gradient that is no number, or no memory left.
        """
        try:
            return self._learn(groups, rollouts)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise LearningError(f"out of memory at step {self.step + 1}: lower grpo.rows or grpo.row_tokens") from error

    def _learn(self, groups: Sequence[Sequence[int]], rollouts: Sequence[Sampled]) -> Report:
        begun = time.monotonic()
        step, sums, norms = self.begin(groups, rollouts), Sums(), []
        for _ in range(self.settings.updates):
            loss, norm = self._update(lambda: self.accumulate(step, sums))
            sums.add("loss", loss)
            norms.append(norm)
        self.step += 1
        return sums.report(self.settings.updates) | {
            "grad_norm": sum(norms) / len(norms),
            "lr": self.learning_rate,
            "learn_seconds": time.monotonic() - begun,
            "row_tokens": sum(int(part.inputs["input_ids"].numel()) for part in step.parts),
            "tokens": sum(len(one.walk.ids) for one in rollouts),
        }

    def begin(self, groups: Sequence[Sequence[int]], rollouts: Sequence[Sampled]) -> Step:
        """What stays the same in all updates of a step."""
        weights = loss_weights(rollouts, self.settings)
        pad_id = self.tokenizer.pad_token_id or 0
        size = (self.settings.row_tokens, self.settings.rows)
        found = batches(groups, rollouts, weights, self.policy, *size, pad_id, self._by_segment, self._dense)
        parts = [part.to(self._device) for part in found]
        several = self.settings.updates > 1 or self.settings.importance == "sequence"
        olds: list[Tensor | None] = [self._logprobs(self.model, part) if several else None for part in parts]
        undone = torch.tensor([self.policy.rule.undo_id in one.walk.ids for one in rollouts], device=self._device)
        kept = self._kept(parts, olds, len(rollouts)) if self.settings.importance == "sequence" else None
        return Step(parts, olds, [self._reference_logprobs(part) for part in parts], undone, kept)

    def accumulate(self, step: Step, sums: Sums) -> Tensor:
        """The loss of the model as it is now, whose gradients are added to those of the parameters.

        Raises:
            LearningError: it is no number.
        """
        total = torch.zeros((), device=self._device)
        for part, old, reference in zip(step.parts, step.olds, step.references, strict=True):
            logprobs, entropy = score(self.model, part, self.policy)
            loss = self._loss(part, logprobs, old, reference, step, sums)
            self._backward(loss)
            total += loss.detach()
            sums.mean("entropy", entropy)
        return total

    def _loss(self, rows: Rows, logprobs: Tensor, old: Tensor | None, reference: Tensor | None, step: Step, sums: Sums) -> Tensor:
        settings = self.settings
        old = logprobs.detach() if old is None else old
        ratio = (logprobs - old).exp()
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        losses = -torch.minimum(ratio * rows.advantage, clipped * rows.advantage)
        gap = (old - rows.behaviour).nan_to_num(0.0)  # the end of a run has no log-probability of its own
        if settings.importance == "token":
            correction = gap.exp().clamp(max=settings.importance_cap)
            losses = losses * correction
            sums.mean("importance", correction)
        elif step.kept is not None:
            losses = losses * step.kept[rows.rollout]
        if reference is not None:
            away = reference - logprobs
            # The k3 estimator of Schulman 2020. Times the ratio its gradient is that of the KL divergence, as in TRL
            # (use_bias_correction_kl, its default; DeepSeek-V3.2).
            kl = ratio * (away.exp() - away - 1)
            losses = losses + settings.beta * kl
            sums.mean("kl", kl.detach())
        with torch.no_grad():
            moved = torch.where(rows.advantage > 0, ratio > 1 + settings.clip_high, ratio < 1 - settings.clip_low)
            sums.mean("clipped", (moved & (rows.advantage != 0)).float())
            of_undone = step.undone[rows.rollout]
            sums.mean("mismatch_undo", gap[of_undone].abs())
            sums.mean("mismatch_plain", gap[~of_undone].abs())
        return (losses * rows.weight).sum()

    def _kept(self, parts: Sequence[Rows], olds: Sequence[Tensor | None], rollouts: int) -> Tensor:
        """[rollouts] 0 for those that this policy makes much likelier, or less likely, than the one that emitted them."""
        total = torch.zeros(rollouts, device=self._device)
        for rows, old in zip(parts, olds, strict=True):
            assert old is not None
            total.index_add_(0, rows.rollout, (old - rows.behaviour).nan_to_num(0.0))
        return (total.abs() <= math.log(self.settings.importance_cap)).float()

    @torch.no_grad()
    def _logprobs(self, model: Any, rows: Rows) -> Tensor:
        return score(model, rows, self.policy)[0]

    def _reference_logprobs(self, rows: Rows) -> Tensor | None:
        if not self.settings.beta:
            return None
        with self._referring() as model:
            return self._logprobs(model, rows)

    def weights(self, dtype: str) -> Weights:
        """For engines: adapters merged."""
        return Weights.of(merged(self.model, self._trainable), dtype)

    def send(self, sender: Sender, actors: Sequence[Any], dtype: str) -> Probe:
        """The same from GPU to GPU; returns what tells them from others."""
        model = merged(self.model, self._trainable)
        sender.send(model, dtype, actors)
        return probe_of(model)


def loss_weights(rollouts: Sequence[Sampled], settings: GrpoSettings) -> list[float]:
    """[rollouts] What one action of each counts, so that the weighted sum is the mean that the loss is named for."""
    lengths = [len(one.walk.ids) if one.counts else 0 for one in rollouts]
    if settings.loss == "grpo":
        return [1 / (len(rollouts) * length) if length else 0.0 for length in lengths]
    total = sum(lengths) if settings.loss == "dapo" else len(rollouts) * settings.max_tokens
    return [1 / total if length else 0.0 for length in lengths]


class Sums:
    """Means over the actions of all parts of a step."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        self._totals[name] = self._totals.get(name, 0.0) + float(value)

    def mean(self, name: str, values: Tensor) -> None:
        self.add(name, values.sum())
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def report(self, updates: int) -> Report:
        """Sums by update, means by value; a mean of nothing is left out."""
        counts = {name: self._counts.get(name, updates) for name in self._totals}
        return {name: total / counts[name] for name, total in self._totals.items() if counts[name]}


class _GrpoLearner:
    """Grpo behind Ray."""

    def __init__(self, folder: str, settings: GrpoSettings, policy: Policy, seed: int, log_file: str) -> None:
        redirect_process_output(Path(log_file))
        self._grpo = Grpo(Path(folder), settings, policy, seed)
        self._sender: Sender | None = None

    def learn(self, groups: Sequence[Sequence[int]], rollouts: Sequence[Sampled]) -> Report:
        return self._grpo.learn(groups, rollouts)

    def weights(self, dtype: str) -> tuple[int, Weights]:
        """(steps learned, weights)"""
        return self._grpo.step, self._grpo.weights(dtype)

    def send(self, actors: Sequence[Any], dtype: str, timeout: float) -> Probe:
        """Weights into the engines of rollout actors, which are alone to read them meanwhile."""
        self._sender = self._sender or Sender(timeout)
        return self._grpo.send(self._sender, actors, dtype)

    def save(self, folder: str) -> None:
        self._grpo.save(Path(folder))

    def checkpoint(self, folder: str) -> None:
        self._grpo.checkpoint(Path(folder))

    def restore(self, folder: str) -> None:
        self._grpo.restore(Path(folder))


GrpoActor: Any = ray.remote(_GrpoLearner)
