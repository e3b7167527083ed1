"""The pages themselves: what the library holds, as HTML for the server or as one file that works from a disk.

Styles and the one script stand in the page; the policy names them by their hashes and allows nothing else, so that markup which
found its way into a page through all escaping would still do nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.report import templates
from pipeline.search_page import Drawn, step_text
from pipeline.view.filters import FACETS, ORDERS, PAGE_ROWS, RANGES, Filters, Selection, Table
from pipeline.view.library import Ask, Library, Rollout

STEPS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.6, 0.75, 0.9)
"""Where one shade of P(U) ends and the next one begins."""
_TREES = 50  # on one page
_RANGE_WORDS = {"undos": "undos", "reward": "reward"}


@dataclass(frozen=True)
class TokenDoubt:
    """One emitted token with the model's wish to take it back."""

    number: int
    """From 1."""
    text: str
    fate: str
    p: float

    @property
    def level(self) -> int:
        return sum(self.p >= step for step in STEPS)


@dataclass(frozen=True)
class _Choice:
    name: str
    title: str
    chosen: str
    choices: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class _Panel:
    """The form of the filters."""

    facets: Sequence[_Choice]
    ranges: Sequence[tuple[str, str, str, str]]
    """(name, title, least, greatest)."""
    text: str
    order: str
    orders: Sequence[tuple[str, str]]
    set: int
    """How many filters are set."""
    static: bool = False


def doubts_of(rollout: Rollout, p_undo: Sequence[float]) -> list[TokenDoubt]:
    rows = zip(rollout.token_texts, rollout.fates, p_undo, strict=True)
    return [TokenDoubt(number, text, fate, p) for number, (text, fate, p) in enumerate(rows, start=1)]


def address(rollout: Rollout, filters: Filters | None = None, **more: object) -> str:
    """Where a rollout's own page is; the filters that led to it come along."""
    place = rollout.place
    return f"/rollout/{place.round}/{place.stage}/{place.at}{(filters or Filters({}, {})).query(page=None, **more)}"


