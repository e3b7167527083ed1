"""The process reward model: a backbone and a head that say at the end of each step how good the solution is so far, 0 to 1.

Trained on rows with step labels, asked by rewards, search, guided decoding and best-of-n. Ids in, values out; where labels come
from is not its business.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from actors.heads import Head, HeadError, load_head, loss, optimiser_of, save_head
from actors.labelled import Batch, Labelled, by_length, collate, linear, step_ends
from actors.packing import pack
from actors.segments import attends_by_segment
from actors.signals import Scorer
from pipeline.prm_config import PrmSettings

Score = Literal["last", "min", "product"]
State = tuple[Sequence[int], Sequence[int]]
"""Ids of a prompt, and of what stands behind it."""

NOTE, HEAD = "prm.json", "head.safetensors"
PAD = 0  # nothing sees padding


class VerifierTrainingError(RuntimeError):
    """Training cannot go on; one line."""


@dataclass
class VerifierCurve:
    """What the training of a verifier looked like; grows while it runs."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss since the point before, in nats)."""
    checks: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss on held-out rows)."""
    step: int = 0
    steps: int = 0
    kept_step: int = 0
    """Step of the saved weights: the best on held-out rows, or the last."""
    rows: int = 0
    left_out: int = 0
    """Rows that are longer than a packed row."""


class ProcessRewardModel(nn.Module):
    """Values of states.

    Example:
        model = ProcessRewardModel.load(Path("runs/tiny/1/prm/prm"))
        values = model.value_of([(prompt_ids, ids)])  # a value for each, at its last id

    Raises:
        HeadError: a head that does not fit the backbone.
    """

    def __init__(self, backbone: Any, head: Head, step_end_ids: frozenset[int], stop_id: int) -> None:
        super().__init__()
        if head.width != backbone.config.get_text_config().hidden_size:
            width = backbone.config.get_text_config().hidden_size
            raise HeadError(f"the head reads hidden states of width {head.width}, the backbone has {width}")
        self.backbone, self.head = backbone, head
        self.step_end_ids, self.stop_id = step_end_ids, stop_id
        self._by_segment = attends_by_segment(backbone)

    @classmethod
    def new(cls, folder: Path, units: int, step_end_ids: frozenset[int], stop_id: int) -> ProcessRewardModel:
        """The backbone of any causal model's folder, and a fresh head."""
        backbone: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        return cls(backbone, Head(backbone.config.get_text_config().hidden_size, units), step_end_ids, stop_id)

    @classmethod
    def load(cls, folder: Path) -> ProcessRewardModel:
        """A saved one, in eval mode, on a GPU if there is one.

        Raises:
            HeadError: no process reward model in the folder, or one that does not fit together.
        """
        try:
            note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
            ends, stop_id = frozenset(map(int, note["step_end_ids"])), int(note["stop_id"])
        except FileNotFoundError as error:
            raise HeadError(
                f"{folder} is no process reward model: it has no {NOTE}; the stage prm writes one (prm.steps)"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HeadError(f"{folder / NOTE} cannot be read: {' '.join(str(error).split())[:200]}") from error
        try:
            backbone: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise HeadError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        head, _ = load_head(folder / HEAD, backbone.config.get_text_config().hidden_size)
        model = cls(backbone, head, ends, stop_id)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def save(self, folder: Path, tokenizer: Any = None) -> None:
        """Complete or not there: the folder gets its name last."""
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        self.backbone.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        save_head(self.head, part / HEAD, {})
        note = {"step_end_ids": sorted(self.step_end_ids), "stop_id": self.stop_id}
        (part / NOTE).write_text(json.dumps(note, sort_keys=True) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    def forward(self, batch: Batch) -> Tensor:
        """[rows, tokens] Logits; those of places that are not scored mean nothing."""
        hidden = self.backbone(**batch.inputs, use_cache=False).last_hidden_state
        logits: Tensor = self.head(hidden)
        return logits

    def batch(self, rows: Sequence[Sequence[Labelled]]) -> Batch:
        return collate(rows, PAD, self._by_segment).to(self.backbone.device)

    @torch.inference_mode()
    def values(self, rows: Sequence[Labelled]) -> list[tuple[float, ...]]:
        """For each row a value for each of its places.

        Raises:
            ValueError: a value that is no number.
        """
        found: dict[int, tuple[float, ...]] = {}
        for indices in by_length(rows):
            batch = self.batch([[rows[index]] for index in indices])
            values_BT = torch.sigmoid(self(batch)).cpu()
            for number, index in enumerate(indices):
                values = values_BT[number, list(rows[index].at)]
                if not values.isfinite().all():
                    raise ValueError("the process reward model gives values that are no numbers: its weights are damaged")
                found[index] = tuple(values.tolist())
        return [found[index] for index in range(len(rows))]

    def value_of(self, states: Sequence[State]) -> list[float]:
        """A value for each state, at its last id. It was trained at the ends of steps: elsewhere it means little."""
        rows = [linear((*prompt, *ids)) for prompt, ids in states]
        return [values[0] for values in self.values([Labelled(row, (len(row.ids) - 1,)) for row in rows])]

    def step_values(self, solutions: Sequence[State]) -> list[tuple[float, ...]]:
        """For each solution, surviving ids alone, a value for each of its steps; none for a solution without a step."""
        asked = {index: row for index, (prompt, ids) in enumerate(solutions) if (row := self.row(prompt, ids))}
        found = dict(zip(asked, self.values(list(asked.values())), strict=True))
        return [found.get(index, ()) for index in range(len(solutions))]

    def row(self, prompt: Sequence[int], ids: Sequence[int]) -> Labelled | None:
        """A solution read at the ends of its steps; None where it has none."""
        ends = step_ends(ids, self.step_end_ids, self.stop_id)
        return Labelled(linear((*prompt, *ids)), tuple(len(prompt) + at for at in ends)) if ends else None

    def scorer(self) -> Scorer:
        """For guided decoding: the value behind the last id where that ends a step, inf in the middle of one."""

        def score(hidden: Tensor, visible: Sequence[tuple[int, ...]]) -> Tensor:
            scores = torch.full((len(visible),), torch.inf)
            at = [index for index, ids in enumerate(visible) if ids[-1] in self.step_end_ids]
            if at:
                scores[at] = torch.tensor(self.value_of([((), visible[index]) for index in at]))
            return scores.to(hidden.device)

        return score


def solution_score(values: Sequence[float], how: Score) -> float:
    """Score of a whole solution from the values of its steps; 0 where it has none."""
    if not values:
        return 0.0
    return {"last": values[-1], "min": min(values), "product": math.prod(values)}[how]


def best_of(values: Sequence[Sequence[float]], how: Score) -> int:
    """Index of the solution with the highest score; of equal ones the first.

    Raises:
        ValueError: no solution.
    """
    if not values:
        raise ValueError("best-of-n needs at least one solution")
    scores = [solution_score(one, how) for one in values]
    return scores.index(max(scores))


def fit(
    source: Path,
    target: Path,
    rows: Sequence[Labelled],
    held_out: Sequence[Labelled],
    settings: PrmSettings,
    step_end_ids: frozenset[int],
    stop_id: int,
    seed: int,
    curve: VerifierCurve,
) -> VerifierCurve:
    """Train a process reward model on the backbone of folder `source` and save it as `target`.

    Args:
        held_out: rows on which the step is chosen whose weights are kept; none keeps the last one's.

    Raises:
        VerifierTrainingError: no row that fits, rows of one label alone, or a loss that is no number.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(seed)  # the head begins at random
    model = ProcessRewardModel.new(source, settings.width, step_end_ids, stop_id)
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    fitting = [row for row in rows if len(row.segment.ids) <= settings.row_tokens]
    curve.steps, curve.rows, curve.left_out = settings.steps, len(fitting), len(rows) - len(fitting)
    check_labels(fitting, "prm", f"no solution fits into prm.row_tokens={settings.row_tokens}")
    packed = pack([len(row.segment.ids) for row in fitting], settings.row_tokens, settings.steps * settings.rows, seed)
    parameters = [part for part in model.parameters() if part.requires_grad]
    optimiser, schedule = optimiser_of(parameters, settings.lr, settings.weight_decay, settings.steps, settings.warmup)

    def step(number: int) -> float:
        some = packed[number * settings.rows : (number + 1) * settings.rows]
        batch = model.batch([[fitting[index] for index in row] for row in some])
        found = loss(model(batch), batch.labels, batch.scored)
        optimiser.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        return float(found.detach())

    train(model, step, lambda: _held_out_loss(model, held_out) if held_out else None, settings.check_every, curve, "prm.lr")
    model.eval().save(target, tokenizer)
    return curve


def check_labels(rows: Sequence[Labelled], name: str, empty: str) -> None:
    """
    Raises:
        VerifierTrainingError: rows that teach nothing.
    """
    labels = [label for row in rows for label in row.labels or ()]
    if not labels:
        raise VerifierTrainingError(f"{name}: {empty}")
    if max(labels) - min(labels) <= 0:
        raise VerifierTrainingError(f"{name}: all {len(labels)} labels are {labels[0]:g}: there is nothing to tell apart")


def train(
    model: nn.Module,
    step: Callable[[int], float],
    check: Callable[[], float | None],
    check_every: int,
    curve: VerifierCurve,
    key: str,
) -> None:
    """Steps and, now and then, checks; leaves the weights of the best check in the model.

    Raises:
        VerifierTrainingError: a loss that is no number.
    """
    best, kept, since = math.inf, dict[str, Tensor](), list[float]()
    for number in range(curve.steps):
        since.append(step(number))
        curve.step = number + 1
        if not math.isfinite(since[-1]):
            raise VerifierTrainingError(f"the loss is {since[-1]} at step {number + 1}: lower the learning rate ({key})")
        if curve.step % check_every and curve.step < curve.steps:
            continue
        curve.losses.append((curve.step, sum(since) / len(since)))
        since = []
        found = check()
        if found is not None:
            curve.checks.append((curve.step, found))
        if found is None or found < best:
            best, curve.kept_step = (math.inf if found is None else found), curve.step
            kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(kept)


def _held_out_loss(model: ProcessRewardModel, rows: Sequence[Labelled]) -> float:
    """Mean binary cross entropy over all places, by the very values that are used later."""
    model.eval()
    values = torch.tensor([value for row in model.values(rows) for value in row], dtype=torch.float64)
    labels = torch.tensor([label for row in rows for label in row.labels or ()], dtype=torch.float64)
    model.train()
    return float(nn.functional.binary_cross_entropy(values.clamp(1e-7, 1 - 1e-7), labels))
