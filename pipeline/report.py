"""The page at the end of a run: plain data in, one self-contained HTML page out. Called by the report stage.

Reads no file but its template and knows no model, tokenizer or dataset. Equal data give equal bytes. What a model wrote is
untrusted: the template escapes everything, and `visible` takes out characters that would disturb the text around them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader

from pipeline.backtrack.undo import UndoRule, apply_undo
from pipeline.config import DecodeSettings
from pipeline.figures import DARK, LIGHT, Plot, figures, is_number
from pipeline.headline import headline
from pipeline.metrics import TRAINED

NONE = "–"
"""What stands where there is no number; never 0."""
MINUS, NBSP = "−", "\u00a0"
LONGEST = 6000
"""Characters of one text that the page shows; the rest is counted."""
MEASURES = (
    ("accuracy", "accuracy"),
    ("undo_rate", "with undo"),
    ("spurious_rate", "with spurious undo"),
    ("logp_error", "log p(error | prefix), nats"),
    ("p_undo_error", "P(U | own error)"),
    ("p_undo_right", "P(U | right)"),
    ("p_correction", "P(correction | after undo)"),
    ("first_try_accuracy", "first tries right"),
    ("errors_per_try", "errors in a first try"),
)
"""What an experiment measures, with the words for it."""
COSINES = {
    "cos_error_undo": "error, undo",
    "cos_error_correction": "error, correction",
    "cos_undo_correction": "undo, correction",
}
"""Cosines of gradients by the names that the checks of a training give them, in words."""
KINDS = ("all", "forward", "hindsight")
LABELS = {
    "base": "before",
    "clean_control": "clean control",
    "in_context": "control that searches in its context",
    "sft": "after",
    "dpo": "after preferences",
    "grpo_control": "control after GRPO",
    "grpo": "after GRPO",
}
_PHRASES = {
    "base": "the model before",
    "clean_control": "the clean control",
    "in_context": "the control that searches in its context",
    "sft": "the model after fine-tuning",
    "dpo": "the model after preferences",
    "grpo_control": "the control after GRPO",
}
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class Piece:
    """A stretch of a rollout whose tokens met the same fate.

    Example:
        >>> rule = UndoRule(undo_id=9, unit="token")
        >>> [(piece.kind, piece.text) for piece in pieces([5, 6, 9, 7], ["a", "b", "", "c"], rule)]
        [('kept', 'a'), ('deleted', 'b'), ('undo', ''), ('kept', 'c')]
    """

    kind: Literal["kept", "deleted", "undo", "cut"]
    text: str = ""
    run: int = 0
    """Number, from 1, of the run of undo tokens that this is or that deleted this; 0 for what is kept."""
    count: int = 0
    """Tokens of an undo run; characters left out for a cut."""
    noops: int = 0
    """Tokens of an undo run that deleted nothing."""


@dataclass(frozen=True)
class Shown:
    """One rollout as the page shows it."""

    problem: str
    family: str
    hindsight: bool
    question: str
    answer: str
    """The gold answer."""
    correct: bool
    first_correct: bool
    undos: int
    spurious: int
    finish: str
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class ShownGroup:
    """Rollouts of one kind, with how many there were to choose from."""

    title: str
    total: int
    rollouts: Sequence[Shown]


@dataclass(frozen=True)
class JudgedShown:
    """A wrong rollout with its first error marked."""

    problem: str
    family: str
    question: str
    answer: str
    before: str
    error: str
    after: str
    """The rollout's text before, within and behind the error."""
    step: int
    """Number of the wrong step, from 1."""
    kind: str
    evidence: str
    method: str


@dataclass(frozen=True)
class CountTable:
    """Counts by row and column; the first row, `all`, sums the others."""

    title: str
    head: str
    """What the rows are."""
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[int]]]


