"""A run opened for reading: which outputs hold rollouts and trees, one table over all rows, single rollouts with their texts.

An output is checked against its checksums before it is used; what is damaged is named and left out. Addresses are numbers and names
of stages: no path comes from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from pipeline.backtrack.searched import Searched
from pipeline.backtrack.tree import Rewinding
from pipeline.backtrack.undo import UndoRule, apply_undo
from pipeline.config import UndoSettings
from pipeline.report import LONGEST, Piece, pieces
from pipeline.search_page import Drawn, draw
from pipeline.stages.io import Codec, Text, read_rows
from pipeline.stages.search import STEPS, TREES
from pipeline.store import Manifest, Store, StoreError
from pipeline.tasks.problem import Problem
from pipeline.view.filters import FACETS, Facet, Mask, Table
from pipeline.view.logged import FOLDER, LoggedSource, log_files
from pipeline.view.sources import (
    UNKNOWN,
    VERDICTS,
    EvaluatedSource,
    Judged,
    RolloutSource,
    Source,
    coded,
    column,
    constant,
)


@dataclass(frozen=True)
class Place:
    """Where a rollout stands: `/rollout/<round>/<stage>/<at>`."""

    round: int
    stage: str
    at: int


@dataclass(frozen=True)
class Rollout:
    """One rollout as pages show it."""

    number: int
    """In the table."""
    place: Place
    problem: Problem
    facets: dict[str, str]
    """Its value of each of FACETS."""
    undos: int
    noops: int
    spurious: int | None
    tokens: int
    reward: float | None
    components: tuple[tuple[str, float], ...]
    step: int | None
    """Of the training that it comes from."""
    raw: str
    """As written, undo tokens spelled out."""
    pieces: Sequence[Piece]
    surviving: str
    first: str | None
    """The first try, where it is another text."""
    judged: Judged | None
    token_texts: tuple[str, ...]
    fates: tuple[str, ...]
    """[tokens] `kept`, `deleted` or `undo`."""

    @property
    def marked(self) -> tuple[str, str, str] | None:
        """The text before, within and behind the first error; None where none was found, or it stands beyond what is shown."""
        if self.judged is None or self.judged.chars[1] > LONGEST:
            return None
        start, end = self.judged.chars
        return self.raw[:start], self.raw[start:end], self.raw[end:]


@dataclass(frozen=True)
class TreeLine:
    """A search tree in the list of them."""

    round: int
    at: int
    problem: Problem
    solved: bool
    simulations: int
    tokens: int
    states: int


@dataclass(frozen=True)
class Ask:
    """What P(U) of a rollout takes: the folder of its model, what it saw, what it wrote."""

    output: tuple[int, str]
    """(round, stage) whose files the folder belongs to."""
    folder: Path
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    """Without the stop id."""
    rule: UndoRule
    mode: str
    rewinding: Rewinding


class Library:
    """All that a run holds for this.

    Raises:
        StoreError: no problems, nothing with rollouts, or no tokenizer.
    """

    def __init__(self, store: Store, damage: Callable[[int, str], str | None] | None = None) -> None:
        """`damage` says what is wrong with an output, as `Store.check` does, which is what it is unless given."""
        self.store, self._damage = store, damage or store.check
        self.name = store.root.resolve().name
        self.notes: list[str] = []
        """What could not be shown, and why."""
        self._manifests = self._find()
        problems = self._manifests.get((0, "problems"))
        if problems is None:
            raise StoreError("; ".join(self.notes) or f"{store.path(0, 'problems')}: there is no such output")
        self._problems = read_rows(store.path(0, "problems"))
        self._ids = column(self._problems, "id")
        self._codecs: dict[tuple[str, str, str], Codec] = {}
        self.sources: list[Source] = [*self._rollouts(), *self._evaluations(), *self._logged()]
        self.trees: dict[int, Dataset] = {
            round: read_rows(store.path(round, stage) / TREES) for (round, stage) in self._manifests if stage == "search"
        }
        if not self.sources:
            nothing = f"{store.root} holds no rollouts: no output of the stages rollouts and evaluate"
            raise StoreError("; ".join([nothing, *self.notes]))
        self._starts = np.cumsum([0, *(source.count for source in self.sources)])
        self.table = self._table()

    def _find(self) -> dict[tuple[int, str], Manifest]:
        """What is whole; the models are not looked at before they are used."""
        found = {}
        for round in self._rounds():
            for stage in ("problems", "rollouts", "judge", "evaluate", "search"):
                if self.store.path(round, stage).is_dir():
                    damage = self._damage(round, stage)
                    manifest = None if damage else self.store.manifest(round, stage)
                    if manifest:
                        found[round, stage] = manifest
                    else:
                        self.notes.append(f"round {round}, {stage} is left out, for it is damaged: {damage}")
        return found

    def _rollouts(self) -> Iterable[Source]:
        for (round, stage), manifest in self._manifests.items():
            if stage == "rollouts":
                judge = self._manifests.get((round, "judge"))
                verdicts = None
                if judge and judge.inputs.get("rollouts") == manifest.digest:
                    verdicts = read_rows(self.store.path(round, "judge"))
                elif judge:
                    self.notes.append(f"round {round}: the verdicts of the judge are left out, for they are of other rollouts")
                yield RolloutSource(manifest, read_rows(self.store.path(round, stage)), verdicts)

    def _evaluations(self) -> Iterable[Source]:
        for (round, stage), manifest in self._manifests.items():
            if stage == "evaluate":
                yield EvaluatedSource(manifest, read_rows(self.store.path(round, stage)))

    def _logged(self) -> Iterable[Source]:
        folder = self.store.root / FOLDER
        for round in self._rounds():
            if log_files(folder, "grpo", round):
                # How undos act stands in what the stage has written, or while it goes on in what it started from.
                manifest = self.store.manifest(round, "grpo") or self.store.manifest(round, "sft")
                if manifest is None:
                    self.notes.append(
                        f"round {round}: rollouts logged by grpo are left out, for its output and that of sft are gone"
                    )
                    continue
                settings: Any = manifest.settings
                source = LoggedSource(folder, "grpo", round, UndoSettings(**settings["undo"]))
                if source.bad:
                    self.notes.append(f"round {round}: {source.bad:,} lines logged by grpo are no rollouts and are left out")
                if source.count:
                    yield source

    def _rounds(self) -> list[int]:
        folders = [path for path in self.store.root.iterdir() if path.name.isascii() and path.name.isdigit() and path.is_dir()]
        return sorted(int(folder.name) for folder in folders)

    def _table(self) -> Table:
        parts = [source.columns(self.codec(source.undo, source.prompt)) for source in self.sources]
        problem = np.concatenate([self._numbers(part.problem) for part in parts])
        of_problem = {name: _with_unknown(column(self._problems, name)) for name in ("split", "family")}
        facets = {}
        for name in FACETS:
            if name in of_problem:
                values = of_problem[name]
                chunks = [pa.DictionaryArray.from_arrays(values.indices.take(pa.array(problem % len(values))), values.dictionary)]
            else:
                own = {"stage": lambda source: source.stage, "round": lambda source: str(source.round)}.get(name)
                chunks = [
                    constant(own(source), len(part.undos)) if own else part.facets[name]
                    for source, part in zip(self.sources, parts, strict=True)
                ]
            facets[name] = _facet(chunks, VERDICTS if name in ("verdict", "first") else ())
        return Table(
            facets,
            np.concatenate([part.undos for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.reward for part in parts]),
            problem,
        )

    def _numbers(self, ids: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.int32]]:
        return pc.fill_null(pc.index_in(ids, value_set=self._ids), -1).to_numpy().astype(np.int32)

    def codec(self, undo: UndoSettings, prompt: str) -> Codec:
        key = (undo.token, undo.unit, prompt)
        if key not in self._codecs:
            folder = self.store.path(0, "base")
            try:
                self._codecs[key] = Codec(folder, undo, prompt)
            except (OSError, ValueError) as error:
                raise StoreError(f"{folder}: its tokenizer cannot be read: {' '.join(str(error).split())[:200]}") from error
        return self._codecs[key]

    def search(self, text: str) -> Mask:
        """Of each problem, whether its id or its question contains a text; capitals do not matter."""
        found = [
            pc.match_substring(column(self._problems, name), text, ignore_case=True).to_numpy(zero_copy_only=False)
            for name in ("id", "question")
        ]
        return np.asarray(found[0] | found[1], dtype=np.bool_)

    def problem(self, number: int) -> Problem:
        return Problem(**self._problems[number])

    def _problem_of(self, problem_id: str) -> Problem:
        number = int(self._numbers(pa.chunked_array([[problem_id]], pa.string()))[0])
        if number >= 0:
            return self.problem(number)
        return Problem(problem_id, UNKNOWN, UNKNOWN, False, "(this problem is not among those of the run)", "", UNKNOWN)

    def number(self, place: Place) -> int | None:
        """The row in the table that stands at a place; None where there is none."""
        for start, source in zip(self._starts, self.sources, strict=False):
            if (source.round, source.stage) == (place.round, place.stage):
                return int(start) + place.at if 0 <= place.at < source.count else None
        return None

    def _at(self, number: int) -> tuple[Source, int]:
        index = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.sources[index], number - int(self._starts[index])

    def rollout(self, number: int) -> Rollout:
        source, at = self._at(number)
        taken, codec = source.take(at), self.codec(source.undo, source.prompt)
        written = codec.decode(taken.token_ids)
        texts = _texts(written)
        undone = apply_undo(written.ids, codec.rule)
        first = codec.decode(taken.first_ids).text if taken.first_ids else None
        reward = float(self.table.reward[number])
        return Rollout(
            number=number,
            place=Place(source.round, source.stage, at),
            problem=self._problem_of(taken.problem),
            facets={name: facet.values[facet.codes[number]] for name, facet in self.table.facets.items()},
            undos=undone.undos,
            noops=undone.noops,
            spurious=taken.spurious,
            tokens=len(taken.token_ids),
            reward=None if np.isnan(reward) else reward,
            components=taken.components,
            step=taken.step,
            raw=written.text,
            pieces=pieces(written.ids, texts, codec.rule),
            surviving=codec.decode(undone.surviving).text,
            first=None if first is None or first == written.text else first,
            judged=taken.judged,
            token_texts=tuple(texts),
            fates=_fates(written.ids, undone.deleted_by, codec.rule),
        )

    def ask(self, number: int) -> Ask | None:
        """How P(U) of a rollout is found; None where the model that wrote it is not in the run any more."""
        source, at = self._at(number)
        facets = {name: facet.values[facet.codes[number]] for name, facet in self.table.facets.items()}
        taken, codec = source.take(at), self.codec(source.undo, source.prompt)
        name, within = source.model_of(facets["model"])
        output = self._output_of(source.inputs.get(name))
        if output is None:
            return None
        folder = self.store.path(*output) / within
        if not (folder / "config.json").is_file():
            return None
        prompt_ids = taken.prompt_ids or codec.prompt_ids(self._problem_of(taken.problem))
        ids = codec.decode(taken.token_ids).ids
        rewinding = "immediate" if facets["mode"] == "guided" else source.rewinding  # a signal asks for one U at a time
        return Ask(output, folder, prompt_ids, ids, codec.rule, facets["mode"], rewinding)

    def _output_of(self, digest: str | None) -> tuple[int, str] | None:
        for round in self._rounds():
            for file in sorted(self.store.root.glob(f"{round}/*/manifest.json")):
                manifest = self.store.manifest(round, file.parent.name)
                if manifest and manifest.digest == digest:
                    return round, manifest.stage
        return None

    def siblings(self, rollout: Rollout, most: int = 12) -> list[int]:
        """Other rollouts of the same problem."""
        same = np.flatnonzero(self.table.problem == self.table.problem[rollout.number])
        return [int(number) for number in same if number != rollout.number][:most]

    def tree_lines(self) -> list[tuple[int, int]]:
        """(round, row) of all trees."""
        return [(round, at) for round, rows in self.trees.items() for at in range(len(rows))]

    def tree_line(self, round: int, at: int) -> TreeLine:
        row = self.trees[round][at]
        problem = self._problem_of(row["problem"])
        return TreeLine(round, at, problem, row["solved"], row["simulations"], row["tokens"], len(row["parent"]))

    def tree(self, round: int, at: int) -> Drawn:
        """One tree with text for ids. What the search backed up stands beside the trees, by what survives at each state."""
        manifest, row = self._manifests[round, "search"], self.trees[round][at]
        settings: Any = manifest.settings
        codec = self.codec(UndoSettings(**settings["undo"]), str(settings["prompt"]))
        steps = read_rows(self.store.path(round, "search") / STEPS)
        mine = steps.select(np.flatnonzero(pc.equal(column(steps, "problem"), row["problem"]).to_numpy())) if len(steps) else steps
        backed = {tuple(step["ids"]): (step["q"], step["samples"]) for step in mine}
        ids = tuple(tuple(step) for step in row["ids"])
        given: dict[str, Any] = {name: row[name] for name in ("problem", "solved", "simulations", "tokens")}
        given |= {name: tuple(row[name]) for name in ("prompt_ids", "parent", "value", "visits", "prior", "right", "undone")}
        tree = Searched(ids=ids, q=given["value"], samples=(0,) * len(ids), **given)
        values = [backed.get(tree.surviving(node), (value, 0)) for node, value in enumerate(tree.value)]
        # Of the root nothing is written down: what it is worth is what lies below it.
        values[0] = (tree.value[0], sum(count for node, (_, count) in enumerate(values) if node and tree.parent[node] == 0))
        q, samples = (tuple(part) for part in zip(*values, strict=True))
        tree = replace(tree, q=q, samples=samples)
        return draw(self._problem_of(row["problem"]), tree, lambda ids: codec.decode(ids).text)


def _with_unknown(values: pa.ChunkedArray) -> pa.DictionaryArray:
    """Coded texts with one more behind them: number -1 is the last."""
    return pa.concat_arrays([values.combine_chunks(), pa.array([UNKNOWN], values.type)]).dictionary_encode()


def _facet(chunks: Sequence[pa.Array], first: Sequence[str]) -> Facet:
    """One coding for the parts of all sources; values that no row has are left out, `first` come first."""
    ordered = [coded(np.arange(len(first), dtype=np.int32), first)] if first else []
    whole = pa.chunked_array([*ordered, *(pa.concat_arrays([chunk]) for chunk in chunks)]).unify_dictionaries().combine_chunks()
    codes = whole.indices.to_numpy()[len(first) :].astype(np.int32)
    used = np.bincount(codes, minlength=len(whole.dictionary)) > 0
    values = tuple(str(value) for value, some in zip(whole.dictionary.to_pylist(), used, strict=True) if some)
    return Facet(values, (np.cumsum(used) - 1).astype(np.int32)[codes])


def _texts(written: Text) -> list[str]:
    return [written.text[start:end] for start, end in written.offsets]


def _fates(ids: Sequence[int], deleted_by: Sequence[int], rule: UndoRule) -> tuple[str, ...]:
    return tuple(
        "undo" if token == rule.undo_id else "deleted" if by >= 0 else "kept" for token, by in zip(ids, deleted_by, strict=True)
    )
