"""`python -m pipeline.store`: what is listed, what counts as damaged or outdated, and that nothing else is removed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.store import RunLock, Store
from pipeline.store.__main__ import main


def write(store: Store, round: int, stage: str, text: str, **inputs: str) -> str:
    """Digest of a new output."""
    with store.write(round, stage, key=text, settings={}, inputs=inputs, seed=0) as draft:
        (draft.path / "a").write_text(text)
        draft.counts["rows"] = 1234
    manifest = store.manifest(round, stage)
    assert manifest
    return manifest.digest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """problems -> base -> rollouts, and sft from base."""
    store = Store(tmp_path / "run")
    problems = write(store, 0, "problems", "p")
    base = write(store, 0, "base", "b", problems=problems)
    write(store, 1, "rollouts", "r", model=base, problems=problems)
    write(store, 1, "sft", "s", base=base)
    (store.root / "logs").mkdir()
    (store.root / ".resume" / "1-grpo").mkdir(parents=True)
    return store


def everything(store: Store) -> list[str]:
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.name != ".lock")


def test_ls_shows_every_output(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (store.path(1, "sft") / "manifest.json").write_text("{}")
    assert main(["ls", str(store.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    places = [line.split()[:2] for line in lines[1:]]
    assert sorted(places) == [["0", "base"], ["0", "problems"], ["1", "rollouts"], ["1", "sft"]]
    said = {place[1]: line for place, line in zip(places, lines[1:], strict=True)}
    assert "1,234" in said["base"] and "missing or damaged" in said["sft"]


def test_verify_reads_every_file(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(store.root)]) == 0 and "4 outputs, 0 damaged" in capsys.readouterr().out
    (store.path(1, "sft") / "a").write_text("x")
    assert main(["verify", str(store.root)]) == 1
    assert "sft: a does not match its checksum" in capsys.readouterr().out


def test_gc_leaves_what_is_up_to_date(store: Store) -> None:
    before = everything(store)
    assert main(["gc", str(store.root)]) == 0
    assert everything(store) == before


def test_gc_removes_what_was_made_from_what_has_changed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """The base is made anew: rollouts and sft go; another problems would take the base with it, too."""
    problems = store.manifest(0, "problems")
    assert problems
    write(store, 0, "base", "other", problems=problems.digest)
    assert main(["ls", str(store.root)]) == 0 and capsys.readouterr().out.count("has changed") == 2
    before = everything(store)
    assert main(["gc", "--dry-run", str(store.root)]) == 0 and everything(store) == before
    assert main(["gc", str(store.root)]) == 0
    assert not store.path(1, "rollouts").exists() and not store.path(1, "sft").exists() and store.path(0, "base").exists()
    write(store, 1, "sft", "s", base=store.manifest(0, "base").digest)  # type: ignore[union-attr]
    write(store, 0, "problems", "others")
    assert main(["gc", str(store.root)]) == 0
    assert [folder.name for folder in (store.root / "0").iterdir()] == ["problems"]
    assert not any((store.root / "1").iterdir()) and (store.root / ".resume" / "1-grpo").is_dir()


def test_gc_removes_damaged_outputs_and_checkpoints_when_asked(store: Store) -> None:
    (store.path(1, "sft") / "manifest.json").unlink()
    assert main(["gc", "--checkpoints", str(store.root)]) == 0
    assert not store.path(1, "sft").exists() and not (store.root / ".resume").exists() and store.path(1, "rollouts").exists()


def test_gc_waits_for_nobody(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(store)
    with RunLock(store.root):
        assert main(["gc", "--checkpoints", str(store.root)]) == 1
    assert "is in use by" in capsys.readouterr().err and everything(store) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["ls", "nowhere"], "there is no folder nowhere"), (["ls", "."], ". is no run folder"), (["rm", "."], "invalid choice: 'rm'")],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-m", "pipeline.store", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
