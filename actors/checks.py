"""Checks while training: what the model makes of held-out errors and of the right states beside them, and whether the loss is
what it should be. The learner calls it between steps. It leaves weights and random states alone: a run with checks ends with
the same weights as one without.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import exp
from typing import Any, NamedTuple, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from actors.by_hand import loss_by_hand
from actors.decode import HfDecoder
from actors.packing import Example, TrainingSet, collate, laid_out
from actors.probe import ProbeRow, ask
from pipeline.backtrack.cursor import DecodeRequest, Decoding
from pipeline.backtrack.trace import Role
from pipeline.statistics import mean, share

GROUPS = ("all", "forward", "hindsight")
BATCH = "batch"
"""Group of what is measured on the fixed batch: loss, loss_by_hand, masked_share, and the cosines of COSINES; n is its number of
traces."""
COSINES = ("cos_error_undo", "cos_error_correction", "cos_undo_correction")
_TERMS: dict[object, str] = {Role.ERROR: "error", "undo": "undo", Role.CORRECTION: "correction"}
_ALLOWED, _ALLOWED_BF16 = 1e-3, 5e-2  # relative difference of the two losses
_MOST_WEIGHTS = 2**28  # beyond which no cosines are measured: three gradients are held at once
_RATE, _PROBABILITY = 0.02, 0.02  # an alarm needs at least so much of right states, of P(U | right)


class CheckError(RuntimeError):
    """The training does not do what it should; one line that says at which step and how far off."""


class Measured(NamedTuple):
    """One value of one check."""

    step: int
    group: str
    """all, forward, hindsight or batch."""
    name: str
    value: float
    low: float | None
    high: float | None
    """95 % interval over problems; None where there is none."""
    n: int


@dataclass(frozen=True)
class HeldOutError:
    """An own error of the start model on a held-out problem, and the right state beside it."""

    hindsight: bool
    error: ProbeRow
    """Asks for the undo token at the evidence, then for the tokens of the wrong decision."""
    right: ProbeRow
    """Asks for the undo token at the same place of the gold solution."""
    corrected: ProbeRow
    """Asks for the tokens of the right step behind the undo, in the form that is trained."""


@dataclass(frozen=True)
class Graded:
    """What became of one decoded problem."""

    correct: bool
    undos: int
    spurious: int
    errors: int = 0
    """That the judge finds in it."""


@dataclass(frozen=True)
class Decodes:
    """Held-out problems that are decoded at every check."""

    requests: Sequence[DecodeRequest]
    hindsight: Sequence[bool]
    decoding: Decoding
    max_num_seqs: int
    row_tokens: int
    grade: Callable[[int, tuple[int, ...]], Graded]
    """(index of the request, emitted ids) -> how it ended."""


@dataclass(frozen=True)
class HeldOut:
    """What a training is checked on."""

    every: int
    """Steps between two checks; one more is made before the first step and one behind the last."""
    errors: Sequence[HeldOutError] = ()
    decodes: Decodes | None = None
    first_tries: Decodes | None = None
    """Problems decoded with U forbidden: whether the training plants errors."""


class Record(Protocol):
    """Where the values go; the learner's curve."""

    probes: list[Measured]
    right_states: list[tuple[int, tuple[float, ...]]]
    first_tries: list[tuple[int, tuple[bool, ...], tuple[int, ...]]]


