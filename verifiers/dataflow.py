"""What a solution computes, compared with what the gold solution computes. Called by the judge alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations

from verifiers.arithmetic import Checked, Equation, checked_equations, open_expressions
from verifiers.expressions import Node, branches, leaves
from verifiers.quantities import Mention, given, is_fact, is_known, unit_words

MAX_TERMS = 10  # of a sum or product whose partial results are listed
MAX_REACH = 5000
NEAR = 120
UNKNOWN = re.compile(r"[b-zB-Z](?![a-zA-Z])")  # `2x + 30 = 110` computes nothing


@dataclass(frozen=True)
class Operation:
    """One evaluated equation, or a calculation without its result.

    Example: `9 * 2 = 18` has operands {9, 2}, signs {*} and result 18.
    """

    checked: Checked
    operands: tuple[Node, ...]
    signs: Counter[str]
    result: Fraction

    def values(self) -> Counter[Fraction]:
        return Counter(abs(node.value) for node in self.operands if node.value is not None)


@dataclass(frozen=True)
class Gold:
    """A gold solution's calculations and what can be reached with them."""

    operations: tuple[Operation, ...]
    reach: frozenset[Fraction]
    """Values that it reaches, or would reach in another order or with its steps merged or split, and numbers it starts from."""
    direct: frozenset[Fraction]
    """Those that it computes as it stands."""


@lru_cache(maxsize=512)  # a problem has many solutions
def gold_of(solution: str) -> Gold:
    found = tuple(operations(solution))
    trees = [one.checked.left for one in found if one.checked.left is not None]
    direct = {one.result for one in found} | {node.value for tree in trees for node in branches(tree) if node.value is not None}
    written = {abs(node.value) for one in found for node in one.operands if node.value is not None}
    return Gold(found, reachable(found) | written, frozenset(direct))


def operations(text: str) -> list[Operation]:
    """What a text computes, in order; the result is the written one, or the right one where none is written."""
    found = []
    equations = checked_equations(text)
    for checked in equations:
        left, value = checked.left, checked.equation.right
        if left is None or value is None or left.value is None or not left.args:
            continue
        found.append(_operation(checked, left, value))
    for node in open_expressions(text, equations):
        span = (node.start, node.end)
        alone = Equation(*span, *span, *span, node.value, node.value, "unchecked")
        assert node.value is not None
        found.append(_operation(Checked(alone, node, None, False), node, node.value))
    numeric = (one for one in found if not any(UNKNOWN.match(text, leaf.end) for leaf in one.operands))
    return sorted(numeric, key=lambda operation: operation.checked.equation.start)


def _operation(checked: Checked, left: Node, result: Fraction) -> Operation:
    if result.denominator > 10**9:
        result = Fraction(round(result * 10**6), 10**6)  # `14.999999999999998` is a binary float's 15
    return Operation(checked, tuple(leaves(left)), Counter(node.op for node in branches(left)), result)


def reachable(gold: Sequence[Operation]) -> frozenset[Fraction]:
    """Values that the gold solution reaches, or would reach in another order or with its steps merged or split.

    Sums and products are written out down to their first operands; every part of one counts. Bounded by MAX_REACH.
    """
    terms: dict[Fraction, list[Fraction]] = {}
    factors: dict[Fraction, list[tuple[Fraction, int]]] = {}
    values: set[Fraction] = set()
    for operation in gold:
        tree = operation.checked.left
        assert tree is not None
        for node in branches(tree):
            if node.value is None:
                continue
            values.add(node.value)
            parts, powers = sum_terms(node, 1, terms), product_factors(node, 1, factors)
            for size in range(2, min(len(parts), MAX_TERMS) + 1):
                values.update(abs(sum(part, Fraction(0))) for part in combinations(parts[:MAX_TERMS], size))
            for size in range(2, min(len(powers), MAX_TERMS) + 1):
                for part in combinations(powers[:MAX_TERMS], size):
                    values.add(multiply(part))
            if len(values) > MAX_REACH:
                return frozenset(values)
        terms.setdefault(operation.result, sum_terms(tree, 1, terms))
        factors.setdefault(operation.result, product_factors(tree, 1, factors))
        values.add(operation.result)
    return frozenset(values)


def multiply(part: Sequence[tuple[Fraction, int]]) -> Fraction:
    product = Fraction(1)
    for value, power in part:
        product = product * value if power > 0 else product / value if value else product
    return product


def sum_terms(node: Node, sign: int, known: dict[Fraction, list[Fraction]]) -> list[Fraction]:
    if node.op in ("+", "-") and node.args:
        second = sign if node.op == "+" else -sign
        return (sum_terms(node.args[0], sign, known) + sum_terms(node.args[1], second, known))[: 2 * MAX_TERMS]
    value = node.value or Fraction(0)
    return [sign * part for part in known.get(value, [value])]


def product_factors(node: Node, power: int, known: dict[Fraction, list[tuple[Fraction, int]]]) -> list[tuple[Fraction, int]]:
    if node.op in ("*", "/") and node.args:
        second = power if node.op == "*" else -power
        both = product_factors(node.args[0], power, known) + product_factors(node.args[1], second, known)
        return both[: 2 * MAX_TERMS]
    value = node.value or Fraction(0)
    return [(part, power * inner) for part, inner in known.get(value, [(value, 1)])]


