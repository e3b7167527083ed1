"""Two runs set against each other: figures counted by hand, runs that cannot be compared, a run at a URL."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline import compare
from pipeline.metrics import Evaluated
from pipeline.stages.evaluate import ROWS
from pipeline.stages.io import write_rows
from pipeline.stages.problems import FEATURES
from pipeline.store import Store
from pipeline.store.remote import Remote
from pipeline.store.url import UrlStore
from pipeline.tasks.problem import Problem
from tests.pipeline.stores import reader

ASKED: dict[str, Any] = {"key": "k", "settings": {}, "seed": 0}
_NUMBERS = itertools.count()


def problems_of(count: int, words: str = "How many") -> list[Problem]:
    return [Problem(f"made/test/{i}", "test", "boxes", i % 2 == 0, f"{words}, {i}?", "#### 1", "1") for i in range(count)]


def row(
    problem: Problem, correct: bool, first: bool = False, tokens: int = 10, mode: str = "rewind", model: str = "sft"
) -> Evaluated:
    place = (model, mode, problem.id, problem.split, problem.family, problem.hindsight)
    return Evaluated(*place, 0.0, correct, first, tokens, 0, 0, 0, "stop", (1,) * tokens, (1,) * 5)


def made(folder: Path, problems: Sequence[Problem], rows: Sequence[Evaluated], round: int = 1) -> Path:
    """A run that has evaluated this."""
    folder.mkdir(exist_ok=True)
    store = Store(folder)
    with store.write(0, "problems", **ASKED, inputs={}) as draft:
        write_rows([vars(one) for one in problems], FEATURES, draft.path)
    manifest = store.manifest(0, "problems")
    assert manifest
    with store.write(round, "evaluate", **ASKED, inputs={"problems": manifest.digest}) as draft:
        write_rows([asdict(one) for one in rows], ROWS, draft.path)
    return folder


def pair_of(tmp_path: Path) -> tuple[Path, Path]:
    """On 20 problems A is right on the first 8, B on 0 .. 1 and 6 .. 19: 12 gained, 4 lost; B spends 3 tokens more."""
    some = problems_of(20)
    a = made(tmp_path / "a", some, [row(one, i < 8, i < 4) for i, one in enumerate(some)])
    b_rows = [row(one, i < 2 or i >= 6, i < 4, 13) for i, one in enumerate(some)]
    alone = [row(one, True, mode="soft") for one in some]
    return a, made(tmp_path / "b", some, [*b_rows, *alone])


def test_differences_are_paired_by_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = map(str, pair_of(tmp_path))
    assert compare.main([a, b, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["a"] == {"run": a, "round": 1}
    all_ = next(one for one in found["pairs"] if (one["mode"], one["group"]) == ("rewind", "all"))
    assert (all_["n"], all_["before"], all_["after"], all_["gained"], all_["lost"]) == (20, 0.4, 0.8, 12, 4)
    assert all_["difference"] == pytest.approx(0.4) and all_["mcnemar_p"] == pytest.approx(2 * 2517 / 2**16)
    assert all_["tokens_after"] - all_["tokens_before"] == 3 and all_["tokens_ci95"] == [3, 3]
    kinds = [one["group"] for one in found["pairs"] if one["mode"] == "rewind"]
    assert kinds == ["all", "forward", "hindsight"]
    first = next(one for one in found["pairs"] if (one["mode"], one["group"]) == ("forbidden", "all"))
    assert (first["before"], first["difference"], first["mcnemar_p"], first["tokens_after"]) == (0.2, 0, 1, 5)
    assert not [one for one in found["pairs"] if one["mode"] == "soft"]
    assert compare.main([b, a]) == 0
    text = capsys.readouterr().out
    assert "-40.0" in text and f"only in {b}: sft soft at 0" in text and "the same 20 problems" in text


def test_few_problems_have_no_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = problems_of(4)
    a, b = (made(tmp_path / name, some, [row(one, right) for one in some]) for name, right in (("a", False), ("b", True)))
    assert compare.main([str(a), str(b)]) == 0
    assert "too few" in capsys.readouterr().out
    assert compare.main([str(a), str(b), "--json"]) == 0
    pair = json.loads(capsys.readouterr().out)["pairs"][0]
    assert pair["difference"] == 1 and pair["ci95"] is None and pair["tokens_ci95"] is None and pair["mcnemar_p"] == 0.125


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()  # what the saving of datasets has said
    assert compare.main([str(one) for one in arguments]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    return told


def test_other_test_sets_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same ids with other questions, and fewer of the same."""
    a, _ = pair_of(tmp_path)
    others = problems_of(20, "How much")
    other = made(tmp_path / "other", others, [row(one, True) for one in others])
    assert "different test sets: 0 problems are the same of 20 and 20" in failed(capsys, a, other)
    some = problems_of(20)
    fewer = made(tmp_path / "fewer", some, [row(one, True) for one in some[:15]])
    assert "15 problems are the same of 20 and 15" in failed(capsys, a, fewer)


def test_what_cannot_be_compared_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair_of(tmp_path)
    some = problems_of(20)
    strange = made(tmp_path / "strange", some, [row(one, True, model="dpo") for one in some])
    assert "no model, mode and temperature in common" in failed(capsys, a, strange)
    (tmp_path / "empty").mkdir()
    assert "empty has no evaluation: run" in failed(capsys, a, tmp_path / "empty")
    assert "no evaluation of round 2" in failed(capsys, a, b, "--round-b", 2)
    assert "nothing on the ood split" in failed(capsys, a, b, "--split", "ood")
    with Store(b).write(0, "problems", **ASKED, inputs={}) as draft:
        write_rows([vars(one) for one in problems_of(20, "New")], FEATURES, draft.path)
    assert "problems have changed since round 1 was evaluated" in failed(capsys, a, b)
    next((a / "1" / "evaluate").glob("*.arrow")).write_bytes(b"damaged")
    assert "does not match its checksum" in failed(capsys, a, strange)
    with pytest.raises(SystemExit) as ended:
        compare.main([str(a), str(tmp_path / "nowhere")])
    assert ended.value.code == 2 and "there is no folder" in capsys.readouterr().err


def test_a_run_at_a_url_is_read_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair_of(tmp_path)
    url, store = f"memory://compare/{next(_NUMBERS)}", Store(b)
    for place in store.places():
        manifest = store.manifest(*place)
        assert manifest
        UrlStore(Remote(url)).upload(store.path(*place), manifest, lambda: None)
    assert reader(url).places() == store.places()
    assert compare.main([str(a), url, "--json"]) == 0
    there = json.loads(capsys.readouterr().out)["pairs"]
    assert compare.main([str(a), str(b), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == there
    assert "has no evaluation" in failed(capsys, a, f"memory://compare/{next(_NUMBERS)}")
