"""Figures of evaluated rows beside accuracy by split and family: by difficulty, how much undos take back, how often a wrong choice
is made to fit, by kind of error, and whether a model errs more and more in its first tries. Plain rows in, records for metrics.json
out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.metrics import KIND_GROUPS, Evaluated, Probed, figures, first_try, groups
from pipeline.statistics import bootstrap, mean, share, trend


def by_difficulty(rows: Sequence[Evaluated], round: int) -> Iterator[dict[str, Any]]:
    """The figures of `metrics.figures` for each model, mode, temperature, split (dev, on which nothing is claimed, left out) and
    number of steps in the gold solution."""
    members: dict[tuple[Any, ...], list[Evaluated]] = {}
    for row in rows:
        if row.split != "dev":
            members.setdefault((row.model, row.mode, row.temperature, row.split, row.steps), []).append(row)
    for place, some in sorted(members.items(), key=lambda one: one[0][-1]):
        names = ("model", "mode", "temperature", "split", "steps")
        yield {"round": round} | dict(zip(names, place, strict=True)) | figures(some)


def undo_lengths_by_model(rows: Sequence[Evaluated], round: int) -> Iterator[dict[str, Any]]:
    """How many tokens each run of undos took back, [[tokens, runs], ..], where a model has undone anything on the test split."""
    found: dict[tuple[Any, ...], Counter[int]] = {}
    for row in rows:
        if row.split == "test" and row.undo_lengths:
            found.setdefault((row.model, row.mode, row.temperature), Counter()).update(row.undo_lengths)
    for (model, mode, temperature), lengths in found.items():
        place = {"round": round, "model": model, "mode": mode, "temperature": temperature}
        yield place | {"lengths": [list(pair) for pair in sorted(lengths.items())]}


def rationalisation(rows: Sequence[Evaluated], round: int) -> Iterator[dict[str, Any]]:
    """Of wrong answers to hindsight problems the share that holds a false equation behind a wrong decision, which makes it fit
    (`x=6; 82-42=40; 40/9=4`), with its 95 % Wilson interval: by model, mode (first tries too), temperature and split, dev left
    out. A share of no wrong answers is None."""
    members: dict[tuple[Any, ...], list[Evaluated]] = {}
    for row in rows:
        if row.hindsight and row.split != "dev":
            members.setdefault((row.model, row.mode, row.temperature, row.split), []).append(row)
    for model, temperature, split in dict.fromkeys((model, at, split) for model, _, at, split in members):
        of_modes = {mode: members[model, mode, temperature, split] for mode in dict.fromkeys(place[1] for place in members)
                    if (model, mode, temperature, split) in members}  # fmt: skip
        of_modes["forbidden"] = [first_try(row) for row in next(iter(of_modes.values()))]
        for mode, some in of_modes.items():
            wrong = [row for row in some if not row.correct]
            found = share(sum(row.rationalised for row in wrong), len(wrong))
            place = {"round": round, "model": model, "mode": mode, "temperature": temperature, "split": split}
            yield place | {
                "n": len(some),
                "wrong": len(wrong),
                "rationalised": sum(row.rationalised for row in wrong),
                "share": found.value if found else None,
                "ci95": [found.low, found.high] if found else None,
            }


def by_error_kind(probes: Sequence[Probed], round: int) -> Iterator[dict[str, Any]]:
    """Own errors of the start model by what kind of error it is, under each model: P(undo) there and at the right place beside it,
    and by how many nats the error itself has become more or less likely, with 95 % bootstrap intervals over problems."""
    start = {probe.problem: probe.logp_error for probe in probes if probe.model == "base"}
    for model in dict.fromkeys(probe.model for probe in probes):
        for kind in sorted({probe.error for probe in probes}):
            some = [probe for probe in probes if (probe.model, probe.error) == (model, kind)]
            record: dict[str, Any] = {"round": round, "model": model, "error": kind, "n": len(some)}
            for name, values in (
                ("p_undo_error", [probe.p_undo_error for probe in some]),
                ("p_undo_right", [probe.p_undo_right for probe in some]),
                ("logp_error_change", [probe.logp_error - start[probe.problem] for probe in some if probe.problem in start]),
            ):
                found = bootstrap(values)
                record[name] = found.value if found else None
                record[f"{name}_ci95"] = None if found is None or found.low is None else [found.low, found.high]
            yield record


def by_bias(rows: Sequence[Evaluated], round: int) -> Iterator[dict[str, Any]]:
    """The figures of rows whose mode is `bias B`, by B: what a model does that is pushed towards undo, or away from it."""
    for mode in dict.fromkeys(row.mode for row in rows):
        some = [row for row in rows if row.mode == mode]
        for group, belongs in groups(some):
            if group in KIND_GROUPS:
                place = {"round": round, "model": some[0].model, "bias": float(mode.removeprefix("bias ")), "group": group}
                yield place | figures([row for row in some if belongs(row)])


@dataclass(frozen=True)
class FirstTries:
    """The first tries of a model at some time of its training, U forbidden, on problems that are the same each time."""

    at: float
    """A training step, or a round."""
    problems: Sequence[str]
    correct: Sequence[bool]
    errors: Sequence[int]
    """[problems] Errors that the judge finds in each."""


def planting(name: str, unit: str, times: Sequence[FirstTries]) -> dict[str, Any] | None:
    """Whether a training plants errors: first tries with U forbidden, and the errors in each, over its checkpoints or rounds, with
    tests for trend. A model that learns to err in order to undo gets worse at both.

    Args:
        name: what is trained.
        unit: what `at` counts: step or round.

    Returns:
        None with fewer than two times, or without a problem that all of them have.
    """
    if len(times) < 2:
        return None
    rows: list[Mapping[str, tuple[bool, int]]] = [
        dict(zip(one.problems, zip(one.correct, one.errors, strict=True), strict=True)) for one in times
    ]
    common = [problem for problem in rows[0] if all(problem in some for some in rows)]
    if not common:
        return None
    found: dict[str, Any] = {"name": name, "unit": unit, "n": len(common), "points": []}
    for one, some in zip(times, rows, strict=True):
        right = share(sum(some[problem][0] for problem in common), len(common))
        errors = mean([float(some[problem][1]) for problem in common], 0.0)
        assert right is not None and errors is not None
        point: dict[str, Any] = {"at": one.at, "first_try_accuracy": right.value, "ci95": [right.low, right.high]}
        ends = None if errors.low is None else [errors.low, errors.high]
        found["points"].append(point | {"errors_per_try": errors.value, "errors_ci95": ends})
    scores = [one.at for one in times]
    for key, place in (("accuracy_trend", 0), ("errors_trend", 1)):
        tested = trend(scores, [[float(some[problem][place]) for some in rows] for problem in common])
        found[key] = asdict(tested) if tested else None
    return found