class Checks(TrainerCallback):
    """Measures before the first step, every so many steps and behind the last one.

    Raises:
        CheckError: a masked target has a gradient, or the loss is not what it is by hand.
    """

    def __init__(self, held_out: HeldOut, record: Record, trainer: Any, data: TrainingSet, row: Sequence[Example],
                 pad_id: int, row_tokens: int) -> None:  # fmt: skip
        """`row` holds the examples of the fixed batch, one packed row."""
        self._held_out, self._record, self._trainer, self._data = held_out, record, trainer, data
        self._row, self._pad_id, self._row_tokens = row, pad_id, row_tokens

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0 and state.is_world_process_zero:
            self._measure(0, args.bf16)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        due = state.global_step % self._held_out.every == 0 or state.global_step == args.max_steps
        if due and state.is_world_process_zero:
            self._measure(state.global_step, args.bf16)

    def _measure(self, step: int, bf16: bool) -> None:
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        training = model.training
        model.eval()
        self._record.probes += self._batch(model, step, bf16)
        if self._held_out.errors:
            self._record.probes += self._probe(model, step)
        if self._held_out.decodes:
            self._record.probes += decoded(model, step, self._held_out.decodes)
        if self._held_out.first_tries:
            self._record.probes += self._first_tries(model, step, self._held_out.first_tries)
        model.train(training)

    def _batch(self, model: Any, step: int, bf16: bool) -> list[Measured]:
        numbers = [number for example in self._row for number in example.numbers]
        batch = collate([self._row], self._data, self._pad_id, self._row_tokens)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        with _watched_logits(model) as seen, torch.enable_grad():
            loss = self._trainer.compute_loss(model, batch, num_items_in_batch=float(batch["weight"].sum()))
            (gradient,) = torch.autograd.grad(loss, seen)
        masked = masked_share(gradient.float().cpu(), batch, self._row, self._data, self._pad_id, self._row_tokens)
        fast = loss.item()
        found = [("loss", fast), ("masked_share", masked)]
        if masked and self._data.targets.mask != "none":
            raise CheckError(f"step {step}: {masked:.2%} of the gradient comes from masked targets; it must be none")
        if not (
            self._trainer.dynamic or self._trainer.joint
        ):  # what a network weighs along the way is no loss that can be said by hand
            slow = loss_by_hand(model, self._data, numbers)
            found.append(("loss_by_hand", slow))
            if abs(fast - slow) > (_ALLOWED_BF16 if bf16 else _ALLOWED) * max(1.0, slow):
                raise CheckError(f"step {step}: the loss of a batch is {fast:.5f}, trace by trace it is {slow:.5f}")
        found += term_cosines(model, self._data, numbers, self._pad_id).items()
        return [Measured(step, BATCH, name, value, None, None, len(numbers)) for name, value in found]

    def _first_tries(self, model: Any, step: int, asked: Decodes) -> list[Measured]:
        graded = _graded(model, asked)
        self._record.first_tries.append((step, tuple(one.correct for one in graded), tuple(one.errors for one in graded)))
        found = []
        for group, members in _grouped(asked.hindsight):
            right = share(sum(graded[index].correct for index in members), len(members))
            errors = mean([float(graded[index].errors) for index in members], 0.0)
            for name, one in (("first_try_accuracy", right), ("errors_per_try", errors)):
                found += [Measured(step, group, name, **asdict(one))] if one else []
        return found

    def _probe(self, model: Any, step: int) -> list[Measured]:
        cases = self._held_out.errors
        with torch.inference_mode():
            answers = ask(model, [row for case in cases for row in (case.error, case.right, case.corrected)])
        rows = [
            {
                "p_undo_error": exp(error[0]),
                "p_undo_right": exp(right[0]),
                "p_correction": exp(sum(corrected)),
                "logp_error": sum(error[1:]),
            }
            for error, right, corrected in zip(answers[::3], answers[1::3], answers[2::3], strict=True)
        ]
        self._record.right_states.append((step, tuple(row["p_undo_right"] for row in rows)))
        found = []
        for group, members in _grouped([case.hindsight for case in cases]):
            for name in rows[0]:
                bounds = (-float("inf"), 0.0) if name == "logp_error" else (0.0, 1.0)
                if one := mean([rows[index][name] for index in members], *bounds):
                    found.append(Measured(step, group, name, **asdict(one)))
        return found


