"""What a person sees: progress, messages, the table at the end, and silence from the libraries underneath.

Called by the runner (`Terminal`, `quiet_third_parties`) and by worker processes (`redirect_process_output`).
Knows terminals and log files; must not know what a stage does.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, TextIO

import rich.progress
from rich.console import Console
from rich.text import Text

LINE_EVERY = 5.0
"""Seconds between two plain progress lines."""
DRAW_EVERY = 0.1
"""Seconds between two redraws; stages may report every row."""
TELL_EVERY = 1.0
"""Seconds between two calls of a terminal's `on_progress`."""
RATE_WINDOW = 30.0
"""Seconds over which the rate is taken: a slow start must not spoil the time left for the whole stage."""
OWN_LOGGERS = "retract"

OnProgress = Callable[[str, str, int], None]
"""(stage, unit, how many more are finished)."""

PROGRESS_BARS_OFF = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers asks the hub's client
}


@dataclass(frozen=True)
class StageLine:
    """One row of the table that ends a run."""

    round: int
    stage: str
    rows: int | None
    seconds: float
    state: Literal["reused", "built", "skipped"]


class Progress:
    """How far one stage is. Made by `Terminal.stage`; to be called from one thread."""

    def __init__(
        self,
        stage: str,
        total: int | None,
        unit: str,
        clock: Callable[[], float],
        write_line: Callable[[str], None],
        draw: Callable[[int, str], None] | None,
        tell: OnProgress | None = None,
    ) -> None:
        self._stage, self._total, self._unit = stage, total, unit
        self._clock, self._write_line, self._draw, self._tell = clock, write_line, draw, tell
        self._done, self._note = 0, ""
        self._told = 0
        self._began = self._lined = self._drawn = self._told_at = clock()
        self._samples = deque([(self._began, 0)])  # (time, done), newest last
        write_line(f"[{stage}] started" if total is None else f"[{stage}] started, {total} {unit}")

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total are finished. An empty note leaves the last one standing."""
        now = self._clock()
        self._done, self._note = done, " ".join(note.split()) or self._note
        if self._draw is not None and now - self._drawn >= DRAW_EVERY:
            self._drawn = now
            self._draw(done, self._details(now))
        if now - self._lined >= LINE_EVERY:
            self._lined = now
            self._write_line(f"[{self._stage}] {self._details(now)}")
        if now - self._told_at >= TELL_EVERY:
            self._told_at = now
            self._tell_new()

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` more are finished."""
        self.update(self._done + n, note)

    def end(self, word: str) -> None:
        """The last line: overall rate and time, after `word` ("took", "stopped after")."""
        self._tell_new()
        seconds = self._clock() - self._began
        rate = self._done / seconds if seconds > 0 else 0.0
        details = "  ".join(filter(None, [self._count(), self._rate(rate), f"{word} {_duration(seconds)}", self._note]))
        if self._draw is not None:
            self._draw(self._done, details)
        self._write_line(f"[{self._stage}] {details}")

    def _tell_new(self) -> None:
        if self._tell is not None and self._done > self._told:
            self._tell(self._stage, self._unit, self._done - self._told)
            self._told = self._done

    def _details(self, now: float) -> str:
        if now - self._samples[-1][0] >= 0.5:
            self._samples.append((now, self._done))
            while len(self._samples) > 2 and now - self._samples[1][0] > RATE_WINDOW:
                self._samples.popleft()
        since, before = self._samples[0]
        rate = (self._done - before) / (now - since) if now > since else 0.0
        left = ""
        if self._total is not None and rate > 0:
            left = f"left {_duration(math.ceil(max(0, self._total - self._done) / rate))}"
        return "  ".join(filter(None, [self._count(), self._rate(rate), left, self._note]))

    def _count(self) -> str:
        of_total = "" if self._total is None else f"/{self._total}"
        return f"{self._done}{of_total} {self._unit}"

    def _rate(self, per_second: float) -> str:
        if per_second <= 0:
            return ""
        if per_second < 1:
            return f"{per_second * 60:.1f} {self._unit}/min"
        return f"{per_second:.{0 if per_second >= 10 else 1}f} {self._unit}/s"


