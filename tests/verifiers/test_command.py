"""`python -m verifiers judge`: every row gets its line, nothing half-written is left, and memory does not grow."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from verifiers import batch
from verifiers.__main__ import main

REPOSITORY = Path(__file__).resolve().parents[2]
QUESTION = "Janet has 16 eggs, eats 3, bakes with 4 and sells the rest for $2 each. What does she make?"
GOLD = "16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18"
FIELDS = {"question": QUESTION, "gold_solution": GOLD, "gold_answer": "18"}
RIGHT = {**FIELDS, "id": "right", "solution": GOLD}
WRONG = {**FIELDS, "id": "wrong", "solution": "16 - 3 - 4 = 9 eggs.\n9 * 2 = 17 dollars.\n#### 17"}
KEYS = ["id", "answer", "correct", "first_error_step", "span", "method", "evidence"]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "verifiers", "judge", *map(str, arguments)]


def judged(folder: Path, rows: list[Any], workers: int = 1) -> list[dict[str, Any]]:
    """The verdicts of some rows; a row that is a text is a line as it stands."""
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    source.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")
    if workers == 1:
        assert main(["judge", str(source), str(target)]) == 0
    else:
        subprocess.run(command(source, target, "--workers", str(workers)), cwd=REPOSITORY, check=True, capture_output=True)
    assert sorted(folder.iterdir()) == [source, target]
    return [json.loads(line) for line in target.read_text("ascii").splitlines()]


def test_a_row_says_what_is_wrong_and_where(tmp_path: Path) -> None:
    right, wrong = judged(tmp_path, [RIGHT, WRONG])
    assert list(right) == list(wrong) == KEYS
    assert list(right.values()) == ["right", "18", True, -1, None, "symbolic", None]
    assert list(wrong.values()) == ["wrong", "17", False, 1, [29, 31], "symbolic", "9 * 2 is 18, not 17"]


def test_order_and_bytes_do_not_depend_on_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds: list[Any] = [RIGHT, WRONG, "{", {**RIGHT, "gold_answer": "none"}, {**WRONG, "id": 7}]
    rows = [row if isinstance(row, str) else {**row, "id": f"{at}-{row['id']}"} for at, row in enumerate(kinds * 60)]
    alone = judged(tmp_path, rows)
    written = (tmp_path / "out.jsonl").read_bytes()
    assert judged(tmp_path, rows, workers=3) == alone
    assert (tmp_path / "out.jsonl").read_bytes() == written
    assert [row.get("line", at + 1) for at, row in enumerate(alone)] == list(range(1, 301))
    assert [row["id"] for row in alone] == [None if isinstance(row, str) else row["id"] for row in rows]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "300 rows: 60 right, 120 wrong, 120 with a located error, 120 errors"
    assert lines[-2].startswith("[judge] 300 rows") and " rows/" in lines[-2]


BAD: list[tuple[Any, str | int | None, str]] = [
    ("no json", None, "not JSON"), ('{"id": "a"', None, "not JSON"), ("\ufeff\ufeff{}", None, "not JSON"),
    ("[" * 100_000, None, "nested too deep"), ('{"id": ' + "1" * 5000 + "}", None, "not JSON"), ("[]", None, "not an object"),
    ("null", None, "not an object"), ("{}", None, "id is missing"),
    ({**RIGHT, "id": None}, None, "id is not a string or an integer"), ({**RIGHT, "id": True}, None, "id is not"),
    ({**RIGHT, "id": 1.5}, None, "id is not"), ({"id": "a"}, "a", "solution or steps is missing"),
    ({**FIELDS, "id": 3}, 3, "solution or steps is missing"), ({**RIGHT, "steps": []}, "right", "both there"),
    ({**FIELDS, "id": "a", "steps": "text"}, "a", "steps is not a list of strings"),
    ({**FIELDS, "id": "a", "steps": ["text", 1]}, "a", "steps is not a list of strings"),
    ({**RIGHT, "solution": 18}, "right", "solution is a number, not a string"),
    ({**RIGHT, "question": ["text"]}, "right", "question is a list, not a string"),
    ({**RIGHT, "question": None}, "right", "question is null, not a string"),
    ({**RIGHT, "gold_solution": {}}, "right", "gold_solution is an object, not a string"),
    ({**RIGHT, "gold_answer": 18}, "right", "gold_answer is a number, not a string"),
    ({key: RIGHT[key] for key in RIGHT if key != "gold_answer"}, "right", "gold_answer is missing"),
    ({**RIGHT, "gold_answer": "eighteen"}, "right", "the gold answer holds no number: 'eighteen'"),
    ({**RIGHT, "gold_answer": ""}, "right", "no number"), ({**RIGHT, "gold_answer": "12:30"}, "right", "no number"),
    (json.dumps({**RIGHT, "note": "x" * batch.MAX_LINE}), None, "longer than 2,000,000 bytes"),
]  # fmt: skip


def test_a_bad_row_stands_in_its_place(tmp_path: Path) -> None:
    rows = [row for bad, _, _ in BAD for row in (bad, RIGHT)]
    found = judged(tmp_path, rows)
    assert len(found) == len(rows)
    assert all(row["correct"] for row in found[1::2])
    for at, ((_, id, words), row) in enumerate(zip(BAD, found[::2], strict=True)):
        assert list(row) == ["id", "line", "error"]
        assert (row["id"], row["line"]) == (id, 2 * at + 1)
        assert words in row["error"] and len(row["error"]) < 200


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    whole = json.dumps(RIGHT).encode()
    source.write_bytes(b"\xef\xbb\xbf" + whole + b"\r\n\r\n  \n\xff\xfe\n" + whole)
    assert main(["judge", str(source), str(target)]) == 0
    first, bad, last = map(json.loads, target.read_text().splitlines())
    assert first["correct"] and last["correct"]
    assert bad["line"] == 4 and bad["error"].startswith("not JSON")


def test_an_empty_file_gives_an_empty_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judged(tmp_path, []) == []
    assert capsys.readouterr().err.splitlines()[-1].startswith("0 rows: ")


def test_ids_and_answers_of_any_characters(tmp_path: Path) -> None:
    ids = ["größe", "🥚", "\ud800", "\x00", "", 10**30, -1]
    found = judged(tmp_path, [{**RIGHT, "id": id, "solution": "#### 18 🥚 \ud800"} for id in ids])
    assert [row["id"] for row in found] == ids
    assert {row["correct"] for row in found} == {True}


@pytest.mark.parametrize(
    ("steps", "index", "words"),
    [
        (["16 - 3 - 4 = 9", "9 * 2 = 17", "#### 17"], 1, "17"),
        (["First she eats.\n16 - 3 - 4 = 9", "", "She sells.\n\n9 * 2 = 17\n", "#### 17"], 2, "17"),
        (["", "", "16 - 3 - 4 = 8\n", "#### 16"], 2, "8"),
        (["One. 16 - 3 - 4 = 9. Two. 9 * 2 = 17. #### 17"], 0, "17"),
        (["16 - 3 - 4 = 9", "9 * 2 = 18", "#### 81"], 2, "81"),
        (["No idea.", "None at all"], 1, "None at all"),
        ([GOLD], -1, ""),
        ([], -1, ""),
        (["", "\n"], -1, ""),
    ],
)
def test_steps_keep_their_numbers(tmp_path: Path, steps: list[str], index: int, words: str) -> None:
    (row,) = judged(tmp_path, [{**FIELDS, "id": "a", "steps": steps, "solution": None}])
    assert row["first_error_step"] == index
    if index < 0:
        assert row["span"] is None and row["evidence"] is None
    else:
        start, end = row["span"]
        assert "\n".join(steps)[start:end] == words
        assert len("\n".join([*steps[:index], ""])) <= start < end <= len("\n".join(steps[: index + 1]))


def test_a_solution_is_cut_into_steps(tmp_path: Path) -> None:
    (row,) = judged(tmp_path, [{**WRONG, "solution": "16 - 3 - 4 = 9 are left. So 9 * 2 = 17 is made. #### 17"}])
    assert row["first_error_step"] == 1


@pytest.mark.parametrize("absent", [{}, {"gold_solution": None}, {"gold_solution": ""}])
def test_without_a_gold_solution(tmp_path: Path, absent: dict[str, Any]) -> None:
    fields = {"question": QUESTION, "gold_answer": "18", **absent}
    texts = [
        GOLD,
        "16 - 3 - 4 = 9 eggs.\n9 * 2 = 17 dollars.\n#### 17",
        "She sells 12 eggs.\n#### 24",
        "16 - 3 = 13\n13 * 2 = 26\n#### 26",
    ]
    rows = judged(tmp_path, [{**fields, "id": at, "solution": text} for at, text in enumerate(texts)])
    assert [(row["correct"], row["first_error_step"]) for row in rows] == [(True, -1), (False, 1), (False, 0), (False, 2)]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "COMMAND"),
        (["grade", "in", "out"], 2, "grade"),
        (["judge"], 2, "IN, OUT"),
        (["judge", "in"], 2, "OUT"),
        (["judge", "absent", "out"], 2, "absent does not exist"),
        (["judge", "in", "in"], 2, "in is the file that is read"),
        (["judge", "in", "link"], 2, "link is the file that is read"),
        (["judge", "old.partial", "old"], 2, "old.partial is the file that is read"),
        (["judge", "in", "folder"], 2, "folder is no ordinary file"),
        (["judge", "in", os.devnull], 2, "is no ordinary file"),
        (["judge", "in", "out", "--method", "model"], 2, "model"),
        (["judge", "in", "out", "--workers", "0"], 2, "0 is not a whole number above 0"),
        (["judge", "in", "out", "--workers", "many"], 2, "many is not a whole number above 0"),
        (["judge", "in", "out", "more"], 2, "more"),
        (["judge", "folder", "out"], 1, "folder: Is a directory"),
        (["judge", "in", "absent/out"], 1, "absent/out.partial: No such file or directory"),
    ],
)
def test_wrong_use_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in", "old.partial"):
        Path(name).write_text(json.dumps(RIGHT))
    Path("link").symlink_to("in")
    Path("folder").mkdir()
    before = {file: file.is_file() and file.read_bytes() for file in tmp_path.iterdir()}
    try:
        ended = main(arguments)
    except SystemExit as exit:
        assert isinstance(exit.code, int)
        ended = exit.code
    assert ended == code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[judge]")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert {file: file.is_file() and file.read_bytes() for file in tmp_path.iterdir()} == before


class Endless:
    """The command, at work on a file that does not end; has written some verdicts when `started` returns."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.source, self.target = folder / "in", folder / "out"
        self.partial = folder / "out.partial"
        os.mkfifo(self.source)
        self.pipe = os.open(self.source, os.O_RDWR)
        self.process = subprocess.Popen(
            command(self.source, self.target, "--workers", str(workers)),
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )

    def started(self) -> None:
        row = json.dumps({**RIGHT, "solution": "#### 18"}).encode() + b"\n"
        while not (self.partial.exists() and self.partial.stat().st_size):
            assert self.process.poll() is None, self.process.communicate()
            os.write(self.pipe, row * 8)

    def children(self) -> list[int]:
        return [int(id) for id in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]

    def ended(self) -> tuple[int, list[str]]:
        _, errors = self.process.communicate(timeout=120)
        os.close(self.pipe)
        return self.process.returncode, [line for line in errors.splitlines() if not line.startswith("[judge]")]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("sent", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_stopped_run_leaves_what_was_there(tmp_path: Path, workers: int, sent: signal.Signals, code: int, word: str) -> None:
    run = Endless(tmp_path, workers)
    if workers == 1:
        run.target.write_text("old")
    run.started()
    run.process.send_signal(sent)
    assert run.ended() == (code, [f"error: {word}; {run.target} is as it was before"])
    assert not run.partial.exists()
    assert run.target.exists() == (workers == 1)
    assert workers > 1 or run.target.read_text() == "old"


def running(process: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_killed_run(tmp_path: Path) -> None:
    run = Endless(tmp_path, 2)
    run.started()
    children = run.children()
    assert len(children) >= 2
    run.process.kill()
    run.ended()
    assert not run.target.exists()
    for _ in range(300):
        if not any(map(running, children)):
            break
        time.sleep(0.1)
    assert not any(map(running, children))


KILLS_A_WORKER = """
import multiprocessing, os, signal, sys, threading, time
from verifiers.__main__ import main

def kill():
    while len(children := multiprocessing.active_children()) < 2:
        time.sleep(0.001)
    time.sleep(0.1)  # Python 3.11's pool can lose a death that comes while it still starts a process
    os.kill(children[0].pid, signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
sys.exit(main(sys.argv[1:]))
"""


def test_a_dead_worker_is_one_line(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text(f"{json.dumps(RIGHT)}\n" * 2000)
    call = [sys.executable, "-c", KILLS_A_WORKER, "judge", str(source), str(target), "--workers", "2"]
    done = subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[judge]")]
    assert done.returncode == 1
    assert len(lines) == 1 and lines[0].startswith("error: a worker process died after ")
    assert list(tmp_path.iterdir()) == [source]


def test_a_long_line_is_read_past(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_LINE", 10)
    text = b"short\n" + b"x" * 10 + b"\n" + b"x" * 11 + b"\n" + b"x" * 35 + b"\n\n" + b"x" * 20 + b"\nlast\n" + b"x" * 11
    lines = list(batch.numbered(io.BytesIO(text)))
    assert lines == [(1, b"short\n"), (2, b"x" * 10 + b"\n"), (3, None), (4, None), (6, None), (7, b"last\n"), (8, None)]


def test_chunks_are_bounded_and_whole() -> None:
    lines: list[batch.Line] = [(at, b"x" * (at % 7 * 40_000)) for at in range(1, 500)]
    groups = list(batch.chunks(lines))
    assert [line for group in groups for line in group] == lines
    for group in groups:
        sizes = [len(text or b"") for _, text in group]
        assert 0 < len(group) <= batch.CHUNK_ROWS and sum(sizes[:-1]) < batch.CHUNK_BYTES


PEAK = """
import sys
from verifiers.__main__ import main

assert main(sys.argv[1:]) == 0
# not the resource module: its peak begins with that of the process that started this one
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, workers: int) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    row = json.dumps({**FIELDS, "id": "a" * 500, "solution": "#### 18", "note": "x" * 1000})
    peaks = []
    for rows in (2_000, 20_000):
        source.write_text(f"{row}\n" * rows)
        call = [sys.executable, "-c", PEAK, "judge", str(source), str(target), "--workers", str(workers)]
        peaks.append(int(subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout))
        assert target.read_bytes().count(b"\n") == rows
    assert peaks[1] - peaks[0] < 8_000  # KiB; the rows alone are 36,000 more
