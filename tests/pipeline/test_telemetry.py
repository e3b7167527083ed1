"""What a person sees: plain lines with an injected clock, a live line on a pseudo-terminal, quiet libraries."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.telemetry import StageLine, Terminal

REPOSITORY = Path(__file__).resolve().parents[2]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """A terminal whose streams and clock belong to the test."""

    def __init__(self, log_file: Path | None = None) -> None:
        self.out, self.err, self.clock = io.StringIO(), io.StringIO(), Clock()
        self.terminal = Terminal(log_file, out=self.out, err=self.err, clock=self.clock)

    def lines(self) -> list[str]:
        return self.out.getvalue().splitlines()


class TestPlainLines:
    def test_rate_time_left_and_note(self) -> None:
        screen = Screen()
        with screen.terminal.stage("rollouts", 8000) as progress:
            screen.clock.now += 6
            progress.update(2400, "accuracy .61")
            screen.clock.now += 14
            progress.update(8000)
        assert screen.lines() == [
            "[rollouts] started, 8000 rows",
            "[rollouts] 2400/8000 rows  400 rows/s  left 0:14  accuracy .61",
            "[rollouts] 8000/8000 rows  400 rows/s  left 0:00  accuracy .61",
            "[rollouts] 8000/8000 rows  400 rows/s  took 0:20  accuracy .61",
        ]

    def test_at_most_one_in_five_seconds_and_always_one_at_the_end(self) -> None:
        screen = Screen()
        with screen.terminal.stage("sft", 1000, unit="steps") as progress:
            for _ in range(1000):
                screen.clock.now += 0.0625
                progress.advance()
        lines = screen.lines()
        assert len(lines) == 1 + int(1000 * 0.0625 / 5) + 1
        assert lines[-1] == "[sft] 1000/1000 steps  16 steps/s  took 1:02"

    def test_stage_without_updates_still_has_its_lines(self) -> None:
        screen = Screen()
        with screen.terminal.stage("base", None):
            screen.clock.now += 3725
        assert screen.lines() == ["[base] started", "[base] 0 rows  took 1:02:05"]

    def test_no_time_passing_is_no_division_by_zero(self) -> None:
        screen = Screen()
        with screen.terminal.stage("base", 2) as progress:
            progress.advance(2)
        assert screen.lines()[-1] == "[base] 2/2 rows  took 0:00"

    def test_slow_work_is_told_in_minutes(self) -> None:
        screen = Screen()
        with screen.terminal.stage("search", 10, unit="trees") as progress:
            screen.clock.now += 40
            progress.advance()
        assert screen.lines()[1] == "[search] 1/10 trees  1.5 trees/min  left 6:00"

    def test_slow_start_does_not_spoil_the_time_left(self) -> None:
        screen = Screen()
        with screen.terminal.stage("rollouts", 1000) as progress:
            for _ in range(10):  # 100 s of start-up
                screen.clock.now += 10
                progress.update(0)
            for done in range(100, 600, 100):
                screen.clock.now += 10
                progress.update(done)
        assert screen.lines()[-2] == "[rollouts] 500/1000 rows  10 rows/s  left 0:50"

    def test_more_than_the_total_and_going_back(self) -> None:
        screen = Screen()
        with screen.terminal.stage("judge", 10) as progress:
            screen.clock.now += 6
            progress.update(12)
            screen.clock.now += 6
            progress.update(0)
        assert screen.lines()[1:3] == ["[judge] 12/10 rows  2.0 rows/s  left 0:00", "[judge] 0/10 rows"]

    def test_failing_stage_says_how_far_it_came(self) -> None:
        screen = Screen()

        def failing() -> None:
            with screen.terminal.stage("rollouts", 100) as progress:
                screen.clock.now += 4
                progress.update(40)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            failing()
        assert screen.lines()[-1] == "[rollouts] 40/100 rows  10 rows/s  stopped after 0:04"

    def test_note_stays_on_its_line(self) -> None:
        screen = Screen()
        with screen.terminal.stage("x", 1) as progress:
            progress.advance(note="two\nlines [red]")
        assert screen.lines()[-1] == "[x] 1/1 rows  took 0:00  two lines [red]"


class TestMessages:
    def test_go_to_their_streams_and_to_the_log(self, tmp_path: Path) -> None:
        log = tmp_path / "new" / "run.log"
        screen = Screen(log)
        screen.terminal.info("model [bold]ready")
        screen.terminal.warn("only 3 traces")
        screen.terminal.error("no disk")
        with screen.terminal.stage("base", 1):
            pass
        assert screen.lines()[0] == "model [bold]ready"
        assert screen.err.getvalue() == "warning: only 3 traces\nerror: no disk\n"
        shown = ["model [bold]ready", "warning: only 3 traces", "error: no disk", *screen.lines()[1:]]
        assert [line.split(" ", 2)[2] for line in log.read_text().splitlines()] == shown

    def test_default_streams_are_those_of_the_moment(self, capsys: pytest.CaptureFixture[str]) -> None:
        terminal = Terminal(None)
        terminal.info("a")
        terminal.warn("b")
        assert capsys.readouterr() == ("a\n", "warning: b\n")

    def test_text_that_the_stream_cannot_encode(self, tmp_path: Path) -> None:
        raw = io.BytesIO()
        terminal = Terminal(tmp_path / "log", out=io.TextIOWrapper(raw, encoding="ascii"))
        terminal.info("caf\xe9 \udc80")
        assert raw.getvalue() == b"caf\\xe9 \\udc80\n"

    def test_summary(self) -> None:
        screen = Screen()
        screen.terminal.summary(
            [
                StageLine(0, "problems", 3000, 0.4, "reused"),
                StageLine(12, "sft", None, 3725.2, "built"),
                StageLine(12, "prm", None, 0, "skipped"),
            ]
        )
        assert screen.lines() == [
            "round  stage     rows     time  state",
            "    0  problems  3000     0:00  reused",
            "   12  sft          -  1:02:05  built",
            "   12  prm          -     0:00  skipped",
        ]


class PseudoTerminal:
    """A terminal of our own; `out` is what programs write to."""

    def __init__(self) -> None:
        self._ours, theirs = os.openpty()
        self.out = open(theirs, "w", encoding="utf-8")  # noqa: SIM115
        self._chunks: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        # All the time, because a terminal that nobody reads blocks its writers.
        while True:
            try:
                self._chunks.append(os.read(self._ours, 1 << 16))
            except OSError:  # how Linux says that the other side was closed
                return

    def shown(self) -> str:
        """All that was written; closes the terminal."""
        self.out.close()
        self._reader.join()
        return b"".join(self._chunks).decode()


@pytest.fixture
def tty(monkeypatch: pytest.MonkeyPatch) -> Iterator[PseudoTerminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = PseudoTerminal()
    yield terminal
    terminal.shown()
    os.close(terminal._ours)


class TestOnATerminal:
    def test_live_line_messages_above_it_and_plain_lines_in_the_log(self, tty: PseudoTerminal, tmp_path: Path) -> None:
        clock, err = Clock(), io.StringIO()
        terminal = Terminal(tmp_path / "log", out=tty.out, err=err, clock=clock)
        with terminal.stage("rollouts", 8000) as progress:
            clock.now += 20
            progress.update(2000, "accuracy [.61]")
            terminal.info("halfway [soon]")
            terminal.warn("into a file")
        terminal.info("after")
        shown = tty.shown()
        assert "rollouts" in shown
        assert "2000/8000 rows  100 rows/s  took 0:20  accuracy [.61]" in shown
        assert "halfway [soon]" in shown
        assert shown.rstrip().endswith("after")
        assert "warning" not in shown and err.getvalue() == "warning: into a file\n"
        log = (tmp_path / "log").read_text()
        assert "[rollouts] 2000/8000 rows  100 rows/s  left 1:00  accuracy [.61]\n" in log
        assert "\x1b" not in log

    def test_dumb_terminal_gets_plain_lines(self, tty: PseudoTerminal, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "dumb")
        with Terminal(None, out=tty.out, clock=Clock()).stage("base", None):
            pass
        assert tty.shown().splitlines() == ["[base] started", "[base] 0 rows  took 0:00"]

    def test_exception_takes_the_live_line_down(self, tty: PseudoTerminal) -> None:
        terminal = Terminal(None, out=tty.out, clock=Clock())

        def failing() -> None:
            with terminal.stage("base", None):
                raise ValueError("x")

        stdout, stderr = sys.stdout, sys.stderr
        with pytest.raises(ValueError, match="x"):
            failing()
        assert (sys.stdout, sys.stderr) == (stdout, stderr)
        with terminal.stage("next", 1):
            pass
        assert "stopped after" in tty.shown()


LIBRARIES = """
import logging, os, sys, warnings
from pathlib import Path
from pipeline.telemetry import quiet_third_parties, redirect_process_output
logging.basicConfig()
early = logging.getLogger("early.library")
early.addHandler(logging.StreamHandler())
early.propagate = False
class Special(logging.Logger): pass
special = Special("special")
logging.root.manager.loggerDict["special"] = special
special.addHandler(logging.StreamHandler())
special.parent = logging.root

