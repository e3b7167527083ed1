"""Filters, counts and paging of rollouts against the obvious loop over rows."""

from __future__ import annotations

import math
import random
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.view.filters import FACETS, ORDERS, PAGE_ROWS, Facet, FilterError, Filters, Selection, Table, evenly

VALUES = {name: ("a", "b", "c")[: 1 + i % 3] for i, name in enumerate(FACETS)}
QUESTIONS = ("how many boxes", "how many legs", "what is left")


def rows_of(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {name: rng.choice(values) for name, values in VALUES.items()}
        | {"undos": rng.randint(0, 3), "tokens": rng.randint(1, 9), "problem": rng.randint(-1, 2)}
        | {"reward": rng.choice([math.nan, -0.5, 0.0, 1.0])}
        for _ in range(count)
    ]


def table_of(rows: list[dict[str, Any]]) -> Table:
    facets = {name: Facet(values, np.array([values.index(row[name]) for row in rows], np.int32)) for name, values in VALUES.items()}
    numbers = {name: np.array([row[name] for row in rows], np.int32) for name in ("undos", "tokens", "problem")}
    return Table(facets, reward=np.array([row["reward"] for row in rows], np.float32), **numbers)


def search(text: str) -> Any:
    return np.array([text in question for question in QUESTIONS])


def slow(rows: list[dict[str, Any]], query: dict[str, str], without: str = "") -> list[int]:
    found = []
    for number, row in enumerate(rows):
        good = all(row[name] == query[name] for name in FACETS if name in query and name != without)
        for name in ("undos", "reward"):
            for end, fits in (("from", float.__ge__), ("to", float.__le__)):
                if f"{name}_{end}" in query:
                    good = good and fits(float(row[name]), float(query[f"{name}_{end}"]))
        if "text" in query:
            good = good and row["problem"] >= 0 and query["text"] in QUESTIONS[row["problem"]]
        if good:
            found.append(number)
    return found


def slow_order(rows: list[dict[str, Any]], found: list[int], order: str) -> list[int]:
    if order == "stored":
        return found
    if order in ("undos", "tokens"):
        return sorted(found, key=lambda number: -rows[number][order])
    sign = 1 if order == "low" else -1
    return sorted(found, key=lambda number: (math.isnan(rows[number]["reward"]), sign * rows[number]["reward"]))


QUERIES = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.sampled_from(values) for name, values in VALUES.items()},
        **{f"undos_{end}": st.sampled_from(["0", "1", "2"]) for end in ("from", "to")},
        **{f"reward_{end}": st.sampled_from(["-1", "-0.5", "0", "0.5"]) for end in ("from", "to")},
        "text": st.sampled_from(["how", "legs", "nothing"]),
        "order": st.sampled_from([order for order in ORDERS]),
        "page": st.sampled_from(["1", "2", "900"]),
    },
)


@given(QUERIES, st.integers(0, 70), st.integers(0, 5))
def test_rows_and_counts_are_those_of_a_loop(query: dict[str, str], count: int, seed: int) -> None:
    rows = rows_of(count, seed)
    table = table_of(rows)
    filters = Filters.parse(query, table)
    selection = Selection(table, filters, search)
    wanted = slow(rows, query)
    if query.get("order") not in ("low", "high"):
        assert selection.rows.tolist() == slow_order(rows, wanted, query.get("order", "stored"))
    else:
        slowly = slow_order(rows, wanted, query["order"])
        by_reward = [[rows[number]["reward"] for number in some] for some in (selection.rows, slowly)]
        assert sorted(selection.rows) == wanted and np.array_equal(*by_reward, equal_nan=True)
    for name, values in VALUES.items():
        open_rows = slow(rows, query, without=name)
        assert selection.choices(name) == [(value, sum(rows[n][name] == value for n in open_rows)) for value in values]
    assert Filters.parse(dict(parse_qsl(filters.query().removeprefix("?"))), table) == filters


def test_pages_hold_every_row_once() -> None:
    rows = rows_of(3 * PAGE_ROWS + 1, 0)
    table = table_of(rows)
    pages = [Selection(table, Filters({}, {}, page=page), search) for page in range(1, 5)]
    assert [number for page in pages for number in page.on_page] == list(range(len(rows)))
    assert {page.pages for page in pages} == {4} and Selection(table, Filters({}, {}, page=99), search).page == 4


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"verdict": "maybe"}, "verdict='maybe': allowed here are a, b"),
        ({"undos_from": "many"}, "undos_from='many': must be a number"),
        ({"reward_to": "nan"}, "must be a number"),
        ({"page": "0"}, "page='0': must be a whole number from 1"),
        ({"page": "²"}, "must be a whole number"),
        ({"order": "best"}, "order='best': allowed are stored"),
        ({"colour": "red"}, "'colour': no such filter; there are stage"),
        ({"model": "x" * 500}, "…': allowed here"),
    ],
)
def test_what_cannot_be_asked(query: dict[str, str], said: str) -> None:
    with pytest.raises(FilterError) as caught:
        Filters.parse(query, table_of(rows_of(3, 0)))
    assert said in str(caught.value) and len(str(caught.value)) < 300


@given(st.integers(0, 50), st.integers(1, 60))
def test_some_of_many_are_spread_over_all(count: int, most: int) -> None:
    some = evenly(np.arange(count), most).tolist()
    assert len(some) == min(count, most) and some == sorted(set(some))
    if 0 < most < count:
        gaps = [after - before for before, after in zip(some, [*some[1:], count], strict=True)]
        assert max(gaps) - min(gaps) <= 1
