"""Work in parts: everything comes once, and a row that fails every time is found, whatever is beside it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.parts import Part, Parts, Quarantine, Quarantined, TooManyQuarantined


def worked(rows: int, size: int, tries: int, bad: set[int]) -> tuple[Counter[int], list[int], int]:
    """Places done, places given up, and failures on the way."""
    parts, done, given_up, failures = Parts(range(rows), size, tries), Counter[int](), [], 0
    while part := parts.next():
        assert part.rows == tuple(range(part.start, part.start + len(part.rows)))
        if bad & set(part.rows):
            failures += 1
            if not parts.failed(part):
                given_up += part.rows
        else:
            done.update(part.rows)
    return done, given_up, failures


@given(st.integers(0, 60), st.integers(1, 30), st.integers(1, 4), st.sets(st.integers(0, 59), max_size=5))
def test_every_row_is_done_once_or_given_up(rows: int, size: int, tries: int, bad: set[int]) -> None:
    done, given_up, failures = worked(rows, size, tries, bad)
    assert done == Counter(set(range(rows)) - bad)
    assert given_up == sorted(bad & set(range(rows)))
    assert failures >= tries * len(given_up)


def test_one_row_of_256_is_found_after_few_failures() -> None:
    assert worked(256, 256, 3, {100})[1:] == ([100], 5 + 3)


def test_a_part_that_failed_once_is_tried_whole_before_it_is_cut() -> None:
    part = Part(8, tuple("abcde"))
    assert part.again(3) == [Part(8, tuple("abcde"), 1)]
    assert [(one.start, "".join(one.rows), one.failures) for one in Part(8, tuple("abcde"), 1).again(3)] == [
        (8, "abc", 1),
        (11, "de", 1),
    ]
    assert Part(0, ("a",), 1).again(3) == [Part(0, ("a",), 2)] and Part(0, ("a",), 2).again(3) == []


def test_rows_are_taken_when_they_are_wanted() -> None:
    taken: list[int] = []
    parts = Parts((taken.append(row) or row for row in range(100)), 4, 3)  # type: ignore[func-returns-value]
    first = parts.next()
    assert first and taken == [0, 1, 2, 3]
    parts.untried(first)
    assert parts.next() == first and len(taken) == 4


def test_the_quarantine_keeps_what_is_known_and_has_a_limit(tmp_path: Path) -> None:
    quarantine = Quarantine(1, tmp_path / "logs" / "quarantine.jsonl")
    quarantine.add("decode", ("row", 1), Quarantined(3, "it broke", "Traceback"))
    with pytest.raises(
        TooManyQuarantined, match=r"^2 rows failed 3 times each \(cluster.row_tries\), more than cluster.quarantine=1"
    ):
        quarantine.add("decode", ("row", 2), Quarantined(3, "it broke again"))
    kept = [json.loads(line) for line in (tmp_path / "logs" / "quarantine.jsonl").read_text().splitlines()]
    assert [(one["row"], one["why"]) for one in kept] == [("('row', 1)", "it broke"), ("('row', 2)", "it broke again")]
