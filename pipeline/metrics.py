"""From evaluated rows to `metrics.json`: the same figures for every model, split and family, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite
from statistics import fmean
from typing import Any

from pipeline.statistics import auroc, bootstrap, paired, share

TRAINED = ("grpo", "dpo", "sft")
"""Models that a round may end with, the last one first."""
SELECTED = ("vote", "likeliest", "best_of_n")
"""Modes that take one of several samples."""
BASELINES = ("guided", *SELECTED)
"""Modes in which another detector, or more tokens, stand against trained undos."""
IN_CONTEXT = "in_context soft"
"""Model and mode of the control that keeps its failed tries in its context."""

KIND_GROUPS = ("all", "forward", "hindsight")
"""The groups that every task has; the others are families."""


@dataclass(frozen=True)
class Evaluated:
    """One problem decoded by one model in one mode."""

    model: str
    mode: str
    """`rewind`: deleted text was gone from the model's context; `soft`: it stayed; `guided`: a signal asked for the undos."""
    problem: str
    split: str
    family: str
    hindsight: bool
    temperature: float
    correct: bool
    """Of the surviving text."""
    first_correct: bool
    """With the undo token forbidden; the same in every mode."""
    tokens: int
    """All emitted tokens, deleted ones included."""
    undos: int
    noops: int
    spurious: int
    """Undo tokens that deleted something while nothing wrong stood there."""
    finish: str
    token_ids: Sequence[int]
    first_token_ids: Sequence[int]
    steps: int = 0
    """Of the gold solution: how difficult the problem is."""
    undo_lengths: Sequence[int] = ()
    """Tokens that each run of undo tokens took back; 0 for a run that met nothing."""
    first_errors: int = 0
    """Errors that the judge finds in the first try."""
    rationalised: bool = False
    """Wrong at last, and a false equation in the surviving text makes a wrong decision before it fit."""
    first_rationalised: bool = False
    """The same of the first try."""


@dataclass(frozen=True)
class Probed:
    """One own error of the start model, under one model."""

    model: str
    problem: str
    family: str
    hindsight: bool
    error: str
    p_undo_error: float
    """P(undo) at the evidence of the error, at temperature 1."""
    p_undo_right: float
    """P(undo) at the same place of the gold solution."""
    logp_error: float
    """Log-probability, in nats, of the tokens of the wrong decision given what stands before them."""


def summarise(rows: Sequence[Evaluated], probes: Sequence[Probed], round: int, main: str) -> dict[str, Any]:
    """Everything of one round that `metrics.json` holds; None wherever there are no rows to measure on.

    Args:
        main: the mode in which models are compared.
    """
    temperatures = dict.fromkeys(row.temperature for row in rows)
    found = [_at_temperature([row for row in rows if row.temperature == one], round, one, main) for one in temperatures]
    models = dict.fromkeys(probe.model for probe in probes)
    return {
        "evaluations": [row for evaluations, _ in found for row in evaluations],
        "comparisons": [row for _, comparisons in found for row in comparisons],
        "probes": [_detection(probes, round, model, *group) for model in models for group in groups(probes)],
    }


