"""What the runs of a study have measured, set beside each other: means over seeds, and paired differences on the same problems.

Evaluations in, records for `study.json` out. Two sources of chance are kept apart: which problems are asked (intervals over all
problems of all seeds, exact McNemar tests) and how a training turns out (Student's t over seeds).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

from pipeline.compare import Evaluation, Pair, Place, pairs_of, shared_problems
from pipeline.figures import is_number
from pipeline.metrics import KIND_GROUPS
from pipeline.statistics import Mean, Paired, mean, paired_counts, share

SHARES = ("accuracy", "first_try_accuracy", "undo_rate", "spurious_undo_rate")
MEASURES = (*SHARES, "tokens_per_problem")
KIND_MEASURES = ("p_undo_error", "p_undo_right", "logp_error_change")
_BOUNDS = {"p_undo_error": (0.0, 1.0), "p_undo_right": (0.0, 1.0)}


@dataclass(frozen=True)
class Result:
    """One evaluated run: its last round, on the test split, at its own temperature."""

    variant: str
    seed: int
    trained: str
    """Name of the model that the round ends with."""
    mode: str
    temperature: float
    metrics: Mapping[str, Any]
    """What the stage evaluate has written."""
    evaluation: Evaluation
    cosines: Mapping[str, float] = field(default_factory=dict)
    """Of the last check of its fine-tuning, see actors/checks.py."""

    @property
    def place(self) -> Place:
        return self.trained, self.mode, self.temperature


@dataclass(frozen=True)
class Difference:
    """after - before on the same problems, over all seeds that both have."""

    group: str
    pooled: Paired
    """Of all problems of all seeds."""
    by_seed: Mapping[int, Paired]
    over_seeds: Mean
    """Of the seeds' differences, by Student's t."""

    @property
    def verdict(self) -> str:
        """better or worse where chance explains it neither over problems nor, with several seeds, over trainings; else not
        decided."""
        one, seeds = self.pooled, self.over_seeds
        if one.low is None or one.high is None or one.low <= 0 <= one.high:
            return "not decided"
        if seeds.low is not None and seeds.high is not None and seeds.low <= 0 <= seeds.high:
            return "not decided"
        return "better" if one.difference > 0 else "worse"

    def to_json(self) -> dict[str, Any]:
        return {
            "group": self.group, "verdict": self.verdict, **_paired_json(self.pooled), "over_seeds": asdict(self.over_seeds),
            "by_seed": {str(seed): _paired_json(one) for seed, one in self.by_seed.items()},
        }  # fmt: skip


def _paired_json(one: Paired) -> dict[str, Any]:
    ends = None if one.low is None else [one.low, one.high]
    return {
        "difference": one.difference, "ci95": ends, "mcnemar_p": one.mcnemar_p, "gained": one.gained, "lost": one.lost, "n": one.n,
    }  # fmt: skip


def compared(runs: Sequence[Result], variants: Sequence[str], against: str) -> dict[str, Any]:
    """Everything that `study.json` says of evaluated runs; empty lists where nothing was measured."""
    of = {name: [run for run in runs if run.variant == name] for name in variants}
    return {
        "figures": [record for name in variants for record in _figures(of[name])],
        "differences": [
            {"variant": name} | told
            for name in variants
            if name != against
            for told in _told(list(differences(of[against], of[name])), _apart(of[against], of[name]))
        ],
        "controls": [record for name in variants for record in _controls(of[name])],
        "rationalisation": [record for name in variants for record in _rationalised(of[name])],
        "error_kinds": [record for name in variants for record in _error_kinds(of[name])],
        "cosines": [record for name in variants for record in _cosines(of[name])],
    }


def _told(found: Sequence[Difference], apart: str) -> Iterator[dict[str, Any]]:
    yield from (one.to_json() for one in found)
    if not found:
        yield {"group": "all", "verdict": "not comparable", "why": apart}


def _apart(before: Sequence[Result], after: Sequence[Result]) -> str:
    common = {one.seed for one in before} & {one.seed for one in after}
    return "their test problems differ" if common else "no seed of both is evaluated"


def _same_problems(a: Evaluation, b: Evaluation) -> bool:
    return shared_problems(a, b) == len(a.problems) == len(b.problems)


def differences(before: Sequence[Result], after: Sequence[Result]) -> Iterator[Difference]:
    """By kind of problems; nothing where the seeds have no problems in common."""
    others = {run.seed: run for run in after}
    found: dict[str, dict[int, Pair]] = {}
    for run in before:
        other = others.get(run.seed)
        if other is None or not _same_problems(run.evaluation, other.evaluation):
            continue
        for pair in pairs_of(other.place, run.evaluation.rows[run.place], other.evaluation.rows[other.place]):
            found.setdefault(pair.group, {})[run.seed] = pair
    yield from _differences(found)


def _differences(found: Mapping[str, Mapping[int, Pair]]) -> Iterator[Difference]:
    for group in KIND_GROUPS:
        pairs = found.get(group, {})
        pooled = paired_counts(*(sum(getattr(one.paired, key) for one in pairs.values()) for key in ("gained", "lost", "n")))
        over_seeds = mean([one.paired.difference for one in pairs.values()], -1.0, 1.0)
        if pooled and over_seeds:
            yield Difference(group, pooled, {seed: one.paired for seed, one in pairs.items()}, over_seeds)


def _records(run: Result) -> list[Mapping[str, Any]]:
    return [
        one
        for one in run.metrics["evaluations"]
        if (one["split"], one["temperature"]) == ("test", run.temperature) and one["group"] in KIND_GROUPS and one["n"]
    ]


def _figures(runs: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """Each model, mode and kind of problems of a variant: every measure by seed and over seeds, accuracy over problems too."""
    found: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        for one in _records(run):
            found.setdefault((one["model"], one["mode"], one["group"]), {})[run.seed] = one
    for (model, mode, group), by_seed in found.items():
        n = sum(one["n"] for one in by_seed.values())
        pooled = share(sum(round(one["accuracy"] * one["n"]) for one in by_seed.values()), n)
        assert pooled is not None
        yield {
            "variant": runs[0].variant, "model": model, "mode": mode, "group": group,
            "trained": (model, mode) == (runs[0].trained, runs[0].mode), "n": n, "pooled_ci95": [pooled.low, pooled.high],
        } | {
            name: _over_seeds({seed: one[name] for seed, one in by_seed.items()}, 0.0, 1.0 if name in SHARES else inf)
            for name in MEASURES
        }  # fmt: skip


def _over_seeds(by_seed: Mapping[int, Any], least: float = -inf, most: float = inf) -> dict[str, Any] | None:
    """Mean with its interval over seeds, and the values; None where a seed has none."""
    if not all(map(is_number, by_seed.values())):
        return None
    found = mean(list(by_seed.values()), least, most)
    if found is None:
        return None
    ends = None if found.low is None else [found.low, found.high]
    return {"value": found.value, "ci95": ends, "by_seed": {str(seed): value for seed, value in by_seed.items()}}


def _controls(runs: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """The trained model against every other model and mode of the same runs, with what each spends: as much training, and as many
    tokens."""
    places = dict.fromkeys((place[0], place[1]) for run in runs for place in run.evaluation.rows if place[2] == run.temperature)
    for model, mode in places:
        if runs and (model, mode) == runs[0].place[:2]:
            continue
        found: dict[str, dict[int, Pair]] = {}
        for run in runs:
            if rows := run.evaluation.rows.get((model, mode, run.temperature)):
                for pair in pairs_of(run.place, rows, run.evaluation.rows[run.place]):
                    found.setdefault(pair.group, {})[run.seed] = pair
        for one in _differences(found):
            pairs = found[one.group].values()
            spent = {
                name: sum(getattr(pair, name) * pair.paired.n for pair in pairs) / one.pooled.n
                for name in ("before", "after", "tokens_before", "tokens_after")
            }
            yield {"variant": runs[0].variant, "model": model, "mode": mode} | one.to_json() | spent


def _rationalised(runs: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """Of wrong answers to hindsight problems those that make a wrong choice fit, over all seeds; of the trained model, and its
    first tries."""
    for mode in dict.fromkeys(mode for run in runs for mode in (run.mode, "forbidden")):
        some = [
            one
            for run in runs
            for one in run.metrics["rationalisation"]
            if (one["model"], one["mode"], one["temperature"], one["split"]) == (run.trained, mode, run.temperature, "test")
        ]
        wrong, made_to_fit = (sum(one[key] for one in some) for key in ("wrong", "rationalised"))
        found = share(made_to_fit, wrong)
        yield {
            "variant": runs[0].variant, "mode": mode, "n": sum(one["n"] for one in some), "wrong": wrong,
            "rationalised": made_to_fit, "share": found.value if found else None,
            "ci95": [found.low, found.high] if found else None,
        }  # fmt: skip


def _error_kinds(runs: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """Own errors of the start models by kind, under the trained ones."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        for one in run.metrics["error_kinds"]:
            if one["model"] == run.trained and one["n"]:
                found.setdefault(one["error"], {})[run.seed] = one
    for kind, by_seed in sorted(found.items()):
        values = {
            name: _over_seeds({seed: one[name] for seed, one in by_seed.items()}, *_BOUNDS.get(name, ())) for name in KIND_MEASURES
        }
        yield {"variant": runs[0].variant, "error": kind, "n": sum(one["n"] for one in by_seed.values())} | values


def _cosines(runs: Sequence[Result]) -> Iterator[dict[str, Any]]:
    for name in dict.fromkeys(name for run in runs for name in run.cosines):
        found = _over_seeds({run.seed: run.cosines[name] for run in runs if name in run.cosines}, -1.0, 1.0)
        if found:
            yield {"variant": runs[0].variant, "name": name} | found
