"""A store that fails on command, and working copies of one run on several machines."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.store import Manifest, Store
from pipeline.store.remote import Remote
from pipeline.store.synced import SyncedStore
from pipeline.store.url import UrlStore


class Flaky(MemoryFileSystem):
    """memory:// with `before(action, path)` called before everything that reads or writes."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    before: ClassVar[Callable[[str, str], None]] = staticmethod(lambda action, path: None)

    def put_file(self, lpath: str, rpath: str, *args: Any, **more: Any) -> None:
        Flaky.before("put", rpath)
        super().put_file(lpath, rpath, *args, **more)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> None:
        Flaky.before("put", path)
        super().pipe_file(path, value, mode, **more)

    def get_file(self, rpath: str, lpath: str, *args: Any, **more: Any) -> None:
        Flaky.before("get", rpath)
        super().get_file(rpath, lpath, *args, **more)

    def cat_file(self, path: str, *args: Any, **more: Any) -> bytes:
        Flaky.before("get", path)
        content: bytes = super().cat_file(path, *args, **more)
        return content

    def find(self, path: str, *args: Any, **more: Any) -> Any:
        Flaky.before("list", path)
        return super().find(path, *args, **more)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.removeprefix("flaky://")))


fsspec.register_implementation("flaky", Flaky, clobber=True)


_NUMBERS = itertools.count()


def new_url(kind: str, folder: Path) -> str:
    """Of a store of that kind, `file`, `memory` or `flaky`, in which nothing stands."""
    return f"file://{folder}/there" if kind == "file" else f"{kind}://bucket/{next(_NUMBERS)}"


def unreachable(action: str, path: str) -> None:
    raise ConnectionError("connection refused")


def hanging(action: str, path: str) -> None:
    time.sleep(600)


def build(store: Store, stage: str, content: dict[str, str], key: str = "k", **inputs: str) -> Manifest:
    """Write an output as the runner does."""
    with store.write(1, stage, key=key, settings={}, inputs=inputs, seed=0) as draft:
        for name, text in content.items():
            (draft.path / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.path / name).write_text(text)
        draft.counts["rows"] = len(content)
    manifest = store.manifest(1, stage)
    assert manifest
    return manifest


def machine(url: str, folder: Path) -> SyncedStore:
    """A working copy as a process that has just started sees it."""
    return SyncedStore.open(url, folder)


def reader(url: str) -> UrlStore:
    return UrlStore(Remote(url))


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}
