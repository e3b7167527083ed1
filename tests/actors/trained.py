"""A tiny model folder and traces to train it on, for the tests of whole trainings."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.packing import TrainingSet
from pipeline.backtrack.curriculum import Schedule
from pipeline.backtrack.embedding import add_undo_token
from pipeline.backtrack.targets import Form
from pipeline.backtrack.trace import Detour, WrongTry, build_trace
from pipeline.backtrack.undo import UndoRule
from pipeline.config import ScratchModel
from pipeline.stages.base import new_model, train_tokenizer


def prepared(folder: Path) -> UndoRule:
    """A tiny model with an undo token in `folder`; the rule of that token."""
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    model = new_model(ScratchModel(layers=1, width=32, heads=2, vocab=300), tokenizer, 0)
    undo_id = add_undo_token(model, tokenizer, "<U>", "mean", ["x"], "x", 0.0, 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return UndoRule(undo_id, "all")


def thirty_traces(
    source: Path,
    form: Form = Form(),  # noqa: B008
    most_undos: Schedule | None = None,
    undo: str = "<U>",
) -> TrainingSet:
    """Half of them with an undo, of uneven length."""
    rule = UndoRule(AutoTokenizer.from_pretrained(source).convert_tokens_to_ids(undo), "all")
    traces = []
    for n in range(30):
        detours = [Detour(0, WrongTry((40 + n, 41), (True, False)))] if n % 2 else []
        traces.append(build_trace([30 + n, 7], [50 + n, 60 + n, *range(70, 70 + n % 5)], detours, rule))
    return TrainingSet(traces, rule, form=form, most_undos=most_undos)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def content(folder: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in weights(folder).items()}


def spoil_token(source: Path, target: Path, token: int) -> None:
    """A copy of the model in which one token's embedding is no number; it predicts that token as before."""
    shutil.copytree(source, target)
    model = AutoModelForCausalLM.from_pretrained(source)
    head = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(target)
