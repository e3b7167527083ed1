"""Majority vote: the answer that most samples give, by value."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifiers.vote import likeliest, majority


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


def test_the_likeliest_is_so_by_the_product_over_all_its_tokens() -> None:
    assert likeliest([[-0.5, -0.6], [-1.0], [-0.1] * 20, [-1.0]]) == 1  # neither by the mean of its tokens nor by the best one
    assert likeliest([[-3.0]]) == 0


@pytest.mark.parametrize("logprobs", [[], [[-1.0], []]])
def test_without_log_probabilities_nothing_is_the_likeliest(logprobs: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="needs one at least"):
        likeliest(logprobs)
