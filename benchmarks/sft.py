"""The learner against TRL's SFTTrainer as it comes (padded rows): same traces, model and batches, side by side in one run.

    python benchmarks/sft.py [--quick] [--run runs/tiny]

Sides: `trl` pads one trace a row; `packed` is our learner in the soft form, whose loss must be the same; `trees` is our learner in
the rewind form, the traces of a problem on one tree, which has another loss by design. Both trainers run their own loop; a
figure is the median step time of runs taken in turns. Peak memory is the largest resident set of a process of its own that
trains one side alone, libraries included. With --run the traces are those of a run's first round. Prints a table and one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from tree import PAD, RULE, VOCABULARY, labels, problem_traces, run_traces  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from actors.learner import TreeTrainer  # noqa: E402
from actors.packing import Example, TrainingSet, collate, examples_of  # noqa: E402
from actors.segments import attends_by_segment  # noqa: E402
from pipeline.backtrack.targets import Form  # noqa: E402
from pipeline.backtrack.trace import Trace  # noqa: E402
from pipeline.backtrack.undo import UndoRule  # noqa: E402
from pipeline.config import ScratchModel  # noqa: E402
from pipeline.stages.base import new_model, train_tokenizer  # noqa: E402

SIDES = ("trl", "packed", "trees")
TRACES, ROW_TOKENS, SPEEDUP_GOAL, LOSS_GOAL = 64, 512, 2.0, 1e-4


class Clock(TrainerCallback):
    """Seconds of each step but the first, which warms up."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter() - self._began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and turns")
    parser.add_argument("--run", type=Path, help="folder of a run whose traces are taken")
    parser.add_argument("--peak", choices=SIDES, help="train this side alone and print the process's peak memory in GiB")
    asked = parser.parse_args()
    steps, turns = (4, 2) if asked.quick else (10, 4)
    rng = random.Random(0)
    if asked.run:
        rule, vocabulary, groups = run_traces(asked.run)
        rng.shuffle(groups)
    else:
        rule, vocabulary, groups = RULE, VOCABULARY, [problem_traces(rng) for _ in range(steps * TRACES)]
    batches = split(groups, steps)
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "trl": lambda: padded(batches, rule, vocabulary, folder),
            "packed": lambda: ours(batches, rule, vocabulary, folder, Form("soft")),
            "trees": lambda: ours(batches, rule, vocabulary, folder, Form("rewind")),
        }
        if asked.peak:
            run(sides[asked.peak])
            print(own_peak())
            return 0
        for _ in range(turns):
            for name, make in sides.items():
                seconds, losses[name] = run(make)
                times[name] += seconds
    traces = statistics.mean(len(batch) for batch in batches)
    useful = statistics.mean(sum(len(trace.ids) for trace in batch) for batch in batches)
    figures: dict[str, float] = {"traces_per_step": traces, "tokens_per_step": useful}
    for name, seconds in times.items():
        figures[f"{name}_ms_per_step"] = 1000 * statistics.median(seconds)
        figures[f"{name}_tokens_per_s"] = useful / statistics.median(seconds)
    for name in ("packed", "trees"):
        figures[f"speedup_{name}"] = figures[f"{name}_tokens_per_s"] / figures["trl_tokens_per_s"]
    figures["loss_difference"] = abs(losses["trl"] - losses["packed"])
    figures |= {f"{name}_peak_gib": peak_memory(name) for name in SIDES}
    print(f"steps of {traces:.0f} traces, {torch.get_num_threads()} threads; tokens are those of the traces without padding")
    for name, figure in figures.items():
        print(f"{name:24}{figure:12.5g}")
    print(f"goals: trees and packed rows {SPEEDUP_GOAL} times as fast as padded rows, first loss equal to {LOSS_GOAL}")
    goals = {"speedup_packed": SPEEDUP_GOAL, "speedup_trees": SPEEDUP_GOAL, "loss_difference": LOSS_GOAL}
    ok = min(figures["speedup_packed"], figures["speedup_trees"]) >= SPEEDUP_GOAL and figures["loss_difference"] <= LOSS_GOAL
    print(json.dumps({"benchmark": "sft", "figures": figures, "goals": goals, "ok": ok}))
    return 0


