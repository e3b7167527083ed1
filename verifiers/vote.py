"""Majority vote over samples of one problem: the control that spends its tokens on more tries instead of on undos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

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
    answers = [_answer(text) for text in texts]
    counts = Counter(answer for answer in answers if answer is not None)
    return answers.index(counts.most_common(1)[0][0]) if counts else 0


def _answer(text: str) -> Fraction | str | None:
    found = extract_answer(text)
    if found is None:
        return None
    number = parse_number(found)
    return found if number is None else number
