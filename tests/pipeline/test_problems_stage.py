"""The stage problems: what it writes is what a list would have held, while it holds no list; and tasks that it refuses."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Settings
from pipeline.stages import problems
from pipeline.stages.io import CHUNK, read_problems, write_rows
from pipeline.stages.stage import Context, StageError
from pipeline.tasks import countdown, synthetic
from pipeline.tasks.problem import Problem
from pipeline.tasks.seen import Seen


class Terminal:
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.done = 0

    @contextmanager
    def stage(self, *_: Any) -> Iterator[Any]:
        yield SimpleNamespace(update=lambda done: setattr(self, "done", done))

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def run(out: Path, task: dict[str, Any]) -> Any:
    settings = Settings.model_validate({"task": task})
    context = SimpleNamespace(settings=settings, out=out, counts={}, terminal=Terminal())
    problems.run(cast(Context, context))
    return context


def made(out: Path, task: dict[str, Any]) -> tuple[list[Problem], Any]:
    context = run(out, task)
    return list(read_problems(out)), context


SYNTHETIC = {"name": "synthetic", "train": 1500, "dev": 40, "test": 40, "ood": 40}
COUNTDOWN = {"name": "countdown", "train": 40, "dev": 8, "test": 8, "ood": 8}


@pytest.mark.parametrize(("task", "load"), [(SYNTHETIC, synthetic.load), (COUNTDOWN, countdown.load)])
def test_it_writes_what_a_list_would_have_held(task: dict[str, Any], load: Any, tmp_path: Path) -> None:
    found, context = made(tmp_path / "out", task)
    whole = list(load(context.settings.task, context.settings.run.seed))
    assert found == whole
    sizes = {split: task[split] for split in ("train", "dev", "test", "ood")}
    assert context.counts == {"rows": len(whole), "skipped": 0, **sizes} and context.terminal.done == len(whole)
    write_rows([vars(problem) for problem in whole], problems.FEATURES, tmp_path / "listed")
    for file in (tmp_path / "listed").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def files(folder: Path, train: list[str], test: list[str], dev: int = 2) -> dict[str, Any]:
    for name, questions in (("train", train), ("test", test)):
        rows = (json.dumps({"question": one, "answer": f"1+1=2\n#### {at}"}) for at, one in enumerate(questions))
        (folder / f"{name}.jsonl").write_text("\n".join([*rows, "no row"]))
    names = {f"{name}_file": str(folder / f"{name}.jsonl") for name in ("train", "test")}
    return {"name": "gsm8k", "dev": dev, "on_bad_row": "skip", **names}


def test_files_are_read_as_a_stream(tmp_path: Path) -> None:
    found, context = made(tmp_path / "out", files(tmp_path, [*"abcdefgb", "x"], [*"xyx"], dev=3))
    assert {problem.question for problem in found[:7]} == set("abcdefg") and [one.question for one in found[7:]] == ["x", "y"]
    assert Counter(one.split for one in found) == {"train": 4, "dev": 3, "test": 2}
    assert context.counts == {"rows": 9, "skipped": 2, "train": 4, "dev": 3, "test": 2, "ood": 0}
    assert context.terminal.warnings == ["problems: 2 bad rows were skipped"]


def test_tasks_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageError, match=r"task\.train: no more than \d+ of 400 different problems"):
        made(tmp_path / "few", {**COUNTDOWN, "train": 400, "numbers": 3, "largest": 5, "largest_target": 10})
    own = [Problem(f"p/{at}", split, "f", False, f"{at}?", "#### 1", "1") for at, split in enumerate(("dev", "train", "test"))]
    loaded = iter([*own, Problem("p/3", "ood", "f", False, "1?", "#### 1", "1")])
    monkeypatch.setattr(synthetic, "load", lambda *_: loaded)
    with pytest.raises(StageError, match=r"the question of p/3 stands in the train split too: '1\?'"):
        made(tmp_path / "twice", SYNTHETIC)
    loaded = iter(own[:2])
    with pytest.raises(StageError, match=r"task: the test split is empty"):
        made(tmp_path / "none", SYNTHETIC)


class Question(str):
    """A text whose end is noticed."""

    alive = most = 0

    def __new__(cls, text: str) -> Question:
        made = super().__new__(cls, text)
        cls.alive += 1
        cls.most = max(cls.most, cls.alive)
        return made

    def __del__(self) -> None:
        Question.alive -= 1


def test_no_more_problems_are_in_memory_than_two_parts_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> Iterator[Problem]:
        for at in range(5 * CHUNK):
            yield Problem(f"p/{at}", ("train", "dev", "test")[at % 3], "f", False, Question(f"{at}?"), "#### 1", "1")

    monkeypatch.setattr(synthetic, "load", load)
    assert run(tmp_path / "out", SYNTHETIC).counts["rows"] == 5 * CHUNK
    assert CHUNK <= Question.most <= 2 * CHUNK + 2 and Question.alive == 0


@given(st.lists(st.text(max_size=3)))
def test_texts_that_were_seen_are_those_of_a_set(texts: list[str]) -> None:
    seen, known = Seen(), set[str]()
    for text in texts:
        assert (text in seen) == (text in known)
        assert seen.add(text) == (text not in known)
        known.add(text)
        assert len(seen) == len(known) and text in seen


def test_many_texts_that_were_seen_take_less_than_themselves() -> None:
    tracemalloc.start()
    seen = Seen()
    assert all(seen.add(f"{'long ' * 100}{number}") for number in range(4_000))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not any(seen.add(f"{'long ' * 100}{number}") for number in range(4_000)) and "\ud800" not in seen
    assert size < 150 * 4_000
