"""Where traces come from: the model's own judged errors, hot samples close to a right step, random tokens, steps of wrong
solutions, search trees. Called by the traces stage. Ids that the model wrote stay as they are; only recomputed text is tokenised.

Errors of rollouts and, where a task decides them exactly, of search trees are cut out by the judge: the wrong decision is kept,
what follows from it is made right, up to the evidence.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from actors.judge import judge_rows
from pipeline.backtrack.harvest import SearchTree, harvest
from pipeline.backtrack.inject import aligned_injection, random_injection, trivial_ids
from pipeline.backtrack.trace import Detour, Role, Trace, WrongTry, build_trace, last_detour
from pipeline.config import TraceSettings
from pipeline.stages.io import Codec, read_rows, with_rollouts
from pipeline.stages.judged import row_of
from pipeline.stages.stage import StageError
from pipeline.tasks.problem import Problem
from verifiers.tasks import judge_of

Ids = tuple[int, ...]
Made = Literal["self", "near_miss", "search"]
"""How the model came to write a wrong solution: as it samples, from a hot sample, in a search."""


@dataclass(frozen=True)
class Candidate:
    """A trace with what is known of where it comes from."""

    problem: Problem
    source: str
    trace: Trace
    correction: str = ""
    """Whose words the right way is in: sibling (another rollout), resampled (by the judge), gold, or search."""
    rollouts: tuple[str, ...] = ()
    """Rollouts its errors were made in."""
    kinds: tuple[str, ...] = ()
    """Kinds of these errors, as judged."""
    continued: Ids = ()
    """How the model went on behind the last error instead of undoing it, where it is known."""


@dataclass(frozen=True)
class Located:
    """A judged wrong rollout, cut at its first error."""

    rollout: str
    problem: Problem
    kind: str
    made: Made
    prompt: Ids
    prefix: Ids
    """Ids of the right steps before the wrong one."""
    wrong_try: WrongTry
    continued: Ids


@dataclass
class Judged:
    """The rollouts of a round by what became of them."""

    right: dict[str, list[Ids]] = field(default_factory=lambda: defaultdict(list))
    """Finished right completions by problem."""
    wrong: dict[str, list[Located]] = field(default_factory=lambda: defaultdict(list))
    """Wrong tries by problem."""
    wholly_wrong: dict[str, list[tuple[str, Ids]]] = field(default_factory=lambda: defaultdict(list))
    """(rollout, completion) of wrong rollouts by problem."""
    resampled: dict[tuple[str, Ids], Ids] = field(default_factory=dict)
    """(problem, right prefix) -> a right continuation that the judge sampled when it looked for the first error."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Why wrong rollouts could not be located."""


def sort_rollouts(
    verdicts: Iterable[Mapping[str, Any]], rollouts: Iterable[Mapping[str, Any]], problems: Mapping[str, Problem], codec: Codec
) -> Judged:
    """Sort the judged rollouts of a round. Training problems alone: any other is a KeyError."""
    judged = Judged()
    for verdict, rollout in with_rollouts(verdicts, rollouts):
        problem = problems[verdict["problem"]]
        if verdict["correct"]:
            if verdict["error_step"] < 0 and rollout["finish"] == "stop":
                judged.right[problem.id].append(tuple(rollout["token_ids"]))
            continue
        judged.wholly_wrong[problem.id].append((rollout["id"], tuple(rollout["token_ids"])))
        if verdict["try_start"] < 0:
            judged.dropped["not_located"] += 1
        elif (one := locate(verdict, rollout, problem, codec)) is None:
            judged.dropped["inside_a_token"] += 1
        else:
            judged.wrong[problem.id].append(one)
            if verdict["continuation"] and verdict["try_start"] == verdict["steps"][verdict["error_step"]][0]:
                judged.resampled[problem.id, one.prefix] = tuple(verdict["continuation"])
    return judged


def locate(verdict: Mapping[str, Any], rollout: Mapping[str, Any], problem: Problem, codec: Codec) -> Located | None:
    """Cut a wrong rollout at its first error; None when a token spans the border of the wrong step."""
    text = codec.decode(rollout["token_ids"])
    begin = verdict["try_start"]
    cut = text.token_at(begin)
    if cut < len(text.offsets) and text.offsets[cut][0] < begin:
        return None
    own = text.ids[cut:]
    continued: Ids = ()
    inner: tuple[Detour, ...] = ()
    if verdict["try_own"]:
        end = verdict["try_start"] + len(verdict["try_text"])
        tried = tuple(token for token, (start, _) in zip(own, text.offsets[cut:], strict=True) if start < end)
        offsets = [(low - begin, high - begin) for low, high in text.offsets[cut : cut + len(tried)]]
        if not tried or offsets[-1][1] != len(verdict["try_text"]):
            return None
        continued = own[len(tried) :]
    else:
        tried = codec.continued_ids(verdict["try_text"]) if cut else codec.encode(verdict["try_text"])
        offsets = list(codec.decode(tried).offsets)
    marks = [any(low < end and max(high, low + 1) > start for start, end in verdict["try_wrong"]) for low, high in offsets]
    if not any(marks):
        return None
    if not verdict["try_own"]:
        inner = _second_error(own, tried, marks.index(True), codec)
    return Located(
        rollout["id"],
        problem,
        verdict.get("error_kind", ""),
        rollout.get("made") or ("near_miss" if rollout.get("hot") else "self"),
        tuple(rollout["prompt_ids"]),
        text.ids[:cut],
        WrongTry(tried, tuple(marks), inner),
        continued,
    )


