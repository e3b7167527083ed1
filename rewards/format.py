"""Whether the surviving text has the form of a solution. Knows nothing of what it says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.rollout import JudgedRollout
from verifiers.answers import extract_answer, parse_number
from verifiers.steps import FINAL

MAX_TEXT = 200_000  # characters that are looked at
_ANNOTATION = re.compile(r"<<[^<>\n]+=[^<>\n]+>>")


@dataclass(frozen=True)
class Format:
    """Share of three conditions that hold: one final marker with a number, nothing behind it, well-formed steps before it."""

    def __call__(self, rollouts: Sequence[JudgedRollout], progress: float) -> list[float]:
        return [sum(conditions(one.text[:MAX_TEXT])) / 3 for one in rollouts]


def conditions(text: str) -> tuple[bool, bool, bool]:
    """(exactly one final marker, with a number; nothing behind it; well-formed steps before it)

    Steps are well formed when there is one at least, every `<<` closes on its line around an equation, and no byte is left
    that is part of no character.
    """
    markers = list(FINAL.finditer(text))
    body = text[: markers[0].start()] if markers else text
    rest = _ANNOTATION.sub("", body)
    formed = bool(body.strip()) and "<<" not in rest and ">>" not in rest and "\ufffd" not in body
    if len(markers) != 1:
        return False, False, formed
    answer = extract_answer(markers[0].group())
    return answer is not None and parse_number(answer) is not None, not text[markers[0].end() :].strip(), formed