def own_peak() -> float:
    """GiB. What getrusage says begins with the peak of the process that started this one."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**20


def peak_memory(side: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", side]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def split(groups: Sequence[Sequence[Trace]], steps: int) -> list[list[Trace]]:
    """`steps` batches of whole problems with at least TRACES traces each."""
    batches: list[list[Trace]] = [[]]
    for group in groups:
        if len(batches[-1]) >= TRACES:
            batches.append([])
        batches[-1] += group
    if len(batches) < steps:
        raise SystemExit(f"the run has traces for {len(batches)} steps, {steps} are needed")
    return batches[:steps]


def run(make: Callable[[], SFTTrainer]) -> tuple[list[float], float]:
    """Step times without the first, and the first loss."""
    trainer, clock = make(), Clock()
    trainer.add_callback(clock)
    compute, losses = trainer.compute_loss, []

    def recorded(*given: Any, **more: Any) -> Any:
        losses.append(compute(*given, **more))
        return losses[-1]

    trainer.compute_loss = recorded  # what the trainer logs is rounded
    trainer.train()
    return clock.steps[1:], losses[0].item()


def model_and_tokenizer(vocabulary: int) -> tuple[Any, Any]:
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    model = new_model(ScratchModel(), tokenizer, 0)
    model.resize_token_embeddings(max(vocabulary, len(tokenizer)), mean_resizing=False)
    return model, tokenizer


def arguments(folder: str, steps: int, rows: int) -> SFTConfig:
    return SFTConfig(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=rows, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, bf16=False, gradient_checkpointing=False, use_cpu=True,
        dataloader_pin_memory=False, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None, train_sampling_strategy="sequential",
    )  # fmt: skip


def padded(batches: Sequence[Sequence[Trace]], rule: UndoRule, vocabulary: int, folder: str) -> SFTTrainer:
    """TRL's trainer with its own collator; a step is the traces of one batch, a row each."""
    model, tokenizer = model_and_tokenizer(vocabulary)
    rows = [{"input_ids": list(trace.ids), "labels": labels(trace, rule)} for batch in batches for trace in batch]
    trainer = SFTTrainer(
        model=model,
        args=arguments(folder, len(batches), 1),
        train_dataset=Dataset.from_dict({"batch": list(range(len(batches)))}),
        processing_class=tokenizer,
    )
    starts = [sum(map(len, batches[:number])) for number in range(len(batches) + 1)]
    collator = trainer.data_collator
    trainer.data_collator = lambda batch: collator(rows[starts[batch[0]["batch"]] : starts[batch[0]["batch"] + 1]])
    return trainer


def ours(batches: Sequence[Sequence[Trace]], rule: UndoRule, vocabulary: int, folder: str, form: Form) -> SFTTrainer:
    model, tokenizer = model_and_tokenizer(vocabulary)
    assert attends_by_segment(model)
    sets = [TrainingSet(batch, rule, form=form, together=True) for batch in batches]
    rows = [pack_all(examples_of(data, ROW_TOKENS)[0]) for data in sets]
    return TreeTrainer(
        model=model,
        args=arguments(folder, len(batches), 1),
        train_dataset=Dataset.from_dict({"batch": list(range(len(batches)))}),
        data_collator=lambda batch: collate(rows[batch[0]["batch"]], sets[batch[0]["batch"]], PAD, by_segment=True),
        processing_class=tokenizer,
    )


def pack_all(examples: Sequence[Example]) -> list[list[Example]]:
    """Every example once, the longest first, each into the first row that has room."""
    rows: list[list[Example]] = []
    for example in sorted(examples, key=lambda one: -one.tokens):
        row = next((row for row in rows if sum(one.tokens for one in row) + example.tokens <= ROW_TOKENS), None)
        if row is None:
            rows.append(row := [])
        row.append(example)
    return rows


if __name__ == "__main__":
    sys.exit(main())
