"""What a run shows of each thing that is claimed of undo, in a sentence with its figures: it holds, it does not, it is not decided
at this n, or it was not measured. Records of metrics.json in, nothing else.

A claim that something is greater than a bound holds where the whole 95 % interval lies above it, does not hold where the whole
interval lies below, and is not decided where the interval holds the bound. No correction is made for their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.metrics import IN_CONTEXT, SELECTED, TRAINED
from pipeline.report import p_value, points
from pipeline.statistics import share

Verdict = Literal["holds", "does not hold", "not decided", "not measured"]
FORWARD_LOSS, FALSE_ALARMS, FIRST_TRIES = 0.01, 0.03, 0.02
"""What may be lost on forward problems; the share of problems with a spurious undo; what first tries may lose to training."""
CONTROLS = ("grpo_control", "clean_control")
"""Of equal training, the one that got as much of it as the trained model first."""
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """One claim and what this run says of it."""

    claim: str
    temperature: float | None
    """None for what is measured by itself."""
    verdict: Verdict
    figures: str
    """The numbers behind the verdict, or what is missing."""


@dataclass(frozen=True)
class _Last:
    """The last round of a run, on the test split at one temperature."""

    trained: str
    mode: str
    evaluations: Sequence[Record]
    comparisons: Sequence[Record]
    greedy: Sequence[Record]
    """Evaluations at temperature 0, for a baseline at others."""

    def control(self) -> str | None:
        models = {row["model"] for row in self.evaluations}
        if self.trained != "grpo":
            return "clean_control" if "clean_control" in models else None
        return next((name for name in CONTROLS if name in models), None)

    def against(self, before: str | None, group: str) -> Record | None:
        """The paired comparison of the trained model with another; None without an interval."""
        found = (one for one in self.comparisons if (one["before"], one["group"]) == (before, group) and one["ci95"])
        return next(found, None)

    def row(self, group: str) -> Record | None:
        return self._found(self.evaluations, self.trained, group)

    def colder(self, group: str) -> Record | None:
        """The control, greedily; None where that is no colder."""
        control = self.control()
        return self._found(self.greedy, control, group) if control and self.greedy is not self.evaluations else None

    def _found(self, rows: Sequence[Record], model: str, group: str) -> Record | None:
        wanted = (model, self.mode, group)
        return next((one for one in rows if (one["model"], one["mode"], one["group"]) == wanted and one["n"]), None)


def claims(metrics: Record) -> list[Claim]:
    """Of the last round, at each temperature that it was evaluated at; empty where nothing was evaluated."""
    rounds = metrics["rounds"]
    if not rounds:
        return []
    last, mode = rounds[-1]["round"], rounds[-1]["mode"]
    here = [one for one in metrics["evaluations"] if (one["round"], one["split"]) == (last, "test")]
    compared = [one for one in metrics["comparisons"] if (one["round"], one["split"]) == (last, "test")]
    models = {one["model"] for one in here}
    trained = next((name for name in TRAINED if name in models), None)
    if trained is None:
        return []
    found: list[Claim] = []
    greedy = [one for one in here if one["temperature"] == 0]
    for temperature in dict.fromkeys(one["temperature"] for one in here):
        rows = [one for one in here if one["temperature"] == temperature] if temperature else greedy
        pairs = [one for one in compared if one["temperature"] == temperature]
        last_ones = _Last(trained, mode, rows, pairs, greedy)
        found += [Claim(claim, temperature, *said) for claim, said in _of_accuracy(last_ones)]
    found += [
        Claim(_NOTICES, None, *_notices(metrics.get("hazards", ()), last, trained)),
        Claim(_PLANTS_NOTHING, None, *_plants_nothing(metrics.get("planting", ()))),
    ]
    order = list(dict.fromkeys(one.claim for one in found))
    return sorted(found, key=lambda one: order.index(one.claim))


Said = tuple[Verdict, str]


def _of_accuracy(last: _Last) -> Iterator[tuple[str, Said]]:
    """(claim, what is said of it)"""
    control = last.control()
    clean = f"{control} {last.mode}" if control else None
    yield (
        "Where the evidence comes after the choice, undo solves more than as much training on clean solutions",
        _difference(last.against(clean, "hindsight"), "needs hindsight problems and the clean control"),
    )
    baselines = [f"{control} {mode}" for mode in SELECTED] if control else []
    yield (
        "There it solves more than controls with as many tokens for the best of several samples, or for tries kept in the context",
        _against_the_best([last.against(name, "hindsight") for name in (*baselines, IN_CONTEXT)]),
    )
    yield (
        f"Where the evidence comes before the choice, undo costs no more than {100 * FORWARD_LOSS:g} point",
        _difference(last.against(clean, "forward"), "needs forward problems and the clean control", -FORWARD_LOSS),
    )
    yield (
        "Undo gains more where the evidence comes late than where it does not",
        _contrast(last.against(clean, "hindsight"), last.against(clean, "forward")),
    )
    yield (
        "Trained undos solve more than undos at improbable tokens, which need no training",
        _difference(last.against(f"{last.trained} guided", "all"), "needs guided in evaluate.modes"),
    )
    if (colder := last.colder("hindsight")) and (own := last.row("hindsight")):
        yield ("Where the evidence comes after the choice, undo solves more than the control does greedily", _apart(own, colder))
    yield (
        f"Right text is left alone: undos delete it in fewer than {100 * FALSE_ALARMS:g} % of the problems",
        _rare(last.row("all")),
    )


def _difference(pair: Record | None, missing: str, least: float = 0.0) -> Said:
    if pair is None:
        return "not measured", missing
    low, high = pair["ci95"]
    reach = f"{points(pair['difference'])} points, 95 % {points(low)} to {points(high)}"
    return _verdict(low, high, least), f"{reach}, McNemar p {p_value(pair['mcnemar_p'])}, n {pair['n']:,}"


def _against_the_best(pairs: Sequence[Record | None]) -> Said:
    """A claim about several controls, by the best of them."""
    known = sorted((pair for pair in pairs if pair is not None), key=lambda pair: float(pair["difference"]))
    said = [(*_difference(pair, ""), pair["before"]) for pair in known]
    if not said:
        return "not measured", "needs evaluate.votes or sft.in_context"
    verdict, figures, best = min(said, key=lambda one: _ORDER.index(one[0]))
    return verdict, f"{figures}, against {best}"


def _apart(one: Record, other: Record) -> Said:
    """Two shares as if of different problems: their difference with Newcombe's interval (1998, method 10)."""
    value, (low, high) = one["accuracy"] - other["accuracy"], one["ci95"]
    below, above = one["accuracy"] - low, high - one["accuracy"]
    other_below, other_above = other["accuracy"] - other["ci95"][0], other["ci95"][1] - other["accuracy"]
    low, high = value - (below**2 + other_above**2) ** 0.5, value + (above**2 + other_below**2) ** 0.5
    told = f"{100 * one['accuracy']:.1f} % of {one['n']:,} against {100 * other['accuracy']:.1f} % of {other['n']:,}"
    return _verdict(low, high), f"{told}: {points(value)} points, 95 % {points(low)} to {points(high)}"


