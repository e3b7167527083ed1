"""Majority vote: the answer that most samples give, by value."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifiers.vote import majority


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["#### 3"], 0),
        (["#### 3", "#### 4"], 0),
        (["#### 3", "#### 4", "#### 4.0"], 1),
        (["#### 5", "#### 1,000", "So it is 1000\n#### 1000"], 1),
        (["nothing", "nothing", "#### 7"], 2),
        (["", ""], 0),
    ],
)
def test_the_most_frequent_answer_wins_and_the_earliest_of_equals(texts: list[str], wanted: int) -> None:
    assert majority(texts) == wanted


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_against_counting_by_hand(answers: list[int]) -> None:
    chosen = answers[majority([f"#### {answer}" for answer in answers])]
    assert all(Counter(answers)[chosen] >= Counter(answers)[other] for other in answers)


def test_no_text() -> None:
    with pytest.raises(ValueError, match="at least one"):
        majority([])
