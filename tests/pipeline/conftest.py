"""Codecs of every kind of tokenizer, each trained once for a file of tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.backtrack.undo import Unit
from pipeline.config import UndoSettings
from pipeline.stages.io import Codec
from tests.pipeline.judged import PROMPT, TOKENIZERS


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Codec]:
    made: dict[tuple[str, Unit], Codec] = {}
    folders: dict[str, Path] = {}

    def codec(name: str = "bytes", unit: Unit = "step") -> Codec:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("tokenizer")
            tokenizer = TOKENIZERS[name]()
            tokenizer.add_tokens([UndoSettings().token], special_tokens=True)
            tokenizer.save_pretrained(folders[name])
        if (name, unit) not in made:
            made[name, unit] = Codec(folders[name], UndoSettings(unit=unit), PROMPT)
        return made[name, unit]

    return codec
