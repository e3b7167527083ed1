"""What users call: the command, on a terminal and in a pipe, and the functions, within transformers and alone."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.decode import HfDecoder
from actors.generate import generate, main, undoing
from actors.saved import InputError, SavedModel
from actors.screen import Screen
from actors.streaming import Appended, Deleted, text_of
from pipeline.backtrack.cursor import Decoded, DecodeRequest
from tests.actors.readers import CONTEXT, UNDO, byte_level, save_model

ROOT = Path(__file__).resolve().parents[2]
OFTEN = {"threshold": 0.01, "max_tokens": 60}  # undo so often that every answer holds some


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return HfDecoder.from_folder(folder, 1, CONTEXT).model


def decoded(folder: Path, model: Any, question: str, seed: int = 0, **how: Any) -> tuple[SavedModel, Decoded]:
    """The answer by the batched decoder."""
    saved = SavedModel.load(folder, OFTEN | how)
    request = DecodeRequest(saved.question_ids(question), seed)
    decoding = saved.decoding(saved.settings, saved.settings.max_tokens)
    return saved, HfDecoder(model, 1, CONTEXT).decode([request], decoding)[0]


def run(folder: Path, *arguments: str, out: Any = None) -> tuple[int, str, str]:
    out, err = out or io.StringIO(), io.StringIO()
    often = ["--threshold", "0.01", "--max-tokens", "60"]
    code = main(["--model", str(folder), *often, *arguments], out, err)
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("how", [{}, {"unit": "token"}, {"mode": "soft"}, {"mode": "forbidden"}, {"temperature": 1.2}], ids=str)
def test_a_pipe_gets_the_surviving_text(folder: Path, model: Any, how: dict[str, Any]) -> None:
    options = [part for key, value in how.items() for part in (f"--{key}", str(value))]
    saved, one = decoded(folder, model, "a b?", 3, **how)
    code, out, err = run(folder, "--seed", "3", *options, "a b?")
    assert (code, err) == (0, "")
    assert out == text_of(saved.tokenizer, one.ids, saved.rule, saved.stop_id) + "\n"
    assert (one.undos > 0) == (how.get("mode") != "forbidden")
    raw = run(folder, "--seed", "3", "--deletions", "raw", *options, "a b?")[1]
    assert raw.count(UNDO) == one.undos


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Emulator:
    """A terminal of a few lines of code: characters and whether they are struck, by row and column; what scrolls away stays."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.row = self.column = self.lowest = 0
        self.struck = False
        self.cells: dict[tuple[int, int], tuple[str, bool]] = {}

    def feed(self, text: str) -> None:
        for found in re.finditer(r"\x1b\[(\d*)([A-Za-z])|([\s\S])", text):
            self._take(found[3] or "", found[1] or "", found[2] or "")

    def _take(self, character: str, number: str, kind: str) -> None:
        if kind == "m":
            self.struck = number == "9"
        elif kind == "A":
            self.row = max(self.row - int(number), self.lowest - self.rows + 1, 0)
        elif kind == "J":
            self.cells = {place: cell for place, cell in self.cells.items() if place < (self.row, self.column)}
        elif character == "\r":
            self.column = 0
        elif character == "\n":
            self.row += 1
            self.lowest = max(self.lowest, self.row)
        else:
            assert not kind and character >= " " and self.column < self.columns - 1
            self.cells[self.row, self.column] = (character, self.struck)
            self.column += 1

    def text(self, struck: bool = False) -> str:
        return "".join(character for _, (character, gone) in sorted(self.cells.items()) if gone == struck)


events = st.lists(st.one_of(st.text("ab \n", min_size=1, max_size=9), st.integers(1, 12)), max_size=20)


@settings(max_examples=150, deadline=None)
@given(events, st.integers(4, 20), st.booleans())
def test_the_screen_shows_what_stands_and_what_was_struck(some: list[str | int], columns: int, erase: bool) -> None:
    out, page, gone = io.StringIO(), "", ""
    screen = Screen(out, columns, 1000, erase)
    for event in some:
        if isinstance(event, str):
            screen.show(Appended(event))
            page += event
        elif page:
            count = min(event, len(page))
            screen.show(Deleted(count))
            page, gone = page[:-count], gone + page[-count:]
    emulator = Emulator(columns, 1000)
    emulator.feed(out.getvalue())
    assert emulator.text() == page.replace("\n", "")
    assert sorted(emulator.text(struck=True)) == ([] if erase else sorted(gone.replace("\n", "")))
    if erase:
        fresh, again = io.StringIO(), Emulator(columns, 1000)
        Screen(fresh, columns, 1000, True).show(Appended(page)) if page else None
        again.feed(fresh.getvalue())
        assert emulator.cells == again.cells  # as if nothing had been taken back


