"""Rows on their way to disk and back, some at a time: what comes back is what a list would have held."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import UndoSettings
from pipeline.stages import lookup
from pipeline.stages.io import CHUNK, Codec, Problems, read_problems, read_rows, write_rows
from pipeline.stages.rollouts import FEATURES
from tests.pipeline.saved import PROBLEMS, save_problems_and_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("io")
    return save_problems_and_models({name: root / name for name in ("problems", "model")})


def row(number: int) -> dict[str, Any]:
    ids = [number % 7] * (number % 5)
    some = {"prompt_ids": ids, "token_ids": [*ids, 1], "logprobs": [-0.5] * len(ids), "finish": "stop", "hot": number % 2 == 0}
    return {"id": f"p#{number}", "problem": "p", "version": "v", **some}


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    def source() -> Iterator[dict[str, Any]]:
        yield from map(row, range(2 * CHUNK + 500))

    for name in ("one", "two"):
        write_rows(source(), FEATURES, tmp_path / name)
    files = sorted((tmp_path / "one").rglob("*"))
    assert [file.name for file in files] == ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"]
    assert all(file.read_bytes() == (tmp_path / "two" / file.name).read_bytes() for file in files)
    found, whole = read_rows(tmp_path / "one"), [row(number) for number in range(2 * CHUNK + 500)]
    assert found.features == FEATURES and list(found) == whole
    assert list(Dataset.from_dict({name: [one[name] for one in whole] for name in FEATURES}, features=FEATURES)) == list(found)


def test_no_rows_are_a_dataset_too(tmp_path: Path) -> None:
    write_rows(iter(()), FEATURES, tmp_path / "none")
    assert list(read_rows(tmp_path / "none")) == [] and read_rows(tmp_path / "none").features == FEATURES


def test_problems_are_a_sequence_that_is_read_when_it_is_asked(folders: dict[str, Path]) -> None:
    for split in (None, "train", "ood", "nowhere"):
        found, whole = read_problems(folders["problems"], split), [one for one in PROBLEMS if split in (None, one.split)]
        assert isinstance(found, Problems) and list(found) == whole and len(found) == len(whole)
        assert list(found[2:5]) == whole[2:5] and list(found[::-1]) == whole[::-1]
        if whole:
            drawn = random.Random(3).sample(range(len(whole)), 5)
            some = random.Random(3).sample(whole, 5)
            assert found.read(drawn) == list(found.take(drawn)) == random.Random(3).sample(found, 5) == some
            assert found[-1] == whole[-1] and whole[3] in found
        with pytest.raises(IndexError):
            found[len(whole)]


@settings(max_examples=30)
@given(names=st.lists(st.sampled_from([problem.id for problem in PROBLEMS]), max_size=12), hashes=st.integers(1, 9))
def test_problems_are_found_by_their_id(folders: dict[str, Path], names: list[str], hashes: int) -> None:
    """Whether or not several ids have the same hash."""
    with mock.patch.object(lookup, "_hashed", lambda name: len(name) * 7 % hashes):
        found = lookup.ById(read_problems(folders["problems"]))
        assert found.find(iter(names)) == {problem.id: problem for problem in PROBLEMS if problem.id in names}
        for unknown in ("", "synthetic/train/chain/99", names[0] + "0" if names else "x"):
            with pytest.raises(KeyError):
                found.find([*names, unknown])


def test_problems_of_another_split_are_not_found(folders: dict[str, Path]) -> None:
    found = lookup.ById(read_problems(folders["problems"], "train"))
    for problem in PROBLEMS:
        if problem.split == "train":
            assert found.find([problem.id]) == {problem.id: problem}
        else:
            with pytest.raises(KeyError):
                found.find([problem.id])


def test_prompts_are_those_of_each_problem(folders: dict[str, Path]) -> None:
    codec = Codec(folders["model"], UndoSettings(unit="token"), "Q: {question}<|BACKTRACK|>\n")
    assert list(codec.prompts(PROBLEMS)) == [(one, codec.prompt_ids(one)) for one in PROBLEMS]
