"""A solution cut into steps, and characters mapped to tokens. Called by the judge and by whoever builds traces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_STEPS = 1000  # the last one takes what is left

FINAL = re.compile(r"(?:^|(?<=\n)|(?<=[.!?]\ ))[ \t*]*+(?:\#{4}|A:|(?:Final\ )?[Aa]nswer:)[^\n]*", re.VERBOSE)
SENTENCE_END = re.compile(r"[.!?;][\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9$€£\\<(])")
ENUMERATOR = re.compile(r"(?<!\s)\s++(?=Step\s+[0-9]{1,2}\s*[:.)-])|(?<=[.!?;:])\s++(?=\(?[0-9]{1,2}[.)]\s+[A-Z$])")
ONLY_ENUMERATOR = re.compile(r"(?:Step\s+)?\(?[0-9]{1,2}[.):]?$")
ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|No|vs|etc|approx)|\b[A-Za-z]\.[A-Za-z]|\b[A-Z])\.$")


@dataclass(frozen=True)
class Step:
    """Example: the second line of `a\\nb` is Step(index=1, start=2, end=3, text="b"); offsets are characters."""

    index: int
    start: int
    end: int
    text: str


def split_steps(text: str) -> list[Step]:
    """Steps in order; text[step.start:step.end] == step.text, and only white space lies between two steps.

    One step a line. A body that is one line is cut into sentences (or at `1.`, `Step 1:`). The last line that
    announces the answer (`####`, `A:`, `Answer:`) is a step of its own even when it shares a line.
    """
    final: re.Match[str] | None = None
    for match in FINAL.finditer(text):
        final = match
    stop = final.start() if final else len(text)
    spans = [span for span in lines(text, 0, stop)]
    if len(spans) == 1:
        spans = sentences(text, *spans[0])
    if final:
        spans += lines(text, final.start(), len(text))
    if len(spans) > MAX_STEPS:
        spans = [*spans[: MAX_STEPS - 1], (spans[MAX_STEPS - 1][0], spans[-1][1])]
    return [Step(index, start, end, text[start:end]) for index, (start, end) in enumerate(spans)]


def lines(text: str, start: int, stop: int) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    while start < stop:
        newline = text.find("\n", start, stop)
        end = stop if newline < 0 else newline
        spans += stripped(text, start, end)
        start = end + 1
    return spans


def stripped(text: str, start: int, end: int) -> list[tuple[int, int]]:
    part = text[start:end]
    inner = part.strip()
    left = start + len(part) - len(part.lstrip())
    return [(left, left + len(inner))] if inner else []


def sentences(text: str, start: int, stop: int) -> list[tuple[int, int]]:
    """Spans of the sentences of one line; `Mr.` and a lone `1.` end none."""
    cuts = {match.end() for match in SENTENCE_END.finditer(text, start, stop)}
    cuts |= {match.end() for match in ENUMERATOR.finditer(text, start, stop)}
    spans: list[tuple[int, int]] = []
    for cut in [*sorted(cuts), stop]:
        before = text[max(start, cut - 24) : cut].rstrip()
        whole = text[start : min(cut, start + 24)].strip()
        if cut != stop and (ABBREVIATION.search(before) or ONLY_ENUMERATOR.match(whole)):
            continue
        spans += stripped(text, start, cut)
        start = cut
    return spans


def token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Half-open span of the tokens that overlap characters start..end.

    offsets: [tokens] of (first character, one past the last), in order; special tokens have an empty pair.
    Without an overlap the span is empty and stands before the first token that begins at or after start.
    Raises ValueError when end lies before start.
    """
    if end < start:
        raise ValueError(f"a character span ends at {end} before it starts at {start}")
    hits = [at for at, (low, high) in enumerate(offsets) if low < end and high > start]
    if hits:
        return hits[0], hits[-1] + 1
    place = next((at for at, (low, high) in enumerate(offsets) if high > low >= start), len(offsets))
    return place, place