class Terminal:
    """The user's screen, and the same lines with their time in `log_file`.

    Example:
        terminal = Terminal(Path("runs/tiny/run.log"))
        with terminal.stage("rollouts", total=8000) as progress:
            progress.update(1200)
    """

    def __init__(
        self,
        log_file: Path | None,
        *,
        out: TextIO | None = None,
        err: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log_file, self._out, self._err, self._clock = log_file, out, err, clock
        self._live: Console | None = None
        self.on_progress: OnProgress | None = None
        """Is told of what stages finish, at most once a second each."""
        if log_file is not None:
            log_file.parent.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str = "rows") -> Iterator[Progress]:
        """Show the progress of one stage: one live line on a terminal, elsewhere plain lines, the last one always."""
        out = self._stdout()
        if not (out.isatty() and os.environ.get("TERM", "dumb") != "dumb"):
            with _ended(Progress(name, total, unit, self._clock, self._line, None, self.on_progress)) as progress:
                yield progress
            return
        bar = rich.progress.Progress(
            rich.progress.SpinnerColumn("line"),
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TextColumn("{task.fields[details]}", markup=False),
            console=Console(file=out),
            redirect_stderr=self._stderr().isatty(),  # a stderr that goes to a file must still get there
        )
        task = bar.add_task(name, total=total, details="")
        try:
            drawing = _drawing(bar, task)
            with bar, _ended(Progress(name, total, unit, self._clock, self._log, drawing, self.on_progress)) as progress:
                self._live = bar.console
                yield progress
        finally:
            self._live = None

    def info(self, text: str) -> None:
        """One message on stdout."""
        self._say(self._stdout(), text)

    def warn(self, text: str) -> None:
        """What the user should know but need not act on, on stderr."""
        self._say(self._stderr(), f"warning: {text}")

    def error(self, text: str) -> None:
        """Why the run ends, on stderr."""
        self._say(self._stderr(), f"error: {text}")

    def summary(self, rows: Sequence[StageLine]) -> None:
        """The table that ends a run, on stdout."""
        cells = [("round", "stage", "rows", "time", "state")]
        for row in rows:
            count = "-" if row.rows is None else str(row.rows)
            cells.append((str(row.round), row.stage, count, _duration(row.seconds), row.state))
        widths = [max(len(line[column]) for line in cells) for column in range(5)]
        for number, stage, count, seconds, state in cells:
            line = f"{number:>{widths[0]}}  {stage:<{widths[1]}}  {count:>{widths[2]}}  {seconds:>{widths[3]}}  {state}"
            self._line(line)

    def _stdout(self) -> TextIO:
        return self._out or sys.stdout  # looked up late: tests and rich put other streams there

    def _stderr(self) -> TextIO:
        return self._err or sys.stderr

    def _line(self, text: str) -> None:
        self._say(self._stdout(), text)

    def _say(self, stream: TextIO, text: str) -> None:
        if self._live is not None and stream.isatty():
            self._live.print(Text(text), soft_wrap=True)  # above the live line, which a plain write would tear
        else:
            _write(stream, text)
        self._log(text)

    def _log(self, text: str) -> None:
        if self._log_file is not None:
            now = datetime.now().isoformat(sep=" ", timespec="milliseconds")
            with open(self._log_file, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{now} {text}\n")


def quiet_third_parties(log_file: Path) -> None:
    """For the driver: all logging and warnings into `log_file`, on stderr only what concerns the user.

    That is WARNING and above from loggers named `retract...`, ERROR and above from all others. Also switches off the
    progress bars of the Hugging Face libraries, unless the user's environment already decides; these read their
    variables when imported, so call this before importing them. Calling it again changes the file and nothing else.
    """
    _quiet(log_file, None)


def redirect_process_output(log_file: Path) -> None:
    """For a worker process: stdout and stderr, those of C code included, go to the end of `log_file`.

    Logging does as in `quiet_third_parties`, its warnings and errors to the stderr that the process was born with,
    which Ray forwards to the driver. Calling it again changes the file and nothing else.
    """
    global _born_stderr
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if _born_stderr is None:
        _born_stderr = open(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    fd = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    _quiet(log_file, _born_stderr)


_born_stderr: TextIO | None = None
_handlers: list[logging.Handler] = []


class _RoutedLogger(logging.Logger):
    """Hands every record to the root's handlers, also where a library hung up its own and cut the way to the root."""

    def callHandlers(self, record: logging.LogRecord) -> None:
        logging.root.callHandlers(record)


class _ScreenHandler(logging.StreamHandler[TextIO]):
    """One line on stderr for what concerns the user; the traceback, if any, is in the log file."""

    def __init__(self, stream: TextIO | None, log_file: Path) -> None:
        super().__init__(stream)
        self._fixed_stream, self._log_file = stream, log_file

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= (logging.WARNING if record.name.startswith(OWN_LOGGERS) else logging.ERROR)

    def format(self, record: logging.LogRecord) -> str:
        source = "" if record.name.startswith(OWN_LOGGERS) else f"{record.name}: "
        text = f"{record.levelname.lower()}: {source}{record.getMessage()}"
        if record.exc_info and record.exc_info[0]:
            text += f" ({record.exc_info[0].__name__}: {record.exc_info[1]}; traceback in {self._log_file})"
        return text

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = self._fixed_stream or sys.stderr  # a live line swaps sys.stderr while it is on the screen
        super().emit(record)


def _quiet(log_file: Path, stderr: TextIO | None) -> None:
    for name, value in PROGRESS_BARS_OFF.items():
        os.environ.setdefault(name, value)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace")
    file.setLevel(logging.INFO)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"))
    for old in [*logging.root.handlers]:
        logging.root.removeHandler(old)
        if old in _handlers:
            old.close()
    _handlers[:] = [file, _ScreenHandler(stderr, log_file)]
    for handler in _handlers:
        logging.root.addHandler(handler)
    logging.root.setLevel(logging.INFO)
    # Loggers made later are of this class, those made before become so: adjusting each library by name would miss some.
    logging.setLoggerClass(_RoutedLogger)
    for logger in logging.root.manager.loggerDict.values():
        if type(logger) is logging.Logger:
            logger.__class__ = _RoutedLogger
        elif isinstance(logger, logging.Logger) and not isinstance(logger, _RoutedLogger):
            logger.handlers.clear()
            logger.propagate = True
    logging.captureWarnings(True)


@contextmanager
def _ended(progress: Progress) -> Iterator[Progress]:
    try:
        yield progress
    except BaseException:
        progress.end("stopped after")
        raise
    progress.end("took")


def _drawing(bar: rich.progress.Progress, task: rich.progress.TaskID) -> Callable[[int, str], None]:
    return lambda done, details: bar.update(task, completed=done, details=details)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _write(stream: TextIO, text: str) -> None:
    # Model text may hold what the stream cannot encode; that is no reason to end a run.
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()
