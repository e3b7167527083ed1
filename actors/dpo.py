"""The learner of preferences on the tree: both sides of a pair are walks of one token tree, scored by one forward of the policy and
one of its reference. Formulae and their sources: docs/dpo.md. Linear rows with loss dpo go to TRL instead, actors/dpo_trl.py.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl.trainer.utils import disable_dropout_in_model

from actors.checkpoints import newest_step, save_step
from actors.dpo_trl import fit_by_trl
from actors.memory import out_of_memory
from actors.policy import Policy, Rows, Sampled, batches, logits_of, logprobs_of
from actors.policy_learner import LearningError, PolicyLearner
from pipeline.backtrack.preferences import Pair, walks
from pipeline.backtrack.trace import Role
from pipeline.dpo_config import DpoSettings
from pipeline.telemetry import redirect_process_output

Record = dict[str, float]
"""Figures of a step, or of a check, whose names begin with HELD_OUT."""
HELD_OUT = "held_out_"
_RECORDS = "records.json"
_ROWS_TO_CHECK = 8


@dataclass(frozen=True)
class PairSet:
    """What a training learns from."""

    train: Sequence[Pair]
    held_out: Sequence[Pair]
    """Of other problems; measured and never trained on."""


@dataclass(frozen=True)
class Compared:
    """Sums over the actions of each side that count."""

    chosen: Tensor
    """[pairs] log policy - log reference."""
    rejected: Tensor
    kl_chosen: Tensor
    """[pairs] KL(reference || policy) of what may come next, in every state of the side: D_SeqKL of TDPO, in nats."""
    kl_rejected: Tensor
    logprob: Tensor
    """[pairs] log policy of the chosen side."""
    error: Tensor
    """[pairs] log policy - log reference of the chosen side's wrong decisions, which no loss counts."""
    errs: Tensor
    """[pairs] bool: it is known which these are."""


def losses(compared: Compared, settings: DpoSettings) -> Tensor:
    """[pairs] -log sigmoid(u) of DPO (Rafailov et al. 2023, eq. 7); -log sigmoid(u - delta) of TDPO1 and
    -log sigmoid(u - alpha delta2) of TDPO2 (Zeng et al. 2024), where delta2 lets no gradient through the chosen side's KL; minus
    the log-probability of the chosen side for sft."""
    if settings.loss == "sft":
        return -compared.logprob
    u = settings.beta * (compared.chosen - compared.rejected)
    if settings.loss == "dpo":
        return -logsigmoid(u)
    if settings.loss == "tdpo1":
        return -logsigmoid(u - settings.beta * (compared.kl_rejected - compared.kl_chosen))
    return -logsigmoid(u - settings.alpha * settings.beta * (compared.kl_rejected - compared.kl_chosen.detach()))


