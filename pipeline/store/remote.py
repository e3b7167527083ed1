"""Files below an fsspec URL: every call ends within a bounded time, every failure is one line that names the URL and the reason.

Called by the other files of this room alone. Knows no manifest and no stage. Credentials and endpoints are fsspec's and its
packages' own business (environment, their configuration files): nothing of them passes through here.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.store import CHUNK, StoreError

PATIENCE = 60.0  # seconds for an answer
SLOWEST = 1e6  # bytes a second, below which a transfer counts as stuck
_PAUSES = (1.0, 3.0)  # seconds before the second and the third try
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, NotImplementedError, ValueError, TypeError)

T = TypeVar("T")


class _Late(Exception):
    """No answer in time."""


class Remote:
    """What lies below one URL; names are relative to it, with forward slashes.

    All methods raise StoreError when the store does not answer or refuses, after three tries.

    Example: `Remote("s3://bucket/runs/tiny").read("config.yaml")`
    """

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        import fsspec  # it takes a moment, which local runs need not spend
        from fsspec.implementations.local import LocalFileSystem

        if re.search(r"://[^/]*@", url):
            raise StoreError("a URL must not hold a name or password, which would be logged: leave them to the environment")
        self.url, self._patience = url.rstrip("/"), patience
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:  # fsspec names the package
            raise StoreError(f"{self.url}: a package is missing: {_one_line(error)}") from error
        except Exception as error:
            raise StoreError(f"{self.url}: {_one_line(error)}") from error
        self._root = str(root).rstrip("/")
        self._on_disk = isinstance(self._fs, LocalFileSystem)
        # Object stores have no folders; making one of s3fs might make a bucket.
        self._has_folders = not self._fs.async_impl

    def read(self, name: str) -> bytes | None:
        """Content of a small file; None where there is none."""
        try:
            content: bytes = self._call(f"reading {name}", lambda: self._fs.cat_file(self._at(name)))
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """A small file, in place of an older one; on a disk and in an object store nobody sees half of it."""

        def replace() -> None:
            if self._on_disk:
                part = f"{self._at(name)}.{uuid.uuid4().hex[:12]}.part"
                self._fs.pipe_file(part, content)
                os.replace(part, self._at(name))
            else:
                self._fs.pipe_file(self._at(name), content)

        self._call(f"writing {name}", lambda: self._in_folder(name, replace))

    def create(self, name: str, content: bytes) -> bool:
        """A small file where there is none yet; whether it is ours. As exclusive as the store allows, see docs/store.md."""

        def exclusive() -> None:
            if self._on_disk:  # whose pipe_file looks first and writes then
                part = f"{self._at(name)}.{uuid.uuid4().hex[:12]}.part"
                self._fs.pipe_file(part, content)
                try:
                    os.link(part, self._at(name))
                finally:
                    os.remove(part)
            else:
                self._fs.pipe_file(self._at(name), content, mode="create")

        try:
            self._call(f"writing {name}", lambda: self._in_folder(name, exclusive))
        except FileExistsError:
            return False
        return True

    def put(self, file: Path, name: str) -> None:
        """Copy a local file there."""
        limit = self._patience + file.stat().st_size / SLOWEST
        self._call(f"writing {name}", lambda: self._in_folder(name, lambda: self._fs.put_file(str(file), self._at(name))), limit)

    def get(self, name: str, file: Path, size: int) -> None:
        """Copy a file of that many bytes from there. Raises FileNotFoundError where there is none."""
        self._call(f"reading {name}", lambda: self._fs.get_file(self._at(name), str(file)), self._patience + size / SLOWEST)

    def sha256(self, name: str, size: int) -> str:
        """Of a file of that many bytes. Raises FileNotFoundError where there is none."""

        def read() -> str:
            digest = hashlib.sha256()
            with self._fs.open(self._at(name), "rb") as file:
                while part := file.read(CHUNK):
                    digest.update(part)
            return digest.hexdigest()

        return self._call(f"reading {name}", read, self._patience + size / SLOWEST)

    def sizes(self, below: str = "") -> dict[str, int]:
        """Name -> bytes of all files below a folder, which need not be there."""

        def find() -> dict[str, Any]:
            self._fs.invalidate_cache()  # others write there, too
            found: dict[str, Any] = self._fs.find(self._at(below), detail=True)
            return found

        try:
            found = self._call(f"listing {below or 'it'}", find)
        except FileNotFoundError:
            return {}
        return {path[len(self._root) + 1 :]: int(about["size"] or 0) for path, about in found.items()}

    def remove(self, name: str) -> None:
        """A file or a folder with all that is in it, there or not."""

        def remove() -> None:
            self._fs.invalidate_cache()
            if self._fs.exists(self._at(name)):
                self._fs.rm(self._at(name), recursive=True)

        try:
            self._call(f"removing {name}", remove)
        except FileNotFoundError:
            return

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _in_folder(self, name: str, write: Callable[[], None]) -> None:
        try:
            write()
        except FileNotFoundError:
            if not self._has_folders:
                raise
            self._fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
            write()

    def _call(self, what: str, work: Callable[[], T], limit: float | None = None) -> T:
        for pause in (*_PAUSES, None):
            try:
                return _within(limit or self._patience, work)
            except (FileNotFoundError, FileExistsError):
                raise
            except _Late:
                raise StoreError(f"{self.url}: {what}: no answer within {limit or self._patience:.0f} s") from None
            except Exception as error:
                if pause is None or isinstance(error, _FINAL):
                    raise StoreError(f"{self.url}: {what}: {_one_line(error)}") from error
            time.sleep(pause)
        raise AssertionError


def _within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; _Late when it takes longer. A thread of its own: not every client can be told a limit."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)  # one that is stuck must not keep the program from ending
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not result:
        raise _Late
    return result[0]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
