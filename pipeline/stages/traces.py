"""Stage `traces`: backtrack traces from every source, filtered and mixed, with clean rows beside them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Features, List, Value

from pipeline.backtrack.trace import Role
from pipeline.backtrack.undo import apply_undo
from pipeline.config import TraceMix
from pipeline.stages.filters import HeldOut, Removed, keep, undo_helps
from pipeline.stages.graph import longest_trace
from pipeline.stages.io import Codec, read_problems, read_rows, write_json, write_rows
from pipeline.stages.sources import (
    Candidate,
    Judged,
    aligned_errors,
    clean_row,
    own_errors,
    random_errors,
    searched_errors,
    sort_rollouts,
)
from pipeline.stages.stage import Context, StageError
from pipeline.tasks.problem import Problem
from verifiers.tasks import judge_of

FEATURES = Features(
    {
        "id": Value("string"),
        "problem": Value("string"),
        "family": Value("string"),
        "split": Value("string"),
        "source": Value("string"),
        "correction": Value("string"),
        "rollouts": List(Value("string")),
        "kinds": List(Value("string")),
        "errors": Value("int32"),
        "undos": Value("int32"),
        "difficulty": Value("int32"),
        "partner": Value("int32"),
        "input_ids": List(Value("int32")),
        "roles": List(Value("int8")),
    }
)
"""`difficulty` is how many tokens of wrong tries are taken back; `partner` the row of the dataset below CLEAN that holds the same
solution without its errors."""
CLEAN = "clean"
"""Folder of the partner rows below the stage's own folder."""


def run(context: Context) -> None:
    settings = context.settings
    codec = Codec(context.inputs["model"], settings.undo, settings.base.prompt)
    every = read_problems(context.inputs["problems"])
    problems = {problem.id: problem for problem in every if problem.split == "train"}
    held_out, removed = HeldOut(every), Removed()
    with context.terminal.stage("traces", None) as progress:
        rollouts = read_rows(context.inputs["rollouts"])
        judged = sort_rollouts(read_rows(context.inputs["judge"]), rollouts, problems, codec)
        traces = _mixed(context, judged, problems, codec, held_out, removed)
        progress.update(len(traces))
    if not traces:
        raise StageError(
            "traces: no trace is left; raise rollouts.problems, rollouts.samples or traces.mix, or lower traces.filters: "
            + (
                ", ".join(f"{count} by {name}" for name, count in (removed.by_filter() | judged.dropped).items())
                or "no wrong rollout"
            )
        )
    partners = _partners(traces, codec)
    clean = _clean_rows(partners, problems, codec, round(settings.traces.clean_ratio * len(traces)), settings.run.seed)
    places = {one.trace.ids: place for place, one in enumerate(partners)}
    rows = [
        _row(f"{context.round}.{number}", one, places.get(_surviving(one, codec), -1))
        for number, one in enumerate([*traces, *clean])
    ]
    write_rows(rows, FEATURES, context.out)
    write_rows([_row(f"{CLEAN}.{place}", one, place) for place, one in enumerate(partners)], FEATURES, context.out / CLEAN)
    write_json(removed_json(removed), context.out / "removed.json")
    context.counts.update(rows=len(rows), traces=len(traces), clean=len(clean), partners=len(partners))
    context.counts.update({f"removed_{name}": count for name, count in removed.by_filter().items()}, **judged.dropped)


def removed_json(removed: Removed) -> list[dict[str, Any]]:
    return [{"filter": name, "source": source, "count": count} for (name, source), count in sorted(removed.counts.items())]


