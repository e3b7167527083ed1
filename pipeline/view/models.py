"""P(U) of a rollout on demand: the model that wrote it is loaded when it is first asked for, and kept for the next one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from pipeline.store import Store, StoreError
from pipeline.view.library import Ask
from pipeline.view.sources import seen_mode


class Doubts:
    """One model at a time, one question at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._whole: set[Path] = set()
        self._loaded: tuple[Path, Any] | None = None

    def of(self, ask: Ask) -> list[float]:
        """[ids] P(U) behind each id of a rollout.

        Raises:
            StoreError: the model is damaged, or cannot be loaded.
        """
        from actors.doubts import p_undo  # here, so that looking needs no torch

        with self._lock:
            model = self._model(ask)
            try:
                return p_undo(model, ask.prompt_ids, ask.ids, ask.rule, seen_mode(ask.mode), ask.rewinding)
            except ValueError as error:
                raise StoreError(f"{ask.folder}: {error}") from error

    def _model(self, ask: Ask) -> Any:
        if self._loaded is None or self._loaded[0] != ask.folder:
            from actors.doubts import load

            self._loaded = None  # before the next one comes
            if ask.folder not in self._whole:
                if damage := self._store.check(*ask.output):
                    raise StoreError(damage)
                self._whole.add(ask.folder)
            try:
                self._loaded = ask.folder, load(ask.folder)
            except (OSError, ValueError, RuntimeError) as error:
                raise StoreError(f"{ask.folder}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error
        return self._loaded[1]
