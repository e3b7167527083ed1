"""P(U) behind every token of a written rollout against one forward for each, its context taken from the definition."""

from __future__ import annotations

from itertools import takewhile

import pytest
import torch

from actors.doubts import p_undo, seen
from pipeline.backtrack.undo import apply_undo
from tests.pipeline.tiny import END, FORMS, U, rule, tiny_model

PROMPT = (1, 2, 4)
ROWS = [(1, 5, END, 6, U, 2, 4), (1, 5, U, U, 6, U, 2, U), (), (U, 1, U, U, 5), (4, END, END, U, U, 5, 6)]


def context(ids: tuple[int, ...], end: int, unit: str, rewinding: str, mode: str) -> tuple[int, ...]:
    """What stands in the model's context when `ids[:end]` have been written."""
    if mode == "soft":
        return PROMPT + ids[:end]
    run = len(list(takewhile(lambda token: token == U, reversed(ids[:end]))))
    going_on = end == len(ids) or ids[end] == U
    if unit == "token" and rewinding == "deferred" and run and going_on:
        before = apply_undo(ids[: end - run], rule(unit))  # type: ignore[arg-type]
        return PROMPT + before.surviving + (U,) * run
    return PROMPT + apply_undo(ids[:end], rule(unit)).surviving  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["rewind", "soft"])
@pytest.mark.parametrize(("unit", "rewinding"), FORMS)
def test_one_forward_for_each_token(unit: str, rewinding: str, mode: str) -> None:
    model = tiny_model("llama")
    for ids in ROWS:
        if unit == "token" and rewinding == "deferred" and ids and ids[-1] == U:
            ids = (*ids, 5)  # an open run is the last row's own case
        wanted = []
        for end in range(1, len(ids) + 1):
            given = context(ids, end, unit, rewinding, mode)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([given])).logits[0, -1]
            wanted.append(float(logits.softmax(-1)[U]))
        found = p_undo(model, PROMPT, ids, rule(unit), mode, rewinding)  # type: ignore[arg-type]
        assert found == pytest.approx(wanted, abs=1e-6)


def test_a_prompt_with_undo_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt"):
        seen((1, U), (2,), rule("token"), "rewind", "deferred")