class Dpo(PolicyLearner):
    """A model that learns from pairs."""

    def __init__(self, folder: Path, settings: DpoSettings, policy: Policy, seed: int) -> None:
        super().__init__(folder, settings, policy, seed, settings.steps, referred=True)
        disable_dropout_in_model(self.model)  # as TRL does: policy and reference differ by what is learned alone
        self.settings = settings

    def learn(self, pairs: Sequence[Pair]) -> Record:
        """One optimiser step.

        Raises:
            LearningError: a loss or a gradient that is no number, or no memory left.
        """
        found: list[Record] = []

        def accumulate() -> Tensor:
            total, weights = torch.zeros((), device=self._device), self._weights(pairs)
            for rows, numbers in self._parts(pairs, self.settings.rows):
                compared = self.compare(rows, numbers)
                loss = (losses(compared, self.settings) * weights).sum()
                self._backward(loss)
                total += loss.detach()
                found.append(self._figures(compared))
            return total

        try:
            loss, norm = self._update(accumulate)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise LearningError(f"out of memory at step {self.step + 1}: lower dpo.rows or dpo.row_tokens") from error
        self.step += 1
        return _mean(found) | {"loss": float(loss), "grad_norm": norm, "lr": self.learning_rate}

    @torch.no_grad()
    def measure(self, pairs: Sequence[Pair]) -> Record:
        """The figures of pairs that it does not learn from."""
        found, weights = [], self._weights(pairs)
        for rows, numbers in self._parts(pairs, _ROWS_TO_CHECK):
            compared = self.compare(rows, numbers)
            figures = self._figures(compared)
            figures["sum_loss"] = float((losses(compared, self.settings) * weights).sum()) * len(pairs)
            found.append(figures)
        return _mean(found)

    def _weights(self, pairs: Sequence[Pair]) -> float:
        """What a pair's loss counts: the mean over pairs, for sft that over the chosen actions."""
        if self.settings.loss != "sft":
            return 1 / len(pairs)
        return 1 / max(1.0, sum(sum(walks(pair)[0].weights or ()) for pair in pairs))

    def _parts(self, pairs: Sequence[Pair], rows: int) -> list[tuple[Rows, Tensor]]:
        """Whole pairs in packed rows, some rows at a time, and the pairs' numbers; the chosen side is the first of two walks."""
        rollouts = [Sampled(walk, (0.0,) * len(walk.ids)) for pair in pairs for walk in walks(pair)]
        groups = [(2 * number, 2 * number + 1) for number in range(len(pairs))]
        pad_id = self.tokenizer.pad_token_id or 0
        ones, size = [1.0] * len(rollouts), (self.settings.row_tokens, rows)
        found = batches(groups, rollouts, ones, self.policy, *size, pad_id, self._by_segment)
        return [(part.to(self._device), torch.unique(part.rollout // 2).to(self._device)) for part in found]

    def compare(self, rows: Rows, numbers: Tensor) -> Compared:
        """Both sides of the pairs with these numbers; gradients go through the policy alone."""
        logits = logits_of(self.model, rows, self.policy)
        with self._referring() as reference:
            before = logits_of(reference, rows, self.policy)
        logprobs, _ = logprobs_of(logits, rows, self.policy)
        moved = logprobs - logprobs_of(before, rows, self.policy)[0]
        divergence = self._divergence(logits, before, rows)[rows.place]
        is_error = (rows.role == Role.ERROR).float()

        def sides(values: Tensor) -> tuple[Tensor, Tensor]:
            sums = torch.zeros(2 * int(numbers[-1]) + 2, device=self._device).index_add(0, rows.rollout, values)
            return sums[2 * numbers], sums[2 * numbers + 1]

        chosen, rejected = sides(moved * rows.weight)
        kl_chosen, kl_rejected = sides(divergence * rows.weight)
        with torch.no_grad():
            error, errs = sides(moved * is_error)[0], sides(is_error)[0] > 0
        return Compared(chosen, rejected, kl_chosen, kl_rejected, sides(logprobs * rows.weight)[0], error, errs)

    def _divergence(self, logits: Tensor, before: Tensor, rows: Rows) -> Tensor:
        """[places] KL(reference || policy) over the vocabulary. Within a deferred run of undos the choice is to go on with it or to
        end it: the distribution has two values there."""
        now, then = logits.log_softmax(-1), before.log_softmax(-1)
        found = (then.exp() * (then - now)).sum(-1)
        undo_id = self.policy.rule.undo_id
        in_run = rows.inputs["input_ids"][rows.row, rows.column] == undo_id
        if self.policy.rewinds and in_run.any():
            p, q = then[in_run, undo_id], now[in_run, undo_id]
            no_p, no_q = (torch.log(-torch.expm1(one)) for one in (p, q))
            found = found.masked_scatter(in_run, p.exp() * (p - q) + no_p.exp() * (no_p - no_q))
        return found

    @torch.no_grad()
    def _figures(self, compared: Compared) -> Record:
        """Sums over the pairs."""
        rewards = [self.settings.beta * side for side in (compared.chosen, compared.rejected)]
        named = {
            "accuracy": (rewards[0] > rewards[1]).float(),
            "margin": rewards[0] - rewards[1],
            "reward_chosen": rewards[0],
            "reward_rejected": rewards[1],
            "kl_chosen": compared.kl_chosen,
            "kl_rejected": compared.kl_rejected,
            "error": compared.error,
        }
        found = {f"sum_{name}": float(values.sum()) for name, values in named.items()}
        return found | {"pairs": len(compared.chosen), "errs": float(compared.errs.sum())}


def _mean(parts: Sequence[Record]) -> Record:
    """Means over all pairs of what `_figures` has summed by part; the error's over the pairs in which it is known."""
    sums = {name: math.fsum(part[name] for part in parts) for name in parts[0]}
    pairs, errs = sums.pop("pairs"), sums.pop("errs")
    found = {name.removeprefix("sum_"): value / pairs for name, value in sums.items() if name != "sum_error"}
    return found | ({"error_change": sums["sum_error"] / errs} if errs else {})


def drawn(count: int, batch: int, step: int, seed: int) -> list[int]:
    """Numbers of the pairs of a step, counted from 0: all of them once in an order of chance, then again in another one."""
    found: list[int] = []
    first, end = step * batch, (step + 1) * batch
    for epoch in range(first // count, (end - 1) // count + 1):
        order = list(range(count))
        random.Random(f"{seed}/dpo/{epoch}").shuffle(order)
        found += order[max(0, first - epoch * count) : end - epoch * count]
    return found


def fit(
    source: Path, target: Path, data: PairSet, settings: DpoSettings, policy: Policy, seed: int, resume: Path,
    note: Callable[[Record], None],
) -> None:  # fmt: skip
    """Train the model of `source` on pairs and save it as `target`.

    Args:
        resume: a folder for checkpoints of this very training. What a killed call has left there is gone on from.
        note: gets every record once, those of before a checkpoint again.

    Raises:
        LearningError: as `Dpo.learn`.
    """
    if settings.form == "soft" and settings.loss == "dpo":
        fit_by_trl(source, target, data.train, data.held_out, settings, policy.rule.undo_id, seed, resume, note)
        return
    learner, records = Dpo(source, settings, policy, seed), list[Record]()

    def keep(record: Record) -> None:
        records.append(record)
        note(record)

    def check() -> None:
        if data.held_out:
            found = learner.measure(data.held_out)
            keep({"step": learner.step} | {HELD_OUT + name: value for name, value in found.items()})

    def save(folder: Path) -> None:
        learner.checkpoint(folder)
        (folder / _RECORDS).write_text(json.dumps(records))

    if newest := newest_step(resume):
        learner.restore(newest)
        for record in json.loads((newest / _RECORDS).read_text()):
            keep(record)
    else:
        check()
    while learner.step < settings.steps:
        begun = time.monotonic()
        numbers = drawn(len(data.train), settings.batch, learner.step, seed)
        report = learner.learn([data.train[number] for number in numbers])
        keep({"step": learner.step} | report | {"learn_seconds": time.monotonic() - begun})
        if learner.step % settings.check_every == 0 or learner.step == settings.steps:
            check()
        if learner.step % settings.checkpoint_every == 0 and learner.step < settings.steps:
            save_step(resume, learner.step, save)
    learner.save(target)


class _DpoLearner:
    """Trains behind Ray; the driver polls `records` meanwhile."""

    def __init__(self, log_file: str) -> None:
        redirect_process_output(Path(log_file))
        self._records: list[Record] = []

    def fit(
        self, source: str, target: str, data: PairSet, settings: DpoSettings, policy: Policy, seed: int, resume: str
    ) -> list[Record]:
        fit(Path(source), Path(target), data, settings, policy, seed, Path(resume), self._records.append)
        return self._records

    def records(self, start: int) -> list[Record]:
        """Those from number `start` on."""
        return self._records[start:]


DpoActor: Any = ray.remote(max_concurrency=2)(_DpoLearner)  # type: ignore[call-overload]  # one thread trains, the other answers
