"""A wrong try as training needs it: the model's decision kept, its consequences right, up to where the evidence stands.

Called by the judge stage on wrong solutions, and by the probes that compare P(undo) in wrong and right states.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from types import SimpleNamespace

from pipeline.tasks.families import BY_NAME
from pipeline.tasks.problem import Problem
from verifiers.arithmetic import equations
from verifiers.judge import FirstError, Verdict, judge, show
from verifiers.steps import FINAL

_CHOICE = re.compile(r"Try (\d{1,4}) ")


@dataclass(frozen=True)
class Attempt:
    """One wrong try."""

    step: int
    """Index of the wrong line in the solution."""
    start: int
    """Character of the solution where that step begins; all before it is right."""
    text: str
    """The step up to its evidence: an undo token belongs behind it."""
    wrong: tuple[tuple[int, int], ...]
    """Character spans of `text` that are wrong decisions; everything else in it is right, given them."""
    own: bool
    """Whether `text` is what the model wrote; otherwise false inferences after the decision were recomputed."""


def judge_problem(problem: Problem, solution: str) -> Verdict:
    """The generic judge, with the first error of hindsight problems decided exactly from what they were made of."""
    verdict = judge(solution, problem.solution, problem.answer)
    if verdict.correct:
        return verdict
    choice = _wrong_choice(problem, solution)
    if choice is None:
        return verdict
    step = solution.count("\n", 0, choice.start(1))
    if verdict.error and verdict.error.end <= choice.start(1):
        return verdict
    evidence = f"{choice[1]} does not fit: {attempt_text(problem, int(choice[1])).splitlines()[-1]}"
    error = FirstError(step, choice.start(1), choice.end(1), "choice", evidence)
    return Verdict(verdict.correct, verdict.answer, verdict.steps, error)


def wrong_attempt(problem: Problem, solution: str, verdict: Verdict) -> Attempt | None:
    """The attempt of a wrong solution; None when the verdict names no error or the error has no characters."""
    error = verdict.error
    if verdict.correct or error is None or error.start >= error.end:
        return None
    step = solution.count("\n", 0, error.start)
    line_start = solution.rfind("\n", 0, error.start) + 1
    line_end = solution.find("\n", error.start)
    own = solution[line_start : len(solution) if line_end < 0 else line_end].rstrip()
    span = (error.start - line_start, min(error.end - line_start, len(own)))
    if error.kind == "choice":
        text = attempt_text(problem, int(solution[error.start : error.end]))
        return Attempt(step, line_start, text, (span,), own.startswith(text))
    # Elsewhere the evidence is the finished step. A false equation behind the first error is another error.
    later = (equation for equation in equations(own) if equation.verdict == "false" and equation.right_start >= span[1])
    wrong = (span, *((equation.right_start, equation.right_end) for equation in later))
    return Attempt(step, line_start, own, wrong, True)


def right_attempt(problem: Problem, step: int) -> str | None:
    """The same state in the gold solution: its text up to the place where the evidence of `step` stands; None beyond its end."""
    lines = problem.solution.split("\n")
    if step >= len(lines):
        return None
    line = lines[step]
    if problem.hindsight and (choice := _CHOICE.match(line)):
        line = attempt_text(problem, int(choice[1]))
    return "\n".join([*lines[:step], line])


def attempt_text(problem: Problem, choice: int) -> str:
    """A try of a hindsight problem, as its family words it, up to the evidence."""
    attempt = BY_NAME[problem.family].attempt
    if attempt is None:
        raise ValueError(f"{problem.id}: family {problem.family} has no choices")
    return attempt(_params(problem), choice)


def _params(problem: Problem) -> SimpleNamespace:
    return SimpleNamespace(**json.loads(problem.params))


def _wrong_choice(problem: Problem, solution: str) -> re.Match[str] | None:
    """The first try of a value that does not solve the problem, written with the family's own words."""
    family = BY_NAME.get(problem.family)
    if not problem.hindsight or family is None or family.right_choice is None:
        return None
    right = family.right_choice(_params(problem))
    for match in _CHOICE.finditer(solution):
        at_line_start = match.start() == 0 or solution[match.start() - 1] == "\n"
        # Where other words than the family's follow the number, the wording is the error, not the choice.
        head = attempt_text(problem, int(match[1])).split(":")[0] if at_line_start else None
        if head is not None and int(match[1]) != right and solution.startswith(head, match.start()):
            return match
    return None


def state_is_wrong(problem: Problem, text: str) -> bool:
    """Whether an unfinished solution holds an error already: what decides if an undo there was spurious."""
    # The number at which it stops may equal the answer by chance: a wrong choice stays wrong until an answer is given.
    if not FINAL.search(text) and _wrong_choice(problem, text):
        return True
    error = judge_problem(problem, text).error
    # `answer` and `step` only say that the solution does not end as it should.
    if error is None or error.kind in ("answer", "step"):
        return False
    return error.end < len(text) or not _may_become_right(text)


def _may_become_right(text: str) -> bool:
    """Whether the text stops within a right result: `12+10=2` is no error while a digit can follow."""
    last = max(equations(text), key=lambda equation: equation.right_end, default=None)
    if last is None or last.left is None or last.right_end < len(text):
        return False
    return show(last.left).startswith(text[last.right_start :])
