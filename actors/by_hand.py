"""The loss of a batch by the long way: every trace alone, every context taken from the start of the trace, ordinary forwards.

checks.py compares it with what the trainer computes on trees and packed rows. It shares with it what a trace teaches
(`trace_walk`), and nothing of how that is laid out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.packing import TrainingSet
from pipeline.backtrack.targets import trace_walk
from pipeline.backtrack.trace import Trace
from pipeline.backtrack.undo import apply_undo

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Taught:
    """One target."""

    at: int
    """Index in the trace of the token it belongs to."""
    context: Ids
    """What the model sees there; in the hard form, where a mask decides that, what was emitted."""
    target: int
    weight: float
    ends_run: bool = False
    """What is taught is not to emit the target."""


def taught(trace: Trace, data: TrainingSet) -> list[Taught]:
    """Every target of one trace that counts. In the rewind form one that it repeats in the same state counts once."""
    start, rule, form = trace.prompt_length, data.rule, data.form
    walk = trace_walk(trace, rule, data.targets)
    weights, targets = walk.weights or (), walk.targets or ()
    found = [Taught(at, trace.ids[:at], trace.ids[at], walk.prompt_weight) for at in range(1, start)]
    for step, token in enumerate(walk.ids):
        at, emitted = start + step, walk.ids[:step]
        if form.context != "rewind":
            found.append(Taught(at, trace.ids[:at], targets[step], weights[step]))
            continue
        run = 0  # undo tokens whose effect is put off until the run ends
        while rule.unit == "token" and form.rewinding == "deferred" and run < step and emitted[-1 - run] == rule.undo_id:
            run += 1
        within = walk.prompt + apply_undo(emitted[: step - run], rule).surviving + (rule.undo_id,) * run
        if run and token != rule.undo_id:
            found.append(Taught(at, within, rule.undo_id, weights[step - 1], True))
        behind = walk.prompt + apply_undo(emitted, rule).surviving
        found.append(Taught(at, within if token == rule.undo_id else behind, targets[step], weights[step]))
    if form.context == "rewind":
        best: dict[tuple[Ids, int, bool], Taught] = {}
        for one in found:
            key = (one.context, one.target, one.ends_run)
            if key not in best or one.weight > best[key].weight:
                best[key] = one
        found = list(best.values())
    return [one for one in found if one.weight > 0]


@torch.no_grad()
def loss_by_hand(model: Any, data: TrainingSet, numbers: Sequence[int]) -> float:
    """Mean loss per target, by weight, of the traces with these numbers; `model` is in eval mode."""
    total = weight = 0.0
    for number in numbers:
        trace, counts = data.traces[number], data.weights[number] if data.weights else 1.0
        some = taught(trace, data)
        for one, logits in zip(some, _logits(model, trace, some, data), strict=True):
            logprobs = logits.double().log_softmax(-1)
            loss = -torch.log(-torch.expm1(logprobs[one.target])) if one.ends_run else -logprobs[one.target]
            total += counts * one.weight * float(loss)
            weight += counts * one.weight
    return total / max(weight, 1e-9)


def _logits(model: Any, trace: Trace, some: Sequence[Taught], data: TrainingSet) -> list[Tensor]:
    """[vocabulary] for each target."""
    if data.form.context == "hard":
        seen = _hidden_rows(trace, data)
        given = {name: value.to(model.device) for name, value in seen.items()}
        row = model(**given, use_cache=False).logits[0]
        return [row[one.at - 1] for one in some]
    # A causal forward over a context holds all contexts that it begins with.
    longest: list[Ids] = []
    for context in sorted({one.context for one in some}, reverse=True):
        if not longest or longest[-1][: len(context)] != context:
            longest.append(context)
    rows = {}
    for context in longest:
        ids = torch.tensor([context], device=model.device)
        rows[context] = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    holder = {one.context: next(c for c in longest if c[: len(one.context)] == one.context) for one in some}
    return [rows[holder[one.context]][len(one.context) - 1] for one in some]


def _hidden_rows(trace: Trace, data: TrainingSet) -> dict[str, Tensor]:
    """The row of the hard form: what stands when a token has been emitted is what it sees, and undo tokens unless hidden."""
    ids, start, undo_id = trace.ids, trace.prompt_length, data.rule.undo_id
    sees = torch.eye(len(ids), dtype=torch.bool)
    positions = []
    for place in range(len(ids)):
        stands = {*range(start), *(start + at for at in apply_undo(ids[start : place + 1], data.rule).source)}
        positions.append(place if data.form.positions == "kept" else sum(other < place for other in stands))
        for other in range(place):
            is_undo = other >= start and ids[other] == undo_id
            sees[place, other] = not data.form.hide_undos if is_undo else other in stands
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": sees[None, None],
    }
