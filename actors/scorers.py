"""From a signal's settings to the learned verifier that it names. Decoders call it once for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors import verifier_head
from actors.heads import HeadError
from actors.prm import ProcessRewardModel
from actors.signals import Scorer
from pipeline.backtrack.cursor import Signal


def scorer_of(signal: Signal, model: Any, folder: Path | None) -> Scorer:
    """The scorer of a signal of kind `score`.

    Args:
        model: what is decoded; a verifier head reads its hidden states.
        folder: the model's own, None where it is not known.

    Raises:
        HeadError: the verifier is not there, or does not fit the model.
    """
    place = Path(signal.folder) if signal.folder is not None else folder
    if place is None:
        raise HeadError("signal kind score: decode.signal.folder must name the folder of the verifier, the model has none")
    if signal.by == "prm":
        return ProcessRewardModel.load(place).scorer()
    return verifier_head.scorer(verifier_head.load(place, model))
