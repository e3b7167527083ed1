"""`make bench` on scripts made up for it: figures read, failures shown, hand-written text kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import run_all
from benchmarks.search import half_ratio

GOOD = """import sys, json
print("a table", sys.argv[1:])
figures = {"ratio": 1.23456, "n": 7, "gone": float("nan"), "curve": [1, 2]}
print(json.dumps({"benchmark": "good", "figures": figures, "goals": {"ratio": 1}, "ok": True}))
"""
MISSED = """print('{"benchmark": "missed", "figures": {"a|b": 1}, "goals": {"a|b": 2, "other": 3}, "ok": false}')
raise SystemExit(1)
"""
NEEDS = """import sys
print("set DATA to a folder", file=sys.stderr)
sys.exit(2)
"""
PAGE = f"# Benchmarks\n\nBy hand.\n\n{run_all.BEGIN}\nlast time\n{run_all.END}\n\nWhat it means.\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    broken = "print('x')\nraise OSError('no such <run>')"
    for name, code in {"good": GOOD, "missed": MISSED, "broken": broken, "needs": NEEDS}.items():
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path


def bench(folder: Path, *more: str) -> int:
    return run_all.main(["--folder", str(folder), "--page", str(folder / "page.md"), *more])


def test_every_script_is_run_and_the_rest_of_the_page_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(folder, "--quick") == 1  # one has failed
    page = (folder / "page.md").read_text()
    assert page.startswith("# Benchmarks\n\nBy hand.\n\n") and page.endswith(f"{run_all.END}\n\nWhat it means.\n")
    assert "last time" not in page and "run_all.py --quick`" in page and "cores" in page and "Python 3" in page
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert list(rows) == ["broken.py", "good.py", "missed.py", "needs.py"]
    assert "goals reached" in rows["good.py"]
    assert "ratio 1.235 (goal 1) | <details><summary>2</summary>n 7, gone –</details> |" in rows["good.py"]
    assert "**a goal was missed**" in rows["missed.py"] and "a\\|b 1 (goal 2), other – (goal 3)" in rows["missed.py"]
    assert "**failed**" in rows["broken.py"] and "exit code 1: OSError: no such &lt;run>" in rows["broken.py"]
    assert "not measured" in rows["needs.py"] and "set DATA to a folder" in rows["needs.py"]
    assert "good: goals reached" in capsys.readouterr().out
    assert bench(folder, "--quick") == 1 and (folder / "page.md").read_text().count(run_all.BEGIN) == 1


def test_names_leave_the_page_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(folder, "good", "needs") == 0  # what lacks something has not failed
    assert (folder / "page.md").read_text() == PAGE and "| `good.py` |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        bench(folder, "nothing")
    assert ended.value.code == 2 and "there is no benchmark nothing" in capsys.readouterr().err


def test_a_script_that_takes_too_long_is_ended_and_shown(folder: Path) -> None:
    (folder / "slow.py").write_text("import time\ntime.sleep(600)")
    one = run_all.measure(folder / "slow.py", [], 0.5)
    assert one.ok is None and one.why == "not done after 0.5 s"


def test_a_page_without_its_marks_is_refused_before_anything_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "page.md").write_text("# mine\n")
    with pytest.raises(SystemExit):
        bench(folder)
    assert "once each" in capsys.readouterr().err and (folder / "page.md").read_text() == "# mine\n"


def test_the_real_page_has_its_marks() -> None:
    assert run_all.written(run_all.PAGE.read_text(), ["x"]).count("x\n")


def test_a_search_that_samples_beat_has_missed_its_goal() -> None:
    """And where nobody solves half, or search alone does, there is no ratio."""
    assert half_ratio([100.0, 250.0, 194.0]) == 1.94
    assert half_ratio([None, 250.0, None]) == 0.0
    assert half_ratio([None, None, None]) is None is half_ratio([100.0, None, None])