def first_deviation(
    mine: Sequence[Operation],
    gold: Gold,
    answer: Fraction | None,
    source: Source | None = None,
    *,
    idle_ok: bool = False,
    finished: bool = True,
) -> Operation | None:
    """The first operation that gold never makes and that leads to nothing gold reaches, or that works on a foreign quantity.

    With `idle_ok` one that does not feed the answer does no harm: the answer is right. Where the solution is not `finished`,
    what gold reaches in another order may still be put to use. None when gold computes nothing.
    """
    if not gold.operations and source is None:
        return None
    good = [not gold.operations or operation.result in gold.reach for operation in mine]
    for at in _astray_later(mine, gold) if finished else ():
        good[at] = False
    sound = _sound(mine, source) if source else [True] * len(mine)
    for at in _repeated(mine, gold):
        sound[at] = False
    fine, feeding = [False] * len(mine), [False] * len(mine)
    wanted: set[Fraction] = set() if answer is None else {answer}
    needed: set[Fraction] = set()
    for at in range(len(mine) - 1, -1, -1):
        operation = mine[at]
        fine[at] = sound[at] and (good[at] or operation.result in needed)
        feeding[at] = operation.result in wanted
        if fine[at]:
            needed |= set(operation.values()) - (source.given if source else frozenset())
        if feeding[at]:
            wanted |= set(operation.values())
    astray = (at for at in range(len(mine)) if not fine[at] and (feeding[at] or not idle_ok))
    return next((mine[at] for at in astray), None)


def _repeated(mine: Sequence[Operation], gold: Gold) -> Iterator[int]:
    """Operations that reach, from other numbers, a value that was reached before and that gold reaches once."""
    once = {value for value, count in Counter(operation.result for operation in gold.operations).items() if count == 1}
    first: dict[Fraction, Counter[Fraction]] = {}
    for at, operation in enumerate(mine):
        before = first.setdefault(operation.result, operation.values())
        if operation.result in once and not before & operation.values():
            yield at


def _astray_later(mine: Sequence[Operation], gold: Gold) -> Iterator[int]:
    """Operations whose result gold reaches only by another order, and from which no later one comes back to a result of gold.

    `3 + 4 = 7` for `16 - 3 - 4 = 9` is right when `16 - 7 = 9` follows, and chance when nothing does.
    """
    returning: set[Fraction] = set()  # operands of later operations that come back
    for at in range(len(mine) - 1, -1, -1):
        operation = mine[at]
        if operation.result in gold.direct or operation.result in returning:
            returning |= set(operation.values())
        elif gold.operations:
            yield at


@dataclass(frozen=True)
class Source:
    """Where a solution may take its numbers from."""

    text: str
    """The solution."""
    given: frozenset[Fraction]
    """Quantities of the question, and what stands for them."""
    known: frozenset[Fraction]
    """These, and what the gold solution reaches."""

    @staticmethod
    def of(text: str, question: str, gold: Gold) -> Source:
        asked = given(question)
        return Source(text, asked, asked | gold.reach)

    def near(self, start: int, end: int) -> str:
        """The line around a place, at most NEAR characters either side."""
        low = max(self.text.rfind("\n", 0, start) + 1, start - NEAR)
        stop = self.text.find("\n", end)
        return self.text[low : min(stop if stop >= 0 else len(self.text), end + NEAR)]


def _sound(mine: Sequence[Operation], source: Source) -> list[bool]:
    """Whether every operand of an operation is known where it stands: given, reached by gold, an earlier result, or a fact."""
    known = set(source.known)
    sound = []
    for operation in mine:
        equation = operation.checked.equation
        operands = [node for node in operation.operands if node.value is not None]
        strange = [node for node in operands if not is_known(as_mention(node), known)]
        words = unit_words(source.near(equation.start, equation.end)) if strange else set()
        sound.append(all(is_fact(abs(node.value or Fraction(0)), words) for node in strange))
        known |= {operation.result} | ({equation.left} if equation.left is not None else set())
        tree = operation.checked.left
        if tree is not None:
            known |= {node.value for node in branches(tree) if node.value is not None}
    return sound


def as_mention(node: Node) -> Mention:
    return Mention(node.start, node.end, abs(node.value or Fraction(0)), True)


def closest(operation: Operation, gold: Sequence[Operation], done: Sequence[Operation]) -> Operation | None:
    """The gold operation that shares most operands, signs and the result; what the solution has done already goes last."""
    finished = {step.result for step in done}

    def likeness(other: Operation) -> tuple[int, int, int]:
        shared = sum((operation.values() & other.values()).values())
        signs = sum((operation.signs & other.signs).values())
        apart = sum(other.values().values()) - shared
        return 4 * shared + signs + 3 * (other.result == operation.result) - 2 * (other.result in finished), -apart, signs

    best = max(gold, key=likeness, default=None)
    return best if best and operation.values() & best.values() else None
