"""The verifier head: P(should undo now) from the policy's hidden states, by a small network beside the model's own head.

Trained alone, with the policy frozen and its hidden states computed once, or jointly with its fine-tuning. It reads what the output
layer reads, so that decoding has it for nothing. Saved within a model folder, or in a folder of its own for that model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from actors.dynamic import restore, state_of
from actors.heads import Head, load_head, loss, optimiser_of, save_head
from actors.labelled import Labelled, by_length, collate
from actors.prm import PAD, VerifierCurve, check_labels, train
from actors.segments import attends_by_segment
from actors.signals import Scorer
from pipeline.prm_config import HeadSettings

FILE = "verifier_head.safetensors"
_CHECK_EVERY = 100


@torch.inference_mode()
def hidden_states(model: Any, rows: Sequence[Labelled]) -> list[Tensor]:
    """For each row what the output layer reads at its places, [places, width], on the CPU.

    `model` is a causal model in eval mode.
    """
    by_segment = attends_by_segment(model)
    found: dict[int, Tensor] = {}
    for indices in by_length(rows):
        batch = collate([[rows[index]] for index in indices], PAD, by_segment).to(model.device)
        hidden_BTD = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
        for number, index in enumerate(indices):
            found[index] = hidden_BTD[number, list(rows[index].at)].float().cpu()
    return [found[index] for index in range(len(rows))]


def policy_of(folder: Path) -> Any:
    """The model of a folder in fp32 and eval mode, on a GPU if there is one."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def fit(
    policy: Path,
    target: Path,
    rows: Sequence[Labelled],
    held_out: Sequence[Labelled],
    settings: HeadSettings,
    seed: int,
    curve: VerifierCurve,
) -> VerifierCurve:
    """Train a head on the frozen policy of a folder and write it into the folder `target`.

    Args:
        rows: states, labelled 1 where the policy should undo.
        held_out: states on which the step is chosen whose weights are kept; none keeps the last one's.

    Raises:
        VerifierTrainingError: no states, states of one label alone, or a loss that is no number.
    """
    check_labels(rows, "the verifier head", "the traces hold no state with a target")
    model = policy_of(policy)
    states_ND, labels_N = _stacked(model, rows)
    held_ND, held_N = _stacked(model, held_out) if held_out else (None, None)
    torch.manual_seed(seed)
    head = Head(states_ND.shape[1], settings.width)
    curve.steps, curve.rows = settings.steps, len(labels_N)
    optimiser, schedule = optimiser_of(head.parameters(), settings.lr, 0.01, settings.steps, 0.0)
    drawn = torch.Generator().manual_seed(seed)

    def step(number: int) -> float:
        some = torch.randint(len(labels_N), (settings.batch,), generator=drawn)
        found = loss(head(states_ND[some]), labels_N[some], torch.ones(len(some)))
        optimiser.zero_grad()
        found.backward()
        optimiser.step()
        schedule.step()
        return float(found.detach())

    def check() -> float | None:
        if held_ND is None or held_N is None:
            return None
        with torch.no_grad():
            return float(nn.functional.binary_cross_entropy_with_logits(head(held_ND), held_N))

    train(head, step, check, _CHECK_EVERY, curve, "prm.head.lr")
    target.mkdir(parents=True, exist_ok=True)
    save_head(head, target / FILE, {})
    return curve


class JointHead:
    """A head that is trained along with the policy, whose gradient its loss reaches. Its optimiser is its own, so that it changes
    nothing of how the policy is clipped and scheduled."""

    def __init__(self, model: Any, undo_id: int, seed: int) -> None:
        with torch.random.fork_rng():  # the model's training draws what it would draw without this
            torch.manual_seed(seed)
            self.head = Head(model.get_input_embeddings().weight.shape[1], HeadSettings().width).to(model.device)
        self._undo_id = undo_id
        self._optimiser = torch.optim.AdamW(self.head.parameters(), lr=HeadSettings().lr)

    def loss(self, hidden: Tensor, last: Tensor, target: Tensor, ends_run: Tensor, weight: Tensor, learn: bool) -> Tensor:
        """Cross entropy summed over targets; states within a run of U's count nothing.

        Args:
            hidden: [targets, width] What the output layer reads at their places.
            last: [targets] The ids that stand there.
            target: [targets]
            ends_run: [targets] bool: what is taught is not to emit the target.
            weight: [targets]
            learn: whether the head makes a step on the gradients of the loss before this one.
        """
        if learn:
            self._settle()
        due = ((target == self._undo_id) & ~ends_run).float()
        losses = nn.functional.binary_cross_entropy_with_logits(self.head(hidden), due, reduction="none")
        return (losses * weight * (last != self._undo_id)).sum()

    def _settle(self) -> None:
        if any(part.grad is not None for part in self.head.parameters()):
            self._optimiser.step()
            self._optimiser.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Its whole state."""
        self._settle()
        return state_of(self.head, self._optimiser)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        restore(self.head, self._optimiser, tensors)

    def save(self, folder: Path) -> None:
        """Into the model's folder."""
        self._settle()
        save_head(self.head, folder / FILE, {"joint": True})


def _stacked(model: Any, rows: Sequence[Labelled]) -> tuple[Tensor, Tensor]:
    """[states, width] and [states]."""
    labels = [label for row in rows for label in row.labels or ()]
    return torch.cat(hidden_states(model, rows)), torch.tensor(labels)


def load(folder: Path, model: Any) -> Head:
    """The head in a folder, for a model and where that is.

    Raises:
        HeadError: none is there, or it does not fit the model.
    """
    head, _ = load_head(folder / FILE, model.config.get_text_config().hidden_size)
    return head.to(model.device)


def p_should_undo(policy: Path, folder: Path, rows: Sequence[Labelled]) -> list[tuple[float, ...]]:
    """For each row the head's probability at each of its places."""
    model = policy_of(policy)
    head = load(folder, model).cpu()
    with torch.inference_mode():
        return [tuple(torch.sigmoid(head(states_ND)).tolist()) for states_ND in hidden_states(model, rows)]


def scorer(head: Head) -> Scorer:
    """For guided decoding: 1 - P(should undo), so that undo is due where the score is low."""

    def score(hidden_BD: Tensor, visible: Sequence[tuple[int, ...]]) -> Tensor:
        return 1 - torch.sigmoid(head(hidden_BD))

    return score
