"""Quantities that a text names, in digits or in words, and which of them come from nowhere. Called by the judge alone.

In human-labelled wrong solutions the first error is most often a misquoted quantity of the question, written in prose
before anything is calculated with it: `three times as many` where the question says twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_TEXT = 20_000  # characters of a text that are searched; a solution's own quantities are looked for in as many
MAX_MENTIONS = 2_000
MAX_KNOWN = 1_000  # values that are combined with each other

_UNITS = (
    "zero one two three four five six seven eight nine ten "
    "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
CARDINALS = {word: value for value, word in enumerate(_UNITS.split())}
TENS = {word: 10 * value for value, word in enumerate(_TENS.split(), start=2)}
MULTIPLES = {
    "twice": 2, "double": 2, "doubles": 2, "doubled": 2, "thrice": 3, "triple": 3, "triples": 3, "tripled": 3, "quadruple": 4,
    "quadrupled": 4, "couple": 2, "pair": 2, "dozen": 12, "dozens": 12, "score": 20, "both": 2,
}  # fmt: skip
PARTS = {
    "half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9,
    "tenth": 10, "twentieth": 20, "hundredth": 100,
}  # fmt: skip
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}

_CARDINAL = rf"(?:(?:{'|'.join(TENS)})(?:[- ](?:{'|'.join(list(CARDINALS)[1:10])}))?|{'|'.join(reversed(list(CARDINALS)))})"
_PART = rf"(?:{'|'.join(PARTS)})s?"
MENTION = re.compile(
    rf"""
    (?<![\w.,/:^])(?P<digits>(?:[0-9]{{1,3}}(?:[, ][0-9]{{3}})+(?![0-9])|[0-9]{{1,30}})(?:\.[0-9]{{1,30}})?)
        (?:(?P<slash>\s?/\s?)(?P<bottom>[0-9]{{1,9}})(?![0-9.:,]*[0-9/]))?
        (?P<percent>\s?%|\s?percent\b)?
        (?P<after>st\b|nd\b|rd\b|th\b|:[0-9]|[A-Za-z](?![A-Za-z])|[.)]\s+[A-Z*])?
        (?:\s(?P<scale>{"|".join(SCALES)})\b)?
  | \b(?P<compound>{_CARDINAL}|an?)[- ](?P<part>{_PART})\b
  | \b(?P<word>{_CARDINAL})\b(?:[- ](?P<wordscale>{"|".join(SCALES)})\b)?
  | \b(?P<multiple>{"|".join(MULTIPLES)})\b
  | \b(?P<half>half)\b
  | \b(?P<ordinal>{_PART})\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
LABEL = re.compile(
    r"(?:^|\n|[.:;]\s+)\W{0,3}(?:Step\s+)?[0-9]{1,2}\s*[.):]|"
    r"\b(?:Step|Equation|Part|Day|Week|Train|Case|Method|Option|Year|Level|Grade)s?\s+#?[0-9]{1,4}\b",
    re.IGNORECASE,
)

BEFORE = re.compile(r"[-+*/×÷(][ $€£]*$|\bx $")
COUNT = re.compile(r"\b(?:the|all|these|those|other) $", re.IGNORECASE)
AFTER = re.compile(r"[ %]*(?:[-+*/×÷=)]|x )")

# Facts that a solution may use although neither the question nor the right solution writes them down: value -> words of its unit.
_FACTS = {
    7: "week day", 24: "hour day", 60: "minute hour second", 12: "month year dozen inch foot feet noon am pm", 52: "week year",
    365: "day year", 366: "day year", 30: "day month", 31: "day month", 28: "day february", 4: "quarter week month",
    100: "percent % cent dollar centimeter meter century", 10: "decade dime", 25: "quarter", 5: "nickel weekday workday school",
    3: "yard foot feet", 16: "ounce pound", 1000: "gram kilogram meter kilometer liter milliliter", 3600: "hour second",
    2: "both pair couple twice two average half halves weekend", 20: "score", 180: "degree angle triangle", 360: "degree circle",
    90: "right angle",
}  # fmt: skip
FACTS = {value: frozenset(word.rstrip("s") for word in words.split()) for value, words in _FACTS.items()}


@dataclass(frozen=True)
class Mention:
    """One quantity. Example: in `half of 30` there are Mention(0, 4, 1/2, firm=True) and Mention(8, 10, 30, firm=True)."""

    start: int
    end: int
    value: Fraction
    firm: bool
    """Certainly a quantity; `one`, `a third guess` and a variable's coefficient may be something else."""
    percent: bool = False


def mentions(text: str) -> list[Mention]:
    """Quantities in order. Linear in the text, bounded by MAX_TEXT and MAX_MENTIONS."""
    return list(_mentions(text[:MAX_TEXT]))