def _at_temperature(
    rows: Sequence[Evaluated], round: int, temperature: float, main: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(evaluations, comparisons)"""
    models = list(dict.fromkeys(row.model for row in rows))
    modes = list(dict.fromkeys(row.mode for row in rows))
    measured = {(row.model, row.mode, row.split) for row in rows}
    splits = list(dict.fromkeys(row.split for row in rows))
    evaluations: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    for split in splits:
        for group, belongs in groups(rows):
            here = [row for row in rows if row.split == split and belongs(row)]
            chosen = {(a, b): [row for row in here if (row.model, row.mode) == (a, b)] for a in models for b in modes}
            for model in models:
                place = {"round": round, "model": model, "split": split, "group": group, "temperature": temperature}
                here_modes = [mode for mode in modes if (model, mode, split) in measured]
                evaluations += [place | {"mode": mode} | figures(chosen[model, mode]) for mode in here_modes]
                leads = main if main in here_modes or not here_modes else here_modes[0]
                first = figures([first_try(row) for row in chosen[model, leads]])
                del first["cut_at_max_tokens"]  # how first tries ended is not kept
                evaluations.append(place | {"mode": "forbidden"} | first)
            place = {"round": round, "split": split, "group": group, "temperature": temperature}
            comparisons += [place | one for one in _compare(chosen, main, trained_model(rows))]
    return evaluations, comparisons


def acceptance(rows: Sequence[Evaluated], main: str, p: float) -> dict[str, Any]:
    """Whether the trained model may start the next round, and the paired test on dev problems in mode `main` that decides it.

    It may unless its accuracy there is below the start model's and McNemar's p is at most `p`. The dev split is decoded at one
    temperature.
    """

    def right(model: str) -> list[bool]:
        return [row.correct for row in rows if (row.model, row.mode, row.split) == (model, main, "dev")]

    before, after = right("base"), right(trained_model(rows))
    found = paired(before, after)
    if found is None:
        return {"accepted": True, "dev": None}
    fell = found.difference < 0 and found.mcnemar_p <= p
    shares = {"before": fmean(before), "after": fmean(after)}
    return {"accepted": not fell, "dev": {**shares, **asdict(found)}}


def in_numbers(dev: Mapping[str, Any]) -> str:
    """The paired test of an acceptance in a few words."""
    return f"from {dev['before']:.3f} to {dev['after']:.3f} (n {dev['n']}, McNemar p {dev['mcnemar_p']:.2g})"


def rounds_table(rounds: Sequence[tuple[int, Mapping[str, Any]]]) -> list[str]:
    """Lines that set rounds side by side: (number, metrics as `acceptance` decided on them). None for a single round.

    A round starts from the newest one before that was accepted.
    """
    if len(rounds) < 2:
        return []
    lines, start = ["round  starts from  dev before   after      p  accepted"], "base"
    for round, metrics in rounds:
        dev = metrics.get("dev")
        figures = [f"{dev['before']:.3f}", f"{dev['after']:.3f}", f"{dev['mcnemar_p']:.2g}"] if dev else ["-"] * 3
        measured = "{:>10}  {:>6}  {:>5}".format(*figures)
        lines.append(f"{round:>5}  {start:<11}  {measured}  {'yes' if metrics['accepted'] else 'no, it fell'}")
        start = f"round {round}" if metrics["accepted"] else start
    return lines


def trained_model(rows: Sequence[Evaluated]) -> str:
    """Name of the model that a round ends with."""
    measured = {row.model for row in rows}
    return next((name for name in TRAINED if name in measured), "sft")


def groups(rows: Sequence[Any]) -> Iterator[tuple[str, Callable[[Any], bool]]]:
    """all, then the two kinds, then every family; a group without rows is left out."""
    yield "all", lambda row: True
    for name, kind in (("forward", False), ("hindsight", True)):
        if any(row.hindsight == kind for row in rows):
            yield name, partial(_has, "hindsight", kind)
    for family in dict.fromkeys(row.family for row in rows):
        yield family, partial(_has, "family", family)


def _has(attribute: str, value: object, row: Any) -> bool:
    return bool(getattr(row, attribute) == value)


def _accuracy(correct: Sequence[bool]) -> dict[str, Any]:
    found = share(sum(correct), len(correct))
    return {
        "n": len(correct),
        "accuracy": found.value if found else None,
        "ci95": [found.low, found.high] if found else None,
    }


def first_try(row: Evaluated) -> Evaluated:
    ids = row.first_token_ids
    undone = replace(row, undos=0, noops=0, spurious=0, undo_lengths=())
    return replace(undone, correct=row.first_correct, rationalised=row.first_rationalised, tokens=len(ids), token_ids=ids)


def tokens_table(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for people: all modes of each model side by side on all test problems, with what they spent."""
    lines = [f"{'test split':15}{'mode':10}{'at':>4}{'accuracy':>9}{'95 %':>15}{'tokens':>9}{'with undo':>11}{'spurious':>10}"]
    for row in evaluations:
        if (row["split"], row["group"]) == ("test", "all") and row["n"]:
            interval = "{:.3f} .. {:.3f}".format(*row["ci95"])
            spent = f"{row['tokens_per_problem']:9.1f}{row['undo_rate']:11.3f}{row['spurious_undo_rate']:10.3f}"
            lines.append(f"{row['model']:15}{row['mode']:10}{row['temperature']:4g}{row['accuracy']:9.3f}{interval:>15}{spent}")
    return lines if len(lines) > 1 else []


def figures(rows: Sequence[Evaluated]) -> dict[str, Any]:
    """What is said of rows of one model and mode. Rates are shares of problems: with an undo, a spurious or a no-op one."""
    n = len(rows)
    tokens = bootstrap([row.tokens for row in rows])
    return _accuracy([row.correct for row in rows]) | {
        "first_try_accuracy": sum(row.first_correct for row in rows) / n if n else None,
        "tokens_per_problem": tokens.value if tokens else None,
        "tokens_ci95": [tokens.low, tokens.high] if tokens and tokens.low is not None else None,
        "undo_rate": sum(row.undos > 0 for row in rows) / n if n else None,
        "undos_per_problem": fmean(row.undos for row in rows) if n else None,
        "spurious_undo_rate": sum(row.spurious > 0 for row in rows) / n if n else None,
        "noop_undos": sum(row.noops for row in rows),
        "wrong_to_right": sum(row.correct and not row.first_correct for row in rows),
        "right_to_wrong": sum(row.first_correct and not row.correct for row in rows),
        "cut_at_max_tokens": sum(row.finish == "length" for row in rows),
    }


def _compare(chosen: dict[tuple[str, str], list[Evaluated]], main: str, trained: str) -> list[dict[str, Any]]:
    """The trained model in the main mode against its first tries, its other modes, and what the others do at their best."""
    if (trained, main) not in chosen:
        return []
    own = chosen[trained, main]
    told = [(place, some) for place, some in chosen.items() if place != (trained, main) and some]
    pairs = [
        (" ".join(place), some)
        for place, some in told
        if place[0] == trained or place[1] in (main, *BASELINES) or " ".join(place) == IN_CONTEXT
    ]
    answers = [(name, [row.correct for row in some]) for name, some in pairs]
    answers.append((f"{trained} forbidden", [row.first_correct for row in own]))
    found = []
    for name, before in answers:
        difference = paired(before, [row.correct for row in own])
        if difference:
            place = {"before": name, "after": f"{trained} {main}"}
            interval = {"ci95": None if difference.low is None else [difference.low, difference.high]}
            counts = {key: value for key, value in asdict(difference).items() if key not in ("low", "high")}
            found.append(place | counts | interval)
    return found


def _detection(probes: Sequence[Probed], round: int, model: str, group: str, belongs: Callable[[Any], bool]) -> dict[str, Any]:
    some = [probe for probe in probes if probe.model == model and belongs(probe)]
    start = {probe.problem: probe.logp_error for probe in probes if probe.model == "base" and belongs(probe)}
    wrong, right = [probe.p_undo_error for probe in some], [probe.p_undo_right for probe in some]
    return {
        "round": round,
        "model": model,
        "group": group,
        "n": len(some),
        "p_undo_error": average(wrong),
        "p_undo_right": average(right),
        "auroc": auroc(wrong, right),
        "logp_error_change": average([probe.logp_error - start[probe.problem] for probe in some]),
    }


def average(values: Sequence[float]) -> float | None:
    """The mean; None where there is no value, or one that is no number: what a model could not say is missing, not 0."""
    return fmean(values) if values and all(map(isfinite, values)) else None
