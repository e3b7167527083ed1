"""Dynamic masking: a small network learns beside the model which targets are wrong decisions, and weighs the losses by that.

Called by the learner's trainer. The network has an optimiser of its own, so that it changes nothing of how the model is clipped and
scheduled; its state goes into the checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.backtrack.targets import ErrorPredictor, dynamic_weights

_LR = 1e-3


class DynamicMask:
    """f(y, h) of `ErrorPredictor`, trained along."""

    def __init__(self, model: Any, seed: int) -> None:
        embeddings = model.get_input_embeddings()
        with torch.random.fork_rng():  # the model's training draws what it would draw without this
            torch.manual_seed(seed)
            self._predictor = ErrorPredictor(embeddings.weight.shape[1]).to(model.device)
        self._optimiser = torch.optim.AdamW(self._predictor.parameters(), lr=_LR)

    def weights(self, hidden: Tensor, embedding: Tensor, wrong: Tensor, learn: bool) -> Tensor:
        """[targets] 1 - sigmoid(f(y, h)), for the loss of this batch; then, where `learn`, a step of the network on it.

        Args:
            hidden: [targets, width] What the head sees at their places.
            embedding: [targets, width] Of the targets.
            wrong: [targets] Whether they are wrong decisions.
        """
        with torch.enable_grad():
            # To one scale: beside hidden states behind a norm, raw embeddings of a small model are next to nothing.
            both = (torch.nn.functional.rms_norm(one.float(), one.shape[-1:]) for one in (hidden, embedding))
            logits = self._predictor(*both)
            if learn:
                self._optimiser.zero_grad()
                self._predictor.loss(logits, wrong).backward()
                self._optimiser.step()
        return dynamic_weights(logits)

    def tensors(self) -> dict[str, Tensor]:
        """Its whole state."""
        return state_of(self._predictor, self._optimiser)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        restore(self._predictor, self._optimiser, tensors)


def state_of(network: torch.nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A network and its optimiser as tensors, for a checkpoint."""
    found = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for number, state in optimiser.state_dict()["state"].items():
        found |= {f"optimiser.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return found


def restore(network: torch.nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `state_of`."""
    weights: dict[str, Tensor] = {}
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "network":
            weights[rest] = tensor
        elif part == "optimiser":
            number, _, key = rest.partition(".")
            states.setdefault(int(number), {})[key] = tensor
    network.load_state_dict(weights)
    optimiser.load_state_dict(optimiser.state_dict() | {"state": states})
