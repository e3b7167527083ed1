"""Figures of the report: lines and bars in, SVG out, inline in the page's own colours or as a picture that stands alone. Equal data
give equal bytes."""

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

_STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_MARKERS = "osD^vPX*"  # of lines of one point, which dashes cannot tell apart


@dataclass(frozen=True)
class Colours:
    ink: str
    rule: str
    paper: str
    series: Sequence[str]

    def named(self) -> dict[str, str]:
        """By the names that the page has for them."""
        series = {f"series-{i + 1}": colour for i, colour in enumerate(self.series)}
        return {"ink": self.ink, "rule": self.rule, "paper": self.paper} | series

    def css(self) -> str:
        """Declarations of a rule."""
        return "; ".join(f"--{name}: {colour}" for name, colour in self.named().items())


# Of the page, and of pictures that stand alone.
LIGHT = Colours("#1d2126", "#d9dde2", "#ffffff", ("#1f5fa8", "#a85a12", "#2c7a4b", "#8a3f97", "#b3343f"))
DARK = Colours("#e4e7ea", "#353b42", "#15181c", ("#7db4f0", "#e8a560", "#7fcf9c", "#d09be0", "#f08f97"))
# Stand in an SVG until the page's own take their place, so that it follows light and dark.
_LATER = Colours("#010203", "#040506", "#131415", ("#070809", "#0a0b0c", "#0d0e0f", "#101112", "#161718"))


@dataclass(frozen=True)
class Line:
    """One line of a figure: (step, value) points."""

    name: str
    points: Sequence[Sequence[float]]
    band: Sequence[Sequence[float]] = ()
    """(step, low, high) of an interval, drawn as a band; as a bar for a line of one point."""


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
    reach: float | None = None
    """How far from 0 it runs; None: as far as the points do."""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)


def _drawn(points: Sequence[Sequence[Any]]) -> list[Sequence[float]]:
    """What of a line can be drawn: a point that is no number is missing, and not at 0."""
    return [point for point in points if all(map(is_number, point))]


def figures(plots: Sequence[Plot], name: str) -> list[Markup]:
    return [figure(plot, f"{name}{i}") for i, plot in enumerate(plots) if any(_drawn(line.points) for line in plot.lines)]


def figure(plot: Plot, name: str) -> Markup:
    """An inline SVG in the page's own colours; lines differ by dashes too. `name` keeps the ids of one page apart."""
    svg = _svg([plot], (4.4, 2.7), name)
    svg = re.sub(r' width="[^"]*" height="[^"]*"', ' role="img"', svg, count=1)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", svg)
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(plot.title, Markup(svg))


def picture(plots: Sequence[Plot]) -> tuple[str, bytes]:
    """Figures side by side that stand alone: an SVG that follows light and dark, and a PNG."""
    plots = [plot for plot in plots if any(_drawn(line.points) for line in plot.lines)]
    size = (3.9 * max(1, len(plots)), 3.2)
    style = f"<style>:root {{ {LIGHT.css()} }} @media (prefers-color-scheme: dark) {{ :root {{ {DARK.css()} }} }}</style>"
    ground = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    svg = re.sub(r"<svg[^>]*>", lambda found: found[0] + style + ground, _svg(plots, size, "picture"), count=1)
    png = io.BytesIO()
    with matplotlib.rc_context(_settings(LIGHT, "picture")):
        _drawing(plots, size, LIGHT).savefig(png, format="png", dpi=160, facecolor=LIGHT.paper, metadata={"Software": None})
    return svg, png.getvalue()


def _svg(plots: Sequence[Plot], size: tuple[float, float], name: str) -> str:
    buffer, nothing = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(_settings(_LATER, name)):
        _drawing(plots, size, _LATER).savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)  # it would hold for the whole page
    for variable, colour in _LATER.named().items():
        svg = svg.replace(colour, f"var(--{variable})")
    # Matplotlib indents, and gives each point of a path a line of its own.
    svg = re.sub(r"\n\s*", "\n", svg)
    return re.sub(r' d="[^"]*"', lambda path: " ".join(path[0].split("\n")), svg)