def speak():
    late = logging.getLogger("late.library")
    if not late.handlers:
        late.addHandler(logging.StreamHandler())
        late.propagate = False
    for logger in (early, late, special, logging.getLogger("retract.runner")):
        logger.debug("%s debug", logger.name)
        logger.info("%s info", logger.name)
        logger.warning("%s warning", logger.name)
        logger.error("%s error", logger.name)
    warnings.warn("deprecated thing")
    try:
        1 / 0
    except ZeroDivisionError:
        early.exception("broke")
"""


def speak(code: str, *arguments: object, **environment: str) -> tuple[str, list[str]]:
    kept = {name: value for name, value in os.environ.items() if "PROGRESS_BARS" not in name}
    done = subprocess.run(
        [sys.executable, "-c", LIBRARIES + code, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**kept, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, done.stderr.splitlines()


def expected_on_stderr(log: Path) -> list[str]:
    return [
        "error: early.library: early.library error",
        "error: late.library: late.library error",
        "error: special: special error",
        "warning: retract.runner warning",
        "error: retract.runner error",
        f"error: early.library: broke (ZeroDivisionError: division by zero; traceback in {log})",
    ]


def assert_complete(log: str) -> None:
    for name in ("early.library", "late.library", "special", "retract.runner"):
        for level in ("info", "warning", "error"):
            assert log.count(f"{name}: {name} {level}\n") == 1
    assert "debug" not in log
    assert log.count("UserWarning: deprecated thing") == 1
    assert log.count("Traceback (most recent call last)") == 1


class TestQuietThirdParties:
    def test_only_what_concerns_the_user_reaches_stderr(self, tmp_path: Path) -> None:
        log = tmp_path / "new" / "run.log"
        out, err = speak("quiet_third_parties(Path(sys.argv[1])); speak()", log)
        assert out == ""
        assert err == expected_on_stderr(log)
        assert_complete(log.read_text())

    def test_calling_again_doubles_nothing(self, tmp_path: Path) -> None:
        log = tmp_path / "run.log"
        _, err = speak("for _ in range(3): quiet_third_parties(Path(sys.argv[1]))\nspeak()", log)
        assert err == expected_on_stderr(log)
        assert_complete(log.read_text())

    def test_progress_bars_are_off_unless_the_user_wants_them(self, tmp_path: Path) -> None:
        show = """quiet_third_parties(Path(sys.argv[1]))
