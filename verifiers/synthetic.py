"""The synthetic families, decided exactly: their params tell for any choice whether it can still lead to a right answer."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

from pipeline.tasks.families import BY_NAME
from pipeline.tasks.problem import Problem
from verifiers.arithmetic import equations
from verifiers.judge import FirstError, Verdict
from verifiers.steps import FINAL
from verifiers.task import Attempt, TaskJudge, line_of, may_become_right

_CHOICE = re.compile(r"Try (\d{1,4})( |\Z)")


class SyntheticJudge(TaskJudge):
    """Hindsight problems by their right choice; forward ones like any calculation."""

    exact = True

    def judge(self, problem: Problem, solution: str) -> Verdict:
        verdict = super().judge(problem, solution)
        if verdict.correct:
            return verdict
        choice = _wrong_choice(problem, solution)
        if choice is None or verdict.error and verdict.error.end <= choice.start(1):
            return verdict
        step = solution.count("\n", 0, choice.start(1))
        evidence = f"{choice[1]} does not fit: {attempt_text(problem, int(choice[1])).splitlines()[-1]}"
        error = FirstError(step, choice.start(1), choice.end(1), "choice", evidence)
        return replace(verdict, error=error)

    def attempt(self, problem: Problem, solution: str, verdict: Verdict) -> Attempt | None:
        error = verdict.error
        if verdict.correct or error is None or error.kind != "choice":
            return super().attempt(problem, solution, verdict)
        step, start, own = line_of(solution, error.start)
        text = attempt_text(problem, int(solution[error.start : error.end]))
        return Attempt(step, start, text, ((error.start - start, error.end - start),), own.startswith(text))

    def right_state(self, problem: Problem, step: int, lines: int = 1) -> str | None:
        gold = problem.solution.split("\n")
        if problem.hindsight and step < len(gold) and (choice := _CHOICE.match(gold[step])):
            return "\n".join([*gold[:step], attempt_text(problem, int(choice[1]))])  # a try's evidence stands within its line
        return super().right_state(problem, step, lines)

    def state_is_wrong(self, problem: Problem, text: str) -> bool:
        # The number at which it stops may equal the answer by chance: a wrong choice stays wrong until a right answer is given.
        if _wrong_choice(problem, text) and not (FINAL.search(text) and self.correct(problem, text)):
            return True
        return super().state_is_wrong(problem, text)

    def evidence_seen(self, problem: Problem, text: str) -> bool:
        choice = _wrong_choice(problem, text)
        if choice is None:
            return True
        _, _, own = line_of(text, choice.start(1))
        if len(own) >= len(attempt_text(problem, int(choice[1]))):
            return True
        return any(one.verdict == "false" for one in equations(own)) and not may_become_right(own)


def attempt_text(problem: Problem, choice: int) -> str:
    """A try of a hindsight problem, as its family words it, up to the evidence."""
    attempt = BY_NAME[problem.family].attempt
    if attempt is None:
        raise ValueError(f"{problem.id}: family {problem.family} has no choices")
    return attempt(_params(problem), choice)


def _params(problem: Problem) -> SimpleNamespace:
    return SimpleNamespace(**json.loads(problem.params))


def _wrong_choice(problem: Problem, solution: str) -> re.Match[str] | None:
    """The first try of a value that does not solve the problem, written with the family's own words or the beginning of them."""
    family = BY_NAME[problem.family]
    if family.right_choice is None:
        return None
    right = family.right_choice(_params(problem))
    for match in _CHOICE.finditer(solution):
        at_line_start = match.start() == 0 or solution[match.start() - 1] == "\n"
        may_grow = not match[2] and str(right).startswith(match[1])
        if not at_line_start or int(match[1]) == right or may_grow:
            continue
        # Where other words than the family's follow the number, the wording is the error, not the choice.
        head, words = attempt_text(problem, int(match[1])).split(":")[0], solution[match.start() :]
        if words.startswith(head) or head.startswith(words):
            return match
    return None