def _settings(colours: Colours, salt: str) -> dict[Any, Any]:
    return {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "font.size": 9,
        "text.color": colours.ink,
        "axes.edgecolor": colours.rule,
        "axes.labelcolor": colours.ink,
        "xtick.color": colours.ink,
        "ytick.color": colours.ink,
        "grid.color": colours.rule,
        "grid.linewidth": 0.6,
    }


def _drawing(plots: Sequence[Plot], size: tuple[float, float], colours: Colours) -> Figure:
    """Several plots stand side by side and have their titles above them; one has it in the page."""
    drawing = Figure(figsize=size, layout="constrained")
    for place, plot in enumerate(plots):
        axes = drawing.add_subplot(1, len(plots), place + 1)
        _draw(axes, plot, colours)
        if len(plots) > 1:
            axes.set_title(plot.title, fontsize=9)
    return drawing


def _free_corner(axes: Any, drawn: Sequence[Line]) -> str:
    """For the legend of single points: matplotlib's own `best` does not see their bars."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    width, height = 0.7, 0.08 * len(drawn) + 0.05  # of the axes, as a legend is about as large

    def free(corner: str) -> bool:
        for line in drawn:
            (x, y), bar = line.points[0], line.band[0][1:] if line.band else ()
            across = (x - left) / (right - left)
            bottom, top = ((value - low) / (high - low) for value in (min([y, *bar]), max([y, *bar])))
            beside = across < 1 - width if "right" in corner else across > width
            if not (beside or (top < 1 - height if "upper" in corner else bottom > height)):
                return False
        return True

    corners = ("lower right", "upper right", "upper left", "lower left")
    return next((corner for corner in corners if free(corner)), corners[0])


def _draw(axes: Any, plot: Plot, colours: Colours) -> None:
    lines = [Line(line.name, _drawn(line.points), _drawn(line.band)) for line in plot.lines]
    drawn = [line for line in lines if line.points]
    for i, line in enumerate(drawn):
        steps, values = zip(*line.points, strict=True)
        colour = colours.series[i % len(colours.series)]
        if plot.bars:
            axes.bar(steps, values, width=0.7, color=colour, label=line.name)
            continue
        if len(line.points) == 1:
            reach = [[values[0] - line.band[0][1]], [line.band[0][2] - values[0]]] if line.band else None
            mark = _MARKERS[i % len(_MARKERS)]
            axes.errorbar(steps, values, reach, color=colour, fmt=mark, markersize=6, linewidth=1.6, clip_on=False, label=line.name)
            continue
        if line.band:
            places, low, high = zip(*line.band, strict=True)
            axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        marker = "o" if len(values) < 30 else ""
        style: dict[str, Any] = {"linestyle": _STYLES[(i + i // len(colours.series)) % len(_STYLES)], "marker": marker}
        axes.plot(steps, values, color=colour, **style, linewidth=1.6, markersize=3, clip_on=False, label=line.name)
    if plot.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if plot.whole else None, symbol=" %"))
        axes.set_ylim(0, 1 if plot.whole else None)
    elif all(value >= 0 for line in drawn for _, value in line.points):
        axes.set_ylim(bottom=0)
    if plot.reach is not None:
        axes.set_xlim(0, plot.reach)
    if plot.kept_step is not None:
        axes.axvline(plot.kept_step, color=colours.ink, linewidth=0.8, linestyle=":", label=f"kept, step {plot.kept_step}")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(plot.across)
    axes.grid(axis="y")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    if len(drawn) > 1 or plot.kept_step is not None:
        single = all(len(line.points) == 1 for line in drawn)
        axes.legend(frameon=False, loc=_free_corner(axes, drawn) if single else "best")
