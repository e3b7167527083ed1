"""What the report says beside accuracy: samples at equal tokens, how much undos take back, planted errors, biases, whether
training plants errors, and what a run has not measured. Records of metrics.json in, figures and sentences out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.breakdown import FirstTries, planting
from pipeline.config import Settings
from pipeline.figures import Line, Plot
from pipeline.metrics import TRAINED
from pipeline.report import LABELS, Evidence
from pipeline.stages.io import read_rows

KINDS = {
    "random": "random tokens",
    "arithmetic": "false result",
    "own": "own error",
    "paraphrase": "right, worded otherwise",
    "right": "right, gold words",
}
NEW = ("difficulty", "rationalisation", "error_kinds", "undo_lengths", "passes", "biases", "hazards", "interventions")
"""Lists of metrics.json that stand here."""


def evidence_of(metrics: Mapping[str, Any], audits: Sequence[Mapping[str, Any]], settings: Settings) -> Evidence:
    """Of the last round; the audits are of all rounds."""
    last = max((one["round"] for one in metrics["rounds"]), default=0)
    of = {name: [one for one in metrics[name] if one["round"] == last] for name in NEW}
    main = next((one["mode"] for one in metrics["rounds"] if one["round"] == last), "")
    return Evidence(
        difficulty=[one for one in of["difficulty"] if (one["mode"], one["temperature"]) == (main, settings.evaluate.temperature)],
        rationalisation=[
            one for one in of["rationalisation"] if (one["temperature"], one["split"]) == (settings.evaluate.temperature, "test")
        ],
        error_kinds=of["error_kinds"],
        passes=of["passes"],
        biases=of["biases"],
        hazards=of["hazards"],
        interventions=of["interventions"],
        audits=audits,
        kinds=KINDS,
        sampled=list(_samples(of["passes"])),
        lengths=[_lengths(one) for one in of["undo_lengths"] if one["mode"] != "guided"],
        hazard_plots=list(_hazards(of["hazards"])),
        bias_plots=_biases(of["biases"]),
        audit_plots=[plot for one in audits for plot in _audit(one)],
        missing=list(_missing(settings, metrics, last)),
    )


def _name(model: str, mode: str) -> str:
    return f"{LABELS.get(model, model)}, {'undo forbidden' if mode == 'forbidden' else 'with undo'}"


def _samples(passes: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
    """A line for each model over what its samples cost, so that models are read off at equal tokens."""
    told = [one for one in passes if one["group"] == "all"]
    for name, title in (("majority", "maj@k: the majority of k samples is right"), ("pass", "pass@k: one of k samples is right")):
        lines = []
        for model, mode in dict.fromkeys((one["model"], one["mode"]) for one in told):
            some = [one for one in told if (one["model"], one["mode"]) == (model, mode)]
            band = [(one["tokens"], *one[f"{name}_ci95"]) for one in some if one[f"{name}_ci95"]]
            lines.append(Line(_name(model, mode), [(one["tokens"], one[name]) for one in some], band))
        if lines:
            yield Plot(title, lines, True, across="tokens a problem")


def _lengths(one: Mapping[str, Any]) -> Plot:
    heat = f", temperature {one['temperature']:g}" if one["temperature"] else ""
    title = f"{LABELS.get(one['model'], one['model'])}, mode {one['mode']}{heat}"
    return Plot(title, [Line("runs of undos", one["lengths"])], bars=True, across="tokens taken back by one run of undos")


def _hazards(records: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
    for model in dict.fromkeys(one["model"] for one in records):
        some = [one for one in records if (one["model"], one["group"]) == (model, "all") and one["n"]]
        lines = [
            Line(KINDS[one["kind"]], [point[:2] for point in one["within"]], [(j, low, high) for j, _, low, high in one["within"]])
            for one in some
        ]
        if any(value for one in some for _, value, *_ in one["within"]):
            yield Plot(f"{LABELS.get(model, model)}: P(U within j ids)", lines, True, across="j, ids behind the planted text")


def _biases(records: Sequence[Mapping[str, Any]]) -> list[Plot]:
    some = sorted((one for one in records if one["group"] == "all"), key=lambda one: one["bias"])
    words = (("accuracy", "right"), ("first_try_accuracy", "first try right"), ("undo_rate", "with undo"))
    names = (*words, ("spurious_undo_rate", "with spurious undo"))
    lines = [Line(word, [(one["bias"], one[key]) for one in some if one[key] is not None]) for key, word in names]
    return [Plot("shares of problems by bias", lines, True, across="added to the logit of undo")] if some else []


def _audit(one: Mapping[str, Any]) -> Iterator[Plot]:
    points = one["points"]
    right = Line("right", [(at["at"], at["first_try_accuracy"]) for at in points], [(at["at"], *at["ci95"]) for at in points])
    ends = [(at["at"], *at["errors_ci95"]) for at in points if at["errors_ci95"]]
    errors = Line("errors", [(at["at"], at["errors_per_try"]) for at in points], ends)
    yield Plot(f"{one['name']}: first tries right", [right], True, across=one["unit"])
    yield Plot(f"{one['name']}: errors in a first try", [errors], across=one["unit"])


def audits_of(
    inputs: Mapping[str, Path],
    curves: Mapping[str, Mapping[str, Any]],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    rounds: Iterable[int],
) -> list[dict[str, Any]]:
    """The planting audit: over the checks of each fine-tuning and each reinforcement learning, on dev problems; over the models
    that a round makes one out of the other, and over rounds, on test problems.

    Args:
        histories: of reinforcement learning, by `grpo-ROUND` and `grpo-ROUND-control`.
    """
    found = []
    for name, curve in curves.items():
        times = [
            FirstTries(step, [str(number) for number in range(len(right))], right, errors)
            for step, right, errors in curve.get("first_tries", ())
        ]
        found.append(planting(f"{name.replace('-', ', round ')}, dev", "step", times))
    for name, records in histories.items():
        checks = [(one["step"], one["first_tries"]) for one in records if "first_tries" in one]
        times = [FirstTries(step, one["problems"], one["correct"], one["errors"]) for step, one in checks]
        _, number, *control = name.split("-")
        found.append(planting(f"grpo{' of the control' if control else ''}, round {number}, dev", "step", times))
    ends: list[FirstTries] = []
    for round in rounds:
        models = _first_tries(inputs[f"evaluate-{round}"])
        order = [name for name in ("base", *reversed(TRAINED)) if name in models]
        if not ends and order:
            ends.append(FirstTries(0, *models[order[0]]))
        if order:
            ends.append(FirstTries(round, *models[order[-1]]))
        if len(order) > 2:
            title = f"round {round}, test: {', '.join(order)}"
            found.append(planting(title, "model", [FirstTries(at, *models[name]) for at, name in enumerate(order)]))
    found.append(planting("the trained model of each round, test", "round", ends))
    return [one for one in found if one]


def _first_tries(evaluate: Path) -> dict[str, tuple[list[str], list[bool], list[int]]]:
    """Problems, verdicts and errors of the first tries on the test split, by model, in the main mode at the main temperature."""
    rows = read_rows(evaluate)
    names = ("model", "mode", "split", "temperature", "problem", "first_correct", "first_errors")
    found: dict[str, tuple[list[str], list[bool], list[int]]] = {}
    main: tuple[Any, Any] | None = None
    for row in rows.select_columns(list(names)):
        main = main or (row["mode"], row["temperature"])  # the main ones come first
        if row["split"] == "test" and (row["mode"], row["temperature"]) == main:
            problems, right, errors = found.setdefault(row["model"], ([], [], []))
            problems.append(row["problem"])
            right.append(row["first_correct"])
            errors.append(row["first_errors"])
    return found


def _missing(settings: Settings, metrics: Mapping[str, Any], last: int) -> Iterator[str]:
    """What a reader could look for and does not find, and which setting makes it."""
    here = [one for one in metrics["evaluations"] if one["round"] == last and one["n"]]
    if not any(one["model"] == "clean_control" for one in here):
        yield "the clean control, without which a gain may come from the training steps alone (sft.control)"
    for split in ("test", "dev", "ood"):
        if not any(one["split"] == split for one in here):
            yield f"the {split} split, of which nothing was evaluated"
    for mode in ("rewind", "soft", "guided"):
        if not any(one["mode"] == mode for one in here):
            yield f"mode {mode} (evaluate.modes)"
    if not any(one["mode"] == "vote" for one in here):
        yield "the majority vote with as many tokens (evaluate.votes)"
    for temperature in (0.0, 1.0):
        if not any(one["temperature"] == temperature for one in here):
            yield f"temperature {temperature:g} (evaluate.also_at)"
    if not any(one["mode"] != "forbidden" for one in metrics["passes"]):
        yield "pass@k and maj@k of the trained model (evaluate.samples)"
    if not metrics["probes"]:
        yield "P(undo) at own errors: the start model made none that could be cut out"
    if not metrics["hazards"]:
        yield "planted errors and forced undos (evaluate.planted)"
    if not metrics["biases"]:
        yield "the bias sweep (evaluate.biases)"
    for stage, section in (("search", settings.search.problems), ("prm", settings.prm.steps), ("dpo", settings.dpo.steps)):
        if not section:
            yield f"stage {stage} ({stage}.{'problems' if stage == 'search' else 'steps'})"
    if not settings.grpo.steps:
        yield "stage grpo (grpo.steps)"
    if not settings.experiment.variants:
        yield "an experiment that compares ways to fine-tune (experiment.variants)"
    if settings.run.rounds == 1:
        yield "more than one round (run.rounds), and other seeds (run.seed): one run is one seed"
