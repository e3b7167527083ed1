"""`python -m pipeline.store ls|verify|gc RUN`: what a run holds, in a folder or at a URL, whether it is whole, and what can go."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.arguments import OneLineParser
from pipeline.store import MANIFEST, Manifest, Store, StoreError
from pipeline.store.remote import Remote
from pipeline.store.synced import is_url
from pipeline.store.url import UrlStore

AnyStore = Store | UrlStore


@dataclass(frozen=True)
class Output:
    """One place of a stage's output; without a manifest it cannot be read."""

    round: int
    stage: str
    manifest: Manifest | None


def outputs(store: AnyStore) -> list[Output]:
    """All outputs of a run, the oldest first in each round."""
    found = [Output(round, stage, store.manifest(round, stage)) for round, stage in store.places()]
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


def listed(store: AnyStore) -> Iterator[str]:
    """A line for each output."""
    found = outputs(store)
    old = outdated(found)
    yield f"{'round':>5}  {'stage':<12}{'rows':>10}{'MB':>9}{'seconds':>9}  {'created':<26}{'content':<14}"
    for one in found:
        if one.manifest is None:
            yield f"{one.round:>5}  {one.stage:<12}{MANIFEST} is missing or damaged"
            continue
        size = store.size(one.round, one.stage) / 1e6
        rows = f"{one.manifest.counts['rows']:,}" if "rows" in one.manifest.counts else ""
        note = f"its {old[one.round, one.stage]} has changed" if (one.round, one.stage) in old else ""
        figures = (
            f"{rows:>10}{size:>9.1f}{one.manifest.seconds:>9.0f}  {one.manifest.created:<26}{one.manifest.digest[:12]:<14}{note}"
        )
        yield f"{one.round:>5}  {one.stage:<12}{figures}".rstrip()


def damages(store: AnyStore) -> list[str]:
    """One line for each damaged output; every file is read."""
    return [damage for one in outputs(store) if (damage := store.check(one.round, one.stage))]


def garbage(store: AnyStore) -> list[tuple[int, str]]:
    """Outputs that nothing reads: they are damaged, or were made from what has changed since."""
    found = outputs(store)
    old = outdated(found)
    return [(one.round, one.stage) for one in found if one.manifest is None or (one.round, one.stage) in old]


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, 1 for a damaged or unusable run folder, 2 for wrong arguments."""
    parser = OneLineParser(prog="python -m pipeline.store", description="Look into a run, check it, clean it up.")
    parser.add_argument("command", choices=("ls", "verify", "gc"), help="list outputs, check every file, remove what nothing reads")
    parser.add_argument("run", type=_run, metavar="RUN", help="run folder, such as runs/tiny, or URL, such as s3://bucket/runs/tiny")
    parser.add_argument("--checkpoints", action="store_true", help="gc: of stages that were stopped, too; they start over")
    parser.add_argument("--dry-run", action="store_true", help="gc: only say what would go")
    options = parser.parse_args(arguments)
    try:
        store: AnyStore = _at_url(options.run) if isinstance(options.run, str) else Store(options.run)
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


def _collect(store: AnyStore, checkpoints: bool, dry_run: bool) -> None:
    with store.lock():  # which removes the drafts of dead processes
        places = garbage(store)
        more = [name for name in store.leftovers(checkpoints) if not any(name.startswith(f"{a}/{b}/") for a, b in places)]
        for place in places:
            print(f"{'would remove' if dry_run else 'removed'} {store.where(*place)}")
            if not dry_run:
                store.remove(*place)
        for name in more:
            print(f"{'would remove' if dry_run else 'removed'} {store.name}/{name}")
            if not dry_run:
                store.remove_leftover(name)
    print(f"folders that {'would go' if dry_run else 'are gone'}: {len(places) + len(more)}")


def _at_url(url: str) -> UrlStore:
    store = UrlStore(Remote(url))
    if not store.places():
        raise StoreError(f"{url} is no run: it holds no rounds")
    return store


def _run(text: str) -> str | Path:
    if is_url(text):
        return text
    folder = Path(text)
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    if not any(part.is_dir() and part.name.isdigit() for part in folder.iterdir()):
        raise argparse.ArgumentTypeError(f"{text} is no run folder: it holds no rounds")
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
