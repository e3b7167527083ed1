"""`python -m pipeline.store ls|verify|gc RUN`: what a run folder holds, whether it is whole, and what can go."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.arguments import OneLineParser
from pipeline.store import MANIFEST, Manifest, RunLock, Store, StoreError


@dataclass(frozen=True)
class Output:
    """One folder of a stage's output; without a manifest it cannot be read."""

    round: int
    stage: str
    manifest: Manifest | None


def outputs(store: Store) -> list[Output]:
    """All outputs of a run folder, the oldest first in each round."""
    rounds = sorted(int(folder.name) for folder in store.root.iterdir() if folder.is_dir() and folder.name.isdigit())
    found = [
        Output(round, folder.name, store.manifest(round, folder.name))
        for round in rounds
        for folder in sorted((store.root / str(round)).iterdir())
        if folder.is_dir()
    ]
    return sorted(found, key=lambda one: (one.round, one.manifest.created if one.manifest else ""))


def outdated(found: Sequence[Output]) -> dict[tuple[int, str], str]:
    """(round, stage) -> the input that it was made from and that is not there any more, or is outdated itself."""
    gone: dict[tuple[int, str], str] = {}
    while True:
        good = [(one, one.manifest) for one in found if one.manifest and (one.round, one.stage) not in gone]
        present = {manifest.digest for _, manifest in good}
        more = {
            (one.round, one.stage): name
            for one, manifest in good
            for name, digest in manifest.inputs.items()
            if digest not in present
        }
        if not more:
            return gone
        gone |= more


def listed(store: Store) -> Iterator[str]:
    """A line for each output."""
    found = outputs(store)
    old = outdated(found)
    yield f"{'round':>5}  {'stage':<12}{'rows':>10}{'MB':>9}{'seconds':>9}  {'created':<26}{'content':<14}"
    for one in found:
        if one.manifest is None:
            yield f"{one.round:>5}  {one.stage:<12}{MANIFEST} is missing or damaged"
            continue
        size = sum(file.stat().st_size for file in store.path(one.round, one.stage).rglob("*") if file.is_file()) / 1e6
        rows = f"{one.manifest.counts['rows']:,}" if "rows" in one.manifest.counts else ""
        note = f"its {old[one.round, one.stage]} has changed" if (one.round, one.stage) in old else ""
        figures = (
            f"{rows:>10}{size:>9.1f}{one.manifest.seconds:>9.0f}  {one.manifest.created:<26}{one.manifest.digest[:12]:<14}{note}"
        )
        yield f"{one.round:>5}  {one.stage:<12}{figures}".rstrip()


def damages(store: Store) -> list[str]:
    """One line for each damaged output; every file is read."""
    return [damage for one in outputs(store) if (damage := store.check(one.round, one.stage))]


def garbage(store: Store, checkpoints: bool) -> list[Path]:
    """What nothing reads: outputs that are damaged, or were made from what has changed since; checkpoints if asked for."""
    found = outputs(store)
    old = outdated(found)
    gone = [store.path(one.round, one.stage) for one in found if one.manifest is None or (one.round, one.stage) in old]
    resume = store.root / ".resume"
    return gone + ([resume] if checkpoints and resume.is_dir() else [])


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, 1 for a damaged or unusable run folder, 2 for wrong arguments."""
    parser = OneLineParser(prog="python -m pipeline.store", description="Look into a run folder, check it, clean it up.")
    parser.add_argument("command", choices=("ls", "verify", "gc"), help="list outputs, check every file, remove what nothing reads")
    parser.add_argument("run", type=_run_folder, metavar="RUN", help="run folder, such as runs/tiny")
    parser.add_argument("--checkpoints", action="store_true", help="gc: of stages that were stopped, too; they start over")
    parser.add_argument("--dry-run", action="store_true", help="gc: only say what would go")
    options = parser.parse_args(arguments)
    store = Store(options.run)
    try:
        if options.command == "ls":
            print("\n".join(listed(store)))
        elif options.command == "verify":
            found = damages(store)
            print("\n".join([*found, f"{len(outputs(store))} outputs, {len(found)} damaged"]))
            return bool(found)
        else:
            _collect(store, options.checkpoints, options.dry_run)
    except (StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _collect(store: Store, checkpoints: bool, dry_run: bool) -> None:
    with RunLock(store.root):  # which removes the drafts of dead processes
        found = garbage(store, checkpoints)
        for folder in found:
            print(f"{'would remove' if dry_run else 'removed'} {folder}")
            if not dry_run:
                shutil.rmtree(folder)
    print(f"folders that {'would go' if dry_run else 'are gone'}: {len(found)}")


def _run_folder(text: str) -> Path:
    folder = Path(text)
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    if not any(part.is_dir() and part.name.isdigit() for part in folder.iterdir()):
        raise argparse.ArgumentTypeError(f"{text} is no run folder: it holds no rounds")
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
