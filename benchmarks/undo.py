"""Applying undos: seconds for a million tokens, one at a time and in batches, and how the time grows with the length.

    python benchmarks/undo.py [--quick]

Each figure is the median of several runs on the kind of row that takes longest: random ones, deep ones (all pushed, then all
undone), one endless line. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MILLION, ROW = 1_000_000, 1000
UNDO, END = 9, 0
# A quadratic algorithm would need ten times as long for each token of a row that is ten times as long.
GOALS = {"seconds_per_million": 1.0, "growth": 3.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = 3 if parser.parse_args().quick else 9
    figures, growth = measure(repeats)
    print(f"seconds for {MILLION:,} tokens, slowest kind of row, median of {repeats}; batch: {MILLION // ROW} rows x {ROW}")
    print(f"{'':8}{'apply_undo':>12}{'UndoStream':>12}{'apply_undo_batch':>18}{'growth':>8}")
    for unit, (whole, stream, batch) in figures.items():
        print(f"{unit:8}{whole:12.3f}{stream:12.3f}{batch:18.4f}{growth[unit]:8.2f}")
    names = ("apply_undo", "stream", "batch")
    flat = {f"{name}_{unit}": value for unit, values in figures.items() for name, value in zip(names, values, strict=True)}
    worst = {"seconds_per_million": max(values[0] for values in figures.values()), "growth": max(growth.values())}
    print(f"slowest apply_undo {worst['seconds_per_million']:.3f} s   goal: below {GOALS['seconds_per_million']} s")
    print(f"time per token, rows ten times as long: x {worst['growth']:.2f}   goal: below {GOALS['growth']}")
    ok = all(worst[name] < goal for name, goal in GOALS.items())
    print(json.dumps({"benchmark": "undo", "figures": worst | flat, "goals": GOALS, "ok": ok}))
    return 0


def measure(repeats: int) -> tuple[dict[str, tuple[float, float, float]], dict[str, float]]:
    """By unit: seconds of the three forms, and the time per token at a million tokens over that at a tenth of it."""
    import numpy as np

    from pipeline.backtrack.undo import UndoRule, UndoStream, Unit, apply_undo, apply_undo_batch

    kinds = rows(MILLION)
    short = rows(MILLION // 10)
    lengths = np.full(MILLION // ROW, ROW)
    grids = [np.array(ids).reshape(-1, ROW) for ids in kinds]
    figures, growth = {}, {}
    for unit in get_args(Unit):
        rule = UndoRule(UNDO, unit, frozenset({END}))
        whole = [median(apply_undo, repeats, ids, rule) for ids in kinds]
        tenth = [median(apply_undo, repeats, ids, rule) for ids in short]
        stream = [median(UndoStream(rule).feed, repeats, ids) for ids in kinds]
        batch = [median(apply_undo_batch, repeats, ids, lengths, rule) for ids in grids]
        figures[unit] = max(whole), max(stream), max(batch)
        growth[unit] = max(long / ten / 10 for long, ten in zip(whole, tenth, strict=True))
    return figures, growth


def rows(tokens: int) -> list[list[int]]:
    """Kinds of rows: random, all pushed and then undone, one line without an end."""
    rng = random.Random(0)
    mixed = [rng.choice((END, 1, 2, 3, 4, 5, 6, 7, UNDO, UNDO)) for _ in range(tokens)]
    return [mixed, [1] * (tokens // 2) + [UNDO] * (tokens // 2), [1] * (tokens - 1) + [UNDO]]


def median(work: Callable[..., object], repeats: int, *given: Any) -> float:
    def timed() -> float:
        began = time.perf_counter()
        work(*given)
        return time.perf_counter() - began

    return statistics.median(timed() for _ in range(repeats))


if __name__ == "__main__":
    sys.exit(main())
