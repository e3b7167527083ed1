"""The verdict on a solution: is it right, and if not, where does the first wrong decision stand and what shows it.

Called by the judge stage. It compares with the gold solution symbolically; it knows no model and no task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from verifiers.answers import extract_answer, is_right, parse_number
from verifiers.arithmetic import Checked, read
from verifiers.dataflow import Operation, Source, closest, first_deviation, gold_of, operations
from verifiers.expressions import Node, branches, leaves, tokens
from verifiers.phrases import left_side
from verifiers.quantities import MAX_TEXT, foreign
from verifiers.steps import FINAL, Step, split_steps


@dataclass(frozen=True)
class FirstError:
    """Example: in `5 + 7 = 13` FirstError(step=0, start=8, end=10, kind="arithmetic", evidence="5 + 7 is 12, not 13")."""

    step: int
    start: int
    """first character of the wrong decision in the solution"""
    end: int
    kind: str
    """arithmetic, copy, quantity, operand, operator, result, expression, answer or step; choice or rollouts elsewhere"""
    evidence: str


@dataclass(frozen=True)
class Verdict:
    """A right answer may still carry an error of kind `arithmetic`; it makes no error trace."""

    correct: bool
    answer: str | None
    steps: tuple[Step, ...]
    error: FirstError | None
    later: tuple[tuple[int, int], ...] = ()
    """Characters of further false results behind the first error; what else stands there is right, given the first error."""


def judge(
    solution: str,
    gold_solution: str,
    gold_answer: str,
    question: str = "",
    *,
    regardless: bool = False,
    finished: bool = True,
) -> Verdict:
    """Judge one solution. Never raises on any text; offsets are characters of `solution`.

    With the question, a quantity that comes from nowhere is an error too. `regardless` looks for an error even where the
    final answer is right, to measure false alarms. What is not `finished` may still come back from a way of its own.
    """
    answer = extract_answer(solution)
    steps = tuple(split_steps(solution))
    correct = is_right(solution, gold_answer)
    mine = operations(solution)
    false = list(slips(solution, steps, mine))
    slip = false[0] if false else None
    if not steps or correct and not regardless:
        return Verdict(correct, answer, steps, slip if slip and slip.kind == "arithmetic" else None)
    reached = parse_number(answer) if answer is not None else None
    before_slip = [one for one in mine if slip is None or one.checked.equation.end <= slip.start]
    gold = gold_of(gold_solution)
    source = Source.of(solution, question, gold) if question else None
    stray = first_deviation(
        before_slip if slip else mine, gold, None if slip else reached, source, idle_ok=correct, finished=finished
    )
    error = deviation(solution, steps, stray, before_slip, gold.operations) if stray else slip
    if source and (misquoted := foreign_quantity(steps, mine, source, error)):
        error = misquoted
    if error is None and not correct:
        error = ending(solution, steps, mine, answer, gold_answer)
    later = tuple((one.start, one.end) for one in false if error and one.start >= error.end)
    return Verdict(correct, answer, steps, error, later)


def foreign_quantity(
    steps: Sequence[Step], mine: Sequence[Operation], source: Source, error: FirstError | None
) -> FirstError | None:
    """A quantity in the words before `error` that neither the question nor the gold solution nor a calculation gives."""
    known = set(source.known)
    spans = [(one.checked.equation.start, one.checked.equation.end) for one in mine]
    at = 0
    for step in steps:
        if step.start > MAX_TEXT or FINAL.match(source.text, step.start) or error and step.start >= error.start:
            return None
        while at < len(mine) and mine[at].checked.equation.start < step.end:
            tree = mine[at].checked.left
            known |= (
                {mine[at].result} | {node.value for node in branches(tree) if node.value is not None} if tree else {mine[at].result}
            )
            at += 1
        found = foreign(source.text, step.start, min(step.end, error.start) if error else step.end, known, spans)
        if found:
            named = source.text[found.start : found.end]
            return FirstError(
                step.index, found.start, found.end, "quantity", f"{named} stands neither in the question nor follows from it"
            )
    return None


def slips(solution: str, steps: Sequence[Step], mine: Sequence[Operation]) -> Iterator[FirstError]:
    """Equations that do not hold, and results that are written differently behind their `<<...>>`."""
    for operation in mine:
        equation = operation.checked.equation
        if equation.verdict == "false" and equation.left is not None:
            claim = solution[equation.left_start : equation.left_end].strip()
            written = solution[equation.right_start : equation.right_end].strip()
            evidence = f"{claim} is {show(equation.left)}, not {written}"
            yield located(steps, equation.right_start, equation.right_end, "arithmetic", evidence)
            continue
        copied = copied_number(solution, operation.checked)
        if copied and copied.value != operation.result:
            evidence = f"the result {show(operation.result)} is written as {solution[copied.start : copied.end]}"
            yield located(steps, copied.start, copied.end, "copy", evidence)


def copied_number(solution: str, checked: Checked) -> Node | None:
    """The number behind `<<a=b>>` when it is whole, has the same sign and is no unit conversion of b."""
    if not checked.annotated or not solution.startswith(">>", checked.equation.right_end):
        return None
    start = checked.equation.right_end + 2
    items = tokens(solution, start, min(len(solution), start + 40))
    if not items or items[0].kind != "num" or items[0].start != start:
        return None
    following = items[1].kind if len(items) > 1 else ""
    value, result = parse_number(items[0].text), checked.equation.right
    if following not in ("", "word", "other") or value is None or not result or result.denominator != 1:
        return None
    known_scale = result in [value * scale for scale in (100, 1000, 10**6, 10**9)]
    cut_off = items[0].end == len(solution)
    return None if known_scale or cut_off else Node("num", items[0].start, items[0].end, value)


def deviation(
    solution: str, steps: Sequence[Step], stray: Operation, done: Sequence[Operation], gold: Sequence[Operation]
) -> FirstError:
    """Point at the first operand, operator or result in which the operation differs from the closest one of gold."""
    equation = stray.checked.equation
    tree = visible_tree(solution, stray)
    claim = solution[equation.left_start : equation.left_end].strip()
    nearest = closest(stray, gold, [one for one in done if one.checked.equation.end <= equation.start])
    if nearest is None:
        evidence = f"nothing in the right solution corresponds to {claim} = {show(stray.result)}"
        return located(steps, tree.start, tree.end, "expression", evidence)
    target = nearest.checked.left
    assert target is not None
    wanted = ", ".join(show(node.value) for node in leaves(target))
    evidence = f"{claim} = {show(stray.result)} stands where {infix(target)} = {show(nearest.result)} is needed"
    spare = nearest.values()
    for node in leaves(tree):
        size = abs(node.value or Fraction(0))
        if spare[size] == 0:
            return located(steps, node.start, node.end, "operand", f"{evidence}: {show(node.value)} is not among {wanted}")
        spare[size] -= 1
    signs = Counter(nearest.signs)
    for node in sorted(branches(tree), key=lambda branch: branch.op_start):
        if signs[node.op] == 0 and node.op_end > node.op_start:
            return located(steps, node.op_start, node.op_end, "operator", evidence)
        signs[node.op] -= 1
    return located(steps, equation.right_start, equation.right_end, "result", evidence)


def visible_tree(solution: str, operation: Operation) -> Node:
    """The tree of the left side, where it is written first: before `<<...>>` when the prose has the same numbers."""
    checked, tree = operation.checked, operation.checked.left
    assert tree is not None
    if not checked.annotated:
        return tree
    opening = solution.rfind("<<", 0, checked.equation.left_start)
    stop = solution.rfind("=", max(0, opening - 6), opening)
    start = max(solution.rfind("\n", 0, opening) + 1, solution.rfind(">>", 0, opening) + 2, opening - 200, 0)
    if stop < start:
        return tree
    items = left_side(tokens(solution, start, stop), line_start=False)
    node = read(items).node if items else None
    if node is None or [leaf.value for leaf in leaves(node)] != [leaf.value for leaf in leaves(tree)]:
        return tree
    return node


def ending(solution: str, steps: Sequence[Step], mine: Sequence[Operation], answer: str | None, gold_answer: str) -> FirstError:
    """No wrong calculation was found: blame the answer line when it states an answer, else the last step."""
    last = steps[-1]
    at = solution.rfind(answer, last.start, last.end) if answer else -1
    if answer is None or at < 0:
        return FirstError(last.index, last.start, last.end, "step", "the solution ends here without a right answer")
    reached = parse_number(answer)
    if mine and reached is not None and mine[-1].result != reached:
        evidence = f"the last calculation gives {show(mine[-1].result)}, the answer says {answer}"
    else:
        evidence = f"the answer is {extract_answer(gold_answer) or gold_answer.strip()}, not {answer}"
    return FirstError(last.index, at, at + len(answer), "answer", evidence)


def located(steps: Sequence[Step], start: int, end: int, kind: str, evidence: str) -> FirstError:
    index = max((step.index for step in steps if step.start <= start), default=0)
    return FirstError(index, start, end, kind, evidence)


def infix(node: Node) -> str:
    """The tree in plain writing, with parentheses where needed."""
    if not node.args:
        return show(node.value)
    parts = [infix(arg) if not arg.args else f"({infix(arg)})" for arg in node.args]
    if node.op in "+-" and node.args[0].op in ("+", "-") and len(parts) == 2:
        parts[0] = infix(node.args[0])
    return f"-{parts[0]}" if node.op == "neg" else f" {node.op} ".join(parts)


def show(value: Fraction | None) -> str:
    """A short decimal where one exists, else a fraction."""
    if value is None:
        return "undefined"
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 64:
        return "a very large number"
    if value.denominator == 1:
        return str(value.numerator)
    decimal = f"{float(value):.6g}"
    if "e" not in decimal and Fraction(decimal) == value:
        return decimal
    return f"{value.numerator}/{value.denominator}" if value.denominator < 1000 else f"about {decimal}"
