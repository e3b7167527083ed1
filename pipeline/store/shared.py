"""Run folders side by side that take from each other what they would otherwise make twice: the runs of studies.

Files are linked, not copied, where the disk can: one copy of a model serves all runs that begin with it. Nothing writes to a file
of an output in place, outputs are replaced whole; so that nobody's editor does either, linked files are read-only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pipeline.store import MANIFEST, Manifest, RunLock, Store, StoreError, _sync_folder


@dataclass(frozen=True)
class SharedStore(Store):
    """The outputs of one run folder, and those of others that are as good."""

    siblings: Sequence[Path] = ()
    """Run folders to take from."""
    since: str = ""
    """Only what was made at this time or later, as in `Manifest.created`: what is made anew is not taken from what was there."""

    def adopt(self, round: int, stage: str, key: str) -> str | None:
        """As for every store. An output that is damaged, or whose run is in use by another process, is not taken."""
        for folder in self.siblings:
            other = Store(folder)
            manifest = other.manifest(round, stage)
            if manifest is None or manifest.key != key or manifest.created < self.since:
                continue
            with ExitStack() as held:
                try:
                    held.enter_context(RunLock(folder))
                except StoreError:
                    continue  # another process is at work there
                if other.check(round, stage) is None:
                    self._link(other.path(round, stage), manifest)
                    return folder.name if folder.parent == self.root.parent else label(folder)
        return None

    def _link(self, source: Path, manifest: Manifest) -> None:
        with self._drafted(manifest.stage, self.path(manifest.round, manifest.stage)) as draft:
            for name in (*manifest.files, MANIFEST):
                target = draft / name
                target.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(source / name, target)
            for parent, _, _ in os.walk(draft, topdown=False):
                _sync_folder(Path(parent))


def label(folder: Path) -> str:
    """A run of another study, in words."""
    return f"{folder.parent.name}/{folder.name}"


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
        target.chmod(target.stat().st_mode & ~0o222)
    except OSError:  # another disk, or one without links
        target.unlink(missing_ok=True)
        shutil.copyfile(source, target)
