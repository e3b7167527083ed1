"""P(U) behind every token of a rollout that is there already: how much the model that wrote it would have liked to take back.

Called by pipeline/view, for one rollout at a time. What the model sees in each state is Cursor's word, as in decoding.
"""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from actors.probe import ProbeRow, ask
from pipeline.backtrack.cursor import Cursor, DecodeRequest, Decoding, Mode
from pipeline.backtrack.tree import Rewinding
from pipeline.backtrack.undo import UndoRule

Ids = tuple[int, ...]


def load(folder: Path) -> Any:
    """The model of a folder in fp32 and eval mode, on a GPU if there is one. Weights are read from safetensors alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def seen(prompt_ids: Ids, ids: Ids, rule: UndoRule, mode: Mode, rewinding: Rewinding) -> list[Ids]:
    """[n] What the model saw when each of the emitted ids had been taken, the prompt included.

    Raises:
        ValueError: an empty prompt, or one with U in it.
    """
    stop_id = -1  # none of these ids ends the decode before its time
    # Without room for two more ids no undo would be allowed, which ends a run of them.
    decoding = Decoding(mode, 0.0, 1.0, len(ids) + 2, stop_id, rule, rewinding, None, ban_tried=False, max_undos=len(ids) + 1)
    cursor = Cursor(DecodeRequest(prompt_ids, 0, ids), decoding, 1 + max((rule.undo_id, *prompt_ids, *ids)))
    found = []
    while (token := cursor.forced) is not None:
        cursor.take(token, 0.0)
        found.append(cursor.visible)
    return found


def p_undo(model: Any, prompt_ids: Ids, ids: Ids, rule: UndoRule, mode: Mode, rewinding: Rewinding) -> list[float]:
    """[n] P(U) at temperature 1, without bias and ban, in the state behind each emitted id. `model` is in eval mode.

    Raises:
        ValueError: as `seen`.
    """
    states = seen(prompt_ids, ids, rule, mode, rewinding)
    # A causal forward over a row holds all states that it begins with.
    rows: list[Ids] = []
    for state in sorted(set(states), reverse=True):
        if not rows or rows[-1][: len(state)] != state:
            rows.append(state)
    found: dict[Ids, float] = {}
    for row in rows:
        at = sorted({len(state) for state in states if row[: len(state)] == state})
        asked = ProbeRow(row, tuple(at), (rule.undo_id,) * len(at))
        # One at a time: a few rows of a large vocabulary would need gigabytes.
        [logprobs] = ask(model, [asked])
        found |= {row[:length]: exp(logprob) for length, logprob in zip(at, logprobs, strict=True)}
    return [found[state] for state in states]
