"""What the clean control makes of at least the tokens of the fine-tuned model, which its undos have to beat: the majority vote
of several samples, the likeliest of them, a process reward model's choice. Pass@k of these, and of samples of the trained model,
at equal tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from datasets import Features, Value
from datasets import List as ListOf

from actors.engines import Completion
from actors.prm import best_of
from pipeline.backtrack.cursor import DecodeRequest, Mode
from pipeline.backtrack.undo import apply_undo
from pipeline.metrics import Evaluated
from pipeline.passes import Sample
from pipeline.stages.io import Codec
from pipeline.stages.measured import Model, decode
from pipeline.stages.prm import MODEL as PRM
from pipeline.stages.probes import rationalises
from pipeline.stages.rollouts import rolled, row_seed
from pipeline.stages.stage import Context
from pipeline.tasks.problem import Problem
from verifiers.tasks import judge_of
from verifiers.vote import answer_key, likeliest, majority

SAMPLES = Features(
    {
        "model": Value("string"),
        "mode": Value("string"),
        "problem": Value("string"),
        "number": Value("int32"),
        "split": Value("string"),
        "family": Value("string"),
        "hindsight": Value("bool"),
        "temperature": Value("float64"),
        "correct": Value("bool"),
        "answer": Value("string"),
        "tokens": Value("int32"),
        "logprob": Value("float64"),
        "undos": Value("int32"),
        "finish": Value("string"),
        "token_ids": ListOf(Value("int32")),
    }
)

VOTE, LIKELIEST, BEST = "vote", "likeliest", "best_of_n"
"""What the modes are called in rows and metrics: by majority, by the model's own probability, by a process reward model."""
LEAST = 3  # of two votes the first one wins


def vote(
    context: Context, models: Sequence[Model], rows: Sequence[Evaluated], test: Sequence[Problem], codec: Codec
) -> tuple[list[Evaluated], list[Sample]]:
    """Rows of what was chosen, and all samples: of the clean control with undo forbidden, or of the start model where there is
    none; and of the trained model with undo where `evaluate.samples` asks for them.

    Args:
        rows: what the models have made of the test split in the main mode.
    """
    asked, trained = context.settings.evaluate, models[-1]
    own = next(one for one in reversed(models) if one.name in ("clean_control", "base"))
    if not test:
        return [], []
    main = [row for row in rows if (row.mode, row.split, row.temperature) == (asked.modes[0], "test", asked.temperature)]
    spent, mine = ([row for row in main if row.model == name] for name in (trained.name, own.name))
    count = votes_needed(spent, mine) * max(1, asked.samples) if asked.votes is None else asked.votes
    elections: list[Evaluated] = []
    samples: list[Sample] = []
    asked_for: tuple[tuple[Model, Mode, int], ...] = ((own, "forbidden", count), (trained, asked.modes[0], asked.samples))
    for model, mode, number in asked_for:
        if number == 0:
            continue
        wanted = requests_for(test, codec, number, context.settings.run.seed)
        with context.terminal.stage("votes" if model is own else "samples", len(wanted)) as progress:
            done = decode(
                context, model, wanted, asked.vote_temperature, codec, mode, lambda count, tokens: progress.advance(count)
            )
        judged = [
            _sample(model.name, mode, test[i // number], i % number, one, asked.vote_temperature, codec)
            for i, one in enumerate(done)
        ]
        samples += judged
        names = [(f"{one.problem}#{one.model}.{VOTE}.{one.number}", one.problem) for one in judged]
        lines = rolled(names, done, model.version, VOTE, asked.vote_temperature)
        told = zip(lines, judged, strict=True)
        context.rollouts.write([replace(line, model=one.model, undos=one.undos, correct=one.correct) for line, one in told])
        if model is own:
            by_problem = {row.problem: row for row in mine}
            batches = [done[start : start + number] for start in range(0, len(done), number)]
            taken = {
                VOTE: [majority([codec.decode(one.token_ids).text for one in some]) for some in batches],
                LIKELIEST: [likeliest([one.logprobs for one in some]) for some in batches],
            }
            if verifiers := context.inputs.get("prm"):
                states = [(request.prompt_ids, one.token_ids) for request, one in zip(wanted, done, strict=True)]
                values = context.workers.verifiers().step_values(verifiers / PRM, states)
                parts = [values[start : start + number] for start in range(0, len(done), number)]
                taken[BEST] = [best_of(some, context.settings.prm.score) for some in parts]
            for name, winners in taken.items():
                of_all = zip(test, batches, winners, strict=True)
                elections += [elected(name, problem, some, won, by_problem[problem.id], codec) for problem, some, won in of_all]
    return elections, samples


def _sample(model: str, mode: str, problem: Problem, number: int, done: Completion, temperature: float, codec: Codec) -> Sample:
    undone = apply_undo(done.token_ids, codec.rule)
    text = codec.decode(undone.surviving).text
    return Sample(
        model=model,
        mode=mode,
        problem=problem.id,
        number=number,
        split=problem.split,
        family=problem.family,
        hindsight=problem.hindsight,
        temperature=temperature,
        correct=judge_of(problem).correct(problem, text),
        answer=answer_key(text),
        tokens=len(done.token_ids),
        logprob=sum(done.logprobs) if done.logprobs else None,
        undos=undone.undos,
        finish=done.finish,
        token_ids=done.token_ids,
    )


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


def elected(mode: str, problem: Problem, samples: Sequence[Completion], winner: int, own: Evaluated, codec: Codec) -> Evaluated:
    """The row of a sample that was taken out of several, with the tokens of all of them.

    Args:
        mode: what the row is called.
        winner: index of the sample.
        own: the control's row in the main mode.
    """
    text = codec.decode(samples[winner].token_ids).text
    return replace(
        own,
        mode=mode,
        correct=judge_of(problem).correct(problem, text),
        rationalised=rationalises(problem, text),
        tokens=sum(len(sample.token_ids) for sample in samples),
        undos=0,
        noops=0,
        spurious=0,
        undo_lengths=(),
        finish=samples[winner].finish,
        token_ids=samples[winner].token_ids,
    )
