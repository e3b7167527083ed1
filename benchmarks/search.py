"""Tree search against independent samples at equal tokens, and how full it keeps its engine.

    python benchmarks/search.py [--quick] [--engine vllm] [--run RUN]

Problems of the test split that the model fails greedily: solved against tokens, best-of-n and search judged by the same verifier,
which sees finished solutions alone. That greedy decoding fails is used by neither side: the first simulation goes the greedy way
all the same, and its tokens count. Without a run a small model is trained here first. Throughput is measured with the same engine,
memory with scripted completions. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from actors.engines import Completion, Request, Sampling, make_engine  # noqa: E402
from actors.mcts import Made, Tree, Vocabulary  # noqa: E402
from actors.search import Case, Searcher  # noqa: E402
from pipeline.config import EngineSettings, Settings, UndoSettings  # noqa: E402
from pipeline.search_config import SearchSettings  # noqa: E402
from pipeline.stages.io import Codec, read_problems  # noqa: E402
from pipeline.stages.search import EndsRight  # noqa: E402
from pipeline.tasks.problem import Problem  # noqa: E402

SIMULATIONS = (1, 2, 4, 8, 16, 32, 64)
GOALS = {"token_ratio": 2.0, "speedup": 5.0, "engine_busy": 0.8, "gib_10000_trees": 4.0}
PROMPT = "{question}\n"
TEMPERATURES = (1.0, 1.5)


class Kit:
    """A model with what judges it."""

    def __init__(self, model: Path, rows: int, kind: Literal["hf", "vllm"]) -> None:
        self.codec = Codec(model, UndoSettings(), PROMPT)
        self.engine = make_engine(model, EngineSettings(kind=kind, max_num_seqs=rows), 512, 0)
        self.right = EndsRight(model, UndoSettings(), PROMPT)
        self.barred = (self.codec.rule.undo_id, *self.codec.spare_ids)
        self.rows = rows

    def generate(self, requests: Sequence[Request], sampling: Sampling, batch: int = 0) -> tuple[list[Completion], str]:
        return self.engine.generate(requests, sampling), ""

    def sampling(self, temperature: float, longest: int) -> Sampling:
        return Sampling(temperature, 1.0, longest, self.codec.stop_id, self.barred)

    def words(self) -> Vocabulary:
        codec = self.codec
        return Vocabulary(codec.rule.step_end_ids, codec.stop_id, codec.rule.undo_id, frozenset(codec.spare_ids))

    def cases(self, problems: Sequence[Problem]) -> list[Case]:
        return [Case(one, self.codec.prompt_ids(one)) for one in problems]

    def solves(self, problem: Problem, ids: Sequence[int]) -> bool:
        return bool(ids) and ids[-1] == self.codec.stop_id and self.right(problem, tuple(ids))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer problems and samples")
    parser.add_argument("--run", type=Path, help="folder of a run whose fine-tuned model and problems are taken")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf", help="what generates (default: %(default)s)")
    parser.add_argument("--skip-curves", action="store_true", help="throughput and memory alone")
    asked = parser.parse_args()
    if asked.run and not (asked.run / "1" / "sft").is_dir():
        parser.error(f"{asked.run} has no fine-tuned model of a first round")
    count, samples = (16, 16) if asked.quick else (80, 64)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        run = asked.run
        model, problems = (run / "1" / "sft", run / "0" / "problems") if run else trained(Path(scratch), asked.quick)
        kit = Kit(model, 256, asked.engine)
        pool = [one for one in read_problems(problems) if one.split == "test"]
        random.Random(0).shuffle(pool)
        if not asked.skip_curves:
            figures |= curves(kit, pool, count, samples)
        figures |= throughput(kit, pool, asked.quick)
    figures |= memory(1000 if asked.quick else 10_000)
    goals = {name: goal for name, goal in GOALS.items() if name in figures}
    ok = all(figures[name] <= goal if name.startswith("gib") else figures[name] >= goal for name, goal in goals.items())
    print(json.dumps({"benchmark": "search", "figures": figures, "goals": goals, "ok": ok}))
    return 0


def failed(kit: Kit, pool: Sequence[Problem], count: int) -> list[Problem]:
    """The first `count` problems that greedy decoding fails."""
    found: list[Problem] = []
    for start in range(0, len(pool), 256):
        part = pool[start : start + 256]
        made = kit.engine.generate([Request(case.prompt, 0) for case in kit.cases(part)], kit.sampling(0.0, 160))
        found += [one for one, row in zip(part, made, strict=True) if not kit.solves(one, row.token_ids)]
        if len(found) >= count:
            break
    return found[:count]


def curves(kit: Kit, pool: Sequence[Problem], count: int, samples: int) -> dict[str, Any]:
    problems = failed(kit, pool, count)
    print(f"{len(problems)} problems that greedy decoding fails; both sides are judged by the same verifier, on finished solutions")
    search, spent = searched(kit, problems, samples)
    budgets = [40 * 2 ** (step / 2) for step in range(13)]
    sides: dict[str, list[float]] = {"search": [share(search, budget) for budget in budgets]}
    drawn = {temperature: best_of_n(kit, problems, samples, temperature) for temperature in TEMPERATURES}
    for temperature, rows in drawn.items():
        sides[f"best of n, T {temperature:g}"] = [expected(rows, budget) for budget in budgets]
    print(f"{'tokens a problem':18}" + "".join(f"{name:>20}" for name in sides))
    for place, budget in enumerate(budgets):
        print(f"{budget:<18.0f}" + "".join(f"{values[place]:20.1%}" for values in sides.values()))
    print("solved after so many simulations, with the tokens that they took a problem; samples beside them")
    by_count = []
    for n in (one for one in SIMULATIONS if one <= samples):
        solved = sum(0 < one[0] <= n for one in search) / len(search)
        tokens = spent[min(n, len(spent)) - 1] / len(search)
        by_count.append({"simulations": n, "solved": solved, "tokens": tokens})
        other = "".join(f"   T {t:g}: {pass_at(rows, n):6.1%}" for t, rows in drawn.items())
        print(f"{n:4} simulations {solved:6.1%} in {tokens:5.0f} tokens   best of {n}:{other}")
    ratios = {}
    for name, values in list(sides.items())[1:]:
        for level in (0.25, 0.5, 0.75, 0.9):
            mine, other = tokens_for(budgets, sides["search"], level), tokens_for(budgets, values, level)
            if mine:
                ratios[f"{name} / search, tokens to solve {level:.0%}"] = round(other / mine, 2) if other else None
    for name, ratio in ratios.items():
        print(f"{name:50} {ratio or 'out of reach of best of n'}")
    half = half_ratio([tokens_for(budgets, values, 0.5) for values in sides.values()])
    return {
        "problems": len(problems),
        "budgets": [round(one) for one in budgets],
        "curves": {name: [round(one, 4) for one in values] for name, values in sides.items()},
        "by_simulations": by_count,
        "token_ratios": ratios,
        **({} if half is None else {"token_ratio": half}),
    }


def searched(kit: Kit, problems: Sequence[Problem], simulations: int) -> tuple[list[tuple[int, int]], list[int]]:
    """For each problem (simulations, tokens) up to the first right end, 0 and -1 without one; and the tokens of all problems after
    each simulation, since all trees are open together and a round is one simulation of each."""
    spent: list[int] = []
    how = SearchSettings(simulations=simulations, after_right=0, max_tokens=160, batch=len(problems))
    one = Searcher(kit, how, kit.words(), 0, 256, kit.right, on_round=lambda meter: spent.append(meter.tokens))
    found = {tree.problem: (tree.simulations if tree.solved else 0, tree.first_tokens) for tree in one.search(kit.cases(problems))}
    return [found[one.id] for one in problems], spent


Rows = list[list[tuple[int, bool]]]


def best_of_n(kit: Kit, problems: Sequence[Problem], samples: int, temperature: float) -> Rows:
    """(tokens, right) of independent samples of each problem."""
    asked = [
        (place, Request(case.prompt, place << 16 | sample))
        for place, case in enumerate(kit.cases(problems))
        for sample in range(samples)
    ]
    rows: Rows = [[] for _ in problems]
    made = kit.engine.generate([one for _, one in asked], kit.sampling(temperature, 160))
    for (place, _), row in zip(asked, made, strict=True):
        rows[place].append((len(row.token_ids), kit.solves(problems[place], row.token_ids)))
    return rows


def share(first: Sequence[tuple[int, int]], budget: float) -> float:
    return sum(0 <= tokens <= budget for _, tokens in first) / len(first)


def expected(rows: Rows, budget: float, draws: int = 200) -> float:
    """Share solved within the budget, over random orders of the samples; a sample that ends beyond it does not count."""
    rng, solved = random.Random(0), 0
    for row in rows:
        for _ in range(draws):
            spent = 0
            for tokens, right in rng.sample(row, len(row)):
                spent += tokens
                if spent > budget:
                    break
                if right:
                    solved += 1
                    break
    return solved / (draws * len(rows))


def pass_at(rows: Rows, n: int) -> float:
    """Share solved by n samples, without bias: 1 - C(wrong, n) / C(all, n)."""
    total = 0.0
    for row in rows:
        wrong, missed = sum(not right for _, right in row), 1.0
        for i in range(n):
            missed *= max(wrong - i, 0) / (len(row) - i)
        total += 1 - missed
    return total / len(rows)


def tokens_for(budgets: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """Tokens at which a curve reaches a level, on the straight line between two budgets."""
    for place in range(1, len(budgets)):
        low, high = values[place - 1], values[place]
        if low < level <= high:
            return budgets[place - 1] + (level - low) / (high - low) * (budgets[place] - budgets[place - 1])
    return None


def half_ratio(tokens: Sequence[float | None]) -> float | None:
    """Least tokens of the samplings over those of search, the first of `tokens`, to solve half; 0 where some sampling solves half
    and search does not, None where there is nothing to divide."""
    search, others = tokens[0], [one for one in tokens[1:] if one]
    if not others:
        return None
    return round(min(others) / search, 2) if search else 0.0


def throughput(kit: Kit, pool: Sequence[Problem], quick: bool) -> dict[str, float]:
    """Simulations/s of one question at a time against many in lockstep, on the same problems with the same engine, and the share of
    the time that it is busy. Without a GPU seconds are those that this process computes, so that others on the machine count on
    neither side; the one side's questions stand half before and half behind the other's."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    count, simulations = (64, 8) if quick else (128, 16)
    problems = pool[:count]
    how: dict[str, Any] = {"simulations": simulations, "after_right": simulations, "max_tokens": 160}
    alone, together = "one question at a time", "lockstep"
    parts = [(alone, 1, problems[::2]), (together, count, problems), (alone, 1, problems[1::2])]
    list(Searcher(kit, SearchSettings(batch=4, **how), kit.words(), 0, 256, kit.right).search(kit.cases(pool[-4:])))  # to be warm
    done: dict[str, list[float]] = {name: [0.0] * 5 for name, _, _ in parts}
    for name, batch, some in parts:
        one = Searcher(kit, SearchSettings(batch=batch, **how), kit.words(), 0, 256, kit.right)
        began, computed = time.perf_counter(), clock()
        list(one.search(kit.cases(some)))
        seconds = (clock() - computed, time.perf_counter() - began)
        new = (one.meter.simulations, one.meter.tokens, *seconds, one.meter.engine_seconds)
        done[name] = [before + more for before, more in zip(done[name], new, strict=True)]
    rates = {}
    for name, (made, tokens, computed, waited, engine) in done.items():
        rates[name], busy = made / computed, engine / waited
        print(f"{name:24}{rates[name]:8.1f} simulations/s, {tokens / computed:8.0f} tokens/s, engine busy {busy:.1%}")
    speedup = rates[together] / rates[alone]
    print(f"{'ratio':24}{speedup:8.1f}   ({count} problems, {simulations} simulations each)")
    return {"speedup": speedup, "engine_busy": busy, "simulations_per_s": rates[together]}


