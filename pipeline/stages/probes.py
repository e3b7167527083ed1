"""Own errors of a model on held-out problems, and the right states beside them: where P(undo) is measured, by the evaluation
behind a training and by the checks within it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.checks import Decodes, Graded, HeldOut, HeldOutError
from actors.engines import Completion, Request, Sampling
from actors.judge import judge_rows
from actors.parts import all_there
from actors.probe import ProbeRow
from pipeline.backtrack.cursor import DecodeRequest, Mode
from pipeline.backtrack.trace import Detour, WrongTry, build_trace
from pipeline.backtrack.undo import apply_undo
from pipeline.config import SftSettings
from pipeline.stages.io import Codec, decoding_of, read_problems
from pipeline.stages.rollouts import context_length, row_seed, within_context
from pipeline.stages.sources import locate
from pipeline.stages.stage import Context
from pipeline.tasks.problem import Problem
from rewards.rollout import undo_runs, verdict_of
from verifiers.arithmetic import equations
from verifiers.tasks import judge_of


@dataclass(frozen=True)
class Case:
    """An own error and the right state beside it."""

    problem: Problem
    kind: str
    error: ProbeRow
    """Asks for the undo token at the evidence, then for the tokens of the wrong decision."""
    right: ProbeRow
    """Asks for the undo token at the same place of the gold solution."""
    rewound: ProbeRow
    """Asks for the right step where deleted tokens are gone."""
    emitted: ProbeRow
    """Asks for the right step in the row as it was emitted, wrong try and undo included."""


def spread(problems: Sequence[Problem], split: str, most: int | None) -> list[Problem]:
    """At most so many of a split, evenly spread over it, so that every family is there."""
    of_split = [problem for problem in problems if problem.split == split]
    if most is None or most >= len(of_split):
        return of_split
    return [of_split[i * len(of_split) // most] for i in range(most)]


def own_errors(context: Context, folder: Path, version: str, problems: Sequence[Problem], codec: Codec) -> list[Case]:
    """First errors of the model of `folder`, from one sample of each problem at temperature 1 with undo forbidden."""
    settings = context.settings
    pool = context.workers.pool(folder, version, context_length(context))
    sampling = Sampling(1.0, 1.0, settings.rollouts.max_tokens, codec.stop_id, (codec.rule.undo_id, *codec.spare_ids))
    requests = [Request(codec.prompt_ids(p), row_seed(settings.run.seed, f"probe/{p.id}")) for p in problems]
    completions, _ = pool.generate(requests, sampling, settings.rollouts.batch)
    return cases_of(problems, all_there(completions), codec)


def cases_of(problems: Sequence[Problem], completions: Sequence[Completion], codec: Codec) -> list[Case]:
    """A case for every wrong completion whose first error can be cut out and that has a right state beside it."""
    texts = [codec.decode(completion.token_ids) for completion in completions]
    judged = judge_rows([(problem, text.text) for problem, text in zip(problems, texts, strict=True)])
    cases = []
    for problem, completion, one in zip(problems, completions, judged, strict=True):
        if one.attempt is None:
            continue
        right = judge_of(problem).right_state(problem, one.attempt.step, one.attempt.text.count("\n") + 1)
        if right is None:
            continue
        prompt = codec.prompt_ids(problem)
        verdict: Mapping[str, Any] = {
            "try_start": one.attempt.start,
            "try_text": one.attempt.text,
            "try_wrong": one.attempt.wrong,
            "try_own": one.attempt.own,
        }
        rollout = {"id": problem.id, "prompt_ids": prompt, "token_ids": completion.token_ids}
        if (wrong := locate(verdict, rollout, problem, codec)) is None:
            continue
        step = _right_step(problem, wrong.prefix, codec)
        if not step:
            continue
        before = (*prompt, *wrong.prefix)
        ids = (*before, *wrong.wrong_try.ids)
        decisions = tuple(len(before) + i for i, is_wrong in enumerate(wrong.wrong_try.wrong) if is_wrong)
        undo = codec.rule.undo_id
        error = ProbeRow(ids, (len(ids), *decisions), (undo, *(ids[i] for i in decisions)))
        state = (*prompt, *codec.encode(right))
        kind = one.verdict.error.kind if one.verdict.error else ""
        plain = WrongTry(wrong.wrong_try.ids, wrong.wrong_try.wrong)
        trace = build_trace(prompt, (*wrong.prefix, *step), [Detour(len(wrong.prefix), plain)], codec.rule)
        # With unit token the undos stop where the try has left the right step: what it shares with that still stands.
        count = min(len(step), trace.ids[::-1].index(undo))
        if not count:
            continue
        cases.append(
            Case(
                problem=problem,
                kind=kind,
                error=error,
                right=ProbeRow(state, (len(state),), (undo,)),
                rewound=_last((*before, *step), count),
                emitted=_last(trace.ids, count),
            )
        )
    return cases


def _right_step(problem: Problem, prefix: tuple[int, ...], codec: Codec) -> tuple[int, ...]:
    """Ids of the gold step that belongs behind a right prefix; empty where nothing is left to do."""
    text = judge_of(problem).continuation(problem, codec.decode(prefix).text)
    if not text:
        return ()
    step, newline, _ = text.partition("\n")
    return codec.continued_ids(step + newline) if prefix else codec.encode(step + newline)


def _last(ids: tuple[int, ...], count: int) -> ProbeRow:
    """Asks for the last tokens of a row."""
    return ProbeRow(ids, tuple(range(len(ids) - count, len(ids))), ids[len(ids) - count :])


def dev_cases(context: Context, codec: Codec, count: int) -> list[Case]:
    """Own errors of the start model on so many dev problems."""
    problems = spread(read_problems(context.inputs["problems"]), "dev", count)
    fits, _ = within_context(context, problems, [codec.prompt_ids(problem) for problem in problems])
    return own_errors(context, context.inputs["model"], context.digests["model"], [problems[i] for i in fits], codec)


def held_out(
    sft: SftSettings, cases: Sequence[Case], decodes: Decodes | None = None, first_tries: Decodes | None = None
) -> HeldOut:
    """What a training with these settings is checked on. The hard form is asked in the row as emitted, nothing hidden."""
    errors = [
        HeldOutError(one.problem.hindsight, one.error, one.right, one.rewound if sft.form == "rewind" else one.emitted)
        for one in cases
    ]
    return HeldOut(sft.checks.every or sft.steps, errors, decodes, first_tries)


def decodes(context: Context, codec: Codec, sft: SftSettings, problems: Sequence[Problem]) -> Decodes:
    """Decoding of these problems as the form of a training wants it: deleted text gone from the context by the section decode,
    or left there, with undo sampled like any token. Temperature and length are those of the section evaluate."""
    settings = context.settings
    asked = settings.evaluate
    mode: Mode = "rewind" if sft.form == "rewind" else "soft"
    most = asked.max_tokens
    free = (
        {"threshold": None, "undo_bias": 0.0, "ban_tried": False, "max_undos": most, "max_undos_per_state": most}
        if mode == "soft"
        else {}
    )
    decoding = decoding_of(codec, settings.decode, mode, asked.temperature, asked.top_p, most, **free)
    requests = [DecodeRequest(codec.prompt_ids(p), row_seed(settings.run.seed, f"evaluate/{p.id}")) for p in problems]

    def grade(index: int, ids: tuple[int, ...]) -> Graded:
        problem, undone = problems[index], apply_undo(ids, codec.rule)
        correct = judge_of(problem).correct(problem, codec.decode(undone.surviving).text)
        return Graded(correct, undone.undos, spurious_undos(problem, ids, codec))

    hindsight = [problem.hindsight for problem in problems]
    return Decodes(requests, hindsight, decoding, settings.engine.max_num_seqs, context_length(context), grade)


def first_tries(context: Context, codec: Codec, count: int) -> Decodes | None:
    """So many dev problems, decoded greedily with undo forbidden, as long as a rollout may be; None for 0."""
    settings = context.settings
    problems = spread(read_problems(context.inputs["problems"]), "dev", count) if count else []
    if not problems:
        return None
    prompts = [codec.prompt_ids(problem) for problem in problems]
    fits, _ = within_context(context, problems, prompts)
    chosen = [problems[i] for i in fits]
    decoding = decoding_of(codec, settings.decode, "forbidden", 0.0, 1.0, settings.rollouts.max_tokens)
    requests = [DecodeRequest(prompts[i], row_seed(settings.run.seed, f"evaluate/{problems[i].id}")) for i in fits]

    def grade(index: int, ids: tuple[int, ...]) -> Graded:
        problem, text = chosen[index], codec.decode(ids).text
        return Graded(judge_of(problem).correct(problem, text), 0, 0, errors_in(problem, text))

    hindsight = [problem.hindsight for problem in chosen]
    return Decodes(requests, hindsight, decoding, settings.engine.max_num_seqs, context_length(context), grade)


def errors_in(problem: Problem, text: str) -> int:
    """Errors that the judge finds in a whole solution: the first one, and false results behind it."""
    verdict = verdict_of(problem, text)
    return (verdict.error is not None) + len(verdict.later)


def rationalises(problem: Problem, text: str) -> bool:
    """Whether a wrong solution makes its wrong decision fit: an equation behind the first error does not hold. Where that error is
    itself a false result there was no decision to be made fit."""
    verdict = verdict_of(problem, text)
    if verdict.correct or verdict.error is None or verdict.error.kind in ("arithmetic", "copy"):
        return False
    return any(one.verdict == "false" and one.right_start >= verdict.error.end for one in equations(text))


def spurious_undos(problem: Problem, ids: Sequence[int], codec: Codec) -> int:
    """Undo tokens that deleted something while nothing wrong stood there."""
    runs = undo_runs(problem, ids, codec.rule, lambda state: codec.decode(state).text)
    return sum(run.unnecessary for run in runs)
