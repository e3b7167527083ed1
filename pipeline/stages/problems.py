"""Stage `problems`: the task's problems, all splits in one dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Features, Value

from pipeline.stages.io import read_problems, write_rows
from pipeline.stages.stage import Context, StageError
from pipeline.task_config import CountdownTask, Gsm8kTask
from pipeline.tasks import countdown, gsm8k, synthetic
from pipeline.tasks.problem import SPLITS, Problem, TaskError
from pipeline.tasks.seen import Seen

FEATURES = Features(
    {
        "id": Value("string"),
        "split": Value("string"),
        "family": Value("string"),
        "hindsight": Value("bool"),
        "question": Value("string"),
        "solution": Value("string"),
        "answer": Value("string"),
        "params": Value("string"),
    }
)


def run(context: Context) -> None:
    task, seed = context.settings.task, context.settings.run.seed
    splits: Counter[str] = Counter()
    trained, skipped = Seen(), 0
    with context.terminal.stage("problems", None) as progress:

        def rows(problems: Iterable[Problem]) -> Iterator[dict[str, Any]]:
            for count, problem in enumerate(problems, start=1):
                splits[problem.split] += 1
                if problem.split == "train":
                    trained.add(problem.question)
                progress.update(count)
                yield vars(problem)

        try:
            if isinstance(task, Gsm8kTask):
                problems, skipped = gsm8k.load(task, seed)
            elif isinstance(task, CountdownTask):
                problems = countdown.load(task, seed)
            else:
                problems = synthetic.load(task, seed)
            write_rows(rows(problems), FEATURES, context.out)
        except TaskError as error:
            raise StageError(str(error)) from error
    _check(context.out, splits, trained)
    if skipped:
        context.terminal.warn(f"problems: {skipped} bad rows were skipped")
    context.counts.update(rows=splits.total(), skipped=skipped, **{split: splits[split] for split in SPLITS})


def _check(folder: Path, splits: Mapping[str, int], trained: Seen) -> None:
    """Every split that training and evaluation need has problems, and no question stands in two of them."""
    for split in ("train", "dev", "test"):
        if not splits[split]:
            raise StageError(f"task: the {split} split is empty")
    others = (problem for split in SPLITS if split != "train" for problem in read_problems(folder, split))
    both = next((problem for problem in others if problem.question in trained), None)
    if both:
        raise StageError(f"task: the question of {both.id} stands in the train split too: {both.question[:80]!r}")
