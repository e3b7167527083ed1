"""Stage `judge`: a verdict for every rollout, and for wrong ones the first error, in characters and tokens, with its evidence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

from datasets import Features, List, Value

from actors.engines import Sampling
from actors.judge import Judged, judge_all
from actors.localise import Case, Found, Localiser
from actors.parts import Quarantined
from pipeline.stages.graph import samples_prefixes
from pipeline.stages.io import Codec, Text, read_problems, read_rows, write_rows
from pipeline.stages.kept import Kept, tuples
from pipeline.stages.rollouts import context_length
from pipeline.stages.stage import Context
from pipeline.tasks.problem import Problem
from verifiers.judge import FirstError, Verdict
from verifiers.localise import BinarySearch, PosteriorSearch, Search, symbolic_prior
from verifiers.steps import Step, token_span
from verifiers.task import Attempt
from verifiers.tasks import judge_of

FEATURES = Features(
    {
        "id": Value("string"),
        "problem": Value("string"),
        "correct": Value("bool"),
        "answer": Value("string"),
        "steps": List(List(Value("int32"))),
        "error_step": Value("int32"),
        "error_chars": List(Value("int32")),
        "error_tokens": List(Value("int32")),
        "error_kind": Value("string"),
        "evidence": Value("string"),
        "method": Value("string"),
        "later_errors": List(List(Value("int32"))),
        "try_start": Value("int32"),
        "try_text": Value("string"),
        "try_wrong": List(List(Value("int32"))),
        "try_own": Value("bool"),
        "continuation": List(Value("int32")),
    }
)


def run(context: Context) -> None:
    settings = context.settings
    codec = Codec(context.inputs["model"], settings.undo, settings.base.prompt)
    problems = {problem.id: problem for problem in read_problems(context.inputs["problems"], "train")}
    rollouts = read_rows(context.inputs["rollouts"])
    texts = [codec.decode(ids) for ids in rollouts["token_ids"]]
    pairs = [(problems[problem], text.text) for problem, text in zip(rollouts["problem"], texts, strict=True)]
    context.workers.start()
    found = _verdicts(context, rollouts["id"], pairs)
    judged = [one for one in found if isinstance(one, Judged)]
    if len(judged) < len(found):
        _leave_out(context, rollouts["id"], found)
        kept = [row for row, one in enumerate(found) if isinstance(one, Judged)]
        rollouts, texts, pairs = rollouts.select(kept), [texts[row] for row in kept], [pairs[row] for row in kept]
    methods = ["exact" if judge_of(problem).exact else "symbolic" for problem, _ in pairs]
    continuations: dict[int, tuple[int, ...]] = {}
    if samples_prefixes(settings):
        prompts = rollouts["prompt_ids"]
        ids = rollouts["id"]
        continuations = _by_rollouts(context, codec, ids, prompts, [problem for problem, _ in pairs], texts, judged, methods)
    rows = [
        _row(row_id, problem.id, text, one, method, continuations.get(index, ()))
        for index, (row_id, (problem, _), text, one, method) in enumerate(
            zip(rollouts["id"], pairs, texts, judged, methods, strict=True)
        )
    ]
    write_rows(rows, FEATURES, context.out)
    right = sum(one.verdict.correct for one in judged)
    located = sum(one.attempt is not None for one in judged)
    flawed = sum(one.verdict.correct and one.verdict.error is not None for one in judged)
    context.counts.update(rows=len(rows), right=right, wrong=len(rows) - right, located=located, right_with_a_wrong_step=flawed)


def _verdicts(context: Context, ids: Sequence[str], pairs: Sequence[tuple[Problem, str]]) -> list[Judged | Quarantined]:
    """One for each rollout. Those that a killed run had left behind are not made again."""
    settings = context.settings
    with context.terminal.stage("judge", len(ids)) as progress, Kept(context.resume / "verdicts.jsonl") as kept:
        found: dict[str, Judged | Quarantined] = {row_id: judged_from(values) for row_id, values in kept.found.items()}
        missing = [at for at, row_id in enumerate(ids) if row_id not in found]
        names = iter([ids[at] for at in missing])
        rows = [pairs[at] for at in missing]
        for batch in judge_all(rows, settings.judge.batch, settings.cluster.judge, settings.cluster.row_tries):
            named = {row_id: one for one, row_id in zip(batch, names, strict=False)}
            kept.add({row_id: astuple(one) for row_id, one in named.items() if isinstance(one, Judged)})
            found |= named
            progress.update(len(found))
    return [found[row_id] for row_id in ids]


def judged_from(values: Sequence[Any]) -> Judged:
    """The inverse of `astuple`, from what JSON has made of it."""
    (correct, answer, steps, error, later), attempt = tuples(values)
    verdict = Verdict(correct, answer, tuple(Step(*one) for one in steps), FirstError(*error) if error else None, later)
    return Judged(verdict, Attempt(*attempt) if attempt else None)


def _leave_out(context: Context, ids: Sequence[str], found: Sequence[Judged | Quarantined]) -> None:
    """Count and name the rollouts that could not be judged: nothing is learned from them, in neither direction."""
    quarantine = context.workers.quarantine()
    for row_id, one in zip(ids, found, strict=True):
        if isinstance(one, Quarantined):
            context.terminal.warn(f"judge: {row_id} is left out after {one.tries} tries (cluster.row_tries): {one.why}")
            quarantine.add("judge", row_id, one)
    context.counts["quarantined"] = quarantine.rows


def _by_rollouts(
    context: Context,
    codec: Codec,
    ids: Sequence[str],
    prompts: Sequence[Sequence[int]],
    problems: Sequence[Problem],
    texts: Sequence[Text],
    judged: list[Judged],
    methods: list[str],
) -> dict[int, tuple[int, ...]]:
    """Search the first errors of wrong solutions with the model that wrote them; fills in `judged` and `methods`.

    Returns: index of the solution -> a right completion of the steps before its first wrong one.
    """
    settings = context.settings
    method = "combined" if settings.judge.method == "auto" else settings.judge.method
    wrong = [
        i
        for i, one in enumerate(judged)
        if not one.verdict.correct and one.verdict.steps and not (settings.judge.method == "auto" and judge_of(problems[i]).exact)
    ]
    if not wrong:
        return {}
    solve_rate = sum(one.verdict.correct for one in judged) / len(judged)
    cases = [_case(ids[i], prompts[i], texts[i], judged[i].verdict) for i in wrong]
    searches: list[Search] = [
        BinarySearch(len(case.prefixes))
        if method == "rollouts"
        else PosteriorSearch(symbolic_prior(judged[i].verdict), solve_rate, settings.judge.sure, settings.judge.budget)
        for i, case in zip(wrong, cases, strict=True)
    ]
    asked = settings.rollouts
    undo = (codec.rule.undo_id, *codec.spare_ids)
    pool = context.workers.pool(context.inputs["model"], context.digests["model"], context_length(context))
    with context.terminal.stage("judge/localise", None, "completions") as progress:
        localiser = Localiser(
            pool,
            Sampling(asked.temperature, asked.top_p, asked.max_tokens, codec.stop_id, undo),
            settings.judge.samples,
            asked.batch,
            settings.run.seed,
            lambda case, tokens: judge_of(problems[wrong[case]]).correct(problems[wrong[case]], codec.decode(tokens).text),
            progress.update,
        )
        found = localiser.locate(cases, searches)
    for i, case, one in zip(wrong, cases, found, strict=True):
        verdict = _relocated(judged[i].verdict, texts[i], case, one, codec)
        judged[i] = Judged(verdict, judge_of(problems[i]).attempt(problems[i], texts[i].text, verdict))
        methods[i] = method
    context.counts.update(completions=localiser.completions, completion_tokens=localiser.tokens)
    return {i: one.right[0] for i, one in zip(wrong, found, strict=True) if one.right}


def _case(row_id: str, prompt: Sequence[int], text: Text, verdict: Verdict) -> Case:
    cuts = [text.token_at(step.start) for step in verdict.steps]
    return Case(row_id, tuple(prompt), ((), *(text.ids[:cut] for cut in cuts[1:])))


def _relocated(verdict: Verdict, text: Text, case: Case, found: Found, codec: Codec) -> Verdict:
    """The verdict with the error where the search found it; a symbolic span within that step stays."""
    error = verdict.error
    if error and error.step == found.step:
        return replace(verdict, error=replace(error, evidence=f"{error.evidence}; {found.evidence}"))
    step = verdict.steps[found.step]
    own = text.ids[len(case.prefixes[found.step]) :]
    # The span starts at the first token that no right continuation shares.
    shared = max((_shared(own, other) for other in found.right), default=0)
    start = min(max(step.start, text.offsets[len(text.ids) - len(own) + shared][0] if shared < len(own) else 0), step.end - 1)
    return replace(verdict, error=FirstError(found.step, start, step.end, "rollouts", found.evidence))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _row(row_id: str, problem: str, text: Text, judged: Judged, method: str, continuation: Sequence[int]) -> dict[str, object]:
    verdict, attempt = judged.verdict, judged.attempt
    error = verdict.error
    tokens = (text.token_at(error.start), token_span(text.offsets, error.start, error.end)[1]) if error else (-1, -1)
    return {
        "id": row_id,
        "problem": problem,
        "correct": verdict.correct,
        "answer": verdict.answer,
        "steps": [[step.start, step.end] for step in verdict.steps],
        "error_step": error.step if error else -1,
        "error_chars": [error.start, error.end] if error else [-1, -1],
        "error_tokens": list(tokens),
        "error_kind": error.kind if error else "",
        "evidence": error.evidence if error else "",
        "method": method,
        "later_errors": [list(span) for span in verdict.later] if error else [],
        "try_start": attempt.start if attempt else -1,
        "try_text": attempt.text if attempt else "",
        "try_wrong": [list(span) for span in attempt.wrong] if attempt else [],
        "try_own": attempt.own if attempt else False,
        "continuation": list(continuation),
    }
