"""Every equation of a solution, with the place where it stands and whether it holds.

Called by the judge and by the reward for arithmetic. Knows text and numbers only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from verifiers.expressions import Node, NotArithmetic, Parser, Token, leaves, tokens
from verifiers.phrases import expressions, left_side, right_side

MAX_SIDE = 240  # characters of a side that are read
MAX_EQUATIONS = 400  # per text; further equals signs are not looked at
MAX_TEXT = 200_000  # characters that are searched for equals signs

ANNOTATION = re.compile(r"<<([^<>\n]{1,480})>>")
EQUALS = re.compile(r"(?<![<>!=≠:])(==?|≈|\\approx(?![a-z])|\bequals\b)(?![=>])")
LABEL = re.compile(r"(?i)[a-z]+ [0-9]{1,2}[ ]?[-–][ ]")
TORN_BEFORE = re.compile(r"(?:[0-9][,:.]|[A-Za-z_0-9]|[0-9)] +|[0-9] and )\Z")  # `6:00 + 18`, `D1 = 2`, `1 and 1/4`
TORN_AFTER = re.compile(r"\.\.|:[0-9]|,[0-9]| and \(?[0-9]+/")

HUNDREDTH = Fraction(1, 100)
DIMENSIONS = {
    word: dimension
    for dimension, words in {
        "time": "second seconds minute minutes min mins hour hours hr hrs h s "
        "day days week weeks month months year years decade decades",
        "length": "inch inches foot feet yard yards mile miles mm cm m km meter meters centimeter centimeters kilometer kilometers",
        "money": "$ dollar dollars cent cents penny pennies nickel nickels dime dimes quarter quarters",
        "amount": "ounce ounces oz pound pounds lb lbs ton tons gram grams g kg kilogram kilograms "
        "cup cups pint pints quart quarts gallon gallons ml liter liters l tablespoon tablespoons teaspoon teaspoons",
        "count": "dozen dozens pair pairs half halves",
    }.items()
    for word in words.split()
}  # fmt: skip


@dataclass(frozen=True)
class Equation:
    """Example: in `5 + 7 = 13` left is 5 + 7 (characters 0..5, value 12), right is 13 (8..10) and the verdict false.

    All offsets are characters of the text, half open.
    """

    start: int
    end: int
    left_start: int
    left_end: int
    right_start: int
    right_end: int
    left: Fraction | None
    right: Fraction | None
    verdict: Literal["true", "false", "unchecked"]


@dataclass(frozen=True)
class Checked:
    """An equation with the trees of its sides, for the judge."""

    equation: Equation
    left: Node | None
    right: Node | None
    annotated: bool
    """stands in `<<...>>`"""


@dataclass(frozen=True)
class Side:
    items: list[Token]
    node: Node | None
    plain: Node | None
    """the tree with `%` read as a unit"""


def equations(text: str) -> list[Equation]:
    """All equations in order of their place. Never raises; work is linear in the text and bounded."""
    return [checked.equation for checked in checked_equations(text)]


def checked_equations(text: str) -> list[Checked]:
    """As `equations`, with trees. A `<<a=b>>` is read for itself and cuts the prose around it."""
    found: list[Checked] = []
    for start, end, annotated, glued in regions(text[:MAX_TEXT]):
        between: dict[int, list[Token]] = {}  # where a side begins -> its tokens: the right side of `=` is the left one of the next
        marks = list(EQUALS.finditer(text, start, end))[: MAX_EQUATIONS - len(found)]
        previous: Checked | None = None
        for at, mark in enumerate(marks):
            low = marks[at - 1].end() if at else start
            high = marks[at + 1].start() if at + 1 < len(marks) else end
            one = check(text, low, mark, high, annotated, glued and at == 0, previous, at == 0, between)
            if one is not None:
                found.append(one)
            previous = one
        if len(found) >= MAX_EQUATIONS:
            break
    return sorted(found, key=lambda checked: checked.equation.start)


OPERATOR = re.compile(
    r"[0-9$€£)]\s?(?:[a-zA-Z()' ]{0,60}?)(?:[+*×÷]|\s[-/−–x]\s|\btimes\b|\bplus\b|\bminus\b|(?:divid|multipli)ed by)"
)


def open_expressions(text: str, taken: list[Checked]) -> list[Node]:
    """Calculations whose result is not written behind them: `Speed = 3 * 3 miles per hour`, `we add 7 + 28 + 12.`"""
    spans = [(one.equation.start, one.equation.end) for one in taken]
    found: list[Node] = []
    for start, end, annotated, glued in regions(text[:MAX_TEXT]):
        if annotated or glued or end - start > 4 * MAX_SIDE or not OPERATOR.search(text, start, end):
            continue
        for items in expressions(tokens(text, start, end)):
            node = read(items).node
            if node is None or node.value is None or not node.args or text[node.end : node.end + 12].lstrip(" $€£").startswith("="):
                continue
            plain_fraction = node.op == "/" and " " not in text[node.start : node.end]
            if not plain_fraction and not any(low < node.end and node.start < high for low, high in spans):
                found.append(node)
        if len(found) >= MAX_EQUATIONS:
            break
    return found


def regions(text: str) -> Iterator[tuple[int, int, bool, bool]]:
    """Stretches to read: (start, end, is an annotation, its first number completes an earlier expression)."""
    start, glued = 0, False
    for match in [*ANNOTATION.finditer(text), None]:
        stop = match.start() if match else len(text)
        while start <= stop:
            newline = text.find("\n", start, stop)
            line_end = stop if newline < 0 else newline
            if line_end > start:
                yield start, line_end, False, glued
            if newline < 0:
                break
            start, glued = newline + 1, False
        if match:
            yield match.start(1), match.end(1), True, False
            before = text[max(0, stop - 8) : stop].rstrip(" $€£")
            glued, start = before[-1:] in tuple("+-*/x×÷−–("), match.end()


def check(
    text: str,
    low: int,
    mark: re.Match[str],
    high: int,
    annotated: bool,
    glued: bool,
    previous: Checked | None,
    first: bool,
    between: dict[int, list[Token]],
) -> Checked | None:
    """The equation around one equals sign; None when there is nothing to check, as in `x = 5` or `1 hour = 60 minutes`."""
    cut_left, cut_right = mark.start() - low > MAX_SIDE, high - mark.end() > MAX_SIDE
    low = mark.start() - MAX_SIDE if cut_left else low
    high = mark.end() + MAX_SIDE if cut_right else high
    line_start = first and (low == 0 or text[low - 1] == "\n")
    label = LABEL.match(text, low, mark.start()) if line_start else None
    left_tokens = between.pop(low) if low in between else tokens(text, label.end() if label else low, mark.start())
    right_tokens = tokens(text, mark.end(), high)
    if not cut_right:
        between[mark.end()] = right_tokens
    left_items = left_side(left_tokens, line_start)
    right_items = right_side(right_tokens)
    if not left_items or not right_items:
        return None
    left, right = read(left_items), read(right_items)
    continues = previous is not None and left_items[0].start == left_tokens[0].start
    if not any(token.kind in ("op", "pow", "frac") for token in left_items + right_items):
        units = any(token.unit for token in left_items + right_items)
        if not continues or units or left.node is None or right.node is None:
            return None
    if left.node is None and right.node is None:
        return None
    whole_left = glued and left_items[0].start == left_tokens[0].start
    readable = not (
        whole_left
        or cut_left and left_items[0].start == left_tokens[0].start
        or cut_right and right_items[-1].end == right_tokens[-1].end
    )  # fmt: skip
    verdict = compare(text, left, right, "=" not in mark.group() and mark.group() != "equals") if readable else "unchecked"
    equation = Equation(
        left_items[0].start, right_items[-1].end, left_items[0].start, left_items[-1].end,
        right_items[0].start, right_items[-1].end,
        left.node.value if left.node else None, right.node.value if right.node else None, verdict,
    )  # fmt: skip
    return Checked(equation, left.node, right.node, annotated)


def read(items: list[Token]) -> Side:
    try:
        node = Parser(items, HUNDREDTH).parse()
        plain = Parser(items, Fraction(1)).parse() if any(token.kind == "pct" for token in items) else node
    except NotArithmetic:
        return Side(items, None, None)
    return Side(items, node, plain)


def compare(text: str, left: Side, right: Side, about: bool) -> Literal["true", "false", "unchecked"]:
    """True when any sensible reading holds, false when every reading fails, unchecked when a reading is missing."""
    pairs = [(a, b) for a in (left.node, left.plain) for b in (right.node, right.plain)]
    if any(a is None or b is None or a.value is None or b.value is None for a, b in pairs):
        return "unchecked"
    if any(holds(a, b, about) for a, b in pairs if a and b):
        return "true"
    return "unchecked" if ambiguous(text, left, right) else "false"


def holds(left: Node, right: Node, about: bool) -> bool:
    """Equal, or equal after rounding (or cutting off) to the digits that are shown.

    A whole number shown for a broken one must be within 1 %: `100/3 = 33` is rounding, `40/9 = 4` hides a remainder.
    """
    exact, shown = (left, right) if right.op == "num" else (right, left)
    assert exact.value is not None and shown.value is not None
    difference = abs(exact.value - shown.value)
    if difference == 0:
        return True
    if about and difference * 20 <= abs(exact.value):
        return True
    if shown.op != "num" or shown.ulp == 0 or exact.value.denominator == 1 and shown.ulp >= 1 and not rounded(exact):
        return False
    if shown.ulp < Fraction(1, 10**9) and difference * 10**9 <= abs(exact.value):
        return True  # the tail of a binary float
    cut = abs(exact.value) > abs(shown.value) and difference < shown.ulp
    near = cut or difference * 2 <= shown.ulp
    return near and (shown.ulp < 1 or about or difference * 100 <= abs(exact.value))


def rounded(node: Node) -> bool:
    """An operand is a decimal fraction, so that the value may stem from one that was rounded before."""
    return any(0 < leaf.ulp < 1 for leaf in leaves(node))


def ambiguous(text: str, left: Side, right: Side) -> bool:
    """The numbers differ, but units or habits of writing may explain it."""
    items = left.items + right.items
    words = {word for token in items for word in token.unit.split("/") for word in word.split()}
    if "$" in text[max(0, left.items[0].start - 2) : right.items[-1].end]:
        words.add("$")
    dimensions = [DIMENSIONS[name] for name in sorted({singular(word) for word in words if word in DIMENSIONS})]
    if len(dimensions) != len(set(dimensions)):
        return True
    bare = not any(token.kind in ("op", "pow", "frac") for token in left.items)
    if any(len(word) == 1 and word.isalpha() and word != "a" for word in words) or bare and left.items[0].unit or "of" in words:
        return True  # `3m = 220 - 10`, `4 subjects = 186 + 62`
    before, after = text[: left.items[0].start][-12:], text[right.items[-1].end :][:12]
    if TORN_BEFORE.search(before) or TORN_AFTER.match(after):
        return True
    if bare and before.rstrip(" $")[-1:] not in ("", "=", "\n"):
        return True  # `packs sold is 4 = 6 * 15` names a thing, whereas a line that begins `13 = 5 + 7` claims a sum
    numbers = sum(token.kind == "num" for token in items)
    percents = sum(token.kind == "pct" for token in items)
    if 0 < percents < numbers and any(token.kind == "op" and token.text in "+-" for token in left.items):
        return True  # `50 + 10% = 55`
    divided = False
    for token in items:
        if divided and token.text in ("/", "implicit*"):
            return True  # `6/2(3)`, `60 / 3/4`
        divided = token.text == "/" or token.kind == "pow" or divided and token.text not in "+-*"
    # `5+3=8-2=6` writes the next calculation behind the result
    first = leaves(right.node)[0].value if right.node and right.node.args else None
    return first is not None and left.node is not None and first == left.node.value


def singular(word: str) -> str:
    return {"feet": "foot", "inches": "inch", "$": "dollar", "pennies": "penny", "halves": "half"}.get(
        word, word[:-1] if word.endswith("s") and len(word) > 2 else word
    )
