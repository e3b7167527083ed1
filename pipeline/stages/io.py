"""How stages read and write: rows as `datasets.Dataset` folders, token ids and text side by side, small JSON files."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, load_from_disk
from transformers import AutoConfig, AutoTokenizer

from pipeline.backtrack.cursor import Decoding, Mode, Signal
from pipeline.backtrack.embedding import undo_rule
from pipeline.config import DecodeSettings, UndoSettings
from pipeline.tasks.problem import Problem

T = TypeVar("T")


CHUNK = 1000
"""Rows in memory at a time."""
_SHARD = 500_000_000  # bytes of a dataset's file, about


def write_rows(rows: Iterable[Mapping[str, Any]], features: Features, folder: Path) -> None:
    """Save rows as a Dataset, some at a time. The same rows give the same bytes, so that equal content has an equal digest."""
    schema = features.arrow_schema
    write_tables((pa.Table.from_pylist(some, schema) for some in _chunks(rows)), features, folder)


def write_tables(tables: Iterable[pa.Table], features: Features, folder: Path) -> None:
    """The same for rows that are columns already. The same tables give the same bytes."""
    empty = Dataset.from_dict({name: [] for name in features}, features=features)
    empty._fingerprint = hashlib.sha256(str(features).encode()).hexdigest()[:16]  # the default one is random
    empty.save_to_disk(folder)
    parts = list[Path]()
    source = iter(tables)
    while (table := next(source, None)) is not None:
        parts.append(folder / f".{len(parts)}.part")
        _write_shard(itertools.chain([table], source), features, parts[-1])
    names = [f"data-{number:05}-of-{len(parts):05}.arrow" for number in range(len(parts))]
    for part, name in zip(parts, names, strict=True):
        part.rename(folder / name)
    state = json.loads((folder / "state.json").read_text())  # what `datasets` writes there, but for the files
    state["_data_files"] = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))


def _write_shard(tables: Iterator[pa.Table], features: Features, file: Path) -> None:
    """As many of the tables as a file shall hold."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as stream:
        while sink.tell() < _SHARD and (table := next(tables, None)) is not None:
            stream.write_table(table)


def _chunks(rows: Iterable[T]) -> Iterator[list[T]]:
    source = iter(rows)
    while some := list(itertools.islice(source, CHUNK)):
        yield some


def read_rows(folder: Path) -> Dataset:
    """A Dataset that `write_rows` has saved."""
    if not json.loads((folder / "state.json").read_text())["_data_files"]:  # load_from_disk cannot read one without rows
        features = DatasetInfo.from_directory(str(folder)).features
        return Dataset.from_dict({name: [] for name in features}, features=features)
    return load_from_disk(str(folder))