def memory(trees: int, simulations: int = 64) -> dict[str, float]:
    """GiB of open trees of a typical size, scaled to 10,000: 64 simulations of 5 lines of 12 ids."""
    words, how = Vocabulary(frozenset({0}), 1, 2), SearchSettings(simulations=simulations + 1, after_right=10_000, max_tokens=160)
    before = resident()
    grown = [grow(Tree(tuple(range(3, 63)), how, words, seed), simulations, seed) for seed in range(trees // 40)]
    gib = 10_000 * (resident() - before) / len(grown) / 2**30
    nodes = sum(len(tree.nodes) for tree in grown) / len(grown)
    print(f"10,000 open trees of {simulations} simulations, {nodes:.0f} nodes each: {gib:.2f} GiB (measured on {len(grown)})")
    return {"gib_10000_trees": gib, "nodes_per_tree": nodes}


def resident() -> int:
    """Bytes of main memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grow(tree: Tree, simulations: int, seed: int) -> Tree:
    rng = random.Random(seed)
    while tree.simulations < simulations and (wants := tree.wants()):
        for wanted in wants:
            left = max(1, 60 - len(wanted.ids))
            ids = tuple(1 if i == left - 1 else 0 if i % 12 == 11 else rng.randrange(3, 500) for i in range(left))
            top = tuple(tuple((token if k == 0 else 500 + k, -0.2 - 1.0 * k) for k in range(9)) for token in ids)
            nodes, ending = tree.observe(wanted, Made(ids, (-0.2,) * len(ids), top))
            tree.settle(wanted, nodes[-1], False if ending == "stop" else None)
    return tree


def trained(scratch: Path, quick: bool) -> tuple[Path, Path]:
    """A small model that makes mistakes, and problems for it."""
    from pipeline.runner import Pipeline, Selection
    from pipeline.settings_file import load_settings
    from pipeline.telemetry import Terminal

    steps = 150 if quick else 1200
    options = ["run.name=search", f"run.root={scratch}", "task.train=3000", "task.dev=60", "task.test=300", "task.ood=10"]
    options += [f"base.train.steps={steps}", "base.train.rows=8", "base.train.lr=2e-3", "base.train.check_problems=60"]
    settings: Settings = load_settings(ROOT / "configs" / "tiny.yaml", options)
    folder = scratch / "search"
    (folder / "logs").mkdir(parents=True)
    Pipeline(settings, folder, Selection(only=("problems", "base")), Terminal(folder / "logs" / "run.log")).run()
    return folder / "0" / "base", folder / "0" / "problems"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    sys.exit(main())
