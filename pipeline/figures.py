"""Figures of the report: lines and bars in, inline SVG out, in the page's own colours. Equal data give equal bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Colours of the figures, replaced by the page's own so that they follow light and dark.
_INK, _RULE, _SERIES = "#010203", "#040506", ("#070809", "#0a0b0c", "#0d0e0f", "#101112")
_STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


@dataclass(frozen=True)
class Line:
    """One line of a figure: (step, value) points."""

    name: str
    points: Sequence[Sequence[float]]
    band: Sequence[Sequence[float]] = ()
    """(step, low, high) of an interval, drawn as a band."""


@dataclass(frozen=True)
class Plot:
    """One figure; drawn when any of its lines has a point."""

    title: str
    lines: Sequence[Line]
    percent: bool = False
    kept_step: int | None = None
    """Step whose weights were kept, marked by an upright line."""
    bars: bool = False
    """Upright bars at whole numbers in place of lines, for a histogram."""
    whole: bool = True
    """Whether a percentage is drawn from 0 to 100, or as far as it goes."""
    across: str = "step"
    """What runs from left to right."""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)


def _drawn(points: Sequence[Sequence[Any]]) -> list[Sequence[float]]:
    """What of a line can be drawn: a point that is no number is missing, and not at 0."""
    return [point for point in points if all(map(is_number, point))]


def figures(plots: Sequence[Plot], name: str) -> list[Markup]:
    return [figure(plot, f"{name}{i}") for i, plot in enumerate(plots) if any(_drawn(line.points) for line in plot.lines)]


def figure(plot: Plot, name: str) -> Markup:
    """An inline SVG in the page's own colours; lines differ by dashes too. `name` keeps the ids of one page apart."""
    settings: dict[Any, Any] = {
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _RULE,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _RULE,
        "grid.linewidth": 0.6,
    }
    with matplotlib.rc_context(settings):
        drawing = Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = drawing.add_subplot()
        lines = [Line(line.name, _drawn(line.points), _drawn(line.band)) for line in plot.lines]
        drawn = [line for line in lines if line.points]
        for i, line in enumerate(drawn):
            steps, values = zip(*line.points, strict=True)
            if plot.bars:
                axes.bar(steps, values, width=0.7, color=_SERIES[i % len(_SERIES)], label=line.name)
                continue
            if line.band:
                places, low, high = zip(*line.band, strict=True)
                axes.fill_between(places, low, high, color=_SERIES[i % len(_SERIES)], alpha=0.15, linewidth=0)
            marker = "o" if len(values) < 30 else ""
            style: dict[str, Any] = {
                "color": _SERIES[i % len(_SERIES)],
                "linestyle": _STYLES[(i + i // len(_SERIES)) % len(_STYLES)],
                "marker": marker,
            }
            axes.plot(steps, values, **style, linewidth=1.6, markersize=3, clip_on=False, label=line.name)
        if plot.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if plot.whole else None, symbol=" %"))
            axes.set_ylim(0, 1 if plot.whole else None)
        elif all(value >= 0 for line in drawn for _, value in line.points):
            axes.set_ylim(bottom=0)
        if plot.kept_step is not None:
            axes.axvline(plot.kept_step, color=_INK, linewidth=0.8, linestyle=":", label=f"kept, step {plot.kept_step}")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel(plot.across)
        axes.grid(axis="y")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        if len(drawn) > 1 or plot.kept_step is not None:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawing.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)  # it would hold for the whole page
    svg = re.sub(r' width="[^"]*" height="[^"]*"', ' role="img"', svg, count=1)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", svg)
    for colour, variable in ((_INK, "ink"), (_RULE, "rule"), *((colour, f"series-{i + 1}") for i, colour in enumerate(_SERIES))):
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(plot.title, Markup(svg))
