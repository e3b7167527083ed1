"""What a stage keeps: whole lines come back, a torn one does not, and what is added behind it is read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.stages.kept import Kept, KeptRows, tuples


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


SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("text", pa.string())])


def columns(numbers: list[int]) -> dict[str, list[object]]:
    return {"ids": [list(range(number % 4)) for number in numbers], "text": [f"row {number}" for number in numbers]}


def rows_of(kept: KeptRows, size: int) -> list[dict[str, object]]:
    tables = list(kept.in_order(size))
    assert all(len(table) == size for table in tables[:-1])
    return [row for table in tables for row in table.to_pylist()]


def wanted(numbers: list[int]) -> list[dict[str, object]]:
    return [{"number": number, "ids": list(range(number % 4)), "text": f"row {number}"} for number in sorted(numbers)]


@given(st.permutations(range(30)), st.lists(st.integers(1, 7), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 5))
def test_rows_come_in_order_however_they_were_added(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], sizes: list[int], size: int, reopened: int
) -> None:
    file = tmp_path_factory.mktemp("rows") / "rows.arrow"
    added: list[int] = []
    kept = KeptRows(file, SCHEMA)
    for turn, count in enumerate(sizes):
        if turn == reopened:
            kept.__exit__(None, None, None)
            kept = KeptRows(file, SCHEMA)
        some, numbers = numbers[:count], numbers[count:]
        kept.add(some, columns(some))
        added += some
    with kept:
        assert kept.numbers.tolist() == added and rows_of(kept, size) == wanted(added)


def test_a_torn_part_is_not_read_wherever_it_is_torn(tmp_path: Path) -> None:
    file = tmp_path / "rows.arrow"
    ends = []
    with KeptRows(file, SCHEMA) as kept:
        for some in ([5, 1], [4], [0]):
            kept.add(some, columns(some))
            ends.append(file.stat().st_size)
    content = file.read_bytes()
    for end in range(0, len(content), 3):
        file.write_bytes(content[:end])
        whole = [5, 1, 4, 0][: [0, 2, 3, 4][sum(end >= one for one in ends)]]
        with KeptRows(file, SCHEMA) as kept:
            assert kept.numbers.tolist() == whole
            kept.add([9], columns([9]))
            assert rows_of(kept, 2) == wanted([*whole, 9])
        with KeptRows(file, SCHEMA) as kept:
            assert kept.numbers.tolist() == [*whole, 9]


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from pipeline.stages.kept import KeptRows; import pyarrow as pa\n"
        f"kept = KeptRows(Path({str(tmp_path)!r}) / 'rows.arrow', pa.schema([('text', pa.string())]))\n"
        "kept.add([3], {'text': ['row 3']}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -signal.SIGKILL
    with KeptRows(tmp_path / "rows.arrow", pa.schema([("text", pa.string())])) as kept:
        assert rows_of(kept, 5) == [{"number": 3, "text": "row 3"}]