@dataclass(frozen=True)
class Evidence:
    """What the last round shows beside accuracies: records as in `metrics.json`, and figures of them."""

    difficulty: Sequence[Mapping[str, Any]] = ()
    rationalisation: Sequence[Mapping[str, Any]] = ()
    error_kinds: Sequence[Mapping[str, Any]] = ()
    passes: Sequence[Mapping[str, Any]] = ()
    biases: Sequence[Mapping[str, Any]] = ()
    hazards: Sequence[Mapping[str, Any]] = ()
    interventions: Sequence[Mapping[str, Any]] = ()
    audits: Sequence[Mapping[str, Any]] = ()
    """Of planted errors, see pipeline/breakdown.py."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Words for kinds of planted texts."""
    sampled: Sequence[Plot] = ()
    lengths: Sequence[Plot] = ()
    hazard_plots: Sequence[Plot] = ()
    bias_plots: Sequence[Plot] = ()
    audit_plots: Sequence[Plot] = ()
    missing: Sequence[str] = ()
    """What the run has not measured, in words."""


@dataclass(frozen=True)
class Page:
    """All that one report says."""

    name: str
    undo_token: str
    unit: str
    temperature: float
    metrics: Mapping[str, Any]
    """What `metrics.json` of the run holds."""
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    """How mode `rewind` decodes."""
    plots: Sequence[Plot] = ()
    checked: Sequence[str] = ()
    """What the checks of each training found of its loss and its mask, in words."""
    experiment: Sequence[Plot] = ()
    compared: Mapping[str, Any] = field(default_factory=dict)
    """What `metrics.json` of an experiment holds."""
    evidence: Evidence = field(default_factory=Evidence)
    tables: Sequence[CountTable] = ()
    histograms: Sequence[Plot] = ()
    judged: Sequence[JudgedShown] = ()
    groups: Sequence[ShownGroup] = ()
    config: str = ""
    versions: Sequence[tuple[str, str]] = field(default=())


