"""What a stage keeps: whole lines come back, a torn one does not, and what is added behind it is read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from pipeline.stages.kept import Kept, tuples


def test_what_was_added_comes_back(tmp_path: Path) -> None:
    with Kept(tmp_path / "resume" / "rows.jsonl") as kept:
        kept.add({"a": [(1, 2), "stop"], "b": 0.1})
        kept.add({"c": [[]]})
    with Kept(tmp_path / "resume" / "rows.jsonl") as kept:
        assert tuples(list(kept.found.values())) == (((1, 2), "stop"), 0.1, ((),)) and list(kept.found) == ["a", "b", "c"]


def test_a_torn_line_is_not_read_and_nothing_is_lost_behind_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with Kept(file) as kept:
        kept.add({"a": 1})
        kept.add({"b": 2})
    file.write_bytes(file.read_bytes()[:-3])
    with Kept(file) as kept:
        assert kept.found == {"a": 1}
        kept.add({"c": 3})
    with Kept(file) as kept:
        assert kept.found == {"a": 1, "c": 3}


def test_what_was_added_survives_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from pipeline.stages.kept import Kept\n"
        f"kept = Kept(Path({str(tmp_path)!r}) / 'rows.jsonl'); kept.add({{'a': 1}}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -signal.SIGKILL
    with Kept(tmp_path / "rows.jsonl") as kept:
        assert kept.found == {"a": 1}