def _grouped(hindsight: Sequence[bool]) -> Iterator[tuple[str, list[int]]]:
    for group in GROUPS:
        yield group, [i for i, kind in enumerate(hindsight) if group == "all" or kind == (group == "hindsight")]


def decoded(model: Any, step: int, asked: Decodes) -> list[Measured]:
    """Accuracy and undo rates of decoding, by kind of problem. `model` is in eval mode."""
    graded = _graded(model, asked)
    found = []
    for group, members in _grouped(asked.hindsight):
        some = [graded[index] for index in members]
        hits = {
            "accuracy": sum(one.correct for one in some),
            "undo_rate": sum(one.undos > 0 for one in some),
            "spurious_rate": sum(one.spurious > 0 for one in some),
        }
        found += [Measured(step, group, name, **asdict(one)) for name, k in hits.items() if (one := share(k, len(some)))]
    return found


def _graded(model: Any, asked: Decodes) -> list[Graded]:
    emitted = HfDecoder(model, asked.max_num_seqs, asked.row_tokens).decode(asked.requests, asked.decoding)
    return [asked.grade(index, one.ids) for index, one in enumerate(emitted)]


@contextmanager
def _watched_logits(model: Any) -> Iterator[list[torch.Tensor]]:
    """Within this, the logits of a forward are a leaf, which is put into the list: a gradient ends there, at no weight."""
    seen: list[torch.Tensor] = []

    def cut(module: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.detach().requires_grad_())
        return seen[-1]

    hook = model.get_output_embeddings().register_forward_hook(cut)
    try:
        yield seen
    finally:
        hook.remove()


def masked_share(
    gradient_NV: torch.Tensor,
    batch: dict[str, torch.Tensor],
    row: Sequence[Example],
    data: TrainingSet,
    pad_id: int,
    row_tokens: int,
) -> float:
    """Part of the logits' gradient that comes from masked targets, in 0 .. 1.

    Counted is the whole gradient at places that carry no target of a right role, and elsewhere what pushes a masked token up.
    Which tokens are masked is read off the roles here, not off the weights that made the batch. With mask none, where errors are
    taught, wrong decisions are counted: what the mask would take out.
    """
    layout = laid_out([row], data, pad_id, row_tokens)
    masked_roles = {Role.ERROR, Role.CONSEQUENCE} if data.targets.mask == "span" else {Role.ERROR}
    masked: dict[tuple[int, int], set[int]] = {}
    right: dict[tuple[int, int], set[int]] = {}
    for place, action in zip(zip(layout.row.tolist(), layout.column.tolist(), strict=True), layout.actions, strict=True):
        wrong = action.role in masked_roles and action.token != data.rule.undo_id
        (masked if wrong else right).setdefault(place, set()).add(action.token)
    total, found = float(gradient_NV.abs().sum()), 0.0
    for index, place in enumerate(zip(batch["row"].tolist(), batch["column"].tolist(), strict=True)):
        if place not in right:
            found += float(gradient_NV[index].abs().sum())
            continue
        for token in masked.get(place, set()) - right[place]:
            found += max(0.0, -float(gradient_NV[index, token]))
    return found / total if total else 0.0


