"""Majority vote of the clean control with at least the tokens of the fine-tuned model: what its undos have to beat; and the
choice of a process reward model among the same samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from actors.engines import Completion
from actors.prm import Score, best_of
from pipeline.backtrack.cursor import DecodeRequest
from pipeline.metrics import Evaluated
from pipeline.stages.io import Codec
from pipeline.stages.rollouts import row_seed
from pipeline.tasks.problem import Problem
from verifiers.tasks import judge_of
from verifiers.vote import majority

VOTE, BEST = "vote", "best_of_n"
"""What the modes are called in rows and metrics: by majority, and by a process reward model's choice."""
LEAST = 3  # of two votes the first one wins


def votes_needed(spent: Sequence[Evaluated], own: Sequence[Evaluated]) -> int:
    """Samples a problem with which `own` spends at least as many tokens as `spent` did, on each kind of problems.

    Args:
        spent: the fine-tuned model's rows in the main mode.
        own: the control's rows of the same problems.
    """
    ratios = [
        fmean(row.tokens for row in spent if row.hindsight == kind) / fmean(row.tokens for row in own if row.hindsight == kind)
        for kind in {row.hindsight for row in own}
    ]
    return max(LEAST, math.ceil(max(ratios)))


def requests_for(problems: Sequence[Problem], codec: Codec, votes: int, seed: int) -> list[DecodeRequest]:
    """`votes` requests a problem, each with its own seed."""
    return [
        DecodeRequest(codec.prompt_ids(problem), row_seed(seed, f"vote/{number}/{problem.id}"))
        for problem in problems
        for number in range(votes)
    ]


def elected(
    problems: Sequence[Problem],
    done: Sequence[Completion],
    votes: int,
    own: Mapping[str, Evaluated],
    codec: Codec,
    values: Sequence[Sequence[float]] | None = None,
    how: Score = "last",
) -> list[Evaluated]:
    """One row a problem: the answer that most of its `votes` samples give, and the tokens of all of them.

    Args:
        done: [problems x votes] samples, problem by problem.
        own: the control's row in the main mode, by problem.
        values: for each sample those of its steps; the sample that they score highest is taken then, not the majority's.
        how: what makes a score of them.
    """
    rows = []
    for index, problem in enumerate(problems):
        part = slice(index * votes, (index + 1) * votes)
        samples = done[part]
        texts = [codec.decode(sample.token_ids).text for sample in samples]
        winner = majority(texts) if values is None else best_of(values[part], how)
        rows.append(
            replace(
                own[problem.id],
                mode=VOTE if values is None else BEST,
                correct=judge_of(problem).correct(problem, texts[winner]),
                tokens=sum(len(sample.token_ids) for sample in samples),
                undos=0,
                noops=0,
                spurious=0,
                finish=samples[winner].finish,
                token_ids=samples[winner].token_ids,
            )
        )
    return rows