def _second_error(own: Ids, tried: Ids, decision: int, codec: Codec) -> tuple[Detour, ...]:
    """The false number by which the model's own words leave the right inferences from its wrong decision."""
    shared = next((at for at, (a, b) in enumerate(zip(own, tried, strict=False)) if a != b), min(len(own), len(tried)))
    end = shared
    while end < len(own) and codec.decode((own[end],)).text.strip().isdigit():
        end += 1
    if shared <= decision or shared == end or shared == len(tried):
        return ()
    return (Detour(shared, WrongTry(own[shared:end], (True,) * (end - shared))),)


def own_errors(judged: Judged, made: Made, settings: TraceSettings, codec: Codec, seed: int) -> Iterator[Candidate]:
    """Every different wrong try of the model leads one trace. With it come other tries, drawn at random, that leave the same
    right way there or elsewhere."""
    for problem_id in sorted(judged.wrong):
        tries = [one for one in judged.wrong[problem_id] if one.made == made]
        unique = list({(one.prefix, one.wrong_try.ids): one for one in tries}.values())
        hot = made == "near_miss"
        rng = random.Random(f"{seed}/{problem_id}/{hot}")
        for first in unique:
            correction, way = _right_way(first, judged, codec)
            if way is None:
                judged.dropped["no_correction"] += 1
                continue
            solution = first.prefix + way
            if hot and _nearness(first, way, codec) < settings.nearness:
                judged.dropped["not_near"] += 1
                continue
            others = [one for one in unique if one is not first and _leaves(one, solution)]
            chosen = [first, *rng.sample(others, rng.randint(0, min(settings.max_errors - 1, len(others))))]
            yield Candidate(
                first.problem,
                made,
                _trace(first.prompt, solution, chosen, codec),
                correction,
                tuple(one.rollout for one in chosen),
                tuple(one.kind for one in chosen),
                chosen[last_detour(solution, [Detour(len(one.prefix), one.wrong_try) for one in chosen], codec.rule)].continued,
            )


def _trace(prompt: Ids, solution: Ids, chosen: Sequence[Located], codec: Codec) -> Trace:
    detours = [Detour(len(one.prefix), one.wrong_try) for one in chosen]
    try:
        return build_trace(prompt, solution, detours, codec.rule)
    except ValueError:  # with this unit a second error cannot be taken back without the first
        plain = [replace(detour, wrong_try=replace(detour.wrong_try, inner=())) for detour in detours]
        return build_trace(prompt, solution, plain, codec.rule)


def _right_way(one: Located, judged: Judged, codec: Codec) -> tuple[str, Ids | None]:
    """A right continuation of the prefix: the model's own words, of a right sibling or sampled anew, else the task's."""
    for ids in judged.right[one.problem.id]:
        if _leaves(one, ids):
            return "sibling", ids[len(one.prefix) :]
    if (resampled := judged.resampled.get((one.problem.id, one.prefix))) and _leaves(one, one.prefix + resampled):
        return "resampled", resampled
    text = judge_of(one.problem).continuation(one.problem, codec.decode(one.prefix).text)
    if text is None:
        return "gold", None
    return "gold", (*codec.continued_ids(text), codec.stop_id) if one.prefix else codec.solution_ids(text)


def _leaves(one: Located, solution: Ids) -> bool:
    """Whether the try stands beside this solution: the same way up to it, another one then."""
    start = len(one.prefix)
    return solution[:start] == one.prefix and solution[start : start + len(one.wrong_try.ids)] != one.wrong_try.ids


def _nearness(one: Located, way: Ids, codec: Codec) -> float:
    """Dice coefficient of the tokens of the wrong try and of as much of the right way, to the end of its first step."""
    end = next((at for at, token in enumerate(way, start=1) if token in codec.rule.step_end_ids), len(way))
    right, wrong = Counter(way[:end]), Counter(one.wrong_try.ids)
    return 2 * (right & wrong).total() / (end + len(one.wrong_try.ids))


def random_errors(
    judged: Judged, problems: Sequence[Problem], count: int, settings: TraceSettings, codec: Codec, seed: int
) -> Iterator[Candidate]:
    """`count` traces with random tokens in a right solution: the model's own where it has one, else gold."""
    drawn = codec.plain_ids()
    for number in range(count):
        problem = problems[number % len(problems)]
        rng = random.Random(f"{seed}/random/{number}/{problem.id}")
        own = judged.right.get(problem.id)
        solution = rng.choice(own) if own else codec.solution_ids(problem.solution)
        k = rng.randint(1, settings.random_tokens)
        injected = random_injection(codec.prompt_ids(problem), solution, drawn, k, rng, codec.rule)
        yield Candidate(problem, "random", injected.trace, "sibling" if own else "gold", kinds=("random",))


