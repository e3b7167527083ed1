"""Runs the stage graph of one run folder: what is up to date is reused, the rest is built; also plans without running."""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Container, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import Settings
from pipeline.rollout_log import RolloutLog
from pipeline.settings_file import dump_settings
from pipeline.stages.graph import MODEL, NAMES, steps, trained_stage
from pipeline.stages.stage import Context, Input, Stage, StageError
from pipeline.store import MANIFEST, Store, stage_key
from pipeline.telemetry import StageLine, Terminal

if TYPE_CHECKING:
    from actors.workers import Workers

BESIDE = ("report.html", "report.svg", "report.png", "report.csv", "metrics.json")
"""Of the newest report, beside the rounds."""


@dataclass(frozen=True)
class Selection:
    """Which stages a command may build; the others must stand already where they are needed."""

    only: tuple[str, ...] = ()
    first: str | None = None
    last: str | None = None
    force: bool = False
    """Build the selected stages even when they are up to date."""
    first_round: int = 1
    """Stages of earlier rounds, and what is made once before them, are not built."""

    def __post_init__(self) -> None:
        for name in (*self.only, self.first, self.last):
            if name is not None and name not in NAMES:
                raise StageError(f"no stage {name!r}; the stages are {', '.join(NAMES)}")
        if self.first and self.last and NAMES.index(self.first) > NAMES.index(self.last):
            raise StageError(f"--from {self.first} comes after --until {self.last}")

    def holds(self, round: int, stage: str) -> bool:
        if self.first_round > 1 and round < self.first_round:
            return False
        at = NAMES.index(stage)
        after = self.first is None or at >= NAMES.index(self.first)
        before = self.last is None or at <= NAMES.index(self.last)
        return (not self.only or stage in self.only) and after and before


@dataclass(frozen=True)
class Planned:
    """What would happen to one stage."""

    round: int
    stage: str
    state: Literal["reuse", "rebuild", "skip"]
    why: str


@dataclass(frozen=True)
class Resolved:
    """Where a stage's inputs stand and the key that its output would have."""

    places: dict[str, tuple[int, str]]
    digests: dict[str, str]
    settings: dict[str, object]
    key: str


