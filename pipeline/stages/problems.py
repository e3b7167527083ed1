"""Stage `problems`: the task's problems, all splits in one dataset."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

from datasets import Features, Value

from pipeline.stages.io import write_rows
from pipeline.stages.stage import Context, StageError
from pipeline.task_config import CountdownTask, Gsm8kTask
from pipeline.tasks import countdown, gsm8k, synthetic
from pipeline.tasks.problem import SPLITS, Problem, TaskError

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
    with context.terminal.stage("problems", None) as progress:
        try:
            if isinstance(task, Gsm8kTask):
                problems, skipped = gsm8k.load(task, seed)
            elif isinstance(task, CountdownTask):
                problems, skipped = list(countdown.load(task, seed)), 0
            else:
                problems, skipped = list(synthetic.load(task, seed)), 0
        except TaskError as error:
            raise StageError(str(error)) from error
        progress.update(len(problems))
    _check(problems)
    write_rows([asdict(problem) for problem in problems], FEATURES, context.out)
    if skipped:
        context.terminal.warn(f"problems: {skipped} bad rows were skipped")
    splits = Counter(problem.split for problem in problems)
    context.counts.update(rows=len(problems), skipped=skipped, **{split: splits[split] for split in SPLITS})


def _check(problems: list[Problem]) -> None:
    """Every split that training and evaluation need has problems, and no question stands in two of them."""
    for split in ("train", "dev", "test"):
        if not any(problem.split == split for problem in problems):
            raise StageError(f"task: the {split} split is empty")
    trained = {problem.question for problem in problems if problem.split == "train"}
    both = next((problem for problem in problems if problem.split != "train" and problem.question in trained), None)
    if both:
        raise StageError(f"task: the question of {both.id} stands in the train split too: {both.question[:80]!r}")
