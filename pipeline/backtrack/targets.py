"""What a trace teaches: a target and a weight for every emitted token, by its role, for every context form.

Called by the learner. `Targets` is the one place that says what is masked, where an undo is asked for and what counts more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.backtrack.layout import Segment, hard, rewind, soft
from pipeline.backtrack.trace import Role, Trace, wrong_states
from pipeline.backtrack.tree import Rewinding, Walk, grow
from pipeline.backtrack.undo import UndoRule, UndoStream

Mask = Literal["none", "decision", "span"]
DetectAt = Literal["first", "step_end", "evidence"]


@dataclass(frozen=True)
class Weights:
    """What a trained token of each role counts in the loss."""

    prefix: float = 1.0
    error: float = 1.0
    """Counts with `mask="none"` alone."""
    consequence: float = 1.0
    undo: float = 1.0
    correction: float = 1.0

    def of(self, role: int) -> float:
        by_role = (0.0, self.prefix, self.error, self.consequence, self.undo, self.correction)
        return by_role[role]


@dataclass(frozen=True)
class Targets:
    """How traces become targets."""

    mask: Mask = "decision"
    """`decision`: nothing teaches a wrong decision. `span`: nor anything else that gets deleted. `none`: all is taught, errors too;
    the example of what not to do."""
    detect_at: DetectAt = "evidence"
    """From where on U is the target in a wrong state: behind the wrong decision, behind the end of its step, or at the evidence,
    where the try ends. Before that the targets are what `mask` leaves of the try."""
    prompt: bool = False
    """Whether the prompt is taught too."""
    weights: Weights = field(default_factory=Weights)


@dataclass(frozen=True)
class Form:
    """What the model sees of deleted tokens, see layout.py."""

    context: Literal["soft", "hard", "rewind"] = "soft"
    rewinding: Rewinding = "deferred"
    hide_undos: bool = False
    """For `hard`: a U is seen by itself alone."""
    positions: Literal["kept", "depth"] = "kept"
    """For `hard`."""


def trace_walk(trace: Trace, rule: UndoRule, targets: Targets) -> Walk:
    """A trace as a walk with its targets."""
    start = trace.prompt_length
    ids, roles = trace.ids[start:], trace.roles[start:]
    masked = {"none": (), "decision": (Role.ERROR,), "span": (Role.ERROR, Role.CONSEQUENCE)}[targets.mask]
    weights = [0.0 if role in masked else targets.weights.of(role) for role in roles]
    wanted = list(ids)
    if targets.detect_at != "evidence":
        for step in _detected(trace, rule, targets.detect_at):
            wanted[step], weights[step] = rule.undo_id, targets.weights.undo
    return Walk(
        trace.ids[:start],
        ids,
        targets=tuple(wanted),
        weights=tuple(weights),
        roles=tuple(roles),
        prompt_weight=float(targets.prompt),
    )


def _detected(trace: Trace, rule: UndoRule, detect_at: DetectAt) -> list[int]:
    """Steps of the completion whose token is not U and is emitted in a wrong state in which U is due.

    With `step_end` a try that ends within its step is detected where it ends.
    """
    start = trace.prompt_length
    states = wrong_states(trace, rule)[start:]
    stream = UndoStream(rule)
    due = [False]  # for the prompt and each surviving token: whether U is due behind it
    found = []
    for step, token in enumerate(trace.ids[start:]):
        deleted = stream.take(token)
        if deleted < 0:
            if due[-1]:
                found.append(step)
            due.append(states[step] and (detect_at == "first" or due[-1] or token in rule.step_end_ids))
        elif deleted:
            del due[-deleted:]
    return found


def segments(
    traces: Sequence[Trace], rule: UndoRule, targets: Targets, form: Form, counts: Sequence[float] | None = None
) -> list[Segment]:
    """Traces laid out for the learner: in the rewind form one tree of all of them (they begin with the same prompt), in the
    others a row for each.

    Args:
        counts: [traces] What each trace counts: all its weights are multiplied by that.
    """
    walks = [trace_walk(trace, rule, targets) for trace in traces]
    if counts is not None:
        walks = [_counting(walk, count) for walk, count in zip(walks, counts, strict=True)]
    if form.context == "rewind":
        return [rewind(grow(walks, rule, form.rewinding), once=True)]
    if form.context == "soft":
        return [soft(walk) for walk in walks]
    return [hard(walk, rule, hide_undos=form.hide_undos, positions=form.positions) for walk in walks]


def _counting(walk: Walk, count: float) -> Walk:
    weights = tuple(count * weight for weight in walk.weights or ())
    return replace(walk, weights=weights, prompt_weight=count * walk.prompt_weight)


class ErrorPredictor(nn.Module):
    """f(y, h) of dynamic masking: how far the token y looks like a wrong decision to the state h behind it, as a logit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Logits [actions] from hidden states [actions, width] that predict the tokens and the tokens' embeddings, same shape.
        No gradient flows back into either: the model must not learn to look right."""
        logits: Tensor = self.layers(torch.cat([hidden, embedding], -1).detach()).squeeze(-1)
        return logits

    def loss(self, logits: Tensor, wrong: Tensor) -> Tensor:
        """Mean binary cross entropy against the roles; `wrong` [actions] is boolean."""
        return nn.functional.binary_cross_entropy_with_logits(logits, wrong.to(logits.dtype))


def dynamic_weights(logits: Tensor) -> Tensor:
    """[actions] Weights in (0, 1): 1 - sigmoid(f(y, h)). Constants as far as the model's gradient is concerned."""
    return 1 - torch.sigmoid(logits.detach())
