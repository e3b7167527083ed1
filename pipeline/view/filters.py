"""Which rollouts are wanted: a query as the page's form sends it, checked, and the rows that it leaves.

Pure numpy over a few numbers a row, so that 10^6 rows take milliseconds. Knows no files, no model, no HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

FACETS = {
    "stage": "stage",
    "round": "round",
    "model": "model",
    "mode": "mode",
    "temperature": "temperature",
    "split": "split",
    "family": "family",
    "verdict": "verdict",
    "first": "first try",
    "finish": "end",
}
"""What can be chosen by name, with the words for it."""
RANGES = ("undos", "reward")
ORDERS = {
    "stored": "as stored",
    "undos": "most undos first",
    "tokens": "longest first",
    "low": "lowest reward first",
    "high": "highest reward first",
}
PAGE_ROWS = 20


class FilterError(ValueError):
    """A query that cannot be answered: one line that names the field and what is allowed."""


@dataclass(frozen=True)
class Facet:
    """One property of all rows."""

    values: tuple[str, ...]
    codes: npt.NDArray[np.int32]
    """[rows] Index of each row's value."""


@dataclass(frozen=True)
class Table:
    """What is filtered by, for all rows."""

    facets: Mapping[str, Facet]
    """A facet for each of FACETS."""
    undos: npt.NDArray[np.int32]
    """[rows]"""
    tokens: npt.NDArray[np.int32]
    """[rows]"""
    reward: npt.NDArray[np.float32]
    """[rows] nan where there is none."""
    problem: npt.NDArray[np.int32]
    """[rows] Number of the row's problem; -1 where it is not known."""

    def __len__(self) -> int:
        return len(self.undos)

    @property
    def rewarded(self) -> bool:
        return bool(np.isfinite(self.reward).any())


@dataclass(frozen=True)
class Filters:
    """A query understood.

    Example:
        filters = Filters.parse({"verdict": "wrong", "undos_from": "1"}, table)
        rows = Selection(table, filters, library.search).rows
    """

    chosen: Mapping[str, str]
    """Facet -> the one value wanted."""
    between: Mapping[str, tuple[float, float]]
    """`undos` or `reward` -> the least and the greatest value wanted."""
    text: str = ""
    """What the question or the problem's id contains."""
    order: str = "stored"
    page: int = 1

    @classmethod
    def parse(cls, query: Mapping[str, str], table: Table) -> Filters:
        """Empty values ask for nothing.

        Raises:
            FilterError: a field or a value that does not exist here.
        """
        asked = {name: value.strip() for name, value in query.items() if value.strip()}
        chosen = {name: asked.pop(name) for name in FACETS if name in asked}
        for name, value in chosen.items():
            values = table.facets[name].values
            if value not in values:
                raise FilterError(f"{name}={_shown(value)}: allowed here are {', '.join(values) or 'none'}")
        between = {}
        for name in RANGES:
            ends = [asked.pop(f"{name}_{end}", None) for end in ("from", "to")]
            if any(ends):
                low, high = (_number(f"{name}_{end}", text) for end, text in zip(("from", "to"), ends, strict=True))
                between[name] = (-math.inf if low is None else low, math.inf if high is None else high)
        text, order = asked.pop("text", ""), asked.pop("order", "stored")
        page = asked.pop("page", "1")
        if order not in ORDERS:
            raise FilterError(f"order={_shown(order)}: allowed are {', '.join(ORDERS)}")
        if not (page.isascii() and page.isdigit() and 0 < len(page) < 10 and int(page)):
            raise FilterError(f"page={_shown(page)}: must be a whole number from 1")
        if asked:
            known = ", ".join([*FACETS, *(f"{name}_{end}" for name in RANGES for end in ("from", "to")), "text", "order", "page"])
            raise FilterError(f"{_shown(next(iter(asked)))}: no such filter; there are {known}")
        return cls(chosen, between, text, order, int(page))

    def query(self, **changes: object) -> str:
        """As part of an address, `?` included; nothing for no filters. A change to None takes a field out."""
        fields: dict[str, object] = dict(self.chosen)
        for name, (low, high) in self.between.items():
            ends = {f"{name}_from": low, f"{name}_to": high}
            fields |= {end: f"{value:g}" for end, value in ends.items() if math.isfinite(value)}
        fields["text"], fields["order"] = self.text, "" if self.order == "stored" else self.order
        fields["page"] = self.page if self.page > 1 else ""
        text = urlencode({name: value for name, value in (fields | changes).items() if value not in ("", None)})
        return f"?{text}" if text else ""

    @property
    def count(self) -> int:
        """How many are set."""
        return len(self.chosen) + len(self.between) + bool(self.text)


class Selection:
    """The rows that the filters leave, in their order, and how many each other choice would leave."""

    def __init__(self, table: Table, filters: Filters, search: Callable[[str], Mask]) -> None:
        """`search` says of each problem whether its question or id contains a text."""
        self._table, self.filters = table, filters
        self._masks: dict[str, Mask] = {}
        for name, value in filters.chosen.items():
            facet = table.facets[name]
            self._masks[name] = facet.codes == facet.values.index(value)
        for name, (low, high) in filters.between.items():
            column = table.undos if name == "undos" else table.reward
            self._masks[name] = (column >= low) & (column <= high)  # false for nan
        if filters.text:
            found = np.append(search(filters.text), False)  # -1 is the last
            self._masks["text"] = found[table.problem]
        self._failed = np.zeros(len(table), np.int8)
        for mask in self._masks.values():
            self._failed += ~mask
        self.rows = self._ordered(np.flatnonzero(self._failed == 0))

    def _ordered(self, rows: Rows) -> Rows:
        order, table = self.filters.order, self._table
        if order == "stored":
            return rows
        keys = {"undos": -table.undos, "tokens": -table.tokens, "low": table.reward, "high": -table.reward}
        return rows[np.argsort(keys[order][rows], kind="stable")]  # nan comes last

    def choices(self, name: str) -> list[tuple[str, int]]:
        """(value, rows that it would leave) for each value of a facet, under all other filters."""
        facet = self._table.facets[name]
        own = self._masks.get(name)
        open_rows = self._failed == 0 if own is None else self._failed - ~own == 0
        counts = np.bincount(facet.codes[open_rows], minlength=len(facet.values))
        return [(value, int(count)) for value, count in zip(facet.values, counts, strict=True)]

    @property
    def pages(self) -> int:
        return max(1, -(-len(self.rows) // PAGE_ROWS))

    @property
    def page(self) -> int:
        """The page asked for, or the last one."""
        return min(self.filters.page, self.pages)

    @property
    def on_page(self) -> Rows:
        start = (self.page - 1) * PAGE_ROWS
        return self.rows[start : start + PAGE_ROWS]


def evenly(rows: Rows, most: int) -> Rows:
    """At most so many of them, spread over all."""
    return rows if len(rows) <= most else rows[np.arange(most) * len(rows) // most]


def _number(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise FilterError(f"{name}={_shown(text)}: must be a number")
    return value


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
