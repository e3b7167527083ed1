"""Stage `traces`: self-generated backtrack traces. Judged wrong tries of a problem that share their right prefix become one
row: prefix, wrong try, undo, .. correction. Ids that the model wrote stay as they are; only recomputed text is tokenised.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Features, List, Value

from pipeline.backtrack.trace import Trace, WrongTry, build_trace, targets
from pipeline.backtrack.undo import apply_undo
from pipeline.stages.io import Codec, read_problems, read_rows, write_rows
from pipeline.stages.stage import Context, StageError
from pipeline.tasks.problem import Problem
from verifiers.steps import token_span
from verifiers.tasks import judge_of

FEATURES = Features(
    {
        "problem": Value("string"),
        "family": Value("string"),
        "source": Value("string"),
        "correction": Value("string"),
        "rollouts": List(Value("string")),
        "errors": Value("int32"),
        "difficulty": Value("int32"),
        "input_ids": List(Value("int32")),
        "roles": List(Value("int8")),
        "labels": List(Value("int32")),
    }
)


@dataclass(frozen=True)
class Located:
    """A judged wrong rollout, cut at its first error."""

    rollout: str
    problem: Problem
    prompt: tuple[int, ...]
    prefix: tuple[int, ...]
    """Ids of the right steps before the wrong one."""
    wrong_try: WrongTry


def run(context: Context) -> None:
    settings = context.settings
    codec = Codec(context.inputs["model"], settings.undo, settings.base.prompt)
    problems = {problem.id: problem for problem in read_problems(context.inputs["problems"], "train")}
    dropped: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    judged = read_rows(context.inputs["judge"])
    with context.terminal.stage("traces", None) as progress:
        rollouts = read_rows(context.inputs["rollouts"])
        right, wrong = _sort(zip(judged, rollouts, strict=True), problems, codec, dropped)
        resampled = _resampled(judged, rollouts, codec)
        for (problem_id, prefix), tries in sorted(wrong.items()):
            problem = problems[problem_id]
            source, correction = _correction(problem, prefix, right[problem_id], resampled.get((problem_id, prefix)), codec)
            if correction is None:
                dropped["no_correction"] += len(tries)
                continue
            for chosen in _chains(tries, settings.traces.max_errors, f"{settings.run.seed}/{problem_id}/{len(prefix)}"):
                trace = build_trace(chosen[0].prompt, prefix, [one.wrong_try for one in chosen], correction, codec.rule)
                surviving = apply_undo(trace.ids[trace.prompt_length :], codec.rule).surviving
                if not judge_of(problem).correct(problem, codec.decode(surviving).text):
                    dropped["ends_wrong"] += 1
                    continue
                rows.append(_row(problem, trace, "self", source, chosen, settings.traces.mask, codec))
            progress.update(len(rows))
    if not rows:
        raise StageError("traces: no wrong rollout could be made into a trace; raise rollouts.problems or rollouts.samples")
    found = len(rows)
    rows += _clean_rows(rows, problems, codec, settings.traces.clean_ratio, settings.run.seed)
    write_rows(rows, FEATURES, context.out)
    context.counts.update(rows=len(rows), traces=found, clean=len(rows) - found, **dropped)


def _sort(
    pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]],
    problems: Mapping[str, Problem],
    codec: Codec,
    dropped: Counter[str],
) -> tuple[dict[str, list[tuple[int, ...]]], dict[tuple[str, tuple[int, ...]], list[Located]]]:
    """Right completions by problem, and wrong tries by problem and right prefix."""
    right: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    wrong: dict[tuple[str, tuple[int, ...]], list[Located]] = defaultdict(list)
    for verdict, rollout in pairs:
        problem = problems[verdict["problem"]]  # training problems alone: a test problem is a KeyError here
        if verdict["correct"]:
            if verdict["error_step"] < 0 and rollout["finish"] == "stop":
                right[problem.id].append(tuple(rollout["token_ids"]))
        elif verdict["try_start"] < 0:
            dropped["not_located"] += 1
        elif (one := locate(verdict, rollout, problem, codec)) is None:
            dropped["inside_a_token"] += 1
        else:
            wrong[problem.id, one.prefix].append(one)
    return right, wrong


def _resampled(
    judged: Iterable[Mapping[str, Any]], rollouts: Iterable[Mapping[str, Any]], codec: Codec
) -> dict[tuple[str, tuple[int, ...]], tuple[int, ...]]:
    """(problem, right prefix) -> a right completion of it that the judge sampled when it looked for the first error."""
    found = {}
    for verdict, rollout in zip(judged, rollouts, strict=True):
        if verdict["continuation"] and verdict["try_start"] == verdict["steps"][verdict["error_step"]][0]:
            text = codec.decode(rollout["token_ids"])
            cut = token_span(text.offsets, verdict["try_start"], verdict["try_start"] + 1)[0]
            found[verdict["problem"], text.ids[:cut]] = tuple(verdict["continuation"])
    return found


def locate(verdict: Mapping[str, Any], rollout: Mapping[str, Any], problem: Problem, codec: Codec) -> Located | None:
    """Cut a wrong rollout at its first error; None when a token spans the border of the wrong step."""
    text = codec.decode(rollout["token_ids"])
    cut = next((i for i, (_, end) in enumerate(text.offsets) if end > verdict["try_start"]), len(text.ids))
    if cut < len(text.offsets) and text.offsets[cut][0] < verdict["try_start"]:
        return None
    own = text.ids[cut:]
    if verdict["try_own"]:
        end = verdict["try_start"] + len(verdict["try_text"])
        own = tuple(token for token, (start, _) in zip(own, text.offsets[cut:], strict=True) if start < end)
        piece = codec.decode(own)
        if piece.text != verdict["try_text"]:
            return None
    else:
        own = codec.encode(verdict["try_text"])
        piece = codec.decode(own)
    marks = [False] * len(own)
    for start, end in verdict["try_wrong"]:
        first, last = token_span(piece.offsets, start, end)
        marks[first:last] = [True] * (last - first)
    if not any(marks):
        return None
    return Located(rollout["id"], problem, tuple(rollout["prompt_ids"]), text.ids[:cut], WrongTry(own, tuple(marks)))


def _chains(tries: Sequence[Located], most: int, seed: str) -> list[list[Located]]:
    """Each different try leads one trace; behind it come 0 to `most` - 1 other tries of the same state, drawn at random."""
    unique = list({one.wrong_try.ids: one for one in tries}.values())
    rng = random.Random(seed)
    chains = []
    for first in unique:
        others = [one for one in unique if one is not first]
        length = rng.randint(0, min(most - 1, len(others)))
        chains.append([first, *rng.sample(others, length)])
    return chains


def _correction(
    problem: Problem,
    prefix: tuple[int, ...],
    right: Sequence[tuple[int, ...]],
    resampled: tuple[int, ...] | None,
    codec: Codec,
) -> tuple[str, tuple[int, ...] | None]:
    """A right continuation of the prefix: the model's own words, of a right sibling or sampled anew, else the task's."""
    for ids in right:
        if ids[: len(prefix)] == prefix:
            return "sibling", ids[len(prefix) :]
    if resampled:
        return "resampled", resampled
    text = judge_of(problem).continuation(problem, codec.decode(prefix).text)
    return "gold", None if text is None else codec.solution_ids(text)


def _row(
    problem: Problem, trace: Trace, source: str, correction: str, tries: Sequence[Located], mask: Any, codec: Codec
) -> dict[str, Any]:
    return {
        "problem": problem.id,
        "family": problem.family,
        "source": source,
        "correction": correction,
        "rollouts": [one.rollout for one in tries],
        "errors": len(tries),
        "difficulty": sum(len(one.wrong_try.ids) for one in tries),
        "input_ids": trace.ids,
        "roles": trace.roles,
        "labels": targets(trace, mask),
    }


def _clean_rows(
    traces: Sequence[Mapping[str, Any]], problems: Mapping[str, Problem], codec: Codec, ratio: float, seed: int
) -> list[dict[str, Any]]:
    """Gold solutions without errors, `ratio` for each trace: of the same problems first, then of others."""
    rng = random.Random(f"{seed}/clean")
    same = sorted({row["problem"] for row in traces})
    others = sorted(set(problems) - set(same))
    rng.shuffle(same)
    rng.shuffle(others)
    order = same + others
    wanted = round(ratio * len(traces))
    picked = [problems[order[i % len(order)]] for i in range(wanted)]
    rows = []
    for problem in picked:
        trace = build_trace(codec.prompt_ids(problem), (), (), codec.solution_ids(problem.solution), codec.rule)
        rows.append(_row(problem, trace, "clean", "gold", (), "decision", codec))
    return rows
