"""Plain completions on transformers, without undo: rows that have ended leave the batch and others take their slots, so a batch
costs what its rows are long together, not what the longest of them is. HfEngine calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from actors.decode import check_model, forward, prefill, refillable, sample, without
from actors.ragged import RaggedCache

if TYPE_CHECKING:
    from actors.engines import Request, Sampling


@dataclass
class Row:
    """A completion under way, or a finished one."""

    index: int
    """Of its request."""
    last: int
    """Id that the next forward reads."""
    length: int
    """Ids so far, those of the prompt included."""
    room: int
    """Ids that may still come."""
    uniforms: Sequence[float]
    """[room] A row's whole randomness; empty where decoding is greedy."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of the ids at temperature 1 before any ban; empty where not asked for."""
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """[ids] The most probable ids, likewise."""
    finish: Literal["stop", "length"] | None = None
    """None while it goes on."""

    def take(self, token: int, stops: frozenset[int]) -> None:
        self.ids.append(token)
        self.last = token
        self.length += 1
        self.room -= 1
        self.finish = "stop" if token in stops else "length" if not self.room else None


@torch.inference_mode()
def complete(model: Any, requests: Sequence[Request], sampling: Sampling, slots: int) -> list[Row]:
    """Finished rows in the order of the requests; no row depends on the others, but for rounding.

    Args:
        model: a causal model in eval mode whose attention takes a mask of booleans (sdpa).
        slots: rows at a time.

    Raises:
        ValueError: a model that `check_model` refuses; vLLM may serve it.
    """
    greedy, stops = sampling.temperature == 0, frozenset((sampling.stop_id, *sampling.also_stop))
    rooms = [min(sampling.max_tokens, request.max_tokens or sampling.max_tokens) for request in requests]
    lengths = [len(request.prompt_ids) for request in requests]
    longest = max(map(sum, zip(lengths, rooms, strict=True)), default=0)
    slots = min(slots, len(requests))
    cache = RaggedCache(check_model(model, longest).num_hidden_layers, slots, longest)
    waiting = sorted(range(len(requests)), key=lambda index: lengths[index], reverse=True)  # like lengths at a time: less padding
    rows: list[Row] = []
    done: dict[int, Row] = {}
    while waiting or rows:
        if refillable(slots, len(rows), len(waiting)):
            new = [waiting.pop() for _ in range(min(slots - len(rows), len(waiting)))]
            prefill(model, cache, len(rows), [requests[index].prompt_ids for index in new])
            for index in new:
                drawn = np.random.Generator(np.random.Philox(requests[index].seed))
                uniforms: list[float] = [] if greedy else drawn.random(rooms[index]).tolist()
                rows.append(Row(index, requests[index].prompt_ids[-1], lengths[index], rooms[index], uniforms))
        _step(model, cache, rows, sampling, stops)
        done.update((row.index, row) for row in rows if row.finish)
        rows = without(cache, rows, [row.finish is not None for row in rows])
    return [done[index] for index in range(len(requests))]


def _step(model: Any, cache: RaggedCache, rows: list[Row], sampling: Sampling, stops: frozenset[int]) -> None:
    """The next id of every row."""
    logits_BV = forward(model, cache, [row.last for row in rows], [row.length for row in rows]).float()
    named = logits_BV.log_softmax(-1) if sampling.logprobs or sampling.top else logits_BV  # before what follows changes them
    if sampling.forbidden_ids:
        logits_BV = logits_BV.clone()
        logits_BV[:, list(sampling.forbidden_ids)] = -torch.inf
    if sampling.temperature == 0:
        ids_B = logits_BV.argmax(-1)
    else:
        uniforms_B = torch.tensor([row.uniforms[len(row.ids)] for row in rows], dtype=torch.float64, device=logits_BV.device)
        ids_B = sample((logits_BV / sampling.temperature).softmax(-1), uniforms_B, sampling.top_p)
    if sampling.logprobs:
        for row, logprob in zip(rows, named.gather(1, ids_B.unsqueeze(1)).squeeze(1).tolist(), strict=True):
            row.logprobs.append(logprob)
    if sampling.top:
        best = named.topk(min(sampling.top, named.shape[1]))
        for row, ids, logprobs in zip(rows, best.indices.tolist(), best.values.tolist(), strict=True):
            row.top.append(tuple(zip(ids, logprobs, strict=True)))
    for row, token in zip(rows, ids_B.tolist(), strict=True):
        row.take(token, stops)
