"""Countdown, decided exactly: a search says of every state whether its numbers still make the target.

What a model wrote is read with a small grammar of its own and never evaluated. Fractions and negative numbers are legal on
the way, each with one way of writing; as many lines are read as the problem gives numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, dropwhile, permutations, takewhile

from pipeline.tasks.problem import Problem
from verifiers.answers import extract_answer
from verifiers.expressions import combine
from verifiers.judge import FirstError, Verdict
from verifiers.steps import split_steps
from verifiers.task import Attempt, TaskJudge

Numbers = tuple[Fraction, ...]
"""What is left, sorted."""

_WHOLE = "[1-9][0-9]{0,19}"  # more digits than seven numbers up to 100 can make
_NUMBER = rf"(?:0|-?{_WHOLE}(?:/{_WHOLE})?)"
_OPERAND = rf"(?:0|-?{_WHOLE}|\((?:-{_WHOLE}|-?{_WHOLE}/{_WHOLE})\))"  # without brackets 8/3/2 would have two meanings
_OPERATION = re.compile(rf"<<({_OPERAND})([-+*/])({_OPERAND})=({_NUMBER})>>")
_LEFT = re.compile(rf"({_NUMBER}), left((?: {_NUMBER}){{1,8}})")
_LISTED = re.compile(_NUMBER)


class CountdownJudge(TaskJudge):
    """A solution is right when its operations are, whatever it says is left; the answer alone is worth nothing."""

    exact = True

    def correct(self, problem: Problem, solution: str) -> bool:
        numbers, target = _core(problem)
        *operations, answer = solution.rstrip().split("\n", len(numbers))
        left = list(numbers)
        for line in operations:
            operation = _operation(line)
            if operation is None:
                return False
            first, second, written = _operands(operation)
            left, missing = _take(left, (first, second))
            if missing or combine(operation[2], first, second) != written:
                return False
            left.append(written)
        return left == [target] and answer == f"#### {target}"

    def judge(self, problem: Problem, solution: str) -> Verdict:
        """Kinds of a first error: operand (a number that is not there), choice (nothing leads to the target any more),
        arithmetic, copy (what is left), answer, expression (a line that is none of these) and step (the solution ends)."""
        correct = self.correct(problem, solution)
        lines = _read(problem, solution.rstrip())
        found = [(line, error) for line in lines for error in line.errors]
        if not found and not correct:
            found = [(lines[-1], _Error(0, len(lines[-1].text), "step", "the solution ends here without an answer"))]
        spans = [(line.start + error.start, line.start + error.end) for line, error in found]
        steps, answer = tuple(split_steps(solution)), extract_answer(solution)
        if not found:
            return Verdict(correct, answer, steps, None)
        line, error = found[0]
        return Verdict(correct, answer, steps, FirstError(line.index, *spans[0], error.kind, error.evidence), tuple(spans[1:]))

    def attempt(self, problem: Problem, solution: str, verdict: Verdict) -> Attempt | None:
        """A wrong choice up to the last operation: nothing is left to choose there, which shows what it was worth, unless a
        false result hides it; so results are recomputed. Other errors show on their own line."""
        error = verdict.error
        if error is None or error.kind == "rollouts":  # found by sampling, maybe elsewhere
            return super().attempt(problem, solution, verdict)
        lines = list(dropwhile(lambda line: not line.errors, _read(problem, solution.rstrip())))
        if verdict.correct or error.start >= error.end or not lines:
            return None
        wrong = lines[0]
        if error.kind == "choice":
            text = "\n".join(_played(list(takewhile(lambda line: line.is_operation, lines))))
            decision = (error.start - wrong.start, error.end - wrong.start)
            return Attempt(wrong.index, wrong.start, text, (decision,), solution.startswith(text, wrong.start))
        spans = tuple((one.start, one.end) for one in wrong.errors)
        return Attempt(wrong.index, wrong.start, wrong.text, spans, True)

    def continuation(self, problem: Problem, done: str) -> str | None:
        """The gold solution where it begins like this, else the first way that the search finds, whole numbers first."""
        if problem.solution.startswith(done):
            return super().continuation(problem, done)
        left, target = _core(problem)
        for line in done.removesuffix("\n").split("\n"):
            errors, after = _check(line, left, target, True)
            if errors or not after or not done.endswith("\n"):
                return None
            left = after
        lines = []
        while len(left) > 1:
            ways = [(head, after) for head, after in _moves(left) if reaches(after, target)]
            head, left = min(ways, key=lambda way: (any(one.denominator > 1 or one < 0 for one in way[1]), way))
            lines.append(head + _show(left))
        return "\n".join([*lines, f"#### {target}"])

    def state_is_wrong(self, problem: Problem, text: str) -> bool:
        return any(line.errors for line in _read(problem, text))

    def evidence_seen(self, problem: Problem, text: str) -> bool:
        """A wrong choice shows where nothing is left to choose; all else, and what hides it, where it stands."""
        lines = _read(problem, text)
        wrong = next((line for line in lines if line.errors), None)
        if wrong is None:
            return True
        begun = wrong is lines[-1] and any(_begins(wrong.text, *move) for move in _moves(wrong.left))
        if wrong.errors[0].kind != "choice" and not begun:
            return True
        operations = [line for line in lines if line.is_operation]
        hidden = any(error.kind in ("operand", "arithmetic") for line in operations for error in line.errors)
        return hidden or len(operations) >= len(_core(problem)[0]) - 1 or lines[-1].text.startswith("####")


# --- which numbers make what ------------------------------------------------------------------------------------------


@lru_cache(maxsize=2**15)
def reaches(numbers: Numbers, target: Fraction) -> bool:
    """Whether the numbers, sorted and each used once, make the target with + - * / in any order and with any brackets.

    Every way ends with an operation on what two parts make. A value of the smaller part leaves at most six values that
    the other one may have to make, so only parts of up to three numbers are ever enumerated.
    """
    if len(numbers) <= 3:
        return target in _values(numbers)
    return any(
        reaches(large, wanted)
        for small, large in _splits(numbers)
        for value in _values(small)
        for wanted in _partners(value, target, large)
    )


def _partners(value: Fraction, target: Fraction, large: Numbers) -> Iterator[Fraction]:
    """What has to be combined with `value` to make the target; where everything does, something that `large` makes."""
    yield target - value
    yield value - target
    yield target + value
    if value:
        yield target / value
        yield target * value
        if target:
            yield value / target
    elif not target:
        yield sum(large, Fraction(0))  # 0 times anything


@lru_cache(maxsize=2**12)
def _values(numbers: Numbers) -> frozenset[Fraction]:
    """All that up to three numbers make."""
    if len(numbers) == 1:
        return frozenset(numbers)
    pairs = ((a, b) for small, large in _splits(numbers) for a in _values(small) for b in _values(large))
    ways = (combine(sign, *order) for a, b in pairs for sign in "+-*/" for order in ((a, b), (b, a)))
    return frozenset(value for value in ways if value is not None)


def _splits(numbers: Numbers) -> set[tuple[Numbers, Numbers]]:
    """All ways to part the numbers in two, the first part not the larger one."""
    every = range(len(numbers))
    chosen = (at for size in range(1, len(numbers) // 2 + 1) for at in combinations(every, size))
    return {(tuple(numbers[i] for i in at), tuple(numbers[i] for i in every if i not in at)) for at in chosen}


# --- lines ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Error:
    """As `FirstError`, with characters of its line."""

    start: int
    end: int
    kind: str
    evidence: str


@dataclass(frozen=True)
class _Line:
    """One line of a solution with its own errors: those that it makes given what stands before it, false or not."""

    index: int
    start: int
    text: str
    left: Numbers
    """Before it, by what the solution itself says."""
    is_operation: bool
    errors: Sequence[_Error]


def _read(problem: Problem, text: str) -> list[_Line]:
    """The lines of a solution up to the first that cannot be read; at most one more than there are numbers.

    Behind an error the numbers count that the solution itself says are left. The last line has no error yet where it may
    be the beginning of a right one.
    """
    numbers, target = _core(problem)
    lines: list[_Line] = []
    left: Numbers | None = numbers
    start, hopeful, sound = 0, True, True
    pieces = text.split("\n", len(numbers))
    for index, piece in enumerate(pieces):
        if left is None:
            break
        errors, after = _check(piece, left, target, hopeful)
        if errors and sound and index == len(pieces) - 1 and _may_become_right(piece, left, target):
            errors = []
        if errors and after:
            hopeful = reaches(after, target)
        sound = sound and not errors
        lines.append(_Line(index, start, piece, left, _operation(piece) is not None, errors))
        left, start = after, start + len(piece) + 1
    return lines


def _played(lines: Sequence[_Line]) -> list[str]:
    """The operations of lines with their true results and what is left then, up to the last one.

    Where an operation needs a number that is there by a false result alone, it takes the nearest one that is left.
    """
    left, texts = lines[0].left, []
    for line in lines:
        operation = _operation(line.text)
        if operation is None or len(left) < 2:
            break
        pair = list(_operands(operation)[:2])
        rest, missing = _take(left, pair)
        for which in missing:
            pair[which] = min(rest, key=lambda one: abs(one - pair[which]))
            rest.remove(pair[which])
        sign, value = operation[2], combine(operation[2], *pair)
        if value is None:  # divided by nothing
            sign, value = "+", sum(pair, Fraction(0))
        sound = not missing and line.left == left and all(error.kind == "choice" for error in line.errors)
        left = _sorted(*rest, value)
        first, second = (_writings(one)[-1] if at in missing else operation[(1, 3)[at]] for at, one in enumerate(pair))
        texts.append(line.text if sound else f"<<{first}{sign}{second}={value}>>{value}, left {_show(left)}")
    return texts


def _check(line: str, left: Numbers, target: Fraction, hopeful: bool) -> tuple[list[_Error], Numbers | None]:
    """Errors of a line in their order, and what is left behind it: nothing behind the answer, None where it cannot be told.

    `hopeful` says whether the numbers that are left can still make the target.
    """
    if not left:
        return ([_Error(0, len(line), "expression", "the answer stands already")] if line.strip() else []), left
    if line.rstrip() == f"#### {target}" and left == (target,):
        return [], ()
    if line.startswith("####"):
        said = line[4:].strip()
        start = line.index(said, 4) if said else 0
        if len(left) > 1:
            evidence = f"{_show(left)} are left: nothing has made {target} yet"
        else:
            evidence = f"the numbers make {left[0]}, the answer line should be '#### {target}'"
        return [_Error(start, start + len(said) if said else len(line), "answer", evidence)], None
    operation = _operation(line)
    if operation is None:
        return [_Error(0, len(line), "expression", "this is neither an operation on two numbers nor the answer")], None
    return _check_operation(line, operation, left, target, hopeful)


def _check_operation(
    line: str, operation: re.Match[str], left: Numbers, target: Fraction, hopeful: bool
) -> tuple[list[_Error], Numbers | None]:
    first, second, written = _operands(operation)
    rest, missing = _take(left, (first, second))
    errors = []
    for which in missing:
        text = operation[(1, 3)[which]]
        evidence = f"{text} is not there twice" if (first, second)[which] in left else f"{text} is not among {_show(left)}"
        errors.append(_Error(*operation.span((1, 3)[which]), "operand", evidence))
    value = combine(operation[2], first, second)
    if value is not None and not missing and hopeful and not reaches(after := _sorted(*rest, value), target):
        evidence = f"from {_show(after)} no way leads to {target}"
        errors.append(_Error(operation.start(1), operation.end(3), "choice", evidence))
    if value != written:
        claim = f"{operation[1]} {operation[2]} {operation[3]} is {'undefined' if value is None else value}"
        errors.append(_Error(*operation.span(4), "arithmetic", f"{claim}, not {written}"))
    expected = None if missing else _sorted(*rest, written)
    copies, listed = _check_copies(line, operation, expected)
    # What the solution says is left is what its next line is made of, if that can be.
    return errors + copies, listed if listed and len(listed) == len(left) - 1 else expected


def _check_copies(line: str, operation: re.Match[str], expected: Numbers | None) -> tuple[list[_Error], Numbers | None]:
    """Errors of what stands behind `<<a*b=c>>`: c once more, and the numbers that are left; and those numbers, where legible."""
    copies = _LEFT.fullmatch(line, operation.end())
    if copies is None or not _in_lowest_terms(_LISTED.findall(copies[0])):
        start = operation.end() if operation.end() < len(line) else 0
        return [_Error(start, len(line), "copy", f"behind it belongs '{operation[4]}, left' and the numbers that are left")], None
    errors = []
    if copies[1] != operation[4]:
        errors.append(_Error(*copies.span(1), "copy", f"the result {operation[4]} is written as {copies[1]}"))
    items = list(_LISTED.finditer(line, *copies.span(2)))
    listed = [Fraction(item[0]) for item in items]
    if expected is not None and _sorted(*listed) != expected:
        evidence = f"left are {_show(expected)}, not{copies[2]}"
        strays = [items[at].span() for at in _take(expected, listed)[1]]
        errors += [_Error(*span, "copy", evidence) for span in strays or [(items[0].start(), items[-1].end())]]
    return errors, _sorted(*listed)


def _may_become_right(line: str, left: Numbers, target: Fraction) -> bool:
    """Whether the line is the beginning of one after which the target can still be made; `left` can."""
    if not left:
        return not line.strip()
    if len(left) == 1:
        return f"#### {target}".startswith(line)
    return "<<".startswith(line) or any(_begins(line, head, after) and reaches(after, target) for head, after in _moves(left))


def _moves(left: Numbers) -> Iterator[tuple[str, Numbers]]:
    """Every legal operation as it may be written, up to the list of what is left, and that list."""
    for first, second in set(permutations(left, 2)):
        for sign in "+-*/":
            value = combine(sign, first, second)
            if value is not None:
                after = _sorted(*_take(left, (first, second))[0], value)
                for one in _writings(first):
                    for other in _writings(second):
                        yield f"<<{one}{sign}{other}={value}>>{value}, left ", after


def _writings(operand: Fraction) -> list[str]:
    whole = [str(operand)] if operand.denominator == 1 else []
    return whole + [f"({operand})"] if operand < 0 or not whole else whole


def _begins(line: str, head: str, after: Numbers) -> bool:
    """Whether the line is a beginning of the head and the numbers behind it, in any order."""
    if not line.startswith(head):
        return head.startswith(line)
    *whole, last = line[len(head) :].split(" ", len(after))
    rest = [str(number) for number in after]
    for text in whole:
        if text not in rest:
            return False
        rest.remove(text)
    return any(text.startswith(last) for text in rest)


def _operation(line: str) -> re.Match[str] | None:
    found = _OPERATION.match(line)
    return found if found and _in_lowest_terms(found[group].strip("()") for group in (1, 3, 4)) else None


def _operands(operation: re.Match[str]) -> tuple[Fraction, Fraction, Fraction]:
    """Both operands and the result as it is written."""
    return Fraction(operation[1].strip("()")), Fraction(operation[3].strip("()")), Fraction(operation[4])


def _in_lowest_terms(numbers: Iterable[str]) -> bool:
    """Whether each is written as this judge writes it: what may follow a beginning stays a matter of finitely many texts."""
    return all(str(Fraction(number)) == number for number in numbers)


def _take(there: Iterable[Fraction], wanted: Sequence[Fraction]) -> tuple[list[Fraction], list[int]]:
    """What stays when the wanted numbers are taken away, and the indices of those that are not there."""
    rest, missing = list(there), []
    for index, number in enumerate(wanted):
        if number in rest:
            rest.remove(number)
        else:
            missing.append(index)
    return rest, missing


def _sorted(*numbers: Fraction) -> Numbers:
    return tuple(sorted(numbers))


def _show(numbers: Iterable[Fraction]) -> str:
    return " ".join(map(str, numbers))


def _core(problem: Problem) -> tuple[Numbers, Fraction]:
    numbers, target = json.loads(problem.params)["core"]
    return _sorted(*map(Fraction, numbers)), Fraction(target)