def term_cosines(model: Any, data: TrainingSet, numbers: Sequence[int], pad_id: int) -> dict[str, float]:
    """Cosines between the gradients, in all weights that are trained, of the log-probabilities of wrong decisions, of undos and of
    corrections in the traces with these numbers: whether a step towards the one is a step towards the other. In the form that is
    trained; every distinct (place, id) counts once, whatever is masked. `model` is in eval mode; its `.grad` is left alone.

    Returns: by name, see COSINES; empty where a trace with an undo is missing, or the model is too large to hold three gradients.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if sum(weight.numel() for weight in weights) > _MOST_WEIGHTS:
        return {}
    sums: dict[str, list[torch.Tensor]] = {}
    for number in numbers:
        trace = data.traces[number]
        if Role.UNDO not in trace.roles:
            continue  # a clean row has nothing that is corrected
        layout = laid_out([[Example((trace,), len(trace.ids), 0, (number,))]], data, pad_id)
        places: dict[str, set[tuple[int, int]]] = {"error": set(), "undo": set(), "correction": set()}
        for column, action in zip(layout.column.tolist(), layout.actions, strict=True):
            term = _TERMS.get("undo" if action.token == data.rule.undo_id else action.role)
            if term and not action.ends_run:
                places[term].add((column, action.token))
        row = (layout.input_ids, layout.position_ids, layout.attention_mask())
        ids, positions, mask = (part.to(model.device) for part in row)
        with torch.enable_grad():
            logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits[0]
            logprobs = logits.float().log_softmax(-1)
            for term, some in places.items():
                if some:
                    columns, tokens = map(list, zip(*sorted(some), strict=True))
                    total = logprobs[columns, tokens].sum()
                    found = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
                    whole = [torch.zeros_like(weight) if one is None else one for one, weight in zip(found, weights, strict=True)]
                    sums[term] = [a + b for a, b in zip(sums[term], whole, strict=True)] if term in sums else whole
    pairs = [tuple(name.split("_")[1:]) for name in COSINES]
    return {
        name: _dot(sums[a], sums[b]) / (_dot(sums[a], sums[a]) * _dot(sums[b], sums[b])) ** 0.5
        for name, (a, b) in zip(COSINES, pairs, strict=True)
        if a in sums and b in sums and _dot(sums[a], sums[a]) and _dot(sums[b], sums[b])
    }


def _dot(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return sum(float((one.double() * other.double()).sum()) for one, other in zip(a, b, strict=True))


_SAID = {
    "p_undo_error": "P(undo | own error)",
    "p_undo_right": "P(undo | right)",
    "p_correction": "P(correction | undo)",
    "logp_error": "log p(error)",
    "accuracy": "accuracy",
    "undo_rate": "with undo",
    "first_try_accuracy": "first tries right",
}


def said(probes: Sequence[Measured]) -> list[str]:
    """A line for every check, of all problems together; intervals and kinds of problems stand in the curve."""
    lines = []
    for step, some in itertools.groupby(probes, lambda one: one.step):
        of_all = {one.name: one.value for one in some if one.group == "all"}
        values = [f"{what} {of_all[name]:.3f}" for name, what in _SAID.items() if name in of_all]
        if values:
            lines.append(f"step {step}: {', '.join(values)}")
    return lines


def alarms(probes: Sequence[Measured], right_states: Sequence[tuple[int, Sequence[float]]], threshold: float | None) -> list[str]:
    """A line for every check at which undo has become more likely where nothing is wrong: the decoder will undo right text.

    Args:
        threshold: P(U) above which the decoder undoes; None where U is sampled like any token.
    """
    means = {one.step: one for one in probes if (one.group, one.name) == ("all", "p_undo_right")}
    lines = []
    # A training that is asked while it measures may have a check's states and not yet its means: the next answer has both.
    whole = [(step, states) for step, states in right_states if step in means]
    for (before, then), (step, now) in itertools.pairwise(whole):
        was, is_now = means[before], means[step]
        if threshold is not None and now:
            fires, fired = (sum(value > threshold for value in some) / len(some) for some in (now, then))
            if fires >= _RATE and fires > fired:
                lines.append(
                    f"step {step}: P(undo) is above decode.threshold {threshold:g} in {fires:.1%} of the held-out right states, "
                    f"{fired:.1%} at step {before}: spurious undos rise"
                )
                continue
        apart = is_now.low is not None and was.high is not None and is_now.low > was.high
        if apart and is_now.value >= _PROBABILITY:
            lines.append(
                f"step {step}: mean P(undo) in held-out right states has risen to {is_now.value:.3f} "
                f"from {was.value:.3f} at step {before}: spurious undos may follow"
            )
    return lines