class Pages:
    """Renders. Everything is escaped by the templates."""

    def __init__(self) -> None:
        self._environment = templates(Path(__file__).parent)
        self._environment.filters["text"] = step_text
        self._environment.globals["steps"] = STEPS
        self._style = self._environment.get_template("view.css.j2").render()
        self._script = self._environment.get_template("view.js.j2").render()
        style, script = (_hash(text) for text in (self._style, self._script))
        self._sources = f"default-src 'none'; style-src {style}; script-src {script}; img-src data:; base-uri 'none'"

    @property
    def policy(self) -> str:
        """The Content-Security-Policy of what the server sends."""
        return f"{self._sources}; form-action 'self'; frame-ancestors 'none'"

    def message(self, name: str, title: str, text: str) -> str:
        return self._render("message.html.j2", name=name, title=title, message=text)

    def listed(self, library: Library, selection: Selection) -> str:
        filters, page = selection.filters, selection.page
        first = (page - 1) * PAGE_ROWS
        return self._render(
            "list.html.j2",
            **_about(library, "rollouts"),
            panel=_panel(library.table, selection),
            rollouts=[library.rollout(int(number)) for number in selection.on_page],
            total=len(selection.rows),
            first=first + 1,
            last=min(first + PAGE_ROWS, len(selection.rows)),
            at=page,
            pages=selection.pages,
            to=filters.query,
            link=lambda one: address(one, filters),
        )

    def single(
        self, library: Library, selection: Selection, number: int, ask: Ask | None, doubts: Sequence[float] | str | None
    ) -> str:
        """`doubts`: P(U) behind each token, or why there is none; None where nobody asked."""
        filters, one = selection.filters, library.rollout(number)
        ranks = (selection.rows == number).nonzero()[0]
        rank = int(ranks[0]) + 1 if len(ranks) else None
        neighbours = [rank - 2, rank] if rank else []
        before, after = (
            address(library.rollout(int(selection.rows[at])), filters) if 0 <= at < len(selection.rows) else None
            for at in neighbours or (-1, -1)
        )
        page = None if rank is None else -(-rank // PAGE_ROWS)
        return self._render(
            "rollout.html.j2",
            **_about(library, ""),
            one=one,
            doubts=doubts_of(one, doubts) if doubts and not isinstance(doubts, str) else None,
            doubt_error=doubts if isinstance(doubts, str) else None,
            can_ask=ask is not None and bool(one.token_texts),
            model_folder="/".join(ask.folder.relative_to(library.store.root).parts) if ask else "",
            ask=address(one, filters, p_undo=1),
            back=filters.query(page=page if page != 1 else None),
            before=before,
            after=after,
            rank=rank,
            total=len(selection.rows),
            others=[library.rollout(other) for other in library.siblings(one)],
            link=lambda other: address(other),
        )

    def trees(self, library: Library, page: int) -> str:
        places = library.tree_lines()
        pages = max(1, -(-len(places) // _TREES))
        page = min(page, pages)
        start = (page - 1) * _TREES
        lines = [library.tree_line(*place) for place in places[start : start + _TREES]]
        places_on = {"first": start + bool(lines), "last": start + len(lines), "total": len(places), "at": page, "pages": pages}
        return self._render("trees.html.j2", **_about(library, "trees"), lines=lines, **places_on)

    def tree(self, library: Library, round: int, at: int) -> str:
        places = library.tree_lines()
        index = places.index((round, at))
        before, after = (
            "/tree/{}/{}".format(*places[other]) if 0 <= other < len(places) else None for other in (index - 1, index + 1)
        )
        return self._render("tree.html.j2", **_about(library, "trees"), tree=library.tree(round, at), before=before, after=after)

    def exported(
        self,
        library: Library,
        selection: Selection,
        rollouts: Sequence[Rollout],
        doubts: Mapping[int, Sequence[float]],
        drawn: Sequence[Drawn],
    ) -> str:
        """One file with everything in it. It filters what it holds by itself."""
        by_number = {one.number: one for one in rollouts}
        asked = selection.filters.query(order=None, page=None).removeprefix("?")
        return self._render(
            "export.html.j2",
            **_about(library, ""),
            policy=f"{self._sources}; form-action 'none'",
            static=True,
            panel=_of_some(rollouts, library.table.rewarded),
            rollouts=rollouts,
            total=len(selection.rows),
            asked=asked,
            doubts={number: doubts_of(by_number[number], found) for number, found in doubts.items()},
            drawn=drawn,
            searched=len(library.tree_lines()),
        )

    def _render(self, template: str, **values: Any) -> str:
        given = {"notes": (), "trees": False, "here": "", "static": False, "policy": None} | values
        return self._environment.get_template(template).render(
            style=Markup(self._style), script=Markup(self._script), **given
        )  # both are our own, so they are not escaped


def _about(library: Library, here: str) -> dict[str, Any]:
    return {"name": library.name, "notes": library.notes, "trees": bool(library.trees), "here": here}


def _panel(table: Table, selection: Selection) -> _Panel:
    filters = selection.filters
    facets = [
        _Choice(name, title, filters.chosen.get(name, ""), selection.choices(name))
        for name, title in FACETS.items()
        if len(table.facets[name].values) > 1
    ]
    ranges = []
    for name in RANGES:
        if name == "undos" or table.rewarded:
            ends = filters.between.get(name, (float("-inf"), float("inf")))
            low, high = (f"{value:g}" if isfinite(value) else "" for value in ends)
            ranges.append((name, _RANGE_WORDS[name], low, high))
    orders = [(name, title) for name, title in ORDERS.items() if table.rewarded or name not in ("low", "high")]
    return _Panel(facets, ranges, filters.text, filters.order, orders, filters.count)


def _of_some(rollouts: Sequence[Rollout], rewarded: bool) -> _Panel:
    """The form over some rollouts alone."""
    facets = []
    for name, title in FACETS.items():
        values = [one.facets[name] for one in rollouts]
        choices = [(value, values.count(value)) for value in dict.fromkeys(values)]
        if len(choices) > 1:
            facets.append(_Choice(name, title, "", choices))
    ranges = [(name, _RANGE_WORDS[name], "", "") for name in RANGES if name == "undos" or rewarded]
    return _Panel(facets, ranges, "", "stored", (), 0, static=True)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
