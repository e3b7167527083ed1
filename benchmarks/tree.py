"""The token tree: time to build batches, tokens computed, and time of forward and backward, against linear rows.

    python benchmarks/tree.py [--quick] [--run runs/tiny]

Traces are random ids in the shape of real ones: four wrong tries at lines of the gold solution of each problem, unit `step`;
with --run the model's timings are also made on the traces and clean rows of the first round of a run.
Both sides of a timing are measured in turns; a figure is the median. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from pipeline.backtrack.layout import IGNORE, Layout, Segment, lay_out, rewind  # noqa: E402
from pipeline.backtrack.targets import Targets, trace_walk  # noqa: E402
from pipeline.backtrack.trace import Detour, Trace, WrongTry, build_trace  # noqa: E402
from pipeline.backtrack.tree import Walk, grow  # noqa: E402
from pipeline.backtrack.undo import UndoRule  # noqa: E402

VOCABULARY, U, LINE_END, PAD = 300, 299, 298, 0
RULE = UndoRule(U, "step", frozenset({LINE_END}))
TRACES, PER_PROBLEM, ROW_TOKENS, ROWS = 10_000, 4, 256, 16
BUILD_SECONDS_GOAL, SPEEDUP_GOAL = 5.0, 1.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer traces in the model's timings, fewer repeats")
    parser.add_argument("--run", type=Path, help="folder of a run whose traces are timed too")
    asked = parser.parse_args()
    quick = asked.quick
    torch.set_num_threads(1)
    rng = random.Random(0)
    problems = [problem_traces(rng) for _ in range(TRACES // PER_PROBLEM)]
    length = statistics.mean(len(trace.ids) for traces in problems for trace in traces)
    figures = {"tokens_per_trace": length}
    for name, by_problem in (("trace", False), ("problem", True)):
        seconds, tokens = zip(*(build(problems, by_problem) for _ in range(1 if quick else 5)), strict=True)
        figures[f"build_s_tree_per_{name}"] = statistics.median(seconds)
        figures[f"tokens_ratio_tree_per_{name}"] = length * TRACES / tokens[0]
    figures["tokens_ratio_group_of_8"] = statistics.mean(group_ratio(rng) for _ in range(200))
    for errors in (1, 2, 4, 8):
        for rule in (RULE, UndoRule(U, "all")):
            figures[f"tokens_ratio_{errors}_errors_{rule.unit}"] = statistics.mean(
                errors_ratio(rng, errors, rule) for _ in range(200)
            )
    repeats = 3 if quick else 7
    figures |= model_times(problems[: 32 if quick else 128], RULE, VOCABULARY, repeats)
    if asked.run:
        rule, vocabulary, groups = run_traces(asked.run)
        some = rng.sample(groups, min(len(groups), 128 if quick else 512))
        figures |= {f"run_{name}": value for name, value in model_times(some, rule, vocabulary, repeats).items()}
    print(f"{TRACES} traces of {length:.0f} tokens, one core; ratios are linear rows over trees")
    for name, figure in figures.items():
        print(f"{name:32}{figure:10.2f}")
    goals = {"build_s_tree_per_trace": BUILD_SECONDS_GOAL, "speedup_tree_per_problem": SPEEDUP_GOAL}
    ok = (
        figures["build_s_tree_per_trace"] < BUILD_SECONDS_GOAL
        and figures["build_s_tree_per_problem"] < BUILD_SECONDS_GOAL
        and figures["speedup_tree_per_problem"] >= SPEEDUP_GOAL
    )
    print(
        f"goals: batches built in under {BUILD_SECONDS_GOAL:.0f} s, a tree per problem {SPEEDUP_GOAL} times as fast as padded rows"
    )
    print(json.dumps({"benchmark": "tree", "figures": figures, "goals": goals, "ok": ok}))
    return 0


def line(rng: random.Random) -> list[int]:
    return [*(rng.randrange(1, 200) for _ in range(rng.randrange(5, 11))), LINE_END]


def problem_traces(rng: random.Random, errors: int = 1, rule: UndoRule = RULE) -> list[Trace]:
    """Traces of one problem: the same gold solution, each with `errors` wrong tries at one of its lines."""
    prompt = [rng.randrange(1, 200) for _ in range(rng.randrange(15, 36))]
    solution = [line(rng) for _ in range(rng.randrange(2, 5))]
    traces = []
    for _ in range(PER_PROBLEM):
        place = sum(map(len, solution[: rng.randrange(len(solution))]))
        tries = [line(rng)[:-1] for _ in range(errors)]
        wrong = [WrongTry(tuple(ids), (True,) + (False,) * (len(ids) - 1)) for ids in tries]
        traces.append(build_trace(prompt, [*chain(*solution)], [Detour(place, one) for one in wrong], rule))
    return traces


def run_traces(folder: Path) -> tuple[UndoRule, int, list[list[Trace]]]:
    """The rule, the vocabulary and, by problem, the training rows of the first round of a run."""
    from datasets import load_from_disk
    from omegaconf import OmegaConf
    from transformers import AutoConfig

    from pipeline.config import Settings
    from pipeline.stages.io import Codec

    settings = Settings.model_validate(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    codec = Codec(folder / "0" / "base", settings.undo, settings.base.prompt)
    by_problem: dict[str, list[Trace]] = {}
    for row in load_from_disk(folder / "1" / "traces"):
        by_problem.setdefault(row["problem"], []).append(Trace(tuple(row["input_ids"]), tuple(row["roles"])))
    rows = AutoConfig.from_pretrained(folder / "0" / "base").vocab_size  # spare ones too: hot samples reach them
    return codec.rule, rows, list(by_problem.values())


def trees(problems: Sequence[Sequence[Trace]], by_problem: bool, rule: UndoRule = RULE) -> list[Segment]:
    walks = [[trace_walk(trace, rule, Targets()) for trace in traces] for traces in problems]
    groups = walks if by_problem else [[walk] for group in walks for walk in group]
    return [rewind(grow(group, rule), once=True) for group in groups]


def batches(segments: Sequence[Segment]) -> list[list[list[Segment]]]:
    """Segments in their order, as many to a row as fit, ROWS rows a batch."""
    rows: list[list[Segment]] = [[]]
    free = ROW_TOKENS
    for segment in segments:
        if len(segment.ids) > free:
            rows.append([])
            free = ROW_TOKENS
        rows[-1].append(segment)
        free -= len(segment.ids)
    return [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]


def build(problems: Sequence[Sequence[Trace]], by_problem: bool) -> tuple[float, int]:
    """Processor seconds from traces to tensors with their masks, and how many tokens the trees have."""
    began = time.process_time()
    segments = trees(problems, by_problem)
    for rows in batches(segments):
        lay_out(rows, ROW_TOKENS, PAD).attention_mask()
    return time.process_time() - began, sum(len(segment.ids) for segment in segments)


def group_ratio(rng: random.Random) -> float:
    """Eight rollouts of one problem: each leaves the most probable solution at some place and has undone a line of its own."""
    prompt = tuple(rng.randrange(1, 200) for _ in range(rng.randrange(15, 36)))
    common = [*chain(*(line(rng) for _ in range(5)))]
    walks = []
    for _ in range(8):
        own = [*chain(*(line(rng) for _ in range(5)))]
        leaves = rng.randrange(len(common))
        walks.append(Walk(prompt, (*common[:leaves], *line(rng), U, *own[leaves:])))
    return sum(len(walk.prompt + walk.ids) for walk in walks) / len(grow(walks, RULE).parent)


def errors_ratio(rng: random.Random, errors: int, rule: UndoRule) -> float:
    """One tree for each trace, so that what is saved is the undos' and the rewritten prefixes' part alone."""
    traces = problem_traces(rng, errors, rule)
    nodes = sum(len(grow([trace_walk(trace, RULE, Targets())], rule).parent) for trace in traces)
    return sum(len(trace.ids) for trace in traces) / nodes


def model_times(problems: Sequence[Sequence[Trace]], rule: UndoRule, vocabulary: int, repeats: int) -> dict[str, float]:
    """Milliseconds of forward and backward a trace, batches made beforehand."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **size))

    def step(logits: torch.Tensor, labels: torch.Tensor) -> None:
        torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").backward()
        model.zero_grad()

    traces = [trace for group in problems for trace in group]
    padded = [pad(traces[start : start + ROWS], rule) for start in range(0, len(traces), ROWS)]
    laid_out = {
        name: [lay_out(rows, None, PAD) for rows in batches(trees(problems, by_problem, rule))]
        for name, by_problem in (("tree_per_trace", False), ("tree_per_problem", True))
    }

    def rows() -> None:
        for ids, mask, labels in padded:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            step(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def on_trees(layouts: Sequence[Layout]) -> None:
        for layout in layouts:
            mask = layout.attention_mask()
            out = model(input_ids=layout.input_ids, position_ids=layout.position_ids, attention_mask=mask, use_cache=False)
            step(out.logits[layout.row, layout.column], layout.labels())

    sides: dict[str, Callable[[], None]] = {"padded_rows": rows}
    sides |= {name: partial(on_trees, layouts) for name, layouts in laid_out.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                times[name].append(1000 * (time.perf_counter() - began) / len(traces))
    medians = {name: statistics.median(values) for name, values in times.items()}
    speedups = {f"speedup_{name}": medians["padded_rows"] / medians[name] for name in laid_out}
    return {f"ms_per_trace_{name}": value for name, value in medians.items()} | speedups


def labels(trace: Trace, rule: UndoRule) -> list[int]:
    walk = trace_walk(trace, rule, Targets())
    wanted = zip(walk.targets or (), walk.weights or (), strict=True)
    return [IGNORE] * len(walk.prompt) + [token if weight else IGNORE for token, weight in wanted]


def pad(traces: Sequence[Trace], rule: UndoRule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Linear rows of one trace each: input ids, mask and labels [rows, tokens]."""
    width = max(len(trace.ids) for trace in traces)
    ids = [[*trace.ids, *[PAD] * (width - len(trace.ids))] for trace in traces]
    mask = [[1] * len(trace.ids) + [0] * (width - len(trace.ids)) for trace in traces]
    wanted = [[*labels(trace, rule), *[IGNORE] * (width - len(trace.ids))] for trace in traces]
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(wanted)


if __name__ == "__main__":
    sys.exit(main())
