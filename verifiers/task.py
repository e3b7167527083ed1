"""How a task judges solutions of its problems. A new task is one file with a subclass, and a line in `verifiers.tasks`.

The base class serves every task whose gold solutions are calculations in GSM8K format; a task that can decide more from
what its problems were made of overrides that part.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.tasks.problem import Problem
from verifiers.answers import is_right
from verifiers.arithmetic import equations
from verifiers.judge import Verdict, judge, show


@dataclass(frozen=True)
class Attempt:
    """A wrong try as training needs it: the model's decision kept, its consequences right, up to where the evidence stands."""

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


class TaskJudge:
    """Judges solutions by comparing them with the gold solution."""

    exact = False
    """Whether first errors are decided from what a problem was made of, so that sampling can add nothing."""

    def correct(self, problem: Problem, solution: str) -> bool:
        """Whether the solution ends right."""
        return is_right(solution, problem.answer)

    def judge(self, problem: Problem, solution: str) -> Verdict:
        """The verdict, with the first error of a wrong solution."""
        return judge(solution, problem.solution, problem.answer, problem.question)

    def attempt(self, problem: Problem, solution: str, verdict: Verdict) -> Attempt | None:
        """The wrong try of a wrong solution; None when the verdict names no error or the error has no characters.

        The evidence is the finished step. A false equation behind the first error is another error.
        """
        error = verdict.error
        if verdict.correct or error is None or error.start >= error.end:
            return None
        step, start, own = line_of(solution, error.start)
        span = (error.start - start, min(error.end - start, len(own)))
        later = (equation for equation in equations(own) if equation.verdict == "false" and equation.right_start >= span[1])
        wrong = (span, *((equation.right_start, equation.right_end) for equation in later))
        return Attempt(step, start, own, wrong, True)

    def right_state(self, problem: Problem, step: int, lines: int = 1) -> str | None:
        """What stands in the gold solution where a wrong try of so many lines ends that began at `step`; None beyond its end."""
        gold = problem.solution.split("\n")
        return "\n".join(gold[: step + lines]) if step + lines <= len(gold) else None

    def continuation(self, problem: Problem, done: str) -> str | None:
        """What belongs behind right steps that end with a line break: the gold solution from its first line whose result does
        not stand there yet. None when nothing is left to do."""
        gold = problem.solution.split("\n")
        if problem.solution.startswith(done):
            return "\n".join(gold[done.count("\n") :])
        reached = {equation.right for equation in equations(done)}
        results = [[equation.right for equation in equations(line)] for line in gold]
        at = next((i for i, values in enumerate(results) if not values or values[-1] not in reached), None)
        return "\n".join(gold[at:]) if at is not None and done.endswith("\n") else None

    def state_is_wrong(self, problem: Problem, text: str) -> bool:
        """Whether an unfinished solution holds an error already: what decides if an undo there was spurious."""
        error = judge(text, problem.solution, problem.answer, problem.question, finished=False).error
        # `answer` and `step` only say that the solution does not end as it should.
        if error is None or error.kind in ("answer", "step"):
            return False
        if error.end < len(text):
            return True
        unfinished_number = error.kind in ("quantity", "operand") and text[-1].isdigit()
        return not unfinished_number and not may_become_right(text)

    def evidence_seen(self, problem: Problem, text: str) -> bool:
        """Whether what stands in an unfinished solution that is wrong already shows that it is. In a calculation the wrong part
        itself does."""
        return True


def line_of(solution: str, at: int) -> tuple[int, int, str]:
    """Index, first character and text of the line that holds a character."""
    start = solution.rfind("\n", 0, at) + 1
    end = solution.find("\n", at)
    return solution.count("\n", 0, at), start, solution[start : len(solution) if end < 0 else end].rstrip()


def may_become_right(text: str) -> bool:
    """Whether the text stops within a right result: `12+10=2` is no error while a digit can follow."""
    last = max(equations(text), key=lambda equation: equation.right_end, default=None)
    if last is None or last.left is None or last.right_end < len(text):
        return False
    return show(last.left).startswith(text[last.right_start :])
