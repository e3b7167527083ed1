"""Problems and models on disk, as stages leave them, for tests of what decodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.backtrack.embedding import add_undo_token
from pipeline.config import ScratchModel
from pipeline.config import UndoSettings as Undo
from pipeline.stages.base import new_model, train_tokenizer
from pipeline.stages.io import write_rows
from pipeline.stages.problems import FEATURES
from pipeline.task_config import SyntheticTask
from pipeline.tasks import synthetic

PROBLEMS = list(synthetic.load(SyntheticTask(train=8, dev=8, test=8, ood=8), seed=0))
CONTEXT = 512


def save_problems_and_models(folders: dict[str, Path], width: int = 32) -> dict[str, Path]:
    """Problems, and models of one tokenizer whose random weights are far from even, so that undo is now likely and now not."""
    write_rows([vars(problem) for problem in PROBLEMS], FEATURES, folders["problems"])
    for seed, name in enumerate(name for name in folders if name != "problems"):
        tokenizer = train_tokenizer([f"{problem.question}\n{problem.solution}" for problem in PROBLEMS], 320)
        model: Any = new_model(ScratchModel(layers=2, width=width, heads=2, vocab=320, context=CONTEXT), tokenizer, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6)
        undo = Undo()
        undo_id = add_undo_token(model, tokenizer, undo.token, undo.init, undo.words, undo.description, undo.noise, seed)
        with torch.no_grad():
            row = model.get_input_embeddings().weight
            row[undo_id] = row[2:undo_id].mean(0) * 12 + row[7 + seed]  # else so small that its probability hardly varies
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders
