"""Rollouts made by hand and at random for the tests of the rewards."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from benchmarks.rewards import END, STOP, UNDO, WORDS, judge_ids, problems, rule, write, wrong_line
from pipeline.backtrack.undo import Unit, apply_undo
from pipeline.reward_config import BacktrackSettings, BudgetSettings, Phases, PhaseWeights, RewardSettings, RewardWeights
from pipeline.tasks.problem import Problem
from rewards.rollout import JudgedRollout, UndoRun

__all__ = ["END", "STOP", "UNDO", "WORDS", "judge_ids", "rule", "write", "wrong_line"]
UNITS: tuple[Unit, ...] = get_args(Unit)
PROBLEMS = problems(60)
LINE_1, LINE_2, LAST = "Ana has 3+4=<<3+4=7>>7 apples.\n", "She pays 7*2=<<7*2=14>>14 dollars.\n", "#### 14"
ANA = Problem(
    "gsm8k/train/0", "train", "gsm8k", False, "Ana has 3 apples and buys 4. Each costs 2 dollars. What does she pay?",
    LINE_1 + LINE_2 + LAST, "14",
)  # fmt: skip
WRONG_1 = LINE_1.replace("7>>7", "8>>8")
WRONG_2 = LINE_2.replace("14>>14", "15>>15")
GARBAGE = ["", "\n\n", "\ufffd\ufffd", "<<<<3=3>>", "####", "#### 1\n#### 2", "=" * 200, "1/0 = 3\n#### nan", "A: or B:"]


def rollout(*pieces: str | int, problem: Problem = ANA, unit: Unit = "step", stop: bool = True) -> JudgedRollout:
    """A judged completion from pieces of text; numbers are runs of undo tokens."""
    ids: list[int] = []
    for piece in pieces:
        ids += WORDS.encode(piece) if isinstance(piece, str) else [UNDO] * piece
    return judge_ids(problem, [*ids, STOP] if stop else ids, unit)


def solution(problem: Problem, draw: random.Random) -> str:
    """What a completion may end as: right, wrong in a line, wrong in its answer, cut, or no solution at all."""
    *lines, answer = problem.solution.split("\n")
    kind = draw.choice(["right", "right", "line", "answer", "cut", "garbage"])
    if kind == "garbage":
        return draw.choice(GARBAGE)
    if kind == "cut":
        return "\n".join(lines[: draw.randint(0, len(lines))])
    if kind == "line":
        at = draw.randrange(len(lines)) if not problem.hindsight else 0
        lines[at] = wrong_line(problem, lines[at], draw)
    return "\n".join([*lines, answer if kind == "right" else f"#### {int(problem.answer) + draw.randint(1, 9)}"])


def detours(problem: Problem, surviving: Sequence[int], unit: Unit, draw: random.Random, most: int = 4) -> list[int]:
    """Emitted ids that leave these: errors written and taken back, right text taken back and written again, no-ops."""
    ids: list[int] = [UNDO] * draw.choice([0, 0, 0, 1, 2])
    places = sorted(draw.choices(range(len(surviving)), k=draw.randint(0, most))) if surviving else []
    at = 0
    for place in places:
        if unit != "token" or draw.random() < 0.5:
            while 0 < place < len(surviving) and surviving[place - 1] != END:
                place -= 1
        if place < at:
            continue
        ids += surviving[at:place]
        at = place
        junk = WORDS.encode(draw.choice([wrong_line(problem, problem.solution.split("\n")[0], draw), "no", "2+2=5", "7"]))
        if unit == "all":
            ids += [*junk, UNDO, *surviving[:at]]
        elif unit == "token":
            back = draw.randint(0, min(3, at))
            ids += [*junk, *[UNDO] * (len(junk) + back), *surviving[at - back : at]]
        elif draw.random() < 0.3 and at:
            start = at - 1
            while start and surviving[start - 1] != END:
                start -= 1
            ids += [UNDO, *surviving[start:at]]
        else:
            ids += [*junk, *[END] * draw.randint(0, 1), UNDO]
    ids += surviving[at:]
    assert apply_undo(ids, rule(unit)).surviving == tuple(surviving)
    return ids


def any_undos(base: JudgedRollout, undos: int, draw: random.Random) -> JudgedRollout:
    """The same surviving ids behind so many undos of any kind, without judging them: whatever a judge may say."""
    runs, at = [], 0
    while at < undos:
        size = draw.randint(1, undos - at)
        unnecessary = draw.randint(0, size)
        noops = draw.randint(0, size - unnecessary)
        runs.append(UndoRun(at, at + size, draw.random() < 0.5, draw.random() < 0.5, unnecessary, noops))
        at += size
    deleted = draw.choice([0, undos, draw.randint(0, 40), draw.randint(0, 1500)]) if undos else 0
    ids = (*base.surviving, *[UNDO] * undos, *[3] * deleted)
    return replace(base, token_ids=ids, undos=undos, noops=sum(run.noops for run in runs), undo_runs=tuple(runs))


def any_settings(draw: random.Random) -> RewardSettings:
    """Settings from all over their bounds, without custom rewards."""

    def weight() -> float:
        return draw.choice([0.0, 10.0, draw.uniform(0, 1), draw.uniform(0, 10)])

    bonus, efficiency = draw.uniform(0, 1), draw.choice([0.0, 1.0, draw.random()])
    names = ("unnecessary", "failed", "noop")
    backtrack = BacktrackSettings(
        correction_bonus=bonus, efficiency=efficiency, **{name: draw.choice([0.0, draw.random()]) for name in names},
        wrong_without_undo=draw.uniform(0, 1 - efficiency), right_at_once=min(2.0, bonus + efficiency + draw.choice([1e-6, 0.5])),
        max_undos=draw.choice([1, 5, 20]),
    )  # fmt: skip
    start = draw.choice([1, 40, 500])
    budget = BudgetSettings(start=start, end=draw.randint(1, start), undo_tokens=draw.choice([1, 32, 1000]))
    phase = [PhaseWeights(outcome=weight(), process=weight(), backtrack=weight()) for _ in range(3)]
    return RewardSettings(
        weights=RewardWeights(outcome=weight(), process=weight(), backtrack=weight(), format=0.1, budget=weight()),
        phases=draw.choice([None, Phases(early=phase[0], middle=phase[1], late=phase[2])]),
        combine=draw.choice(["sum", "gdpo"]), partial_credit=draw.uniform(0, 0.9), backtrack=backtrack, budget=budget,
    )  # fmt: skip
