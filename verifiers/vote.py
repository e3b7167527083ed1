"""Choices among samples of one problem: the control that spends its tokens on more tries instead of on undos."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.passes import plurality
from verifiers.answers import extract_answer, parse_number


def majority(texts: Sequence[str]) -> int:
    """Index of the first text with the answer that most texts give; of equally frequent answers the earliest wins.

    Numbers are equal by value. A text without an answer counts only where none has one.

    Example:
        >>> majority(["#### 3", "#### 4", "no answer", "#### 4.0"])
        1

    Raises:
        ValueError: no text.
    """
    if not texts:
        raise ValueError("a vote needs at least one text")
    return plurality([answer_key(text) for text in texts])


def likeliest(logprobs: Sequence[Sequence[float]]) -> int:
    """Index of the sample with the highest probability, the product of its tokens' own; of equal ones the first.

    Args:
        logprobs: for each sample those of its tokens.

    Raises:
        ValueError: no sample, or one without tokens, whose probability would be 1.
    """
    if not logprobs or not all(logprobs):
        raise ValueError("the likeliest of samples needs one at least, and log-probabilities of each")
    scores = [math.fsum(one) for one in logprobs]
    return scores.index(max(scores))


def answer_key(text: str) -> str | None:
    """The answer of a text, equal numbers spelt alike; None where it gives none.

    Example:
        >>> answer_key("#### 4.0") == answer_key("#### 4")
        True
    """
    found = extract_answer(text)
    if found is None:
        return None
    number = parse_number(found)
    return found if number is None else str(number)
