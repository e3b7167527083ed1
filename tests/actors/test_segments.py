"""Attention within segments is attention under the mask of the whole row, for every kind of model, segment and row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from actors.segments import NAME, NO_MASK, attends_by_segment, blocks
from pipeline.backtrack.layout import Segment, lay_out
from pipeline.backtrack.targets import Targets, segments
from tests.actors.drawn import LAYOUTS, traces
from tests.pipeline.tiny import forward, rule, tiny_model


def both_ways(name: str) -> tuple[Any, Any]:
    one, other = tiny_model(name), tiny_model(name)
    assert attends_by_segment(other)
    return one, other


MODELS = {name: both_ways(name) for name in ("llama", "qwen2", "gpt2")}


def logits_of(model: Any, rows: list[list[Segment]], tokens: int | None) -> torch.Tensor:
    layout = lay_out(rows, tokens)
    given = {"input_ids": layout.input_ids, "position_ids": layout.position_ids, "attention_mask": NO_MASK}
    out: torch.Tensor = model(**given, segments=blocks(rows, layout.input_ids.shape[1]), use_cache=False).logits
    return out


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=30)
@given(traces(), st.sampled_from(sorted(LAYOUTS)), st.integers(1, 3), st.booleans())
def test_logits_are_those_of_the_mask(name: str, drawn: Any, form: str, count: int, wide: bool) -> None:
    """Of rows, trees and both, packed and alone; a row without a segment too."""
    unit, some = drawn
    rewinding = LAYOUTS[form].rewinding if unit == "token" else "immediate"
    found = [
        segment
        for trace in some
        for segment in segments((trace,), rule(unit), Targets(), type(LAYOUTS[form])(LAYOUTS[form].context, rewinding))
    ]
    rows = [found[number::count] for number in range(count)]
    layout = lay_out(rows, 128 if wide else None)
    masked, by_segment = MODELS[name]
    with torch.no_grad():
        expected, logits = forward(masked, layout).logits, logits_of(by_segment, rows, 128 if wide else None)
    real = torch.zeros(layout.input_ids.shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        real[number, : sum(len(segment.ids) for segment in row)] = True
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-9)
    assert logits.isfinite().all()


def test_a_model_that_drops_the_segments_is_not_trained_blindly() -> None:
    model = MODELS["llama"][1]
    with pytest.raises(ValueError, match="was not handed the segments"):
        model(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=NO_MASK, use_cache=False)


def test_generation_is_as_before_and_a_saved_model_knows_nothing_of_it(tmp_path: Any) -> None:
    masked, by_segment = MODELS["llama"]
    ids = torch.tensor([[1, 2, 3, 4], [0, 0, 5, 6]])
    seen = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with torch.no_grad():
        expected, found = (model(input_ids=ids, attention_mask=seen).logits for model in (masked, by_segment))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    by_segment.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_models_of_other_kinds_keep_their_masks() -> None:
    class Own(torch.nn.Module):
        _supports_attention_backend = True

    assert not attends_by_segment(Own())
