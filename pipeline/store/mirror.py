"""Checkpoints of a stage under way, copied to the run's URL while it runs, so that another machine can go on with it.

What stands there is the folder as it stood here at one moment: files by checksum, and last the list of them. A thread copies, so
that training does not wait; a store that does not answer is warned of, and training goes on.

    <url>/.resume/<round>-<stage>/<key>/state.json
    <url>/.resume/<round>-<stage>/<key>/files/<sha256>
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from pipeline.store import StoreError, _hash_file
from pipeline.store.remote import Remote

EVERY = 10.0  # seconds between two looks at the folder
_STATE = "state.json"

Signature = dict[str, tuple[int, int]]


class Mirror:
    """A context manager around a stage: fetches what another machine has left, copies what comes, and once more on the way out.

    Args:
        folder: the checkpoints of one output, <run>/.resume/<round>-<stage>/<key>.
        seen: a file in which is kept which copy this folder was last the same as.
        may_write: raises when another job has the run by now.
    """

    def __init__(
        self,
        remote: Remote,
        run: Path,
        folder: Path,
        seen: Path,
        may_write: Callable[[], None],
        say: Callable[[str], None],
        every: float = EVERY,
    ) -> None:
        self._remote, self._folder, self._seen, self._may_write, self._say = remote, folder, seen, may_write, say
        self._at = folder.relative_to(run).as_posix()
        self._draft = run / ".tmp" / f"checkpoints-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._every = every
        self._copied: Signature | None = None
        self._warned = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self._restore()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        if error is None:
            self._remote.remove(self._at)  # the output stands
            self._seen.unlink(missing_ok=True)
        elif not isinstance(error, StoreError):
            self._try()

    def _work(self) -> None:
        while not self._done.wait(self._every):
            self._try()

    def _try(self) -> None:
        try:
            self.copy()
        except (StoreError, OSError) as error:
            if not self._warned:
                self._say(f"checkpoints are not copied to the store for now, the stage goes on: {error}")
            self._warned = True

    def copy(self) -> None:
        """Copy the folder if it has changed and stands still; otherwise the next look will do.

        Raises:
            StoreError: the store does not answer, or another job has the run.
        """
        before = _signature(self._folder)
        if before == self._copied or not before:
            return
        try:
            hashes = {name: _hash_file(self._folder / name) for name in before}
            there = self._remote.sizes(f"{self._at}/files")
            for name, digest in hashes.items():
                if there.get(f"{self._at}/files/{digest}") != before[name][0]:
                    self._remote.put(self._folder / name, f"{self._at}/files/{digest}")
        except FileNotFoundError:
            return  # an old checkpoint went
        if _signature(self._folder) != before:
            return  # a file may have been read half-written
        self._may_write()
        content = json.dumps({"id": uuid.uuid4().hex, "files": hashes}).encode()
        self._remote.write(f"{self._at}/{_STATE}", content)
        self._remember(content)
        self._copied, self._warned = before, False
        for name in there.keys() - {f"{self._at}/files/{digest}" for digest in hashes.values()}:
            with contextlib.suppress(StoreError):  # the next copy removes it
                self._remote.remove(name)

    def _restore(self) -> None:
        """Take the copy there where another machine has made it: it went on from ours, or we have none."""
        content = self._remote.read(f"{self._at}/{_STATE}")
        if content is None or (self._seen.is_file() and self._seen.read_bytes() == content):
            return
        try:
            files: dict[str, str] = json.loads(content)["files"]
            sizes = self._remote.sizes(f"{self._at}/files")
            for name, digest in files.items():
                target = self._draft / name
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise ValueError(f"{name} lies outside of it")
                target.parent.mkdir(parents=True, exist_ok=True)
                self._remote.get(f"{self._at}/files/{digest}", target, sizes.get(f"{self._at}/files/{digest}", 0))
                if _hash_file(target, sync=True) != digest:
                    raise ValueError(f"{name} does not match its checksum")
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
            self._say(f"{self._remote.url}/{self._at}: the checkpoints there are damaged and not used: {error}")
            shutil.rmtree(self._draft, ignore_errors=True)
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        if self._draft.is_dir():
            self._draft.rename(self._folder)
        self._remember(content)
        self._copied = _signature(self._folder)
        self._say("goes on from checkpoints that another machine has left in the store")

    def _remember(self, content: bytes) -> None:
        self._seen.parent.mkdir(parents=True, exist_ok=True)
        part = self._seen.with_name(f"{self._seen.name}.part")
        part.write_bytes(content)
        part.replace(self._seen)


def _signature(folder: Path) -> Signature:
    """Name -> (bytes, time of the last change) of what is in a folder; half-written parts, named so, are left out."""
    found: Signature = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.endswith(".part")]
        for name in names:
            if not name.endswith(".part"):
                path = Path(parent, name)
                with contextlib.suppress(FileNotFoundError):
                    about = path.stat()
                    found[path.relative_to(folder).as_posix()] = (about.st_size, about.st_mtime_ns)
    return found
