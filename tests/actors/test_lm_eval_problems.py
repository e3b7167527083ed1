"""What the harness's tasks are given and how its answers are judged; all that needs no harness. Beside it, that it is missing."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pytest
from datasets import Dataset

from actors.lm_eval.__main__ import main
from actors.lm_eval.problems import judged, of_gsm8k, of_run
from pipeline.stages.io import read_problems, write_rows
from pipeline.stages.problems import FEATURES
from pipeline.task_config import CountdownTask, SyntheticTask
from pipeline.tasks import countdown, synthetic
from pipeline.tasks.problem import TaskError

PROBLEMS = [
    *synthetic.load(SyntheticTask(train=8, dev=8, test=8, ood=8), seed=0),
    *countdown.load(CountdownTask(name="countdown", train=8, dev=8, test=8, ood=8), seed=0),
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    write_rows([vars(problem) for problem in PROBLEMS], FEATURES, tmp_path / "problems")
    return tmp_path / "problems"


def test_documents_are_the_problems_of_a_split_with_the_prompt_of_the_folder(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "retract.json").write_text(json.dumps({"prompt": "Q: {question}\n"}))
    for split in ("test", "ood"):
        found = of_run(str(tmp_path), problems=str(saved), split=split, version=1.0)
        wanted = [{**vars(one), "prompt": f"Q: {one.question}\n"} for one in read_problems(saved, split)]
        assert list(found["test"]) == wanted and len(wanted) == 16
        assert {row["split"] for row in found["train"]} == {"train"}
    assert of_run(str(tmp_path), problems=str(saved), prompt="{question}?")["test"][0]["prompt"] == f"{wanted_question(saved)}?"
    assert of_run("some/hub-model", problems=str(saved))["test"][0]["prompt"] == f"{wanted_question(saved)}\n"


def wanted_question(saved: Path) -> str:
    return read_problems(saved, "test")[0].question


def test_gold_solutions_are_right_and_other_answers_wrong(saved: Path) -> None:
    """Each by the judge of its family."""
    documents: Dataset = of_run("", problems=str(saved))["test"]
    for document in documents:
        assert judged(document, [document["solution"]]) == {"accuracy": 1.0}
        assert judged(document, ["#### 123456789"]) == {"accuracy": 0.0}
    assert "countdown" in set(documents["family"])


def test_local_files_in_the_format_of_gsm8k(tmp_path: Path) -> None:
    lines = [{"question": f"How many {n}?", "answer": f"It is <<{n}={n}>>.\n#### 1,08{n}"} for n in range(3)]
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = of_gsm8k("", test_file=str(tmp_path / "test.jsonl"))
    assert set(found) == {"test"}  # nothing is asked of the hub
    assert found["test"]["id"] == [f"gsm8k/test/{n}" for n in range(3)] and found["test"]["answer"] == ["1080", "1081", "1082"]
    assert judged(found["test"][1], ["so $1,081 then\n#### $1,081."]) == {"accuracy": 1.0}
    both = of_gsm8k("", test_file=str(tmp_path / "test.jsonl"), train_file=str(tmp_path / "test.jsonl"))
    assert both["train"]["id"] == [f"gsm8k/train/{n}" for n in range(3)]


def test_what_is_missing_is_said_in_one_line(saved: Path, tmp_path: Path) -> None:
    for call, said in (
        (lambda: of_run(), "needs the problems of a run"),
        (lambda: of_run(problems=str(tmp_path / "none")), "holds no problems"),
        (lambda: of_run(problems=str(saved), split="tests"), "split must be one of"),
        (lambda: of_gsm8k(test_file=str(tmp_path / "none.jsonl")), "cannot read"),
    ):
        with pytest.raises(TaskError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_without_the_harness_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more))
    err = io.StringIO()
    assert main(["--model", "retract", "--tasks", "gsm8k"], err) == 2
    assert err.getvalue().count("\n") == 1 and "pip install" in err.getvalue()