def test_a_small_screen_leaves_what_has_scrolled_away() -> None:
    for erase in (False, True):
        out = io.StringIO()
        screen = Screen(out, 10, 4, erase)
        screen.show(Appended("one\ntwo\nthree\nfour\nfive\nsix"))
        screen.show(Deleted(24))
        screen.show(Appended("end"))
        emulator = Emulator(10, 4)
        emulator.feed(out.getvalue())
        assert emulator.text().endswith("end") and emulator.text().startswith("one")


def test_text_of_a_model_cannot_steer_the_terminal() -> None:
    out = io.StringIO()
    Screen(out, 80, 24, False).show(Appended("a\x1b[2J\x07\x9b1m\tb"))
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue() and "\x9b" not in out.getvalue()


@pytest.mark.parametrize("deletions", ["strike", "erase", "raw"])
def test_a_terminal_shows_the_answer_live(folder: Path, model: Any, deletions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((50, 10_000)))
    out = FakeTerminal()
    code, shown, _ = run(folder, "--deletions", deletions, "a b?", out=out)
    assert code == 0 and shown.endswith("\x1b[0m\n")
    saved, one = decoded(folder, model, "a b?")
    emulator = Emulator(50, 10_000)
    emulator.feed(shown.removesuffix("\x1b[0m\n"))
    if deletions == "raw":
        assert emulator.text().count(UNDO) == one.undos
    else:
        plain, other = io.StringIO(), Emulator(50, 10_000)
        Screen(plain, 50, 10_000, True).show(Appended(text_of(saved.tokenizer, one.ids, saved.rule, saved.stop_id)))
        other.feed(plain.getvalue())
        assert emulator.text() == other.text()
        assert bool(emulator.text(struck=True)) == (deletions == "strike")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["  "], "the question is empty"),
        ([f"what is {UNDO}?"], "contains the undo token '<|BACKTRACK|>'"),
        (["--max-tokens", "0", "a"], "max_tokens: Input should be greater than or equal to 1, not 0"),
        (["--max-undos", "0", "a"], "max_undos: Input should be greater than or equal to 1, not 0"),
        (["--threshold", "2", "a"], "threshold: Input should be less than or equal to 1, not 2.0"),
        (["--undo-token", "<no>", "a"], "the tokenizer lacks the undo token '<no>'"),
        (["--prompt", "x", "a"], "prompt: must hold {question} exactly once, and other braces doubled, not 'x'"),
        (["--prompt", "{question} {x}", "a"], "and other braces doubled"),
        (["--seed", "-1", "a"], "seed must be 0 or more"),
        (["--model", "/nowhere", "a"], "/nowhere is no model folder"),
        (["a" * 600], "the prompt is too long"),
        (["a\ud800"], "no valid Unicode text"),
    ],
)
def test_bad_input_is_one_line(folder: Path, arguments: list[str], said: str) -> None:
    code, out, err = run(folder, *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and said in err, err


def test_a_damaged_folder_is_one_line(folder: Path, tmp_path: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    for name, content in (("cut", weights[:2000]), ("no weights", b"no weights at all"), ("empty", b"")):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(content)
        code, out, err = run(tmp_path / name, "a")
        assert (code, out) == (2, "") and err.count("\n") == 1 and f"{tmp_path / name} cannot be loaded" in err, err


def test_a_tokenizer_of_another_model_is_one_line(folder: Path, tmp_path: Path) -> None:
    """It knows the undo token, by an id for which the model has no row."""
    shutil.copytree(folder, tmp_path / "other")
    larger = byte_level("<first>")
    larger.add_tokens([UNDO], special_tokens=True)
    larger.save_pretrained(tmp_path / "other")
    code, out, err = run(tmp_path / "other", "a")
    assert (code, out) == (2, "") and "the model has no id 262, its ids are 0 .. 261" in err and err.count("\n") == 1, err


def test_bad_options_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bad in (["--mode", "never", "a"], ["--threshold", "much", "a"], []):
        with pytest.raises(SystemExit) as ended:
            run(folder, *bad)
        assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_an_escaped_undo_token_is_text(folder: Path) -> None:
    saved = SavedModel.load(folder, {})
    ids = saved.question_ids(f"what is {UNDO}?", escape=True)
    assert saved.rule.undo_id not in ids
    assert saved.tokenizer.decode(ids).replace("\u200b", "") == f"what is {UNDO}?\n"
    assert run(folder, "--escape", f"what is {UNDO}?")[0] == 0


def test_the_folder_says_how_it_is_used(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_model(other, byte_level("<UNDO>"))
    note = {"undo_token": "<UNDO>", "unit": "all", "prompt": "Q: {question}\nA:", "threshold": None, "made_by": "someone"}
    (other / "retract.json").write_text(json.dumps(note))
    saved = SavedModel.load(other, {"unit": "step"})
    assert saved.settings.threshold is None and saved.rule.unit == "step"
    assert saved.tokenizer.decode(saved.question_ids("a")) == "Q: a\nA:"
    (other / "retract.json").write_text('{"unit": "page"}')
    with pytest.raises(InputError, match=r"unit: .*'page'"):
        SavedModel.load(other, {})
    (other / "retract.json").write_text("[")
    assert "retract.json is no JSON" in run(other, "a")[2]


def test_stdin_and_ctrl_c(folder: Path) -> None:
    command = [sys.executable, "-m", "actors.generate", "--model", str(folder), "--threshold", "0.01"]
    done = subprocess.run([*command, "-"], cwd=ROOT, input="a b?\n", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout
    # As a model that never ends: the budget is what the context leaves, and the process is stopped at its first text.
    long = [*command, "--max-tokens", "500", "--temperature", "1", "--deletions", "raw", "a"]
    master, slave = os.openpty()
    with subprocess.Popen(long, cwd=ROOT, stdout=slave, stderr=subprocess.PIPE, env=os.environ | {"TERM": "xterm"}) as process:
        os.close(slave)
        shown = os.read(master, 1)
        process.send_signal(signal.SIGINT)
        while chunk := _read(master):
            shown += chunk
        assert process.wait(60) == 130
        assert process.stderr is not None and process.stderr.read() == b""
    os.close(master)
    assert shown.rstrip().endswith(b"\x1b[0m")


def _read(master: int) -> bytes:
    try:
        return os.read(master, 4096)
    except OSError:  # the other end has closed
        return b""


def padded(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")


def test_custom_generate_is_the_decoder(folder: Path, model: Any) -> None:
    saved = SavedModel.load(folder, {"threshold": 0.01})
    texts = ["a b\n", "a\n", "ab ab ab\n"]
    inputs = padded(saved.tokenizer, texts)
    out = model.generate(**inputs, custom_generate=undoing(saved.tokenizer, threshold=0.01), max_new_tokens=60, do_sample=False)
    wanted = [decoded(folder, model, text.rstrip("\n"))[1] for text in texts]
    assert out.shape[1] == inputs.input_ids.shape[1] + max(len(one.surviving) for one in wanted)
    assert torch.equal(out[:, : inputs.input_ids.shape[1]], inputs.input_ids)
    for row, one in zip(out[:, inputs.input_ids.shape[1] :].tolist(), wanted, strict=True):
        assert tuple(row[: len(one.surviving)]) == one.surviving
        assert set(row[len(one.surviving) :]) <= {saved.tokenizer.pad_token_id}
    assert any(one.undos for one in wanted)
    alone = generate(model, saved.tokenizer, texts, **OFTEN)
    assert torch.equal(alone, out)
    assert torch.equal(generate(model, saved.tokenizer, inputs.input_ids, inputs.attention_mask, **OFTEN), out)
    ids = [saved.prompt_ids(text) for text in texts]
    assert torch.equal(generate(model, saved.tokenizer, ids, **OFTEN), out)


def test_custom_generate_samples_by_torch_s_seed_and_without_undo_is_generate(folder: Path, model: Any) -> None:
    saved = SavedModel.load(folder, {})
    inputs = padded(saved.tokenizer, ["a b\n", "a\n"])
    undo = undoing(saved.tokenizer, threshold=0.01)
    hot: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 0.9, "temperature": 1.3, "max_new_tokens": 30}
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(model.generate(**inputs, custom_generate=undo, num_return_sequences=2, **hot))
    assert found[0].shape[0] == 4 and torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    plain: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40}
    without = model.generate(**inputs, suppress_tokens=[saved.rule.undo_id], **plain)
    assert torch.equal(model.generate(**inputs, custom_generate=undoing(saved.tokenizer, mode="forbidden"), **plain), without)


def test_what_custom_generate_does_not_know_it_refuses(folder: Path, model: Any) -> None:
    tokenizer = byte_level()
    inputs = padded(tokenizer, ["a"])
    undo = undoing(tokenizer)
    for bad in ({"do_sample": True}, {"repetition_penalty": 1.5}, {"num_beams": 2}, {"max_time": 1.0}):
        with pytest.raises(ValueError, match="decoding with undo"):
            model.generate(**inputs, custom_generate=undo, max_new_tokens=5, **bad)
    with pytest.raises(InputError, match=r"temperature: model.generate takes it"):
        undoing(tokenizer, temperature=1.0)
    with pytest.raises(ValueError, match="lacks the undo token"):
        undoing(tokenizer, undo_token="<other>")
    with pytest.raises(InputError, match="max_tokens"):
        generate(model, tokenizer, ["a"], max_tokens=0)


def test_the_example_of_the_docs_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/decoding.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "undoing" in block)
    assert "runs/tiny/model" in code
    exec(code.replace("runs/tiny/model", str(folder)), {})
    assert capsys.readouterr().out.count("\n") >= 2
