"""Figures of the report: curves of the trainings, with what the checks found, and of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actors.checks import BATCH
from pipeline.figures import Line, Plot
from pipeline.report import COSINES, MEASURES

_KINDS = ("hindsight", "forward")


def plots_of(curves: Mapping[str, Mapping[str, Any]]) -> list[Plot]:
    """Of base, and of sft beside its control in every round, by what `curve.json` of each holds."""
    plots = []
    for name, curve in curves.items():
        kind, _, round = name.partition("-")
        if kind == "base":
            plots.append(Plot("base: loss", [Line("loss", curve["losses"])]))
            plots.append(Plot("base: greedy dev accuracy", [Line("dev accuracy", curve["checks"])], True, curve.get("kept_step")))
        elif kind == "sft":
            control = curves.get(f"control-{round}", {"losses": []})
            lines = [Line("sft", curve["losses"]), Line("clean control", control["losses"])]
            plots.append(Plot(f"round {round}: loss", lines))
            plots += _of_checks(curve.get("probes", ()), round)
    return plots


def _of_checks(probes: Sequence[Sequence[Any]], round: str) -> list[Plot]:
    """Undo where it belongs beside undo where nothing is wrong; then the error and its correction, by kind of problem."""
    found: dict[tuple[str, str], list[Sequence[Any]]] = {}
    for step, group, name, value, low, high, _ in probes:
        found.setdefault((group, name), []).append((step, value, low, high))
    if ("all", "p_undo_error") not in found:
        return []

    def lines(name: str) -> list[Line]:
        return [_line(kind, found.get((kind, name), ())) for kind in _KINDS]

    both = (("P(undo | own error)", "p_undo_error"), ("P(undo | right)", "p_undo_right"))
    cosines = [_line(word, found[BATCH, name]) for name, word in COSINES.items() if (BATCH, name) in found]
    return [
        *(
            Plot(f"round {round}: P(undo), {kind}", [_line(word, found.get((kind, name), ())) for word, name in both], True)
            for kind in _KINDS
        ),
        Plot(f"round {round}: log p(error | prefix), nats", lines("logp_error")),
        Plot(f"round {round}: P(correction | after undo)", lines("p_correction"), True),
        *([Plot(f"round {round}: cosine of gradients", cosines, whole=False)] if cosines else []),
    ]


def grpo_plots(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Plot]:
    """Of each reinforcement learning by its records: what rollouts earned, what was right, how often undo stood, and the policy."""
    plots = []
    for name, records in histories.items():
        _, round, *control = name.split("-")
        head = f"round {round}, GRPO{' of the control' if control else ''}"
        steps = [one for one in records if "reward" in one]
        plots += [
            Plot(f"{head}: reward", [_over(steps, "reward", "reward")], whole=False),
            Plot(
                f"{head}: right",
                [
                    _over(steps, "accuracy", "rollouts"),
                    _over(records, "greedy_accuracy", "dev, greedy"),
                    _over(records, "first_try_accuracy", "dev, first tries"),
                ],
                True,
            ),
            Plot(
                f"{head}: undo", [_over(steps, "undo_rate", "with undo"), _over(steps, "spurious_rate", "with spurious undo")], True
            ),
            Plot(f"{head}: entropy, nats", [_over(steps, "entropy", "entropy")], whole=False),
            Plot(f"{head}: reward by component, mean", _of_components(steps), whole=False),
            Plot(
                f"{head}: away from what emitted the rollouts",
                [
                    _over(steps, "clipped", "share clipped"),
                    _over(steps, "kl", "KL from the start, nats"),
                    _over(steps, "mismatch_undo", "log p, engine against learner, with undo"),
                    _over(steps, "mismatch_plain", "the same, without undo"),
                ],
                whole=False,
            ),
            Plot(f"{head}: ids of a rollout", [_over(steps, "length", "mean")], whole=False),
            Plot(
                f"{head}: seconds of a step",
                [
                    _over(steps, f"{part}_seconds", word)
                    for part, word in (("roll", "engine"), ("judge", "judge"), ("learn", "learner"))
                ],
                whole=False,
            ),
        ]
    return plots


def _of_components(steps: Sequence[Mapping[str, Any]]) -> list[Line]:
    names = dict.fromkeys(name for one in steps for name in one.get("components", ()))
    return [
        Line(name, [(one["step"], one["components"][name]["mean"]) for one in steps if name in one["components"]]) for name in names
    ]


def dpo_plots(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Plot]:
    """Of each learning from preferences by its records: how often and by how much the chosen side is preferred."""
    plots = []
    for name, records in histories.items():
        head = f"round {name.split('-')[1]}, preferences"
        both = (("trained on", ""), ("held out", "held_out_"))
        plots += [
            Plot(f"{head}: chosen preferred", [_over(records, f"{of}accuracy", word) for word, of in both], True),
            Plot(f"{head}: reward margin", [_over(records, f"{of}margin", word) for word, of in both], whole=False),
            Plot(
                f"{head}: change of log p(error), nats",
                [_over(records, f"{of}error_change", word) for word, of in both],
                whole=False,
            ),
        ]
    return plots


def _over(records: Sequence[Mapping[str, Any]], key: str, name: str) -> Line:
    return Line(name, [(one["step"], one[key]) for one in records if key in one])


def experiment_plots(compared: Mapping[str, Any]) -> list[Plot]:
    """A figure for each measure over all problems, with a line for each variant; log p(error) and accuracy by kind too."""
    found: dict[tuple[str, str], dict[str, list[Sequence[Any]]]] = {}
    for row in compared.get("measures", ()):
        by_variant = found.setdefault((row["group"], row["name"]), {})
        by_variant.setdefault(row["variant"], []).append((row["step"], row["value"], row["low"], row["high"]))
    plots = []
    for name, title in MEASURES:
        for group in ("all", *_KINDS) if name in ("logp_error", "accuracy") else ("all",):
            of_kind = "" if group == "all" else f", {group}"
            lines = [_line(variant, points) for variant, points in found.get((group, name), {}).items()]
            plots.append(Plot(f"{title}{of_kind}", lines, name not in ("logp_error", "errors_per_try"), whole=False))
    return plots


def _line(name: str, points: Sequence[Sequence[Any]]) -> Line:
    """From (step, value, low, high); a point without an interval leaves its place in the band out."""
    points = sorted(points, key=lambda point: point[0])
    return Line(name, [point[:2] for point in points], [(step, low, high) for step, _, low, high in points if low is not None])
