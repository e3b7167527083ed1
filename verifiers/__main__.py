"""The verifiers from the command line: `python -m verifiers judge IN.jsonl OUT.jsonl [--workers 4]`.

Arguments -> a judged file, and every way that can end -> one line and an exit code. Knows nothing of how a row is judged.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from pipeline.arguments import USAGE, OneLineParser, positive
from pipeline.telemetry import Terminal
from verifiers.batch import METHODS, WorkerDied, judge_file, partial

_FAILED, _STOPPED = 1, 128

_ABOUT = """\
Judge solutions: is the final answer right, and if not, where does the first wrong decision stand and what shows it.

A line of IN is an object with id, question, gold_answer, gold_solution (may be missing) and either solution, one text, or
steps, a list of texts. A line of OUT has id, answer, correct, first_error_step (from 0; -1 without an error), span (first
and last + 1 character of the solution, in which steps are joined by newlines; or null), method and evidence. A row that
cannot be judged gives id, line and error in its place.
"""


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, also where rows were bad; 1 for a failed run, 2 for wrong arguments, 130 and 143 when stopped."""
    options = _parse(arguments)
    source, target = Path(options.source), Path(options.target)
    terminal = Terminal(None, out=sys.stderr)
    wrong = _wrong(source, target)
    if wrong:
        terminal.error(wrong)
        return USAGE
    signal.signal(signal.SIGTERM, _stop)
    try:
        with terminal.stage("judge", total=None) as progress:
            counts = judge_file(source, target, options.workers, progress.advance)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        word = "terminated" if number == signal.SIGTERM else "interrupted"
        terminal.error(f"{word}; {target} is as it was before")
        return _STOPPED + int(number)
    except WorkerDied as error:
        terminal.error(f"{error}; {target} is as it was before")
        return _FAILED
    except OSError as error:
        terminal.error(f"{error.filename or target}: {error.strerror or error}")
        return _FAILED
    terminal.info(
        f"{counts.rows} rows: {counts.right} right, {counts.wrong} wrong, {counts.located} with a located error, "
        f"{counts.errors} errors"
    )
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _wrong(source: Path, target: Path) -> str:
    """What makes the two files unfit for each other, before either is opened."""
    if not source.exists():
        return f"{source} does not exist"
    for file in (target, partial(target)):
        if file.exists() and file.samefile(source):
            return f"{file} is the file that is read; the verdicts need another"
        if file.exists() and not file.is_file():
            return f"{file} is no ordinary file"
    return ""


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m verifiers", description="Judges of solutions.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser("judge", help="judge a file of solutions", description=_ABOUT, formatter_class=raw)
    command.add_argument("source", metavar="IN", help="JSON lines to judge")
    command.add_argument("target", metavar="OUT", help="JSON lines with the verdicts; appears when all are written")
    command.add_argument("--method", choices=METHODS, default=METHODS[0], help="how to judge (default: %(default)s)")
    command.add_argument("--workers", type=positive, default=1, metavar="N", help="processes that judge (default: 1)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
