"""Arithmetic written in prose, read into small trees of exact rationals.

`verifiers.arithmetic` calls this on the few hundred characters at either side of an equals sign. Nothing is ever evaluated
as code, and every loop is bounded by a count of characters, tokens, depth or bits, never by a clock.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_DEPTH = 24  # nested parentheses and signs
MAX_EXPONENT = 64
MAX_BITS = 4096  # of a numerator or denominator
MAX_UNIT_WORDS = 6

SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
WORD_OPERATORS = {"x": "*", "X": "*", "times": "*", "of": "*", "plus": "+", "minus": "-"}
SYMBOLS = {
    "×": "*", "·": "*", "⋅": "*", "∗": "*", "\\times": "*", "\\cdot": "*",
    "÷": "/", "⁄": "/", "\\div": "/", "−": "-", "–": "-",
}  # fmt: skip
VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")

TOKEN = re.compile(
    rf"""
    (?P<skip>\s+|\\[,;!:()\[\]\ ]|\\left\b|\\right\b|&)
  | (?P<num>(?:[0-9]{{1,3}}(?:(?:\{{?,\}}?|[ \u00a0\u202f])[0-9]{{3}})+(?![0-9])|[0-9]+)
        (?:\.[0-9]+)?(?:[eE][+-]?[0-9]{{1,4}}(?!\w))?|\.[0-9]+)
  | (?P<vulgar>[{VULGAR}])
  | (?P<frac>\\[dt]?frac(?![a-z]))
  | (?P<pow>\*\*|\^|[⁰¹²³⁴⁵⁶⁷⁸⁹]+)
  | (?P<op>[-+*/×÷⁄·⋅∗−–]|\\times(?![a-z])|\\cdot(?![a-z])|\\div(?![a-z]))
  | (?P<lpar>[(\[{{]) | (?P<rpar>[)\]}}])
  | (?P<cur>\\?[$€£]) | (?P<pct>\\?%)
  | (?P<text>\\(?:text|mathrm)\{{[^{{}}]{{0,60}}\}})
  | (?P<word>[A-Za-z]+(?:['’-][A-Za-z]+)*(?:\^[23](?![0-9])|[²³])?)
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):  # many are made: a tuple is made three times as fast as a frozen dataclass
    kind: str
    """num, op, lpar, rpar, pct, frac or bad (something that no number stands for)"""
    text: str
    start: int
    end: int
    unit: str = ""
    """words written after the number, lower case"""
    scale: int = 1
    spaced: bool = False
    """white space follows"""


@dataclass(frozen=True)
class Node:
    """Example: `3 + 4` is Node(op="+", args=(3, 4)) with value 7; start..end and op_start..op_end are characters."""

    op: str
    """num, neg, + - * / ^"""
    start: int
    end: int
    value: Fraction | None
    """None where the value would be too large, divides by zero or is not rational"""
    args: tuple[Node, ...] = ()
    op_start: int = 0
    op_end: int = 0
    ulp: Fraction = Fraction(0)
    """what one unit of the last shown digit is worth, for num"""


class NotArithmetic(ValueError):
    """The tokens are no complete expression of numbers."""


def tokens(text: str, start: int, end: int) -> list[Token]:
    """Tokens of text[start:end] without white space; linear in its length."""
    found: list[Token] = []
    waiting: re.Match[str] | None = None
    for match in TOKEN.finditer(text, start, end):
        if waiting is not None:
            found.append(_token(waiting, match.lastgroup == "skip"))
        waiting = None if match.lastgroup == "skip" else match
    if waiting is not None:
        found.append(_token(waiting, False))
    return found


def _token(match: re.Match[str], spaced: bool) -> Token:
    return Token(match.lastgroup or "other", match.group(), match.start(), match.end(), "", 1, spaced)


def combine(op: str, left: Fraction | None, right: Fraction | None) -> Fraction | None:
    """left op right, exactly; None where it is undefined or larger than MAX_BITS."""
    if left is None or right is None:
        return None
    if op == "^":
        if right.denominator != 1 or abs(right) > MAX_EXPONENT or (left == 0 and right < 0):
            return None
        size = max(left.numerator.bit_length(), left.denominator.bit_length()) * abs(int(right))
        return Fraction(left ** int(right)) if size <= MAX_BITS else None
    if op == "/" and right == 0:
        return None
    result = left + right if op == "+" else left - right if op == "-" else left * right if op == "*" else left / right
    return result if max(result.numerator.bit_length(), result.denominator.bit_length()) <= MAX_BITS else None


def number(token: Token) -> tuple[Fraction | None, Fraction]:
    """Value of a num token and the worth of one unit of its last digit."""
    if len(token.text) > MAX_BITS // 4:
        return None, Fraction(0)
    return _number(token.text, token.scale)


@lru_cache(maxsize=4096)
def _number(text: str, scale: int) -> tuple[Fraction | None, Fraction]:
    if len(text) == 1 and text in VULGAR:
        return Fraction(unicodedata.numeric(text)).limit_denominator(10) * scale, Fraction(0)
    mantissa, _, exponent = re.sub(r"[,{}\s]", "", text).lower().partition("e")
    power = int(exponent or "0")
    if abs(power) > MAX_EXPONENT or len(mantissa) > MAX_BITS // 8:
        return None, Fraction(0)
    ulp = Fraction(10) ** (power - len(mantissa.partition(".")[2])) * scale
    return Fraction(mantissa) * Fraction(10) ** power * scale, ulp


class Parser:
    """Recursive descent over tokens: sum > product > sign > power > atom. Raises NotArithmetic.

    percent is what `%` multiplies by: 1/100 as mathematics has it, or 1 where the writer counts in percent.
    """

    def __init__(self, items: list[Token], percent: Fraction) -> None:
        self.items = items
        self.percent = percent
        self.at = 0
        self.depth = 0

    def parse(self) -> Node:
        node = self.sum()
        if self.at != len(self.items):
            raise NotArithmetic
        return node

    def peek(self, kind: str, texts: str = "") -> Token | None:
        if self.at < len(self.items):
            token = self.items[self.at]
            if token.kind == kind and (not texts or token.text in texts.split()):
                return token
        return None

    def take(self, kind: str) -> Token:
        token = self.peek(kind)
        if token is None:
            raise NotArithmetic
        self.at += 1
        return token

    def chain(self, operators: str, operand: str) -> Node:
        node: Node = getattr(self, operand)()
        while token := self.peek("op", operators):
            self.at += 1
            right: Node = getattr(self, operand)()
            op = token.text.removeprefix("implicit").removeprefix("mixed") or "*"
            value = combine(op, node.value, right.value)
            node = Node(op, node.start, right.end, value, (node, right), token.start, token.end)
        return node

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotArithmetic
        node = self.chain("+ -", "product")
        self.depth -= 1
        return node

    def product(self) -> Node:
        return self.chain("* / implicit*", "sign")

    def sign(self) -> Node:
        signs: list[Token] = []
        while token := self.peek("op", "+ -"):
            signs.append(token)
            self.at += 1
            if len(signs) > 2:
                raise NotArithmetic
        node = self.power()
        for token in reversed(signs):
            if token.text == "-":
                value = None if node.value is None else -node.value
                if node.op == "num":
                    node = replace(node, start=token.start, value=value)
                else:
                    node = Node("neg", token.start, node.end, value, (node,), token.start, token.end)
        return node

    def power(self) -> Node:
        node = self.atom()
        token = self.peek("pow")
        if token is None:
            return node
        self.at += 1
        if token.text[0] in "^*":
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise NotArithmetic
            right = self.sign()
            self.depth -= 1
        else:
            right = Node("num", token.start, token.end, Fraction(int(token.text.translate(SUPERSCRIPTS)[:8])))
        value = combine("^", node.value, right.value)
        return Node("^", node.start, right.end, value, (node, right), token.start, token.end)

    def atom(self) -> Node:
        if self.peek("frac"):
            first = self.take("frac")
            top, bottom = self.bracket(), self.bracket()
            value = combine("/", top.value, bottom.value)
            return Node("/", first.start, bottom.end, value, (top, bottom), first.start, first.end)
        if self.peek("lpar"):
            node = self.bracket()
        else:
            token = self.take("num")
            value, ulp = number(token)
            node = Node("num", token.start, token.end, value, ulp=ulp)
            if self.peek("op", "mixed+"):
                part = self.mixed()
                node = replace(node, end=part.end, value=combine("+", node.value, part.value), ulp=Fraction(0))
        if self.peek("pct"):
            token = self.take("pct")
            node = replace(node, end=token.end, value=combine("*", node.value, self.percent), ulp=node.ulp * self.percent)
        return node

    def mixed(self) -> Node:
        self.at += 1
        top = self.take("num")
        value = number(top)[0]
        if top.text in VULGAR:
            return Node("num", top.start, top.end, value)
        self.take("op")
        bottom = self.take("num")
        return Node("num", top.start, bottom.end, combine("/", value, number(bottom)[0]))

    def bracket(self) -> Node:
        opening = self.take("lpar")
        node = self.sum()
        return replace(node, start=opening.start, end=self.take("rpar").end)


def leaves(node: Node) -> list[Node]:
    """The numbers of a tree, left to right."""
    return [node] if not node.args else [leaf for arg in node.args for leaf in leaves(arg)]


def branches(node: Node) -> list[Node]:
    """The operations of a tree, inner ones first."""
    inner = [branch for arg in node.args for branch in branches(arg)]
    return [*inner, node] if node.args else inner
