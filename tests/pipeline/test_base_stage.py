"""The base model: when a model that is trained from scratch gets its undo token."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.learner import Curve
from pipeline.config import Settings
from pipeline.stages import base
from pipeline.stages.io import Codec, write_rows
from pipeline.stages.problems import FEATURES
from pipeline.tasks.problem import Problem

SCRATCH = {"layers": 1, "width": 32, "heads": 2, "vocab": 300, "context": 64}


class Workers:
    """Trains by chance: every weight gets another value."""

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None

    def watch(self, *_: Any) -> Any:
        return nullcontext(SimpleNamespace(curve=lambda _: None))

    def fit(self, source: Path, target: Path, *_: Any) -> Curve:
        model = AutoModelForCausalLM.from_pretrained(source)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
        self.rows = model.get_input_embeddings().weight.detach().clone()
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source).save_pretrained(target)
        return Curve()


@pytest.mark.parametrize("added", ["first", "last"])
def test_a_model_from_scratch_gets_its_undo_token_before_or_behind_its_training(tmp_path: Path, added: str) -> None:
    """Behind it the row is the mean of the words' rows as they are by then; nothing else changes."""
    asked = {"base": {"scratch": {**SCRATCH, "undo_added": added}}, "undo": {"noise": 0.0, "words": ["apples"]}}
    settings = Settings.model_validate(asked)
    some = [Problem(split, split, "gsm8k", False, "Ana has 3 apples.", "#### 3", "3", "{}") for split in ("train", "dev")]
    write_rows([vars(one) for one in some], FEATURES, tmp_path / "problems")
    workers, terminal = Workers(), SimpleNamespace(stage=lambda *_: nullcontext(SimpleNamespace(update=lambda *_: None)))
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    base.run(
        SimpleNamespace(  # type: ignore[arg-type]
            settings=settings, inputs={"problems": tmp_path / "problems"}, out=out, scratch=scratch, resume=tmp_path,
            counts={}, terminal=terminal, workers=workers,
        )
    )  # fmt: skip
    codec, expected = Codec(out, settings.undo, settings.base.prompt), workers.rows
    assert expected is not None
    if added == "last":
        words = AutoTokenizer.from_pretrained(out)(" apples", add_special_tokens=False).input_ids
        expected[codec.rule.undo_id] = expected[sorted(set(words))].mean(0)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(out).get_input_embeddings().weight.detach(), expected)
