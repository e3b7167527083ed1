"""Which judge a problem has. Everything that judges a problem asks here."""

from __future__ import annotations

from pipeline.tasks import countdown
from pipeline.tasks.families import FAMILIES
from pipeline.tasks.problem import Problem
from verifiers.countdown import CountdownJudge
from verifiers.synthetic import SyntheticJudge
from verifiers.task import TaskJudge

_DEFAULT = TaskJudge()
JUDGES: dict[str, TaskJudge] = {
    **dict.fromkeys((family.name for family in FAMILIES), SyntheticJudge()),
    countdown.FAMILY: CountdownJudge(),
}
"""Family -> judge; families that are not named here are calculations in GSM8K format."""


def judge_of(problem: Problem) -> TaskJudge:
    return JUDGES.get(problem.family, _DEFAULT)