def _mentions(text: str) -> Iterator[Mention]:
    for count, match in enumerate(MENTION.finditer(text)):
        if count == MAX_MENTIONS:
            return
        start, end, kind = match.start(), match.end(), match.lastgroup
        if match["digits"]:
            value = Fraction(match["digits"].replace(",", "").replace(" ", ""))
            bottom = int(match["bottom"] or 1)
            end = match.end("bottom") if match["bottom"] else match.end("digits")
            value = (value / bottom if bottom else value) * SCALES.get((match["scale"] or "").lower(), 1)
            yield Mention(start, end, value, not match["after"], match["percent"] is not None)
        elif match["compound"]:
            top = _cardinal(match["compound"])
            part = PARTS[match["part"].lower() if match["part"].lower() in PARTS else match["part"].lower()[:-1]]
            yield Mention(start, end, Fraction(top, part), match["part"].lower().endswith("s"))
        elif match["word"]:
            value = Fraction(_cardinal(match["word"]) * SCALES.get((match["wordscale"] or "").lower(), 1))
            yield Mention(start, end, value, value > 1)
        elif match["multiple"]:
            word = match["multiple"].lower()
            yield Mention(start, end, Fraction(MULTIPLES[word]), word not in ("both", "pair", "score"))
        else:
            word = match[kind or "half"].lower()
            yield Mention(start, end, Fraction(1, PARTS[word if word in PARTS else word[:-1]]), kind == "half")


def _cardinal(word: str) -> int:
    if word.lower() in ("a", "an"):
        return 1
    tens, _, unit = word.lower().replace("-", " ").partition(" ")
    return TENS[tens] + CARDINALS.get(unit, 0) if tens in TENS else CARDINALS[tens]


@lru_cache(maxsize=512)  # a problem has many solutions
def given(question: str) -> frozenset[Fraction]:
    """What a solution may take from the question: its quantities, their percentages and complements, parts of its fractions."""
    percent = "%" in question or "percent" in question
    values = {Fraction(100)} if percent else set()
    for mention in mentions(question):
        value = mention.value
        values.add(value)
        if value.denominator > 1 and (value < 1 or "." not in question[mention.start : mention.end]):
            values |= {Fraction(value.numerator), Fraction(value.denominator), 1 - value, 1 + value, value * 100, 100 - 100 * value}
            values |= {Fraction(value.denominator - value.numerator), 1 / value}
        if mention.percent or value.denominator == 1 and value <= 100 and percent:
            values |= {value / 100, 100 - value, 100 + value, 1 - value / 100, 1 + value / 100}
    return frozenset(values)


def foreign(text: str, start: int, end: int, known: Iterable[Fraction], skip: Iterable[tuple[int, int]]) -> Mention | None:
    """The first quantity of text[start:end] that is not known, no fact of the world, and lies in none of the spans `skip`."""
    values, spans = set(known), [*skip, *(label.span() for label in LABEL.finditer(text, start, end))]
    stretch = text[start:end]
    words = unit_words(stretch)
    for mention in mentions(stretch):
        low, high = start + mention.start, start + mention.end
        if not mention.firm or any(a < high and low < b for a, b in spans):
            continue
        before = text[max(start, low - 8) : low]
        if BEFORE.search(before) or AFTER.match(text, high):
            continue  # within a calculation, whose operands are looked at elsewhere
        if COUNT.search(before) or is_known(mention, values) or is_fact(mention.value, words):
            continue  # `the three days` counts what was named
        # `2x = 80` is the result of an equation's own arithmetic
        if not (before.rstrip(" $").endswith("=") and one_step(mention.value, values)):
            return Mention(low, high, mention.value, True, mention.percent)
    return None


def is_known(mention: Mention, values: set[Fraction]) -> bool:
    """As it stands, as a percentage, or as a rounded value."""
    value = mention.value
    if {value, value / 100, value * 100} & values or value <= 1 and 1 - value in values:
        return True
    if value.denominator > 1 and value.denominator in values and (value.numerator == 1 or value.numerator in values):
        return True
    if value.denominator == 1 and value < 20:
        return False
    return any(abs(value - one) * 100 <= abs(one) for one in values)


def one_step(value: Fraction, known: set[Fraction]) -> bool:
    """Whether one operation on two known values gives the value."""
    some = sorted(known)[:MAX_KNOWN]
    wanted = {side for one in some for side in (value - one, one - value, value + one, value * one)} | {
        value / one for one in some if one
    }
    wanted |= {one / value for one in some if value}
    return not wanted.isdisjoint(some)


def is_fact(value: Fraction, words: set[str]) -> bool:
    """Unit conversions and the like, where their unit is named nearby."""
    if value in (0, 1) or value.numerator == 1 < value.denominator and is_fact(1 / value, words):
        return True
    return value.denominator == 1 and not words.isdisjoint(FACTS.get(int(value), ()))


def unit_words(text: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"[a-z]+|%", text.lower())}
