"""Teacher-forced probes: log-probabilities of given tokens in given contexts, by transformers in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

_ROWS = 64


@dataclass(frozen=True)
class ProbeRow:
    """One sequence and what is asked about it."""

    ids: tuple[int, ...]
    at: tuple[int, ...]
    """Positions of the asked tokens: each is predicted from the ids before it; len(ids) asks behind the last one."""
    tokens: tuple[int, ...]
    """The asked token at each of these positions."""


def probe(folder: Path, rows: Sequence[ProbeRow]) -> list[tuple[float, ...]]:
    """`ask` for the model of a folder, on a GPU if there is one."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return ask(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), rows)


def ask(model: Any, rows: Sequence[ProbeRow]) -> list[tuple[float, ...]]:
    """Log-probabilities [asked tokens] of each row, in nats, in the order of the rows. `model` is in eval mode."""
    device = model.device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found: dict[int, tuple[float, ...]] = {}
    with torch.inference_mode():
        for start in range(0, len(order), _ROWS):
            chunk = order[start : start + _ROWS]
            longest = max(len(rows[i].ids) for i in chunk)
            # Right padding: with a causal mask no real position sees it.
            input_ids = torch.tensor([list(rows[i].ids) + [0] * (longest - len(rows[i].ids)) for i in chunk], device=device)
            logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
            for index, i in enumerate(chunk):
                positions = torch.tensor(rows[i].at, dtype=torch.long, device=device) - 1
                logprobs = torch.log_softmax(logits[index, positions].float(), -1)
                asked = torch.tensor(rows[i].tokens, dtype=torch.long, device=device).unsqueeze(1)
                found[i] = tuple(logprobs.gather(1, asked).squeeze(1).tolist())
    return [found[i] for i in range(len(rows))]
