"""Stage `search`: Monte-Carlo tree search on training problems; its trees are read for traces, step values and preference pairs.

Writes `trees/`, `steps/` and `pairs/` as datasets, and some trees for people: trees.json and search.html (docs/search.md).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Features, List, Value

from actors.engines import Completion, Request, Sampling
from actors.heads import HeadError
from actors.mcts import Vocabulary
from actors.rollout import RolloutPool
from actors.search import Case, Meter, Searcher, StateValue
from pipeline.backtrack.harvest import SearchTree
from pipeline.backtrack.searched import Searched, pairs, step_values
from pipeline.config import DpoSettings, Settings, TraceSettings, UndoSettings
from pipeline.rollout_log import Rolled
from pipeline.search_page import Drawn, draw, render
from pipeline.stages.io import Codec, read_problems, write_json, write_rows
from pipeline.stages.kept import Kept, tuples
from pipeline.stages.pairs import Found, own_pairs
from pipeline.stages.prm import MODEL as PRM
from pipeline.stages.rollouts import context_length, row_seed, within_context
from pipeline.stages.sources import judged_ends
from pipeline.stages.stage import Context, StageError
from pipeline.tasks.problem import Problem
from verifiers.tasks import judge_of

TREES, STEPS, PAIRS = "trees", "steps", "pairs"
_IDS = List(Value("int32"))
TREE_FEATURES = Features(
    {
        "problem": Value("string"),
        "prompt_ids": _IDS,
        "parent": List(Value("int32")),
        "ids": List(_IDS),
        "value": List(Value("float32")),
        "visits": List(Value("int32")),
        "prior": List(Value("float32")),
        "right": List(Value("int8")),
        "undone": List(Value("int32")),
        "solved": Value("bool"),
        "simulations": Value("int32"),
        "tokens": Value("int32"),
    }
)
STEP_FEATURES = Features(
    {
        "problem": Value("string"),
        "prompt_ids": _IDS,
        "ids": _IDS,
        "value": Value("float32"),
        "q": Value("float32"),
        "samples": Value("int32"),
    }
)
PAIR_FEATURES = Features(
    {
        "problem": Value("string"),
        "prompt_ids": _IDS,
        "prefix_ids": _IDS,
        "chosen_ids": _IDS,
        "rejected_ids": _IDS,
        "kind": Value("string"),
        "margin": Value("float32"),
    }
)


@dataclass(frozen=True)
class EndsRight:
    """The verdict of a problem's judge on surviving ids: a right answer, and no false step on the way to it, or search would find
    the false steps that make an answer right. Travels to search workers, which load the tokenizer themselves."""

    folder: Path
    undo: UndoSettings
    prompt: str

    @cached_property
    def _codec(self) -> Codec:
        return Codec(self.folder, self.undo, self.prompt)

    def __call__(self, problem: Problem, ids: tuple[int, ...]) -> bool:
        verdict = judge_of(problem).judge(problem, self._codec.decode(ids).text)
        return verdict.correct and verdict.error is None


def run(context: Context) -> None:
    settings, how = context.settings, context.settings.search
    model = "sft" if how.model == "sft" else "model"
    folder = context.inputs[model]
    codec = Codec(folder, settings.undo, settings.base.prompt)
    ends_right = EndsRight(folder.resolve(), settings.undo, settings.base.prompt)
    pool = context.workers.pool(folder, context.digests[model], context_length(context))
    cases = _cases(context, codec, pool, ends_right)
    words = Vocabulary(codec.rule.step_end_ids, codec.stop_id, codec.rule.undo_id, frozenset(codec.spare_ids))
    values = _state_values(context)
    if how.rollout == "step" and values is None:
        context.terminal.info("search: no process reward model has been trained yet: simulations of this round run to the end")
        how = how.model_copy(update={"rollout": "end"})
    searcher = Searcher(pool.shared(), how, words, settings.run.seed, settings.rollouts.batch, ends_right, values)
    workers = context.workers.search(searcher, pool)
    try:
        with context.terminal.stage("search", len(cases)) as progress, Kept(context.resume / "trees.jsonl") as kept:
            found = {problem: Searched(*tuples(tree)) for problem, tree in kept.found.items()}
            for tree in workers.search([case for case in cases if case.problem.id not in found]):
                kept.add({tree.problem: astuple(tree)})
                found[tree.problem] = tree
                context.rollouts.write(ends_of(tree, context.digests[model], how.undo, how.temperature))
                progress.update(len(found), f"{sum(one.solved for one in found.values())} solved")
    finally:
        workers.close()
    trees = [found[case.problem.id] for case in cases if case.problem.id in found]
    _write(context, codec, {case.problem.id: case.problem for case in cases}, trees)
    _say(context, trees, workers.meter)


def _state_values(context: Context) -> StateValue | None:
    """What values states; None where nothing is asked to, or where the run has made no process reward model yet."""
    asked = context.settings.search.prm
    if asked is None or asked == "run" and "prm" not in context.inputs:
        return None
    folder = context.inputs["prm"] / PRM if asked == "run" else Path(asked)
    try:
        return context.workers.verifiers().state_values(folder)
    except HeadError as error:
        raise StageError(f"search.prm: {error}") from error


def ends_of(tree: Searched, version: str, mode: str, temperature: float) -> list[Rolled]:
    """The judged ends of a tree for the log of rollouts: the way to each, without what was taken back along it."""
    return [
        Rolled(
            f"{tree.problem}#{node}", tree.problem, tree.surviving(node), "stop", version, mode, temperature,
            sum(tree.undone[at] for at in tree.path(node)), correct=bool(right),
        )
        for node, right in enumerate(tree.right) if right >= 0
    ]  # fmt: skip


def _cases(context: Context, codec: Codec, pool: RolloutPool, ends_right: EndsRight) -> list[Case]:
    """The problems to search: drawn anew each round, the same ones for the same seed."""
    settings, how = context.settings, context.settings.search
    problems = read_problems(context.inputs["problems"], "train")
    if how.problems < len(problems):
        drawn = random.Random(f"{settings.run.seed}/search/{context.round}").sample(range(len(problems)), how.problems)
        problems = problems.take(drawn)
    prompts = [codec.prompt_ids(problem) for problem in problems]
    fits, context.counts["prompt_too_long"] = within_context(context, problems, prompts)
    cases = [Case(problems[i], prompts[i]) for i in fits]
    if how.only == "all":
        return cases
    greedy = Sampling(0.0, 1.0, how.max_tokens, codec.stop_id, (codec.rule.undo_id, *codec.spare_ids))
    requests = [Request(case.prompt, row_seed(settings.run.seed, case.problem.id)) for case in cases]
    made, _ = pool.generate(requests, greedy, settings.rollouts.batch)
    # Whoever could not be tried is searched all the same: that the model solves it is not known.
    right = [isinstance(one, Completion) and ends_right(case.problem, one.token_ids) for case, one in zip(cases, made, strict=True)]
    failed = [case for case, solved in zip(cases, right, strict=True) if not solved]
    context.counts["right_greedily"] = sum(right)
    return failed


def _write(context: Context, codec: Codec, problems: dict[str, Problem], trees: Sequence[Searched]) -> None:
    how, out = context.settings.search, context.out
    write_rows([_tree_row(tree) for tree in trees], TREE_FEATURES, out / TREES)
    steps = [_about(tree) | vars(one) for tree in trees for one in step_values(tree)]
    write_rows(steps, STEP_FEATURES, out / STEPS)
    found = [_about(tree) | one for tree in trees for one in _pairs(tree, problems[tree.problem], context.settings, codec)]
    write_rows(found, PAIR_FEATURES, out / PAIRS)
    # The trees that show most: solved ones with wrong branches first, then those that nothing solved.
    shown = sorted(trees, key=lambda tree: (not (tree.solved and 0 in tree.right), tree.problem))[: how.dumps]
    drawn: list[Drawn] = [draw(problems[tree.problem], tree, lambda ids: codec.decode(ids).text) for tree in shown]
    write_json([one.to_json() for one in drawn], out / "trees.json")
    (out / "search.html").write_text(render(drawn, context.settings.run.name, len(trees), sum(tree.solved for tree in trees)))
    context.counts.update(rows=len(trees), steps=len(steps), pairs=len(found))


def _pairs(tree: Searched, problem: Problem, settings: Settings, codec: Codec) -> Iterator[dict[str, Any]]:
    """Preference pairs of a tree: of errors that the judge cuts out where the task decides them exactly, else by values."""
    how = settings.search
    if not judge_of(problem).exact:
        yield from map(vars, pairs(tree, how.margin, codec.rule, how.pairs))
    elif tree.solved:
        grown = SearchTree.of_columns(tree.parent, tree.ids, tree.value, tree.right)
        judged, whole = judged_ends(grown, problem, tree.prompt_ids, codec)
        found, given = Found(), Counter[str]()
        own_pairs(judged, whole, TraceSettings(), DpoSettings(), codec, settings.run.seed, found, ("search",))
        for _, pair in found.pairs:
            given[pair.kind] += 1
            if given[pair.kind] <= how.pairs:
                yield {name: getattr(pair, name) for name in PAIR_FEATURES if name != "problem"}


def _tree_row(tree: Searched) -> dict[str, Any]:
    return {name: getattr(tree, name) for name in TREE_FEATURES}


def _about(tree: Searched) -> dict[str, Any]:
    return {"problem": tree.problem, "prompt_ids": tree.prompt_ids}


def _say(context: Context, trees: Sequence[Searched], meter: Meter) -> None:
    """What was found, and what did not work: nothing is left out in silence."""
    solved = sum(tree.solved for tree in trees)
    simulations, tokens = sum(tree.simulations for tree in trees), sum(tree.tokens for tree in trees)
    context.counts.update(solved=solved, unsolved=len(trees) - solved, simulations=simulations, tokens=tokens, **meter.failed)
    for kind, example in sorted(meter.examples.items()):
        context.terminal.warn(f"search: {kind}: {meter.failed[kind]} times, e.g. {example}")
    if not solved:
        context.terminal.warn("search: no simulation solved any problem: raise search.simulations, or search easier ones")