def _mixed(
    context: Context,
    judged: Judged,
    problems: Mapping[str, Problem],
    codec: Codec,
    held_out: HeldOut,
    removed: Removed,
) -> list[Candidate]:
    """Traces of every source that the mix asks for, in its ratios as far as they go."""
    settings = context.settings.traces
    mix, seed = settings.mix, context.settings.run.seed

    def passing(candidates: Iterable[Candidate]) -> list[Candidate]:
        sound = (one for one in candidates if _ends_right(one, codec, removed))
        kept = list(keep(sound, settings.filters, longest_trace(context.settings), held_out, removed))
        if settings.filters.loss.margin is not None and kept:
            rewinds = context.settings.sft.form != "soft"
            folder = context.inputs["model"]
            kept = undo_helps(
                kept, settings.filters.loss, rewinds, codec, lambda rows: context.workers.probe(folder, rows), removed
            )
        return kept

    def some(candidates: Sequence[Candidate], count: int, source: str) -> list[Candidate]:
        if len(candidates) <= count:
            return list(candidates)
        picked = random.Random(f"{seed}/{source}").sample(range(len(candidates)), count)
        return [candidates[i] for i in sorted(picked)]

    own = passing(own_errors(judged, "self", settings, codec, seed)) if mix.self else []
    unit = len(own) or len(problems)
    traces = some(own, round(mix.self * unit), "self")
    sources = {
        "near_miss": lambda count: own_errors(judged, "near_miss", settings, codec, seed),
        "random": lambda count: random_errors(judged, list(problems.values()), count, settings, codec, seed),
        "aligned": lambda count: aligned_errors(judged, problems, codec, seed),
        "search": lambda count: (
            one for folder in _search_trees(context) for one in searched_errors(folder, problems, settings, codec, seed)
        ),
    }
    assert {"self", *sources} == set(TraceMix.model_fields)
    for source, make in sources.items():
        count = round(getattr(mix, source) * unit)
        if count:
            traces += some(passing(make(count)), count, source)
    return traces


def _search_trees(context: Context) -> list[str]:
    """Folders of search trees: of the stage search where it has run before, and what the settings name."""
    own = [str(context.inputs["search"] / "trees")] if "search" in context.inputs else []
    named = context.settings.traces.search_trees
    return [*own, *([named] if named else [])]


def _ends_right(one: Candidate, codec: Codec, removed: Removed) -> bool:
    """Whether what survives solves the problem: a correction may come from anywhere, and none is trusted."""
    ids = _surviving(one, codec)[one.trace.prompt_length :]
    right = judge_of(one.problem).correct(one.problem, codec.decode(ids).text)
    if not right:
        removed.counts["ends_wrong", one.source] += 1
    return right


def _surviving(one: Candidate, codec: Codec) -> tuple[int, ...]:
    start = one.trace.prompt_length
    return one.trace.ids[:start] + apply_undo(one.trace.ids[start:], codec.rule).surviving


def _partners(traces: Sequence[Candidate], codec: Codec) -> list[Candidate]:
    """The same solutions without their errors, each once."""
    found: dict[tuple[int, ...], Candidate] = {}
    for one in traces:
        ids, start = _surviving(one, codec), one.trace.prompt_length
        found.setdefault(ids, clean_row(one.problem, ids[start:], ids[:start], one.correction))
    return list(found.values())


def _clean_rows(
    partners: Sequence[Candidate], problems: Mapping[str, Problem], codec: Codec, count: int, seed: int
) -> list[Candidate]:
    """`count` rows without errors: partners of traces first, then gold solutions of other problems, then all over again."""
    rng = random.Random(f"{seed}/clean")
    same = list(partners)
    others = sorted(set(problems) - {one.problem.id for one in partners})
    rng.shuffle(same)
    rng.shuffle(others)
    rows = same[:count]
    for problem in (problems[name] for name in others[: count - len(rows)]):
        rows.append(clean_row(problem, codec.solution_ids(problem.solution), codec.prompt_ids(problem), "gold"))
    return [rows[number % len(rows)] for number in range(count)]


def _row(name: str, one: Candidate, partner: int) -> dict[str, Any]:
    roles = one.trace.roles
    return {
        "id": name,
        "problem": one.problem.id,
        "family": one.problem.family,
        "split": one.problem.split,
        "source": one.source,
        "correction": one.correction,
        "rollouts": one.rollouts,
        "kinds": one.kinds,
        "errors": len(one.kinds),
        "undos": roles.count(Role.UNDO),
        "difficulty": roles.count(Role.ERROR) + roles.count(Role.CONSEQUENCE),
        "partner": partner,
        "input_ids": one.trace.ids,
        "roles": roles,
    }
