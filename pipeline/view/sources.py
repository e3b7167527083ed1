"""The outputs of a run that hold rollouts: a few columns of every row to filter by, and single rows in full.

Datasets are memory-mapped: columns are read once, and of everything else only the rows that are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from pipeline.backtrack.cursor import Mode
from pipeline.backtrack.tree import Rewinding
from pipeline.config import DecodeSettings, UndoSettings
from pipeline.stages.io import Codec
from pipeline.store import Manifest

UNKNOWN = "–"
VERDICTS = ("wrong", "right")


@dataclass(frozen=True)
class Columns:
    """Of all rows of a source."""

    facets: Mapping[str, pa.Array]
    """Facet -> [rows] texts, as a dictionary array."""
    problem: pa.ChunkedArray
    """[rows] Ids."""
    undos: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    reward: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Judged:
    """What the judge says of a rollout."""

    step: int
    """Number of the first wrong step, from 1."""
    chars: tuple[int, int]
    """Where the error stands in the text."""
    kind: str
    evidence: str
    method: str


@dataclass(frozen=True)
class Taken:
    """One row in full."""

    problem: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...] | None
    """None: as the settings make it from the question."""
    first_ids: tuple[int, ...] = ()
    """The first try, with undo forbidden, where there is one."""
    spurious: int | None = None
    """Undos of something right; None where that was not looked at."""
    judged: Judged | None = None
    components: tuple[tuple[str, float], ...] = ()
    """Parts of the reward."""
    step: int | None = None
    """Of the training that it comes from."""


class Source(Protocol):
    """One output that holds rollouts."""

    @property
    def stage(self) -> str: ...
    @property
    def round(self) -> int: ...
    @property
    def count(self) -> int:
        """Rows."""
        ...

    @property
    def inputs(self) -> Mapping[str, str]:
        """Input -> digest, of the output."""
        ...

    @property
    def undo(self) -> UndoSettings: ...
    @property
    def prompt(self) -> str: ...
    @property
    def rewinding(self) -> Rewinding: ...

    def columns(self, codec: Codec) -> Columns: ...
    def take(self, at: int) -> Taken: ...
    def model_of(self, model: str) -> tuple[str, str]:
        """(name of the manifest's input, folder within it) of the model that wrote a row."""
        ...


class _Output:
    """What a manifest says."""

    manifest: Manifest

    @property
    def round(self) -> int:
        return self.manifest.round

    @property
    def count(self) -> int:
        return self.manifest.counts["rows"]

    @property
    def inputs(self) -> Mapping[str, str]:
        return self.manifest.inputs

    @property
    def prompt(self) -> str:
        return str(self.manifest.settings["prompt"])


@dataclass(frozen=True)
class RolloutSource(_Output):
    """Tries at training problems, with the judge's verdicts where they are of these rollouts."""

    manifest: Manifest
    rows: Dataset
    verdicts: Dataset | None
    stage: str = "rollouts"

    @property
    def undo(self) -> UndoSettings:
        settings: Mapping[str, Any] = self.manifest.settings
        return UndoSettings(token=settings["token"], unit=settings.get("unit", UndoSettings().unit))

    @property
    def rewinding(self) -> Rewinding:
        return "deferred"  # nothing is undone here: rows hold first tries, or what survived

    def columns(self, codec: Codec) -> Columns:
        settings: Mapping[str, Any] = self.manifest.settings
        asked, ids, count = settings["rollouts"], column(self.rows, "token_ids"), len(self.rows)
        by_heat = [f"{asked[name]:g}" for name in ("temperature", "hot_temperature")]
        heats = list(dict.fromkeys(by_heat))
        hot = column(self.rows, "hot").to_numpy().astype(np.int32)
        if self.verdicts is None:
            verdict = constant(UNKNOWN, count)
        else:
            verdict = coded(column(self.verdicts, "correct").to_numpy().astype(np.int32), VERDICTS)
        facets = {
            "model": constant("base", count),
            "mode": constant(str(asked["mode"]), count),
            "temperature": coded(np.array([heats.index(heat) for heat in by_heat], np.int32)[hot], heats),
            "verdict": verdict,
            "first": verdict if asked["mode"] == "forbidden" else constant(UNKNOWN, count),
            "finish": column(self.rows, "finish").combine_chunks().dictionary_encode(),
        }
        tokens = pc.list_value_length(ids).to_numpy().astype(np.int32)
        return Columns(facets, column(self.rows, "problem"), occurrences(ids, codec.rule.undo_id), tokens, no_reward(count))

    def take(self, at: int) -> Taken:
        row = self.rows[at]
        return Taken(row["problem"], tuple(row["token_ids"]), tuple(row["prompt_ids"]), judged=self._judged(at))

    def _judged(self, at: int) -> Judged | None:
        if self.verdicts is None:
            return None
        row = self.verdicts[at]
        if row["error_step"] < 0:
            return None
        start, end = row["error_chars"]
        return Judged(row["error_step"] + 1, (start, end), row["error_kind"], row["evidence"], row["method"])

    def model_of(self, model: str) -> tuple[str, str]:
        return "model", ""


@dataclass(frozen=True)
class EvaluatedSource(_Output):
    """Every row of an evaluation."""

    manifest: Manifest
    rows: Dataset
    stage: str = "evaluate"

    @property
    def undo(self) -> UndoSettings:
        settings: Mapping[str, Any] = self.manifest.settings
        return UndoSettings(**settings["undo"])

    @property
    def rewinding(self) -> Rewinding:
        settings: Mapping[str, Any] = self.manifest.settings
        return DecodeSettings.model_validate(settings["decode"]).rewinding

    def columns(self, codec: Codec) -> Columns:
        def verdicts(name: str) -> pa.Array:
            return coded(column(self.rows, name).to_numpy().astype(np.int32), VERDICTS)

        heat = column(self.rows, "temperature").combine_chunks().dictionary_encode()
        texts = [f"{value:g}" for value in heat.dictionary.to_pylist()]
        facets = {name: column(self.rows, name).combine_chunks().dictionary_encode() for name in ("model", "mode", "finish")}
        facets |= {
            "temperature": pa.DictionaryArray.from_arrays(heat.indices, pa.array(texts, pa.string())),
            "verdict": verdicts("correct"),
            "first": verdicts("first_correct"),
        }
        undos, tokens = (column(self.rows, name).to_numpy().astype(np.int32) for name in ("undos", "tokens"))
        return Columns(facets, column(self.rows, "problem"), undos, tokens, no_reward(len(self.rows)))

    def take(self, at: int) -> Taken:
        row = self.rows[at]
        return Taken(row["problem"], tuple(row["token_ids"]), None, tuple(row["first_token_ids"]), row["spurious"])

    def model_of(self, model: str) -> tuple[str, str]:
        if model == "base":
            return "model", ""
        stage, control = {
            "clean_control": ("sft", "control"),
            "in_context": ("sft", "in_context"),
            "grpo_control": ("grpo", "control"),
        }.get(model, (model, ""))
        return stage, control


def seen_mode(mode: str) -> Mode:
    """How what was deleted stood in the model's context."""
    return "soft" if mode == "soft" else "rewind"


def column(rows: Dataset, name: str) -> pa.ChunkedArray:
    """One column as it lies on the disk."""
    return rows.data.table.column(name)


def constant(value: str, count: int) -> pa.Array:
    return coded(np.zeros(count, np.int32), [value])


def coded(codes: npt.NDArray[np.int32], values: Sequence[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(list(values), pa.string()))


def no_reward(count: int) -> npt.NDArray[np.float32]:
    return np.full(count, np.nan, np.float32)


def occurrences(lists: pa.ChunkedArray, value: int) -> npt.NDArray[np.int32]:
    """[rows] How often each list holds a value."""
    found = []
    for chunk in lists.chunks:
        hits = np.concatenate([[0], np.cumsum(chunk.values.to_numpy() == value)])
        ends = chunk.offsets.to_numpy()  # into all values, whatever part of them the chunk is
        found.append((hits[ends[1:]] - hits[ends[:-1]]).astype(np.int32))
    return np.concatenate(found) if found else np.zeros(0, np.int32)
