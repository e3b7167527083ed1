"""The small network on hidden states that both learned verifiers end in, its file, and its loss.

The process reward model has one on a backbone of its own, the verifier head is one on the policy. It knows no labels' meaning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class HeadError(ValueError):
    """A head that is not there or cannot be used; one line."""


class Head(nn.Module):
    """Hidden states -> one logit each, by a layer of GELUs.

    Example:
        logits = Head(width=128, units=64)(hidden)  # [.., 128] -> [..]
    """

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.width, self.units = width, units
        self.layers = nn.Sequential(nn.Linear(width, units), nn.GELU(), nn.Linear(units, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        """[.., width] -> [..] Computed in fp32; states are brought to one scale, which differs much from model to model."""
        logits: Tensor = self.layers(nn.functional.rms_norm(hidden.float(), hidden.shape[-1:])).squeeze(-1)
        return logits


def loss(logits: Tensor, labels: Tensor, scored: Tensor) -> Tensor:
    """Mean binary cross entropy, in nats, over the places that are scored; labels may be soft. All have the same shape."""
    losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (losses * scored).sum() / scored.sum().clamp_min(1)


def cosine(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: a rise, then a cosine down to 10 %."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def optimiser_of(
    parameters: Any, lr: float, weight_decay: float, steps: int, warmup: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95))
    schedule: Callable[[int], float] = lambda step: cosine(step, steps, warmup)  # noqa: E731
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, schedule)


def save_head(head: Head, file: Path, about: Mapping[str, Any]) -> None:
    """Complete or not there. `about` is kept beside the weights."""
    part = file.with_suffix(".part")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    save_file(weights, part, metadata={"about": json.dumps({"width": head.width, "units": head.units, **about}, sort_keys=True)})
    part.replace(file)


def load_head(file: Path, width: int) -> tuple[Head, dict[str, Any]]:
    """The head of a file, in eval mode, and what is said about it.

    Args:
        width: of the hidden states that it shall read.

    Raises:
        HeadError: no such file, no head in it, one for states of another width, or numbers in it that are not finite.
    """
    if not file.is_file():
        raise HeadError(f"{file.parent} has no {file.name}: the stage prm trains it (prm.steps)")
    try:
        with safe_open(file, framework="pt") as opened:  # type: ignore[no-untyped-call]
            about: Any = json.loads((opened.metadata() or {}).get("about", "null"))
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        head = Head(int(about["width"]), int(about["units"]))
        head.load_state_dict(weights)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise HeadError(f"{file} is no head: {' '.join(str(error).split())[:200]}") from error
    if head.width != width:
        raise HeadError(f"{file} reads hidden states of width {head.width}, the model has {width}")
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise HeadError(f"{file} holds numbers that are not finite")
    return head.eval(), about