def _contrast(late: Record | None, early: Record | None) -> Said:
    """The difference of two differences on problems that have nothing to do with each other: their variances add."""
    if late is None or early is None:
        return "not measured", "needs hindsight and forward problems and the clean control"
    value = late["difference"] - early["difference"]
    half = sum(((one["ci95"][1] - one["ci95"][0]) / 2) ** 2 for one in (late, early)) ** 0.5
    return _verdict(value - half, value + half), (
        f"{points(late['difference'])} points there, {points(early['difference'])} elsewhere: {points(value)} apart, "
        f"95 % {points(value - half)} to {points(value + half)}"
    )


def _rare(row: Record | None) -> Said:
    if row is None or row["spurious_undo_rate"] is None:
        return "not measured", "nothing was evaluated"
    found = share(round(row["spurious_undo_rate"] * row["n"]), row["n"])
    assert found is not None
    told = f"{100 * found.value:.1f} %, 95 % {100 * found.low:.1f} to {100 * found.high:.1f}, n {found.n:,}"
    return _verdict(-found.high, -found.low, -FALSE_ALARMS), told


_NOTICES = "Undos come of errors: a planted false result is taken back more often than a planted right one"
_PLANTS_NOTHING = f"Training plants no errors: first tries lose no more than {100 * FIRST_TRIES:g} points to it"


def _notices(hazards: Sequence[Record], round: int, trained: str) -> Said:
    """Undo behind a false result that was planted, against a right equation in other words."""
    mine = {
        one["kind"]: one["undone"]
        for one in hazards
        if (one["round"], one["model"], one["group"]) == (round, trained, "all") and one["undone"]["ci95"]
    }
    if not {"arithmetic", "paraphrase"} <= mine.keys():
        return "not measured", "needs evaluate.planted"
    return _apart(*(one | {"accuracy": one["value"]} for one in (mine["arithmetic"], mine["paraphrase"])))


def _plants_nothing(audits: Sequence[Record]) -> Said:
    """First tries over each training, or over rounds, by the slope within problems."""
    said: list[Said] = []
    for one in audits:
        slope, times = one["accuracy_trend"], one["points"]
        if slope and slope["low"] is not None:
            reach = times[-1]["at"] - times[0]["at"]
            low, value, high = (slope[key] * reach for key in ("low", "slope", "high"))
            told = f"{one['name']}: {points(value)} points, 95 % {points(low)} to {points(high)}, n {one['n']:,}"
            said.append((_verdict(low, high, -FIRST_TRIES), told))
    return _worst(said, "needs sft.checks")


_ORDER: tuple[Verdict, ...] = ("does not hold", "not decided", "holds")


def _worst(said: Sequence[Said], missing: str) -> Said:
    """A claim about several things is as good as the worst of them."""
    worst: Callable[[Said], int] = lambda one: _ORDER.index(one[0])  # noqa: E731
    return min(said, key=worst) if said else ("not measured", missing)


def _verdict(low: float, high: float, bound: float = 0.0) -> Verdict:
    return "holds" if low > bound else "does not hold" if high < bound else "not decided"
