"""Wrong files and models, through the command line: one line that says what and where, exit code 1, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from actors.engines import HfEngine
from actors.saved import InputError, SavedModel
from pipeline.cli import main
from pipeline.config import EngineSettings, ScratchModel
from pipeline.stages.base import new_model, train_tokenizer

GOOD = {"question": "Ana has 3 apples and buys 4. How many?", "answer": "She has <<3+4=7>>7.\n#### 7"}


def jsonl(file: Path, *lines: object) -> Path:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def numbered(count: int) -> list[dict[str, str]]:
    return [GOOD | {"question": f"{i}: {GOOD['question']}"} for i in range(count)]


def gsm8k(tmp_path: Path, train: Path, *more: str) -> list[str]:
    test = jsonl(tmp_path / "test.jsonl", GOOD | {"question": "Another one?"})
    files = [f"task.train_file={train}", f"task.test_file={test}", "task.name=gsm8k", "task.dev=2"]
    return ["--config", "smoke", f"run.root={tmp_path}", "--until", "problems", *files, *more]


@pytest.fixture(autouse=True)
def gsm8k_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of other tasks in smoke.yaml do not belong to gsm8k, so these runs have a file of their own."""
    (tmp_path / "smoke.yaml").write_text("run: {name: smoke}\n")
    monkeypatch.setattr("pipeline.cli._config_file", lambda name: tmp_path / "smoke.yaml")
    monkeypatch.setattr("pipeline.cli.quiet_third_parties", lambda log_file: None)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "shards" not in line]  # not the libraries' bars
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    "bad, said",
    [
        ("{not json", "not a JSON object"),
        ({"question": "x"}, "'answer' is missing"),
        (GOOD | {"question": " "}, "'question' is missing, empty or no text"),
        (GOOD | {"answer": "It is 7."}, "no line '#### number'"),
        (GOOD | {"answer": "#### seven"}, "'seven' is no number"),
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: object, said: str) -> None:
    train = jsonl(tmp_path / "train.jsonl", *numbered(4), bad)
    assert main(gsm8k(tmp_path, train)) == 1
    error = one_line(capsys)
    assert f"{train}:5: " in error and said in error
    assert not (tmp_path / "smoke" / "0").exists()


def test_skipped_rows_are_counted_in_the_manifest(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", *numbered(4), "{not json", {"question": "x"})
    assert main(gsm8k(tmp_path, train, "task.on_bad_row=skip")) == 0
    manifest = json.loads((tmp_path / "smoke" / "0" / "problems" / "manifest.json").read_text())
    assert manifest["counts"] == {"rows": 5, "skipped": 2, "train": 2, "dev": 2, "test": 1, "ood": 0}


def test_empty_and_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(gsm8k(tmp_path, jsonl(tmp_path / "empty.jsonl"))) == 1
    assert "empty.jsonl: no usable row in the train split" in one_line(capsys)
    assert main(gsm8k(tmp_path, tmp_path / "none.jsonl")) == 1
    assert "none.jsonl" in one_line(capsys)


def until_base(tmp_path: Path) -> list[str]:
    few = [f"task.{split}=16" for split in ("train", "dev", "test", "ood")]
    return ["--config", "smoke", f"run.root={tmp_path}", "--until", "base", *few]


def test_model_folder_without_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    new_model(ScratchModel(layers=1, width=32, heads=2, vocab=300), tokenizer, 0).save_pretrained(tmp_path / "model")
    assert main([*until_base(tmp_path), f"base.model={tmp_path / 'model'}"]) == 1
    assert f"base.model: cannot load '{tmp_path / 'model'}'" in one_line(capsys)
    assert not (tmp_path / "smoke" / "0" / "base").exists()


def test_local_model_folder_gets_the_undo_token(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    new_model(ScratchModel(layers=1, width=32, heads=2, vocab=300), tokenizer, 0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert main([*until_base(tmp_path), f"base.model={tmp_path / 'model'}", "undo.token=<UNDO>"]) == 0
    saved = json.loads((tmp_path / "smoke" / "0" / "base" / "tokenizer.json").read_text())
    assert "<UNDO>" in [token["content"] for token in saved["added_tokens"]]


def test_pickled_weights_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reading a pickle can run code of whoever wrote it."""
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    folder = tmp_path / "model"
    model = new_model(ScratchModel(layers=1, width=32, heads=2, vocab=300), tokenizer, 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert main([*until_base(tmp_path), f"base.model={folder}"]) == 1
    error = one_line(capsys)
    assert f"base.model: cannot load '{folder}'" in error and "safetensors" in error
    with pytest.raises(InputError, match="has no weights in safetensors"):
        SavedModel.load(folder, {})
    with pytest.raises(OSError, match="safetensors"):
        HfEngine.from_folder(folder, EngineSettings())


def test_code_of_a_model_is_not_run_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    tokenizer.save_pretrained(folder)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert main([*until_base(tmp_path), f"base.model={folder}"]) == 1
    assert "base.model: cannot load" in one_line(capsys) and not (tmp_path / "ran").exists()


def test_unknown_stage_and_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "sftt"]) == 2
    assert "no stage 'sftt'; the stages are problems, base" in one_line(capsys)
    assert main(["--from", "sft", "--until", "judge"]) == 2
    assert "--from sft comes after --until judge" in one_line(capsys)


def test_a_stage_whose_input_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "smoke", f"run.root={tmp_path}", "--only", "judge"]) == 1
    assert "judge needs problems of round 0, which is not there: select it too" in one_line(capsys)


def test_deepspeed_is_missed_before_any_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ds.json"
    asked = [f"run.root={tmp_path}", f"sft.deepspeed={file}", "cluster.learner_workers=2"]
    assert main(asked) == 2
    assert capsys.readouterr().err == f"error: sft.deepspeed: there is no file {file}\n"
    file.write_text("{}")
    assert main(asked) == 2
    assert capsys.readouterr().err == "error: sft.deepspeed: the package deepspeed is not installed\n"


def test_a_reward_of_ones_own_is_missed_before_any_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["grpo.steps=5", "grpo.reward.custom.mine.function=no_such_module_at_all:f"]
    assert main(["--config", "smoke", f"run.root={tmp_path / 'runs'}", *wanted]) == 2
    assert "grpo.reward.custom.mine: cannot import no_such_module_at_all:f: ModuleNotFoundError" in one_line(capsys)
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cli.LEAST_FREE", 1 << 62)
    assert main(["--config", "smoke", f"run.root={tmp_path}"]) == 1
    error = one_line(capsys)
    assert f"the disk of {tmp_path / 'smoke'} is full: " in error and f"{1 << 62:,} are needed" in error
    assert list((tmp_path / "smoke").iterdir()) == []
