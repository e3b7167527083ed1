"""What a solution computes, compared with what the gold solution computes. Called by the judge alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

from verifiers.arithmetic import Checked, checked_equations
from verifiers.expressions import Node, branches, leaves

MAX_TERMS = 10  # of a sum or product whose partial results are listed
MAX_REACH = 5000


@dataclass(frozen=True)
class Operation:
    """One evaluated equation. Example: `9 * 2 = 18` has operands {9, 2}, signs {*} and result 18."""

    checked: Checked
    operands: tuple[Node, ...]
    signs: Counter[str]
    result: Fraction

    def values(self) -> Counter[Fraction]:
        return Counter(abs(node.value) for node in self.operands if node.value is not None)


def operations(text: str) -> list[Operation]:
    """The equations of a text that compute something; the result is the written one."""
    found = []
    for checked in checked_equations(text):
        left, value = checked.left, checked.equation.right
        if left is None or value is None or left.value is None or not left.args:
            continue
        found.append(Operation(checked, tuple(leaves(left)), Counter(node.op for node in branches(left)), value))
    return found


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


def first_deviation(mine: Sequence[Operation], gold: Sequence[Operation], answer: Fraction | None) -> Operation | None:
    """The first operation that gold never makes and that leads to nothing gold reaches.

    Among several, one that feeds the answer goes before an idle side calculation. None when gold computes nothing.
    """
    if not gold:
        return None
    reach = reachable(gold)
    fine = [operation.result in reach for operation in mine]
    feeding = [False] * len(mine)
    wanted: set[Fraction] = set() if answer is None else {answer}
    needed: set[Fraction] = set()
    for at in range(len(mine) - 1, -1, -1):
        operation = mine[at]
        fine[at] = fine[at] or operation.result in needed
        feeding[at] = operation.result in wanted
        if fine[at]:
            needed |= set(operation.values())
        if feeding[at]:
            wanted |= set(operation.values())
    astray = [at for at in range(len(mine)) if not fine[at]]
    first = next((at for at in astray if feeding[at]), astray[0] if astray else None)
    return None if first is None else mine[first]


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
