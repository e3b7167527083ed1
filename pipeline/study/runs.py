"""Which runs a study has, where they stand, and what they have in common: planning and running them one after the other.

Called by the command line, which says how one run is run. Knows settings and folders; imports neither torch nor ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import StringIO
from pathlib import Path

from pipeline.config import Settings
from pipeline.runner import Pipeline, Selection
from pipeline.settings_file import vary
from pipeline.stages.graph import MODEL, steps
from pipeline.stages.stage import StageError
from pipeline.store import Store, stage_key
from pipeline.store.shared import SharedStore, label
from pipeline.store.synced import is_url
from pipeline.telemetry import Terminal


@dataclass(frozen=True)
class StudyRun:
    """One variant with one seed."""

    variant: str
    seed: int
    settings: Settings
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name


def runs_of(settings: Settings, folder: Path) -> list[StudyRun]:
    """All runs of a study in `folder`, seed by seed: a study that is stopped has whole comparisons.

    Raises:
        StageError: a study cannot stand there.
    """
    if is_url(settings.run.root):
        raise StageError("run.root: the runs of a study share files in one folder; a study cannot stand at a URL")
    if any((folder / "0" / name).is_dir() for name in ("problems", "base")):
        raise StageError(f"{folder} holds a run; a study needs a folder of its own: set run.name")
    asked = settings.study
    varied = [(name, seed, vary(settings, name, seed)) for seed in asked.seeds for name in asked.variants]
    return [StudyRun(name, seed, one, folder / one.run.name) for name, seed, one in varied]


def store_of(run: StudyRun, runs: Sequence[StudyRun], since: str = "") -> SharedStore:
    """Where a run's outputs are; it takes from all other runs of the study, and from those of other studies beside it.

    Args:
        since: take only what was made then or later.
    """
    return SharedStore(run.folder, (*(one.folder for one in runs if one is not run), *_beside(run.folder.parent)), since)


def _beside(study: Path) -> list[Path]:
    """Runs of the other studies that stand in the same root."""
    return sorted(config.parent for config in study.parent.glob("*/*/config.yaml") if config.parent.parent != study)


def identities(settings: Settings) -> dict[tuple[int, str], str]:
    """For every output of a run what decides its content, as far as that is known before anything runs: outputs of two runs with
    equal identities will have equal keys."""
    found: dict[tuple[int, str], str] = {}
    for round, stage in steps(settings):
        inputs = {}
        for one in stage.inputs(round):
            if one.stage == MODEL:  # whichever round was accepted, it is one of those before
                before = sorted(f"{place} {identity}" for place, identity in found.items() if place[0] < one.round)
                inputs[one.name] = sha256("\n".join(before).encode()).hexdigest()
            else:
                inputs[one.name] = found[one.round, one.stage]
        found[round, stage.name] = stage_key(stage.name, stage.version, stage.settings(settings), inputs)
    return found


@dataclass(frozen=True)
class PlannedOutput:
    """What would happen to one stage of one run."""

    run: str
    round: int
    stage: str
    state: str
    """reuse, rebuild, skip; or share: another run of the study has it by then, or one of another study has it now."""
    why: str


def plan(runs: Sequence[StudyRun], selection: Selection) -> Iterator[PlannedOutput]:
    """What running a study would do, without doing it."""
    owner: dict[str, str] = {}
    others = [] if selection.force else _beside(runs[0].folder.parent)
    for run in runs:
        known, there = identities(run.settings), _standing_beside(run, others)
        for one in Pipeline(run.settings, run.folder, selection, silent(), Store(run.folder)).plan():
            state, why, identity = str(one.state), one.why, known[one.round, one.stage]
            if state == "rebuild" and identity in owner:
                state, why = "share", f"as in {owner[identity]}"
            elif state == "rebuild" and (one.round, one.stage) in there:
                state, why = "share", f"as in {there[one.round, one.stage]}"
            if state != "skip":
                owner.setdefault(identity, run.name)
            yield PlannedOutput(run.name, one.round, one.stage, state, why)


def _standing_beside(run: StudyRun, others: Sequence[Path]) -> dict[tuple[int, str], str]:
    """Which outputs of a run other studies have, and where: followed from those without inputs, as far as all inputs are known."""
    found: dict[tuple[int, str], str] = {}
    digests: dict[tuple[int, str], str] = {}
    manifests = [(folder, Store(folder)) for folder in others]
    for round, stage in steps(run.settings):
        places = {one.name: (0, "base") if one.stage == MODEL else (one.round, one.stage) for one in stage.inputs(round)}
        if round > 1 or not all(place in digests for place in places.values()):
            continue  # what a later round starts from shows only when the one before is evaluated
        inputs = {name: digests[place] for name, place in places.items()}
        key = stage_key(stage.name, stage.version, stage.settings(run.settings), inputs)
        for folder, store in manifests:
            manifest = store.manifest(round, stage.name)
            if manifest is not None and manifest.key == key:
                found[round, stage.name], digests[round, stage.name] = label(folder), manifest.digest
                break
    return found


def evaluated_round(run: StudyRun) -> int | None:
    """The last round of a run, where its evaluation stands and is what the settings ask for."""
    planned = list(Pipeline(run.settings, run.folder, Selection(), silent(), Store(run.folder)).plan())
    last = [one for one in planned if one.stage == "evaluate"][-1]
    return last.round if last.state == "reuse" else None


def silent() -> Terminal:
    return Terminal(None, out=StringIO(), err=StringIO())
