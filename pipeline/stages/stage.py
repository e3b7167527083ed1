"""What a stage is: a name, its inputs, the settings that matter to it; its code is `run(context)` in the file of its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Settings
from pipeline.rollout_log import RolloutLog
from pipeline.telemetry import Terminal

if TYPE_CHECKING:  # planning a run must not import torch and ray
    from actors.workers import Workers


class StageError(RuntimeError):
    """A stage cannot be run with these inputs or settings. One line that names the setting or file."""


@dataclass(frozen=True)
class Input:
    """An output of another stage that a stage reads."""

    name: str
    """What the reading stage calls it; also its key in the manifest."""
    round: int
    stage: str


@dataclass(frozen=True)
class Context:
    """All that a running stage may touch."""

    settings: Settings
    round: int
    out: Path
    """Empty folder to fill; put in place when the stage returns."""
    scratch: Path
    """Folder that is deleted when the stage returns."""
    resume: Path
    """Folder for checkpoints of this very output: it survives a killed run and is deleted when the output stands."""
    counts: dict[str, int]
    """Row counts for the manifest; `rows` is the one the summary shows."""
    inputs: Mapping[str, Path]
    digests: Mapping[str, str]
    """Digest of each input: for a model input, the version that its completions carry."""
    terminal: Terminal
    workers: Workers
    rollouts: RolloutLog = field(default_factory=lambda: RolloutLog(None))
    """Where every rollout that it makes is written, by `write`."""


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline."""

    name: str
    version: int
    """Raised when the code changes what the stage writes; part of the content hash."""
    inputs: Callable[[int], tuple[Input, ...]]
    """round -> inputs. The stage name `model` stands for the newest accepted model before that round."""
    settings: Callable[[Settings], dict[str, Any]]
    """The part of the configuration that changes what the stage writes, as JSON values."""
    per_round: bool = True
    """Whether self-play repeats it; problems and base are made once, in round 0."""