print(os.environ["HF_HUB_DISABLE_PROGRESS_BARS"], os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"])"""
        assert speak(show, tmp_path / "log")[0] == "1 1\n"
        assert speak(show, tmp_path / "log", HF_HUB_DISABLE_PROGRESS_BARS="0")[0] == "0 1\n"


NOISE = """
def noise():
    print("print")
    print("to stderr", file=sys.stderr)
    os.write(1, b"C code\\n")
    os.write(2, b"C code's errors\\n")
    os.system("echo child")
    speak()
"""


class TestRedirectProcessOutput:
    @pytest.fixture
    def times(self) -> Callable[[int], str]:
        return lambda n: NOISE + f"print('before')\nfor _ in range({n}): redirect_process_output(Path(sys.argv[1]))\n"

    @pytest.mark.parametrize("calls", [1, 3])
    def test_noise_into_the_file_errors_to_the_stderr_of_birth(
        self, tmp_path: Path, times: Callable[[int], str], calls: int
    ) -> None:
        log = tmp_path / "new" / "worker.log"
        out, err = speak(times(calls) + "noise()", log)
        assert out == "before\n"
        assert err == expected_on_stderr(log)
        text = log.read_text()
        assert_complete(text)
        for line in ("print", "to stderr", "C code", "C code's errors", "child"):
            assert text.splitlines().count(line) == 1

    def test_two_processes_append_and_a_second_call_changes_the_file(self, tmp_path: Path, times: Callable[[int], str]) -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        first.write_text("what was there\n")
        move = "print('one'); redirect_process_output(Path(sys.argv[2])); print('two'); noise()"
        _, err = speak(times(1) + move, first, second)
        assert err == expected_on_stderr(second)
        assert first.read_text() == "what was there\none\n"
        assert second.read_text().startswith("two\n")
        assert_complete(second.read_text())
