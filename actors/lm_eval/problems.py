"""Problems for the harness's tasks beside this file, with the prompt that a model was trained on, and their verdicts.

The yamls name these functions; the harness calls them with the fields of `--model_args` and `--metadata`, and loads this file by
its path. Verdicts are those of the stage evaluate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from actors.saved import answer_settings, read_note
from pipeline.task_config import Gsm8kTask
from pipeline.tasks import gsm8k
from pipeline.tasks.problem import SPLITS, Problem, TaskError
from verifiers.tasks import judge_of


def of_run(
    pretrained: str = "", problems: str | None = None, split: str = "test", prompt: str | None = None, **rest: Any
) -> dict[str, Dataset]:
    """Problems that a run's stage `problems` has left in the folder `problems`; `split` is what the harness calls test.

    Raises:
        TaskError: no such folder, or a split without problems.
    """
    if problems is None:
        raise TaskError("retract_run needs the problems of a run: --metadata problems=runs/NAME/0/problems")
    if not (Path(problems) / "state.json").is_file():
        raise TaskError(f"{problems} holds no problems: it has no state.json; a run has them in runs/NAME/0/problems")
    if split not in SPLITS:
        raise TaskError(f"split must be one of {', '.join(SPLITS)}, is {split!r}")
    names = [field.name for field in fields(Problem)]
    rows: Any = load_from_disk(problems)
    found = [Problem(**{name: row[name] for name in names}) for row in rows]
    wanted = {"test": split, "train": "train"}
    chosen = {name: [one for one in found if one.split == taken] for name, taken in wanted.items()}
    if not chosen["test"]:
        raise TaskError(f"{problems} has no problems of split {split}")
    return {name: _documents(some, pretrained, prompt) for name, some in chosen.items() if some}


def of_gsm8k(
    pretrained: str = "", test_file: str | None = None, train_file: str | None = None, prompt: str | None = None, **rest: Any
) -> dict[str, Dataset]:
    """GSM8K from jsonl files with `question` and `answer`, the training one for few-shot examples; without files, from the hub.

    Raises:
        TaskError: a missing file, or a bad row.
    """
    task = Gsm8kTask(name="gsm8k", test_file=test_file, train_file=train_file)
    found = {"test": gsm8k.read(task, "test", test_file)}
    if train_file or not test_file:
        found["train"] = gsm8k.read(task, "train", train_file)
    return {name: _documents(some, pretrained, prompt) for name, (some, _) in found.items()}


def judged(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The house's verdict on the surviving text of an answer."""
    problem = Problem(**{field.name: document[field.name] for field in fields(Problem)})
    return {"accuracy": float(judge_of(problem).correct(problem, results[0]))}


def _documents(problems: Iterable[Problem], folder: str, prompt: str | None) -> Dataset:
    """Problems and their prompts: by `prompt`, else as the model's folder says, else the default of runs."""
    given = {} if prompt is None else {"prompt": prompt}
    template = answer_settings({**read_note(Path(folder)), **given}).prompt
    return Dataset.from_list([{**asdict(one), "prompt": template.format(question=one.question)} for one in problems])