def aligned_errors(judged: Judged, problems: Mapping[str, Problem], codec: Codec, seed: int) -> Iterator[Candidate]:
    """For every wrong rollout its first step that differs from the aligned step of a right solution of the same problem."""
    trivial = trivial_ids({token: codec.decode((token,)).text for token in codec.plain_ids()})
    for problem_id in sorted(judged.wholly_wrong):
        problem = problems[problem_id]
        rng = random.Random(f"{seed}/aligned/{problem_id}")
        for rollout, ids in judged.wholly_wrong[problem_id]:
            own = judged.right.get(problem_id)
            solution = rng.choice(own) if own else codec.solution_ids(problem.solution)
            injected = aligned_injection(
                codec.prompt_ids(problem),
                solution,
                ids,
                codec.rule.step_end_ids,
                codec.rule,
                stop_id=codec.stop_id,
                trivial=trivial,
            )
            if injected is None:
                judged.dropped["not_aligned"] += 1
                continue
            yield Candidate(problem, "aligned", injected.trace, "sibling" if own else "gold", (rollout,), ("aligned",))


def searched_errors(
    folder: str, problems: Mapping[str, Problem], settings: TraceSettings, codec: Codec, seed: int
) -> Iterator[Candidate]:
    """Traces of search trees: a dataset with the columns problem, prompt_ids, parent, ids, value, right (1, 0, or -1 where the
    node ends no solution).

    Where a task decides first errors exactly, the ways to a tree's ends are rollouts like any others. Elsewhere a wrong
    branch is one trace's error up to where its value has dropped (`harvest`).
    """
    try:
        rows = read_rows(Path(folder))
    except (OSError, ValueError) as error:
        raise StageError(f"traces.search_trees: no dataset in {folder}: {' '.join(str(error).split())[:200]}") from error
    if not len(rows):
        raise StageError(f"traces.search_trees: {folder} has no rows")
    columns = {"problem", "prompt_ids", "parent", "ids", "value", "right"}
    if missing := columns - set(rows.column_names):
        raise StageError(f"traces.search_trees: {folder} lacks the columns {', '.join(sorted(missing))}")
    for row in rows:
        if row["problem"] not in problems:
            raise StageError(f"traces.search_trees: {row['problem']!r} is no training problem")
        problem, prompt = problems[row["problem"]], tuple(row["prompt_ids"])
        try:
            tree = SearchTree.of_columns(row["parent"], row["ids"], row["value"], row["right"])
            if judge_of(problem).exact:
                judged, _ = judged_ends(tree, problem, prompt, codec)
                found = own_errors(judged, "search", settings, codec, seed)
                candidates = [replace(one, correction="search") if one.correction == "sibling" else one for one in found]
            else:
                candidates = list(_harvested(tree, problem, prompt, settings, codec))
        except (ValueError, TypeError) as error:  # a null among numbers is a TypeError
            raise StageError(f"traces.search_trees: {row['problem']}: {error}") from error
        yield from candidates


def judged_ends(tree: SearchTree, problem: Problem, prompt: Ids, codec: Codec) -> tuple[Judged, dict[str, Ids]]:
    """The ways to the ends of a tree as judged rollouts, in the order in which `harvest` takes solutions; with them the completions
    by the names of these rollouts."""
    ways, depth = list[Ids]([()]), [0]
    for node, parent in enumerate(tree.parent[1:], start=1):
        ways.append(ways[parent] + tree.ids[node])
        depth.append(depth[parent] + 1)
    ended = [node for node, right in enumerate(tree.right) if right is not None]
    ended.sort(key=lambda node: (-tree.value[node], depth[node], node))
    whole = {f"{problem.id}#{node}": ways[node] for node in ended}
    verdicts, rollouts = [], []
    for name, ids in whole.items():
        text, finish = codec.decode(ids), "stop" if ids[-1:] == (codec.stop_id,) else "length"
        rollouts.append({"id": name, "made": "search", "prompt_ids": prompt, "token_ids": ids, "finish": finish})
        verdicts.append(row_of(name, problem.id, text.offsets, judge_rows([(problem, text.text)])[0], "exact"))
    return sort_rollouts(verdicts, rollouts, {problem.id: problem}, codec), whole


def _harvested(tree: SearchTree, problem: Problem, prompt: Ids, settings: TraceSettings, codec: Codec) -> Iterator[Candidate]:
    found = harvest(tree, most=settings.max_errors)
    if found is not None:
        trace = build_trace(prompt, *found, codec.rule)
        yield Candidate(problem, "search", trace, "search", kinds=("search",) * len(found[1]))


def clean_row(problem: Problem, ids: Ids, prompt: Ids, correction: str) -> Candidate:
    """A right solution without errors."""
    roles = (Role.PROMPT,) * len(prompt) + (Role.CORRECTION,) * len(ids)
    return Candidate(problem, "clean", Trace(prompt + ids, roles), correction)
