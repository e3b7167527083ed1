"""Codecs of every kind of tokenizer, each trained once for a file of tests; stores that answer at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@pytest.fixture
def a_store_that_works(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pause between tries, and whatever a test made fail works again behind it."""
    from pipeline.store import remote
    from tests.pipeline.stores import Flaky

    monkeypatch.setattr(remote, "_PAUSES", (0.0, 0.0))
    yield
    Flaky.before = staticmethod(lambda action, path: None)
