"""`python -m pipeline.compare RUN_A RUN_B`: what two runs have evaluated, set against each other problem by problem.

Arguments -> a table for people or JSON, and every way that can end -> one line and an exit code. Reads the rows that the stage
evaluate has kept, in a folder or at a URL; decodes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.arguments import OneLineParser, positive
from pipeline.metrics import KIND_GROUPS, SELECTED, groups
from pipeline.statistics import Paired, bootstrap, paired
from pipeline.store import Store, StoreError
from pipeline.store.remote import Remote
from pipeline.store.synced import is_url
from pipeline.store.url import UrlStore

_FAILED, _INTERRUPTED = 1, 130
Place = tuple[str, str, float]
"""Model, mode and temperature."""


class CompareError(RuntimeError):
    """Two runs that cannot be compared. One line."""


@dataclass(frozen=True)
class Row:
    """One problem as one model has solved it."""

    problem: str
    family: str
    hindsight: bool
    correct: bool
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """What one run has evaluated on one split."""

    name: str
    round: int
    problems: Mapping[str, tuple[str, str]]
    """Id -> question and answer."""
    rows: Mapping[Place, Mapping[str, Row]]
    """By problem."""


@dataclass(frozen=True)
class Pair:
    """One model, mode and temperature of both runs on the same problems."""

    model: str
    mode: str
    temperature: float
    group: str
    before: float
    after: float
    paired: Paired
    tokens_before: float
    tokens_after: float
    tokens_ci95: tuple[float, float] | None
    """95 % bootstrap interval of the difference in tokens a problem; None for too few problems."""

    def to_json(self) -> dict[str, Any]:
        one = self.paired
        return {
            "model": self.model, "mode": self.mode, "temperature": self.temperature, "group": self.group, "n": one.n,
            "before": self.before, "after": self.after, "difference": one.difference,
            "ci95": None if one.low is None else [one.low, one.high], "mcnemar_p": one.mcnemar_p, "gained": one.gained,
            "lost": one.lost, "tokens_before": self.tokens_before, "tokens_after": self.tokens_after,
            "tokens_ci95": self.tokens_ci95,
        }  # fmt: skip


def compare(a: Evaluation, b: Evaluation) -> list[Pair]:
    """b - a for everything that both have measured, by kind of problems.

    Raises:
        CompareError: other problems, or nothing in common.
    """
    same = shared_problems(a, b)
    if not same == len(a.problems) == len(b.problems):
        raise CompareError(
            f"{a.name} and {b.name} have different test sets: {same} problems are the same of {len(a.problems)} and "
            f"{len(b.problems)}; a paired test needs all of them to be (task, run.seed and evaluate.test decide)"
        )
    places = [place for place in a.rows if place in b.rows]
    if not places:
        raise CompareError(f"{a.name} and {b.name} have no model, mode and temperature in common")
    return [pair for place in places for pair in pairs_of(place, a.rows[place], b.rows[place])]


def shared_problems(a: Evaluation, b: Evaluation) -> int:
    """How many have the same question and answer in both."""
    return sum(b.problems.get(name) == told for name, told in a.problems.items())


def pairs_of(place: Place, a: Mapping[str, Row], b: Mapping[str, Row]) -> Iterable[Pair]:
    """b - a on the problems that both have, by kind; `place` is what the pairs are called."""
    both = [(row, b[name]) for name, row in a.items() if name in b]
    for group, belongs in groups([before for before, _ in both]):
        some = [(before, after) for before, after in both if belongs(before)]
        found = paired([before.correct for before, _ in some], [after.correct for _, after in some])
        more = bootstrap([after.tokens - before.tokens for before, after in some])
        if group not in KIND_GROUPS or found is None or more is None:
            continue
        n = len(some)
        was, now = (sum(pair[i].correct for pair in some) / n for i in (0, 1))
        spent, spends = (sum(pair[i].tokens for pair in some) / n for i in (0, 1))
        ends = None if more.low is None or more.high is None else (more.low, more.high)
        yield Pair(*place, group, was, now, found, spent, spends, ends)


def table(a: Evaluation, b: Evaluation, pairs: Sequence[Pair], split: str) -> list[str]:
    """Lines for people."""
    lines = [
        f"A {a.name}, round {a.round}; B {b.name}, round {b.round}; {split} split, the same {len(a.problems):,} problems; B - A",
        f"{'model':14}{'mode':10}{'at':>4}  {'problems':10}{'n':>6}{'A':>7}{'B':>7}{'points':>8}{'95 %':>17}{'McNemar p':>11}"
        f"{'gained':>8}{'lost':>6}{'tokens A':>10}{'B':>7}",
    ]
    for pair in pairs:
        one = pair.paired
        ends = "too few" if one.low is None or one.high is None else f"{100 * one.low:+.1f} .. {100 * one.high:+.1f}"
        p = "< .001" if one.mcnemar_p < 0.001 else f"{one.mcnemar_p:.3f}"
        place = f"{pair.model:14}{pair.mode:10}{pair.temperature:4g}  {pair.group:10}{one.n:6}"
        figures = f"{pair.before:7.3f}{pair.after:7.3f}{100 * one.difference:+8.1f}{ends:>17}{p:>11}{one.gained:8}{one.lost:6}"
        lines.append(f"{place}{figures}{pair.tokens_before:10.1f}{pair.tokens_after:7.1f}")
    for one_run, other in ((a, b), (b, a)):
        if alone := [f"{model} {mode} at {at:g}" for model, mode, at in one_run.rows if (model, mode, at) not in other.rows]:
            lines.append(f"only in {one_run.name}: {', '.join(alone)}")
    return lines


def read(run: str, split: str, round: int | None) -> Evaluation:
    """The newest evaluation of a run, or that of a round.

    Raises:
        StoreError: it is not there, or is damaged.
    """
    from pipeline.stages.io import read_problems, read_rows  # here, so that `--help` is quick

    store = UrlStore(Remote(run)) if is_url(run) else Store(Path(run))
    made = [number for number, stage in store.places() if stage == "evaluate" and store.manifest(number, stage)]
    if not made or round is not None and round not in made:
        wanted = "" if round is None else f" of round {round}"
        raise StoreError(f"{run} has no evaluation{wanted}: run `python run.py --until evaluate`")
    newest = max(made) if round is None else round
    manifest, made_from = store.manifest(newest, "evaluate"), store.manifest(0, "problems")
    if manifest and made_from and manifest.inputs.get("problems") != made_from.digest:
        raise StoreError(f"{run}: problems have changed since round {newest} was evaluated")
    with tempfile.TemporaryDirectory() as fetched:
        folders = []
        for place in ((newest, "evaluate"), (0, "problems")):
            folder = Path(fetched) / place[1]
            if isinstance(store, UrlStore):
                folder.mkdir()
                store.download(*place, folder)
            elif damage := store.check(*place):
                raise StoreError(damage)
            else:
                folder = store.path(*place)
            folders.append(folder)
        rows = [row for row in read_rows(folders[0]) if row["split"] == split]
        problems = {one.id: (one.question, one.answer) for one in read_problems(folders[1], split)}
    if not rows:
        raise StoreError(f"{run} has evaluated nothing on the {split} split")
    return Evaluation(run, newest, {row["problem"]: problems[row["problem"]] for row in rows}, _by_place(rows))


def _by_place(rows: Sequence[Mapping[str, Any]]) -> dict[Place, dict[str, Row]]:
    """First tries, which stand beside each row, are mode `forbidden`."""
    found: dict[Place, dict[str, Row]] = {}
    for row in rows:
        model, mode, at, name = row["model"], row["mode"], row["temperature"], row["problem"]
        one = Row(name, row["family"], row["hindsight"], row["correct"], row["tokens"])
        found.setdefault((model, mode, at), {})[name] = one
        first = replace(one, correct=row["first_correct"], tokens=len(row["first_token_ids"]))
        if mode not in SELECTED:
            found.setdefault((model, "forbidden", at), {}).setdefault(name, first)  # the main mode comes first
    return found


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, 1 for runs that cannot be compared, 2 for wrong arguments, 130 when stopped."""
    options = _parse(arguments)
    try:
        a = read(options.run_a, options.split, options.round_a)
        b = read(options.run_b, options.split, options.round_b)
        pairs = compare(a, b)
    except (StoreError, CompareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return _INTERRUPTED
    if options.json:
        runs = {key: {"run": one.name, "round": one.round} for key, one in (("a", a), ("b", b))}
        found = runs | {"split": options.split, "pairs": [pair.to_json() for pair in pairs]}
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        print("\n".join(table(a, b, pairs, options.split)))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    about = "Compare two runs on the same problems: differences with 95 %% intervals and McNemar's test."
    parser = OneLineParser(prog="python -m pipeline.compare", description=about)
    for name in ("a", "b"):
        parser.add_argument(
            f"run_{name}",
            type=_run,
            metavar=f"RUN_{name.upper()}",
            help="run folder or URL, such as runs/tiny or s3://bucket/runs/x",
        )
    parser.add_argument("--split", choices=("test", "ood", "dev"), default="test", help="default: %(default)s")
    for name in ("a", "b"):
        parser.add_argument(f"--round-{name}", type=positive, metavar="N", help="round of that run (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def _run(text: str) -> str:
    if not is_url(text) and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