class Pipeline:
    """One run folder and its configuration."""

    def __init__(
        self, settings: Settings, folder: Path, selection: Selection, terminal: Terminal, store: Store | None = None
    ) -> None:
        """`store`: where a run at a URL is worked on in `folder`."""
        self._settings, self._selection, self._terminal = settings, selection, terminal
        self._store = store or Store(folder)
        self._checked: dict[tuple[int, str], str | None] = {}  # damage found, by output; hashing is done once

    def plan(self) -> Iterator[Planned]:
        """What `run` would do, stage by stage, without doing it."""
        rebuilt: set[tuple[int, str]] = set()
        for round, stage in self._steps(rebuilt):
            state, why = self._decide(round, stage, rebuilt)
            if state == "rebuild":
                rebuilt.add((round, stage.name))
            yield Planned(round, stage.name, state, why)

    def run(self) -> list[StageLine]:
        """Build what is not up to date. Lines of the summary, one a stage.

        Raises:
            StageError: a stage cannot run, or an input that is not selected is missing or damaged.
        """
        lines: list[StageLine] = []
        folder = self._store.root
        (folder / "config.yaml").write_text(dump_settings(self._settings))
        self._store.publish("config.yaml")
        with ExitStack() as stack:
            workers: Workers | None = None
            for round, stage in self._steps():
                state, why = self._decide(round, stage, set())
                if state == "rebuild" and (beside := self._adopt(round, stage)):
                    self._terminal.info(f"{stage.name}: the same as in {beside}, taken from there")
                    state, why = "reuse", ""
                if state == "rebuild":
                    workers = workers or stack.enter_context(self._workers())
                    began = time.monotonic()
                    self._build(round, stage, workers)
                    lines.append(self._line(round, stage, time.monotonic() - began, "built"))
                else:
                    if why:
                        self._terminal.warn(f"{stage.name}: {why}")
                    if state == "reuse":
                        self._store.share(round, stage.name)
                    lines.append(self._line(round, stage, 0.0, "reused" if state == "reuse" else "skipped"))
        return lines

    def _steps(self, rebuilt: Container[tuple[int, str]] = ()) -> Iterator[tuple[int, Stage]]:
        """(round, stage) one after the other, as many rounds as it takes: what stops them is known while they run.

        Args:
            rebuilt: outputs of which nothing is known yet.
        """
        done = 0
        while True:
            planned = steps(self._settings)
            if done == len(planned):
                return
            yield planned[done]
            round, stage = planned[done]
            done += 1
            if stage.name == "evaluate" and round < self._settings.run.rounds and (round, "evaluate") not in rebuilt:
                reason = self._enough(round)
                if reason:
                    self._terminal.info(f"no other round after round {round}: {reason}")
                    only = self._settings.run.model_copy(update={"rounds": round})
                    self._settings = self._settings.model_copy(update={"run": only})

    def _enough(self, last: int) -> str | None:
        """Why no round follows the last one; None where one does."""
        run, refused = self._settings.run, 0
        metrics: dict[str, Any] = {}
        for round in range(1, last + 1):
            found = self._store.text(round, "evaluate", "metrics.json")
            metrics = json.loads(found) if found else {"accepted": True, "dev": None}
            refused = 0 if metrics["accepted"] else refused + 1
        if refused >= run.patience:
            return f"{refused} in a row were refused (run.patience)"
        if metrics["accepted"] and metrics.get("dev") and metrics["dev"]["after"] >= run.enough:
            return f"dev accuracy is {metrics['dev']['after']:.3f} (run.enough)"
        return None

    def rounds(self) -> list[str]:
        """The table of the rounds so far that stand evaluated, as lines; none where there is but one."""
        from pipeline.metrics import rounds_table  # scipy is behind it

        found = {round: self._store.text(round, "evaluate", "metrics.json") for round in range(1, self._settings.run.rounds + 1)}
        return rounds_table([(round, json.loads(text)) for round, text in found.items() if text])

    def publish(self) -> Path | None:
        """Put the newest report and the newest accepted model beside the rounds; the report's path, or None when there is none."""
        rounds = self._settings.run.rounds
        manifest = self._store.manifest(rounds, "report")
        if manifest is None:
            return None
        source = self._store.here(rounds, "report")
        for name in BESIDE:
            part = self._store.root / f".{name}.part"
            shutil.copyfile(source / name, part)
            part.replace(self._store.root / name)
        self._export_model(source, manifest.digest)
        self._store.publish(*BESIDE)
        return self._store.root / "report.html"

    def _export_model(self, report: Path, digest: str) -> None:
        """`model/`: a copy of the newest accepted model with its card, to be used, moved and changed without harm to the run."""
        place = self._start_model(Input(MODEL, self._settings.run.rounds + 1, MODEL), set())
        manifest = self._store.manifest(*place) if place else None
        if place is None or manifest is None:
            return
        head, head_digest = self._head_of(place)
        here, target, made_from = self._store.here(*place), self._store.root / MODEL, f"{manifest.digest}\n{digest}\n{head_digest}"
        mark = self._store.root / f".{MODEL}.made-from"
        if target.is_dir() and mark.is_file() and mark.read_text() == made_from:
            return
        mark.unlink(missing_ok=True)
        part = self._store.root / f".{MODEL}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for file in here.iterdir():
            if file.is_file() and file.name not in (MANIFEST, "curve.json"):
                shutil.copyfile(file, part / file.name)
        adapter = self._store.path(*place) / "adapter"  # of LoRA, beside the merged weights
        if adapter.is_dir():
            shutil.copytree(adapter, part / adapter.name, copy_function=shutil.copyfile)
        for name in ("README.md", "retract.json"):
            shutil.copyfile(report / name, part / name)
        if head:
            shutil.copyfile(head, part / head.name)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        self._store.publish(MODEL)
        mark.write_text(made_from)

    def _head_of(self, model: tuple[int, str]) -> tuple[Path | None, str]:
        """The verifier head that the stage prm has trained on a model, and its digest."""
        found = self._store.manifest(model[0], "prm")
        if found is None or model[1] != "sft":  # what grpo trained further is another policy
            return None, ""
        file = self._store.here(model[0], "prm") / "head" / "sft" / "verifier_head.safetensors"
        return (file, found.digest) if file.is_file() else (None, "")

    def _workers(self) -> Workers:
        from actors.workers import Workers  # torch and ray are needed from here on: a run that reuses all never waits for them

        return Workers(self._settings, self._store.root / "logs", self._terminal.info)

    def _line(self, round: int, stage: Stage, seconds: float, state: Literal["reused", "built", "skipped"]) -> StageLine:
        manifest = self._store.manifest(round, stage.name)
        return StageLine(round, stage.name, manifest.counts.get("rows") if manifest else None, seconds, state)

    def _decide(self, round: int, stage: Stage, rebuilt: set[tuple[int, str]]) -> tuple[Literal["reuse", "rebuild", "skip"], str]:
        """What to do with a stage, and a word on why where that is no matter of course."""
        selected = self._selection.holds(round, stage.name)
        changed = [name for name, at in self._places(round, stage, rebuilt).items() if at is None or at in rebuilt]
        if changed:
            return (
                ("rebuild", f"{changed[0]} is rebuilt") if selected else ("skip", f"not selected, though {changed[0]} is rebuilt")
            )
        absent = self._store.manifest(round, stage.name) is None
        if not selected and absent:
            return "skip", ""
        damage = None if absent else self._damage(round, stage.name)
        if not selected:
            if damage:
                raise StageError(f"{damage}; select {stage.name} to rebuild it")
            stale = self._store.manifest(round, stage.name).key != self._resolve(round, stage).key  # type: ignore[union-attr]
            return "reuse", "was built from other settings or inputs and is not selected" if stale else ""
        if self._selection.force:
            return "rebuild", "--force"
        if absent:
            return "rebuild", "not built yet"
        if damage:
            return "rebuild", damage
        if self._store.manifest(round, stage.name).key != self._resolve(round, stage).key:  # type: ignore[union-attr]
            return "rebuild", "settings or inputs changed"
        return "reuse", ""

    def _adopt(self, round: int, stage: Stage) -> str | None:
        """The run from which an output was taken that would have to be built; None where no other has it."""
        found = self._store.adopt(round, stage.name, self._resolve(round, stage).key)
        if found:
            shutil.rmtree(self._store.root / ".resume" / f"{round}-{stage.name}", ignore_errors=True)
            self._checked.pop((round, stage.name), None)
        return found

    def _build(self, round: int, stage: Stage, workers: Workers) -> None:
        found = self._resolve(round, stage)
        module = importlib.import_module(f"pipeline.stages.{stage.name}")
        seed = self._settings.run.seed
        (self._store.root / ".tmp").mkdir(exist_ok=True)
        resume = self._store.root / ".resume" / f"{round}-{stage.name}" / found.key[:16]
        self._forget_checkpoints(resume)
        inputs = {name: self._store.here(*place) for name, place in found.places.items()}
        rollouts = self._watched(round, stage.name)
        with (
            closing(rollouts),
            self._store.keeping(resume, self._terminal.warn),
            tempfile.TemporaryDirectory(dir=self._store.root / ".tmp") as scratch,
            self._store.write(round, stage.name, key=found.key, settings=found.settings, inputs=found.digests, seed=seed) as draft,
        ):
            module.run(
                Context(
                    settings=self._settings,
                    round=round,
                    out=draft.path,
                    scratch=Path(scratch),
                    resume=resume,
                    counts=draft.counts,
                    inputs=inputs,
                    digests=found.digests,
                    terminal=self._terminal,
                    workers=workers,
                    rollouts=rollouts,
                )
            )
        shutil.rmtree(resume.parent, ignore_errors=True)
        self._checked[round, stage.name] = None

    def _watched(self, round: int, stage: str) -> RolloutLog:
        """Have a stage's progress and rollouts told to Ray's metrics; the log of its rollouts."""
        from actors import metrics

        metrics.begin(metrics.Labels(self._settings.run.name, stage, round))
        self._terminal.on_progress = metrics.progressed
        asked = self._settings.monitor
        folder, most = self._store.root / "logs" / "rollouts", asked.rollout_mib << 20
        return RolloutLog(folder, stage, round, most, asked.rollout_files, metrics.rolled)

    def _forget_checkpoints(self, resume: Path) -> None:
        """Remove what other settings or inputs have left of the same output: nothing goes on from there."""
        for other in resume.parent.glob("*"):
            if other != resume or self._selection.force:
                shutil.rmtree(other)
        if self._selection.force:
            self._store.forget(resume)

    def _resolve(self, round: int, stage: Stage) -> Resolved:
        places, digests = {}, {}
        for name, place in self._places(round, stage, set()).items():
            assert place is not None  # nothing is about to be rebuilt, so every model is known
            manifest = self._store.manifest(*place)
            if manifest is None:
                raise StageError(f"{stage.name} needs {place[1]} of round {place[0]}, which is not there: select it too")
            if damage := self._damage(*place):
                raise StageError(f"{stage.name} needs {place[1]} of round {place[0]}: {damage}")
            places[name], digests[name] = place, manifest.digest
        settings: dict[str, object] = dict(stage.settings(self._settings))
        return Resolved(places, digests, settings, stage_key(stage.name, stage.version, settings, digests))

    def _places(self, round: int, stage: Stage, rebuilt: set[tuple[int, str]]) -> dict[str, tuple[int, str] | None]:
        """Where each input stands; None for a model that depends on an evaluation still to be made."""
        return {
            one.name: self._start_model(one, rebuilt) if one.stage == MODEL else (one.round, one.stage)
            for one in stage.inputs(round)
        }

    def _start_model(self, wanted: Input, rebuilt: set[tuple[int, str]]) -> tuple[int, str] | None:
        for round in range(wanted.round - 1, 0, -1):
            if (round, "evaluate") in rebuilt:
                return None
            metrics = self._store.text(round, "evaluate", "metrics.json")
            if metrics and json.loads(metrics)["accepted"]:
                return round, trained_stage(self._settings)
        return 0, "base"

    def _damage(self, round: int, stage: str) -> str | None:
        if (round, stage) not in self._checked:
            self._checked[round, stage] = self._store.check(round, stage)
        return self._checked[round, stage]