def templates(*more: Path) -> Environment:
    """The templates beside this file, and those of other folders, with the filters that they share. Everything is escaped."""
    folders = [*more, Path(__file__).parent]
    environment = Environment(loader=FileSystemLoader(folders), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    filters: dict[str, Callable[..., str | None]] = {
        "percent": percent,
        "interval": interval,
        "number": number,
        "count": count,
        "p_value": p_value,
        "points": points,
        "reach": lambda ends: f"{points(ends[0])} to {points(ends[1])}" if ends else NONE,
        "span": span,
        "visible": visible,
        "clip": clip,
        "settings": lambda changes: ", ".join(f"{key} {value}" for key, value in changes.items()) or "nothing",
        "label": lambda model: LABELS.get(model, model),
        "planted_word": planted_word,
    }
    environment.filters |= filters
    return environment


def render(page: Page) -> str:
    """The HTML page."""
    environment = templates()
    metrics = page.metrics
    last = max((one["round"] for one in metrics["rounds"]), default=0)
    mode_of = {one["round"]: one["mode"] for one in metrics["rounds"]}
    evaluations = [row for row in metrics["evaluations"] if row["temperature"] == page.temperature]
    main = [row for row in evaluations if row["mode"] == mode_of[row["round"]]]
    now = [row for row in main if row["round"] == last]
    models = list(dict.fromkeys(row["model"] for row in now))
    families = [group for group in dict.fromkeys(row["group"] for row in now) if group not in KINDS]
    compared = [one for one in metrics["comparisons"] if one["round"] == last]
    comparisons = [one for one in compared if one["temperature"] == page.temperature]
    return environment.get_template("report.html.j2").render(
        page=page,
        last=last,
        models=models,
        decoded=list(dict.fromkeys(row["model"] for row in evaluations if row["round"] == last)),
        trained=next((name for name in TRAINED if name in models), "sft"),
        probed=list(dict.fromkeys(row["model"] for row in metrics["probes"] if row["round"] == last)),
        kinds=list(KINDS),
        splits=[split for split in ("test", "ood") if any(row["split"] == split for row in now)],
        families=families,
        mode=mode_of.get(last),
        modes=list(dict.fromkeys(row["mode"] for row in evaluations if row["round"] == last)),
        main=_finder(main, "round", "model", "split", "group"),
        in_mode=_finder(evaluations, "round", "model", "mode", "split", "group"),
        probe=_finder(metrics["probes"], "round", "model", "group"),
        worded=[in_words(one) for one in comparisons if _is_told(one)],
        comparisons=comparisons,
        claimed=[(claim, list(some)) for claim, some in groupby(metrics.get("claims", ()), itemgetter("claim"))],
        also_at=_also_at(page, last, compared),
        phrase=phrase,
        evidence=page.evidence,
        figures_of=lambda name: figures(getattr(page.evidence, name), name),
        light=LIGHT.css(),
        dark=DARK.css(),
        headlines=figures(headline(metrics, page.temperature), "headline"),
        figures=figures(page.plots, "plot"),
        histograms=figures(page.histograms, "histogram"),
        experiment=figures(page.experiment, "experiment"),
        measures=MEASURES,
        last_measures=_last_measures(page.compared),
    )


def _also_at(
    page: Page, last: int, compared: Sequence[Mapping[str, Any]]
) -> list[tuple[float, list[Mapping[str, Any]], list[str]]]:
    """(temperature, accuracies by model and kind, sentences) for each temperature beside the page's own."""
    rows = [row for row in page.metrics["evaluations"] if row["round"] == last and row["group"] in KINDS and row["n"]]
    return [
        (
            temperature,
            [row for row in rows if row["temperature"] == temperature],
            [in_words(one) for one in compared if _is_told(one) and one["temperature"] == temperature],
        )
        for temperature in dict.fromkeys(row["temperature"] for row in rows)
        if temperature != page.temperature
    ]


def _finder(rows: Iterable[Mapping[str, Any]], *keys: str) -> Callable[..., Mapping[str, Any]]:
    """Lookup by the values of the keys; an empty record where there is none, which is shown as `NONE`."""
    found = {tuple(row[key] for key in keys): row for row in rows}
    return lambda *values: found.get(values, {})


def _is_told(comparison: Mapping[str, Any]) -> bool:
    """Whether a comparison gets a sentence of its own; all of them stand in the table."""
    return comparison["split"] == "test" and comparison["group"] in KINDS


def phrase(name: str, trained: str = "sft") -> str:
    """What a sentence calls that which the trained model is compared with, a model and its mode."""
    model, _, mode = name.rpartition(" ")
    if model != trained:
        means = {
            "guided": " guided by a signal",
            "vote": " by majority vote",
            "likeliest": " by the likeliest of several samples",
            "best_of_n": " by the process reward model's choice",
        }.get(mode, "")
        return _PHRASES.get(model, model.replace("_", " ")) + means
    return "its own first tries with undo forbidden" if mode == "forbidden" else f"itself in mode “{mode}”"


def in_words(comparison: Mapping[str, Any]) -> str:
    """One sentence for a pair: gains and losses alike, and whether the interval leaves 0 out."""
    difference = comparison["difference"]
    gap = f"{abs(100 * difference):.1f} points {'above' if difference > 0 else 'below'}" if difference else "level with"
    ends = comparison["ci95"]
    told = f"95{NBSP}% interval {points(ends[0])} to {points(ends[1])}" if ends else "too few problems for an interval"
    trained = comparison["after"].split()[0]
    place = "all problems" if comparison["group"] == "all" else f"{comparison['group']} problems"
    sentence = (
        f"{trained} is {gap} {phrase(comparison['before'], trained)} on {place} ({comparison['split']}): "
        f"{told}, McNemar p{NBSP}{p_value(comparison['mcnemar_p'])}, "
        f"{comparison['gained']} gained, {comparison['lost']} lost, n{NBSP}{count(comparison['n'])}"
    )
    return f"{sentence}." if ends and not ends[0] <= 0 <= ends[1] else f"{sentence}; not decided at this n."


def planted_word(audit: Mapping[str, Any]) -> str:
    """What an audit of planted errors says: p below .05 counts, as nothing else does here."""
    worse = {"accuracy_trend": -1, "errors_trend": 1}
    found = [(audit[key], sign) for key, sign in worse.items() if audit[key]]
    if any(one["p"] < 0.05 and one["slope"] * sign > 0 for one, sign in found):
        return "first tries get worse"
    if any(one["p"] < 0.05 for one, _ in found):
        return "first tries get better"
    return "no trend at this n"


def percent(value: Any) -> str:
    return f"{100 * value:.1f}{NBSP}%" if is_number(value) else NONE


def interval(value: Any) -> str:
    """Two shares as percent, such as `71.2 to 78.0`."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(is_number(end) for end in value):
        return NONE
    return f"{100 * value[0]:.1f} to {100 * value[1]:.1f}"


def number(value: Any, digits: int = 1, sign: bool = False) -> str:
    """A value too small for its digits is shown as such, since 0 is another finding."""
    if not is_number(value):
        return NONE
    if sign:
        return signed(value, digits)
    least = 10**-digits
    return f"<{NBSP}{least:.{digits}f}" if 0 < value < least / 2 else f"{value:,.{digits}f}"


def span(ends: Any, digits: int = 1, sign: bool = False) -> str:
    """Two values, such as an interval in nats."""
    if not isinstance(ends, Sequence) or isinstance(ends, str) or not all(map(is_number, ends)):
        return NONE
    return " to ".join(number(end, digits, sign) for end in ends)


def signed(value: float, digits: int = 1) -> str:
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else MINUS}{text}"


def points(share: float) -> str:
    """A difference of two shares in percentage points."""
    return signed(100 * share) if is_number(share) else NONE


def count(value: Any) -> str:
    return f"{value:,}" if is_number(value) else NONE


def p_value(value: Any) -> str:
    if not is_number(value):
        return NONE
    return f"<{NBSP}0.001" if value < 0.001 else f"{value:.3f}"


def visible(text: str) -> str:
    """Text without control characters, lone surrogates and marks that turn the reading direction; each becomes U+FFFD."""
    return "".join(
        "\ufffd" if char in _BIDI or (char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cs")) else char for char in text
    )


def clip(text: str) -> str:
    """At most `LONGEST` characters, and how many are left out."""
    left = len(text) - LONGEST
    return text if left <= 0 else f"{text[:LONGEST]} … {count(left)} more characters"


def pieces(ids: Sequence[int], texts: Sequence[str], rule: UndoRule) -> list[Piece]:
    """What became of each emitted token, equal neighbours joined. `texts[i]` is the text of `ids[i]`."""
    undone = apply_undo(ids, rule)
    deleting = set(undone.deleted_by)
    run_of: dict[int, int] = {}
    run = 0
    for index, token in enumerate(ids):
        if token == rule.undo_id:
            run += index - 1 not in run_of
            run_of[index] = run

    def fate(index: int) -> tuple[Literal["kept", "deleted", "undo"], int]:
        if index in run_of:
            return "undo", run_of[index]
        by = undone.deleted_by[index]
        return ("kept", 0) if by < 0 else ("deleted", run_of[by])

    found: list[Piece] = []
    room = LONGEST
    for (kind, number_of_run), group in groupby(range(len(ids)), fate):
        members = list(group)
        if kind == "undo":
            noops = sum(index not in deleting for index in members)
            found.append(Piece("undo", "", number_of_run, len(members), noops))
            continue
        text = "".join(texts[index] for index in members)
        if len(text) > room:
            left = len(text) - room + sum(len(texts[index]) for index in range(members[-1] + 1, len(ids)))
            return [*found, Piece(kind, visible(text[:room]), number_of_run), Piece("cut", count=left)]
        room -= len(text)
        found.append(Piece(kind, visible(text), number_of_run))
    return found


def tabulate(title: str, head: str, columns: Sequence[str], counts: Mapping[tuple[str, str], int]) -> CountTable:
    """A table from counts by (row, column); columns that are not named are left out."""
    names = list(dict.fromkeys(row for row, _ in counts))
    rows = [(name, [counts.get((name, column), 0) for column in columns]) for name in names]
    return CountTable(title, head, columns, [("all", [sum(row[1][i] for row in rows) for i in range(len(columns))]), *rows])


def _last_measures(compared: Mapping[str, Any]) -> Callable[..., Mapping[str, Any]]:
    """Lookup by variant, group and measure of what an experiment measured at each variant's last step."""
    return _finder(sorted(compared.get("measures", ()), key=lambda row: row["step"]), "variant", "group", "name")
