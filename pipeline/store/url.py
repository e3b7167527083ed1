"""The outputs of a run at a URL. An output's files lie in a folder named by its digest, and its manifest is written last: it alone
makes the output exist, so that no reader ever sees half of one, or parts of two.

    <url>/<round>/<stage>/manifest.json
    <url>/<round>/<stage>/<first 16 digits of the digest>/...
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from pipeline.store import MANIFEST, Manifest, StoreError, _hash_file, _write_synced
from pipeline.store.lease import Lease
from pipeline.store.remote import Remote

Place = tuple[int, str]

_LOOKS = 3  # at an output that is replaced while it is read


class UrlStore:
    """Reading needs no lock; whoever writes holds the run's `Lease`."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote

    def where(self, round: int, stage: str) -> str:
        return f"{self.remote.url}/{round}/{stage}"

    def places(self) -> list[Place]:
        """Every place with a file in it, manifest or not."""
        split = [name.split("/") for name in self.remote.sizes()]
        return sorted({(int(parts[0]), parts[1]) for parts in split if len(parts) > 2 and parts[0].isdigit()})

    def manifest(self, round: int, stage: str) -> Manifest | None:
        """None when it is absent or damaged; `check` says which."""
        try:
            return self._load(round, stage)
        except _NoManifest:
            return None

    def size(self, round: int, stage: str) -> int:
        """Bytes of all files."""
        return sum(self.remote.sizes(f"{round}/{stage}").values())

    def check(self, round: int, stage: str, *, thorough: bool = True) -> str | None:
        """None when every file is there, else one line with the first damage. `thorough` reads them, too."""
        for look in range(_LOOKS):
            damage, manifest = self._look(round, stage, thorough)
            if not damage or look == _LOOKS - 1 or self.manifest(round, stage) == manifest:
                return damage
        raise AssertionError

    def text(self, manifest: Manifest, name: str) -> str | None:
        """A small file of an output; None where there is none. Raises StoreError when it is damaged."""
        if name not in manifest.files:
            return None
        content = self.remote.read(f"{_folder_of(manifest)}/{name}")
        if content is None or hashlib.sha256(content).hexdigest() != manifest.files[name]:
            raise StoreError(f"{self.where(manifest.round, manifest.stage)}: {name} does not match its checksum")
        return content.decode()

    def upload(self, folder: Path, manifest: Manifest, may_write: Callable[[], None]) -> None:
        """Put an output there in place of an older one. What an upload that broke off has left is gone on from.

        Args:
            may_write: raises when another job has the run by now; called before anything that others see changes.
        """
        place, base = f"{manifest.round}/{manifest.stage}", _folder_of(manifest)
        there = self.remote.sizes(base)
        for name in sorted(manifest.files):
            # The folder's name tells the content, so that a file of that name and size is the same file.
            if there.get(f"{base}/{name}") != (folder / name).stat().st_size:
                self.remote.put(folder / name, f"{base}/{name}")
        may_write()
        self.remote.write(f"{place}/{MANIFEST}", manifest.to_json().encode())
        self._tidy(place, {base})

    def download(self, round: int, stage: str, folder: Path) -> Manifest:
        """Fetch an output into an empty folder, every file compared with its checksum.

        Raises:
            DamageError: it is damaged.
            StoreError: it is not there, or the store does not answer.
        """
        for look in range(_LOOKS):
            manifest = self._load(round, stage)
            try:
                self._fetch(manifest, folder)
            except _Damaged as error:
                if look == _LOOKS - 1 or self.manifest(round, stage) == manifest:
                    raise DamageError(f"{self.where(round, stage)}: {error}") from error
                shutil.rmtree(folder)  # it was replaced meanwhile: nothing of the one before may stay
                folder.mkdir()
                continue
            _write_synced(folder / MANIFEST, manifest.to_json())
            return manifest
        raise AssertionError

    def remove(self, round: int, stage: str) -> None:
        self.remote.remove(f"{round}/{stage}/{MANIFEST}")  # first: nobody shall take the rest for an output
        self.remote.remove(f"{round}/{stage}")

    @property
    def name(self) -> str:
        return self.remote.url

    def leftovers(self, checkpoints: bool) -> list[str]:
        """Folders in the places of outputs that no manifest speaks of: uploads that broke off. And checkpoints, if asked for."""
        bases = {"/".join(name.split("/")[:3]) for name in self.remote.sizes() if name.count("/") > 2 and name[0].isdigit()}
        manifests = [self.manifest(*place) for place in self.places()]
        kept = [".resume"] if checkpoints and self.remote.sizes(".resume") else []
        return sorted(bases - {_folder_of(one) for one in manifests if one}) + kept

    def remove_leftover(self, name: str) -> None:
        self.remote.remove(name)

    def lock(self, say: Callable[[str], None] = print) -> Lease:
        return Lease(self.remote, say=say)

    def _load(self, round: int, stage: str) -> Manifest:
        content = self.remote.read(f"{round}/{stage}/{MANIFEST}")
        if content is None:
            raise _NoManifest(f"{self.where(round, stage)}: {MANIFEST} is missing")
        try:
            manifest = Manifest.from_json(content.decode())
        except (UnicodeDecodeError, StoreError) as error:
            raise _NoManifest(f"{self.where(round, stage)}: {error}") from error
        if (manifest.round, manifest.stage) != (round, stage):
            raise _NoManifest(f"{self.where(round, stage)}: holds the output of round {manifest.round}, stage {manifest.stage}")
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in manifest.files):
            raise _NoManifest(f"{self.where(round, stage)}: {MANIFEST} names files outside of the output")
        return manifest

    def _look(self, round: int, stage: str, thorough: bool) -> tuple[str | None, Manifest | None]:
        try:
            manifest = self._load(round, stage)
        except _NoManifest as error:
            return str(error), None
        base = _folder_of(manifest)
        sizes = self.remote.sizes(base)
        for name, wanted in sorted(manifest.files.items()):
            size = sizes.get(f"{base}/{name}")
            if size is None:
                return f"{self.where(round, stage)}: {name} is missing", manifest
            if thorough:
                try:
                    found = self.remote.sha256(f"{base}/{name}", size)
                except FileNotFoundError:
                    return f"{self.where(round, stage)}: {name} is missing", manifest
                if found != wanted:
                    return f"{self.where(round, stage)}: {name} does not match its checksum", manifest
        return None, manifest

    def _fetch(self, manifest: Manifest, folder: Path) -> None:
        base = _folder_of(manifest)
        sizes = self.remote.sizes(base)
        for name, wanted in sorted(manifest.files.items()):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.remote.get(f"{base}/{name}", target, sizes.get(f"{base}/{name}", 0))
            except FileNotFoundError as error:
                raise _Damaged(f"{name} is missing") from error
            if _hash_file(target, sync=True) != wanted:
                raise _Damaged(f"{name} does not match its checksum")

    def _tidy(self, place: str, keep: Iterable[str]) -> None:
        """What was there before. A reader in the middle of it finds a file missing, looks again and sees the new manifest."""
        bases = {"/".join(name.split("/")[:3]) for name in self.remote.sizes(place) if name.count("/") > 2}
        for base in bases - set(keep):
            with contextlib.suppress(StoreError):  # the output stands; gc finds what is left
                self.remote.remove(base)


class DamageError(StoreError):
    """An output at a URL is not what its manifest says."""


class _NoManifest(StoreError):
    """There is no output, or nothing that can be read as one."""


class _Damaged(Exception):
    """A file of an output is not what its manifest says."""


def _folder_of(manifest: Manifest) -> str:
    return f"{manifest.round}/{manifest.stage}/{manifest.digest[:16]}"
