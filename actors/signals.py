"""What asks for U in mode `guided`: a class for each signal, behind one protocol. The decoders ask, cursors obey.

A signal is asked about the id that was emitted last. What the model says of U is never part of it: U is taken out of every
distribution before it is looked at, so an untrained model is guided as well as a trained one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.backtrack.cursor import Cursor, Decoding, Signal

Scorer = Callable[[Tensor, Sequence[tuple[int, ...]]], Tensor]
"""(hidden [rows, width] at the last visible id, as the head reads it; visible ids of each row, the prompt included) -> [rows]
how good what stands there is. A verifier head reads the first, a process reward model the second; where it has no opinion, as
in the middle of a step, it answers inf."""


@dataclass(frozen=True)
class Chosen:
    """Ids just chosen, and what they were chosen from."""

    cursors: Sequence[Cursor]
    """They have taken these ids already."""
    ids_B: Tensor
    logprobs_BV: Tensor
    """At temperature 1, without U and without what was banned: the distribution that was open."""


@dataclass(frozen=True)
class Read:
    """The same ids one forward later, when the model has read them."""

    cursors: Sequence[Cursor]
    hidden_BD: Tensor


class Detector(Protocol):
    """Which rows doubt their last id. It answers at one of two moments and nothing at the other."""

    reads_hidden: bool
    """Whether it needs `read`, for which the engine has to keep hidden states."""

    def chosen(self, step: Chosen) -> Sequence[bool]: ...

    def read(self, step: Read) -> Sequence[bool]: ...


class _Early:
    """A detector that needs no hidden state."""

    reads_hidden = False

    def read(self, step: Read) -> Sequence[bool]:
        return [False] * len(step.cursors)


@dataclass(frozen=True)
class Probability(_Early):
    """The id's own probability is below the threshold: the training-free baseline."""

    threshold: float

    def chosen(self, step: Chosen) -> Sequence[bool]:
        own_B = step.logprobs_BV.gather(1, step.ids_B.unsqueeze(1)).squeeze(1).exp()
        return _answers(own_B < self.threshold)


@dataclass(frozen=True)
class Margin(_Early):
    """The two best ids are closer than the threshold, whichever was chosen."""

    threshold: float

    def chosen(self, step: Chosen) -> Sequence[bool]:
        best_B2 = step.logprobs_BV.topk(2, dim=1).values.exp()
        return _answers(best_B2[:, 0] - best_B2[:, 1] < self.threshold)


@dataclass(frozen=True)
class Entropy(_Early):
    """The entropy of the choice, in nats, is above the threshold."""

    threshold: float

    def chosen(self, step: Chosen) -> Sequence[bool]:
        return _answers(torch.special.entr(step.logprobs_BV.exp()).sum(1) > self.threshold)


@dataclass(frozen=True)
class Repeat(_Early):
    """The last `ngram` ids stand earlier in the surviving text, whose prompt does not count: answers may quote questions."""

    ngram: int

    def chosen(self, step: Chosen) -> Sequence[bool]:
        return [self._repeats(cursor.surviving) for cursor in step.cursors]

    def _repeats(self, ids: tuple[int, ...]) -> bool:
        last = ids[-self.ngram :]
        return any(ids[start : start + self.ngram] == last for start in range(len(ids) - self.ngram))


@dataclass(frozen=True)
class Score:
    """A learned judge's value of what stands there is below the threshold."""

    threshold: float
    scorer: Scorer
    reads_hidden = True

    def chosen(self, step: Chosen) -> Sequence[bool]:
        return [False] * len(step.cursors)

    def read(self, step: Read) -> Sequence[bool]:
        return _answers(self.scorer(step.hidden_BD, [cursor.visible for cursor in step.cursors]) < self.threshold)


def detector_of(decoding: Decoding, scorer: Scorer | None = None) -> Detector | None:
    """The detector that a decoding asks for; None outside mode `guided`.

    Raises:
        ValueError: kind score without a scorer.
    """
    signal = decoding.signal
    if decoding.mode != "guided" or signal is None:
        return None
    if signal.kind == "score":
        if scorer is None:
            raise ValueError("signal kind score needs a scorer: a callable that gives a value for each row")
        return Score(signal.threshold, scorer)
    return _training_free(signal)


def _training_free(signal: Signal) -> Detector:
    if signal.kind == "repeat":
        return Repeat(signal.ngram)
    by_threshold: dict[str, Callable[[float], Detector]] = {"probability": Probability, "margin": Margin, "entropy": Entropy}
    return by_threshold[signal.kind](signal.threshold)


def ask_chosen(detector: Detector, cursors: Sequence[Cursor], ids_B: Tensor, logits_BV: Tensor, undo_id: int) -> None:
    """Ask about ids just taken. `logits_BV` is what they were chosen from, bans at -inf; the column of U is overwritten."""
    asked = [index for index, cursor in enumerate(cursors) if cursor.asks]
    if not asked or detector.reads_hidden:
        return
    logits_BV[:, undo_id] = -torch.inf
    step = Chosen([cursors[index] for index in asked], ids_B[asked], logits_BV[asked].log_softmax(-1))
    _tell(step.cursors, detector.chosen(step))


def ask_read(detector: Detector, cursors: Sequence[Cursor], hidden_BD: Tensor) -> None:
    """Ask about the last visible ids, which the model has just read."""
    asked = [index for index, cursor in enumerate(cursors) if cursor.asks]
    if asked:
        step = Read([cursors[index] for index in asked], hidden_BD[asked])
        _tell(step.cursors, detector.read(step))


def _tell(cursors: Sequence[Cursor], doubts: Sequence[bool]) -> None:
    for cursor, doubted in zip(cursors, doubts, strict=True):
        if doubted:
            cursor.doubt()


def _answers(doubts_B: Tensor) -> list[bool]:
    answers: list[bool] = doubts_B.tolist()
    return answers
