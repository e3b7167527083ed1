"""A run at a URL, worked on in a local working copy: outputs are built here, then put there; what stands there is fetched when it
is read. Whoever runs it sees a `Store`.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.store import Draft, Manifest, RunLock, Store, StoreError
from pipeline.store.lease import Lease
from pipeline.store.mirror import Mirror
from pipeline.store.remote import Remote
from pipeline.store.url import DamageError, Place, UrlStore


def is_url(text: str) -> bool:
    return "://" in text


def working_copy(cache: Path, url: str) -> Path:
    """Folder of a run's working copy; different URLs have different ones."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", url)[-80:].strip("-")
    return cache / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class SyncedStore(Store):
    """`root` is the working copy. What another machine has put there since this one last wrote or read it counts, not ours."""

    there: UrlStore
    _manifests: dict[Place, Manifest] = field(default_factory=dict)
    """Of the outputs there; nobody else changes them while we hold the lease."""
    _bad: set[Place] = field(default_factory=set)
    """Outputs that are damaged here."""
    _lease: list[Lease] = field(default_factory=list)

    @classmethod
    def open(cls, url: str, root: Path) -> SyncedStore:
        """Raises StoreError when the store does not answer."""
        store = cls(root, UrlStore(Remote(url)))
        store.refresh()
        return store

    def refresh(self) -> None:
        """Look again at what is there."""
        self._manifests.clear()
        for place in self.there.places():
            if manifest := self.there.manifest(*place):
                self._manifests[place] = manifest

    @contextmanager
    def lock(self, say: Callable[[str], None] = print) -> Iterator[None]:
        """Hold the working copy and the run there."""
        with ExitStack() as stack:
            stack.enter_context(RunLock(self.root))
            lease = stack.enter_context(Lease(self.there.remote, self._home(), say))
            self._lease[:] = [lease]
            stack.callback(self._lease.clear)
            self.refresh()
            yield

    def manifest(self, round: int, stage: str) -> Manifest | None:
        return self._manifests[round, stage] if self._is_newer_there((round, stage)) else super().manifest(round, stage)

    def check(self, round: int, stage: str) -> str | None:
        """Of what is there, that every file is; checksums are compared when it is fetched."""
        place = (round, stage)
        if self._is_newer_there(place):
            return self.there.check(round, stage, thorough=False)
        damage = super().check(round, stage)
        mine, there = super().manifest(round, stage), self._manifests.get(place)
        same = there is not None and (mine is None or mine.digest == there.digest)
        if damage and same and not self.there.check(round, stage, thorough=False):
            self._bad.add(place)  # and is fetched again
            return None
        return damage

    def text(self, round: int, stage: str, name: str) -> str | None:
        if self._is_newer_there((round, stage)):
            return self.there.text(self._manifests[round, stage], name)
        return super().text(round, stage, name)

    def here(self, round: int, stage: str) -> Path:
        """The folder of an output, fetched first where it is not here.

        Raises:
            StoreError: it is damaged there, or the store does not answer.
        """
        place = (round, stage)
        if self._is_newer_there(place):
            self._fetch(place)
        return self.path(round, stage)

    def share(self, round: int, stage: str) -> None:
        """Put an output there if it is not: one that was just built, or could not be put there before."""
        place, mine = (round, stage), super().manifest(round, stage)
        if mine is None or self._is_newer_there(place) or self._manifests.get(place) == mine:
            return
        try:
            self.there.upload(self.path(round, stage), mine, self._may_write)
        except StoreError as error:
            here = f"{stage} of round {round} stands in {self.path(round, stage)}"
            raise StoreError(f"{error}; {here}, and the same command puts it there") from error
        self._manifests[place] = mine
        self._note(place, mine)
        self.forget(self.root / ".resume" / f"{round}-{stage}")

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
        with super().write(round, stage, key=key, settings=settings, inputs=inputs, seed=seed) as draft:
            yield draft
            if there := self._manifests.get((round, stage)):
                self._note((round, stage), there)  # from now on it is older than ours, should the upload fail
        self._bad.discard((round, stage))
        self.share(round, stage)

    def keeping(self, resume: Path, say: Callable[[str], None]) -> AbstractContextManager[object]:
        for other in {name.split("/")[2] for name in self.there.remote.sizes(self._below(resume.parent)) if name.count("/") > 2}:
            if other != resume.name:  # of other settings or inputs: nothing goes on from there
                self.there.remote.remove(f"{self._below(resume.parent)}/{other}")
        seen = self.root / ".synced" / f"{resume.parent.name}-{resume.name}"
        return Mirror(self.there.remote, self.root, resume, seen, self._may_write, say)

    def forget(self, resume: Path) -> None:
        self.there.remote.remove(self._below(resume))

    def publish(self, *names: str) -> None:
        """Files and folders beside the rounds. Of a folder that holds a model, what makes it loadable comes last."""
        for name in names:
            top = self.root / name
            found = sorted(path for path in top.rglob("*") if path.is_file()) if top.is_dir() else [top]
            wanted = {path.relative_to(self.root).as_posix(): path for path in found}
            there = self.there.remote.sizes(name) if top.is_dir() else {}
            self._may_write()
            for old in sorted(there, key=_opens_a_model, reverse=True):
                if old not in wanted or _opens_a_model(old):
                    self.there.remote.remove(old)
            for new in sorted(wanted, key=_opens_a_model):
                self.there.remote.put(wanted[new], new)

    def _below(self, folder: Path) -> str:
        return folder.relative_to(self.root).as_posix()

    def _is_newer_there(self, place: Place) -> bool:
        there = self._manifests.get(place)
        if there is None:
            return False
        mine = super().manifest(*place)
        if mine is None or place in self._bad:
            return True
        return mine != there and self._noted(place) != there.to_json()

    def _fetch(self, place: Place) -> None:
        with self._drafted("fetched", self.path(*place)) as draft:
            manifest = self._downloaded(place, draft)
        self._note(place, manifest)
        self._manifests[place] = manifest
        self._bad.discard(place)

    def _downloaded(self, place: Place, draft: Path) -> Manifest:
        try:
            return self.there.download(*place, draft)
        except DamageError as error:
            if not self._lease:
                raise
            self.there.remove(*place)  # what is damaged is no output: it is built anew
            raise StoreError(f"{error}; it was removed there, and the same command builds it again") from error

    def _may_write(self) -> None:
        for lease in self._lease:
            lease.check()

    def _noted_in(self, place: Place) -> Path:
        return self.root / ".synced" / f"{place[0]}-{place[1]}.json"

    def _noted(self, place: Place) -> str:
        """The manifest that stood there when this working copy last wrote or read it."""
        with contextlib.suppress(FileNotFoundError):
            return self._noted_in(place).read_text("utf-8")
        return ""

    def _note(self, place: Place, manifest: Manifest) -> None:
        file = self._noted_in(place)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        part.write_text(manifest.to_json(), "utf-8")
        part.replace(file)

    def _home(self) -> str:
        """Identity of this working copy, made once. Held by `RunLock`, nobody else can be alive with it."""
        file = self.root / ".home"
        if not file.is_file():
            part = file.with_name(".home.part")
            part.write_text(uuid.uuid4().hex)
            part.replace(file)
        return file.read_text()


def _opens_a_model(name: str) -> bool:
    return name.endswith("/config.json")