def with_rollouts(
    verdicts: Iterable[Mapping[str, Any]], rollouts: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Verdicts, each with its rollout. Both in the same order; rollouts that could not be judged have none.

    Raises:
        ValueError: a verdict whose rollout is not there.
    """
    rows = iter(rollouts)
    for verdict in verdicts:
        rollout = next((row for row in rows if row["id"] == verdict["id"]), None)
        if rollout is None:
            raise ValueError(f"a verdict on {verdict['id']}, which is not among the rollouts")
        yield verdict, rollout


class Problems(Sequence[Problem]):
    """Problems of a dataset, read when they are asked for: however many there are, they take no memory."""

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> Problem: ...
    @overload
    def __getitem__(self, at: slice) -> Problems: ...
    def __getitem__(self, at: int | slice) -> Problem | Problems:
        if isinstance(at, slice):
            return self.take(range(len(self))[at])
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return Problem(**self._rows[at % len(self)])

    def __iter__(self) -> Iterator[Problem]:
        for some in self._rows.iter(CHUNK):  # one by one costs a hundred times as much
            yield from _problems(some)

    def ids(self) -> Iterator[str]:
        for some in self._rows.select_columns(["id"]).iter(CHUNK):
            yield from some["id"]

    def read(self, places: Sequence[int]) -> list[Problem]:
        """Those at these places, in this order."""
        return list(_problems(self._rows[places]))

    def take(self, places: Sequence[int] | npt.NDArray[np.int64]) -> Problems:
        """The same, to be read later."""
        return Problems(self._rows.select(places))


def _problems(columns: Mapping[str, Sequence[Any]]) -> Iterator[Problem]:
    for values in zip(*(columns[field.name] for field in fields(Problem)), strict=True):
        yield Problem(*values)


def read_problems(folder: Path, split: str | None = None) -> Problems:
    """Problems of one split, or of all, in their stored order."""
    rows = read_rows(folder)
    if split is None:
        return Problems(rows)
    among = pc.equal(rows.data.column("split"), split).to_numpy()
    return Problems(rows).take(np.flatnonzero(among))


def write_json(value: Any, file: Path) -> None:
    """JSON has no NaN and no infinity: they become null, which readers show as missing."""
    file.write_text(json.dumps(_finite(value), indent=1, sort_keys=True, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Text:
    """Ids of a completion with their text and the characters of each token."""

    ids: tuple[int, ...]
    text: str
    offsets: tuple[tuple[int, int], ...]
    """[tokens] half-open character spans; a character made of several tokens belongs to the last of them."""

    def token_at(self, char: int) -> int:
        return token_at(self.offsets, char)


def token_at(offsets: Sequence[tuple[int, int]], char: int) -> int:
    """Index of the first token of a character, or of the token that spans it; the number of tokens behind the text's end."""
    return next((i for i, (start, end) in enumerate(offsets) if end > char or start >= char), len(offsets))


class Codec:
    """A model folder's tokenizer with the undo rule: text from ids, ids from text, prompts from questions."""

    def __init__(self, folder: Path, undo: UndoSettings, prompt: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._prompt = prompt
        self.rule = undo_rule(self.tokenizer, undo.token, undo.unit)
        self.stop_id: int = self.tokenizer.eos_token_id
        self.vocabulary = len(self.tokenizer)
        """Ids from this one on are spare rows of the embedding, if there are any: they mean nothing."""
        self._folder = folder

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        """Ids of the prompt; text that spells a special token is split like any other text."""
        return self.encode(self._prompt.format(question=problem.question))

    def prompts(self, problems: Iterable[Problem]) -> Iterator[tuple[Problem, tuple[int, ...]]]:
        """Problems with the ids of their prompts, as above, some at a time."""
        for some in _chunks(problems):
            texts = [self._prompt.format(question=problem.question) for problem in some]
            found = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
            yield from zip(some, map(tuple, found.input_ids), strict=True)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    def continued_ids(self, text: str) -> tuple[int, ...]:
        """Ids of text that stands behind a line break: some tokenizers put a space before whatever they are given."""
        lead, whole = self.encode("\n"), self.encode(f"\n{text}")
        return whole[len(lead) :] if whole[: len(lead)] == lead else self.encode(text)

    def solution_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a whole solution, the stop id included."""
        return (*self.encode(text), self.stop_id)

    def plain_ids(self) -> tuple[int, ...]:
        """Ids of all tokens but the special ones, of which U is one."""
        special = set(self.tokenizer.all_special_ids) | {self.rule.undo_id, self.stop_id}
        return tuple(token for token in range(len(self.tokenizer)) if token not in special)

    @cached_property
    def spare_ids(self) -> tuple[int, ...]:
        """Ids of the model that the tokenizer does not know. No engine should emit them."""
        rows = AutoConfig.from_pretrained(self._folder).get_text_config().vocab_size
        return tuple(range(self.vocabulary, rows))

    def decode(self, ids: Sequence[int]) -> Text:
        """Text of ids without the stop id and with undo tokens in their written form, and each token's characters."""
        ids = tuple(ids[:-1]) if ids and ids[-1] == self.stop_id else tuple(ids)
        pieces = [self._text([token]) for token in ids]
        text = "".join(pieces)
        if "\ufffd" in text or text != self._text(ids):
            # A character spans several tokens, or text depends on neighbours: decode every prefix.
            # Byte fallback decodes an unfinished character and all bytes before it as \ufffd: what was settled stays.
            prefixes = [""]
            for end in range(1, len(ids) + 1):
                prefixes.append(max(prefixes[-1], self._text(ids[:end]).rstrip("\ufffd"), key=len))
            pieces = [after[len(before) :] for before, after in itertools.pairwise(prefixes)]
            text = "".join(pieces)
        offsets, start = [], 0
        for piece in pieces:
            offsets.append((start, start + len(piece)))
            start += len(piece)
        return Text(ids, text, tuple(offsets))

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def decoding_of(
    codec: Codec, how: DecodeSettings, mode: Mode, temperature: float, top_p: float, max_tokens: int, **more: Any
) -> Decoding:
    """Decoding in a mode as the settings want it; `more` replaces some of them."""
    rest = how.model_dump(exclude={"signal"}) | {"signal": Signal(**how.signal.model_dump()), "vocabulary": codec.vocabulary} | more
    return Decoding(mode, temperature, top_p, max_tokens, codec.stop_id, codec.rule, **rest)
