"""Steps cover the text, and characters find their tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifiers.steps import MAX_STEPS, split_steps, token_span


def texts(solution: str) -> list[str]:
    return [step.text for step in split_steps(solution)]


@pytest.mark.parametrize(
    ("solution", "steps"),
    [
        ("", []),
        ("\n \n", []),
        ("a\nb\n\n#### 3", ["a", "b", "#### 3"]),
        ("He has 3.5 eggs. She has 2. So 5.5 in all. #### 5.5", ["He has 3.5 eggs.", "She has 2.", "So 5.5 in all.", "#### 5.5"]),
        ("He has 3. She has 2.\nA: 5", ["He has 3.", "She has 2.", "A: 5"]),
        ("Mr. Bean pays $3. Mrs. Bean pays $2.", ["Mr. Bean pays $3.", "Mrs. Bean pays $2."]),
        ("1. Add 2 and 3. 2. Double it.", ["1. Add 2 and 3.", "2. Double it."]),
        ("Step 1: add 2 and 3 Step 2: double it", ["Step 1: add 2 and 3", "Step 2: double it"]),
        ("1) one\n2) two", ["1) one", "2) two"]),
        ("#### 18", ["#### 18"]),
        ("First line. Two sentences.\nSecond line.", ["First line. Two sentences.", "Second line."]),
    ],
)
def test_split(solution: str, steps: list[str]) -> None:
    assert texts(solution) == steps


def test_a_megabyte_of_lines_has_few_steps() -> None:
    assert len(split_steps("a\n" * 500_000)) == MAX_STEPS
    assert len(split_steps("A. " * 300_000)) <= MAX_STEPS


@given(st.text("ab1. \n#:A!?(", max_size=80))
def test_steps_cover_the_text(solution: str) -> None:
    steps, at = split_steps(solution), 0
    for index, step in enumerate(steps):
        assert step.index == index
        assert solution[step.start : step.end] == step.text == step.text.strip() != ""
        assert solution[at : step.start].strip() == ""
        at = step.end
    assert solution[at:].strip() == ""


def test_token_span() -> None:
    offsets = [(0, 0), (0, 3), (3, 5), (5, 6), (5, 6), (7, 9)]
    assert token_span(offsets, 0, 1) == (1, 2)
    assert token_span(offsets, 2, 4) == (1, 3)
    assert token_span(offsets, 5, 6) == (3, 5)
    assert token_span(offsets, 6, 7) == (5, 5)
    assert token_span(offsets, 9, 20) == (6, 6)
    with pytest.raises(ValueError, match="ends at 3 before it starts at 4"):
        token_span(offsets, 4, 3)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.data())
def test_token_span_is_the_smallest_cover(widths: list[int], data: st.DataObject) -> None:
    edges = [sum(widths[:at]) for at in range(len(widths) + 1)]
    offsets = list(pairwise(edges))
    start = data.draw(st.integers(0, edges[-1] - 1))
    end = data.draw(st.integers(start + 1, edges[-1]))
    first, last = token_span(offsets, start, end)
    assert offsets[first][0] <= start < offsets[first][1]
    assert offsets[last - 1][0] < end <= offsets[last - 1][1]
