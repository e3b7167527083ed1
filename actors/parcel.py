"""A model folder on its way to nodes that do not see the driver's disk: its files, through Ray's object store.

The engines read them from a temporary folder, which is gone when the model is loaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

Files = Mapping[str, npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Source:
    """Where an actor has a model from."""

    folder: str
    version: str
    """Digest of the weights."""
    node: str = ""
    """The node that is known to see the folder; "" where all do."""
    files: Any = None
    """[ray.ObjectRef of Files] for the others. Inside of this object it stays a reference, and is fetched where it is needed."""

    @classmethod
    def apart(cls, folder: str, version: str) -> Source:
        """Of a folder that this node sees."""
        return cls(folder, version, own_node(), ray.put(packed(Path(folder))))

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """The folder as long as the model is read from it."""
        if self.node in ("", own_node()):
            yield Path(self.folder)
            return
        with tempfile.TemporaryDirectory(prefix="retract-model-") as copy:
            unpack(ray.get(self.files), Path(copy))
            yield Path(copy)


def own_node() -> str:
    """Ray's id of the node of this process; "" without Ray."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def packed(folder: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """The files of a model folder itself, by name, mapped into memory; not what lies in folders below, which are other models."""
    return {
        file.name: np.memmap(file, np.uint8, "r") if file.stat().st_size else np.zeros(0, np.uint8)
        for file in sorted(folder.iterdir())
        if file.is_file()
    }


def unpack(files: Files, folder: Path) -> None:
    for name, content in files.items():
        content.tofile(folder / name)
