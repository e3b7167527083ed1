"""Settings: every mistake is one line that names key, place and what is allowed, and nothing heavy is imported for it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel

from pipeline.cli import main
from pipeline.config import RunSettings, Settings, SftSettings, UndoSettings
from pipeline.settings_file import ConfigError, dump_settings, load_settings
from pipeline.task_config import SyntheticTask

REPOSITORY = Path(__file__).resolve().parents[2]
# configs/cluster holds files for other programs.
CONFIGS = sorted(set((REPOSITORY / "configs").rglob("*.yaml")) - set((REPOSITORY / "configs" / "cluster").iterdir()))
SECTIONS = (
    "run, task, undo, base, engine, cluster, monitor, rollouts, judge, traces, sft, search, prm, dpo, grpo, decode, evaluate, "
    "experiment, study, report"
)


def error_of(folder: Path, text: str, *overrides: str) -> str:
    file = folder / "my.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(file), "FILE")


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        # unknown keys
        ("run: {nmae: a}", [], "run.nmae (set in FILE): no such key; known here: name, root, cache, seed, rounds"),
        ("", ["run.nmae=a"], "run.nmae (set in the command line): no such key; known here: name, root, cache, seed, rounds"),
        ("nonsense: 1", [], f"nonsense (set in FILE): no such key; known here: {SECTIONS}"),
        ("synthetic: 1", [], f"synthetic (set in FILE): no such key; known here: {SECTIONS}"),
        ("task: {name: gsm8k, steps: [2, 3]}", [], "task.steps (set in FILE): no such key; known here: name, train_file"),
        ("task: {train: 80}", ["task.name=gsm8k"], "task.train (set in FILE): no such key; known here: name, train_file"),
        ("task: {name: sums}", [], "task (set in FILE): name must be 'synthetic', 'gsm8k', 'countdown', not 'sums'"),
        ("task: {name: countdown, steps: [2, 3]}", [], "task.steps (set in FILE): no such key; known here: name, train, dev"),
        ("task: {gsm8k: 1}", [], "task.gsm8k (set in FILE): no such key; known here: name, train, dev, test, ood, families"),
        ("1: 2", [], "1 (set in FILE): Keys should be strings"),
        (
            "grpo: {reward: {custom: {short: {function: 'a:b', wight: 1}}}}",
            [],
            "grpo.reward.custom.short.wight (set in FILE): no such key; known here: function, weight",
        ),
        # together
        (
            "grpo: {steps: 5, row_tokens: 300}",
            [],
            "settings of several sections (set in FILE): grpo.row_tokens must hold engine.max_prompt + grpo.max_tokens = 576",
        ),
        (
            "grpo: {steps: 5, undo: epsilon}\ndecode: {threshold: null}",
            [],
            "settings of several sections (set in FILE): grpo.undo: epsilon needs decode.threshold, is null",
        ),
        (
            "grpo: {steps: 5, undo: epsilon}\nundo: {unit: token}",
            [],
            "settings of several sections (set in FILE): grpo.undo: epsilon needs undo.unit step or all",
        ),
        (
            "grpo: {steps: 5, control: true}\nsft: {control: false}",
            [],
            "settings of several sections (set in FILE): grpo.control starts from the clean control",
        ),
        (
            "prm: {steps: 5, labels: both}",
            [],
            "settings of several sections (set in FILE): prm.labels is both, which needs the stage search: set search.problems",
        ),
        (
            "",
            ["dpo.steps=5", "dpo.pairs=search"],
            "settings of several sections (set in the command line): dpo.pairs is search, which needs the stage search",
        ),
        (
            "grpo: {reward: {process_model: true}, steps: 5}",
            [],
            "settings of several sections (set in FILE): grpo.reward.process_model needs the stage prm: set prm.steps",
        ),
        ("evaluate: {also_at: [1.0, 0.0]}", [], "evaluate (set in FILE): also_at must name other temperatures than 0, each once"),
        (
            "search: {problems: 5, rollout: step}",
            [],
            "settings of several sections (set in FILE): search.rollout: step needs search.prm, run or a folder: the model",
        ),
        ("grpo: {loss: dr_grpo}", [], "grpo (set in FILE): loss dr_grpo needs scale: none, is group"),
        (
            "engine: {handover: nccl, kind: hf}\ngrpo: {steps: 1}",
            [],
            "settings of several sections (set in FILE): engine.handover: nccl needs vLLM, engine.kind is hf",
        ),
        (
            "engine: {handover: nccl}\ngrpo: {steps: 1}\ncluster: {rollout: {gpus: 1}}",
            [],
            "settings of several sections (set in FILE): engine.handover: nccl needs cluster.learner.gpus of 1 or more, is 0",
        ),
        (
            "engine: {handover: nccl}\ngrpo: {steps: 1, staleness: 1}\ncluster: {rollout: {gpus: 1}, learner: {gpus: 1}}",
            [],
            "settings of several sections (set in FILE): engine.handover: nccl needs grpo.staleness 0, is 1: engines would be busy",
        ),
        ("grpo: {refill: 1, staleness: 1}", [], "grpo (set in FILE): refill needs staleness 0, is 1"),
        (
            "engine: {handover: nccl}\ngrpo: {steps: 1}\ncluster: {tensor_parallel: 2, rollout: {gpus: 1}, learner: {gpus: 1}}",
            [],
            "settings of several sections (set in FILE): engine.handover: nccl needs cluster.tensor_parallel 1, is 2",
        ),
        (
            "engine: {kind: hf}\ncluster: {tensor_parallel: 2}",
            [],
            "settings of several sections (set in FILE): cluster.tensor_parallel: 2 needs vLLM, engine.kind is hf",
        ),
        (
            "cluster: {tensor_parallel: 2, rollout: {gpus: 0.5}}",
            [],
            "settings of several sections (set in FILE): cluster.tensor_parallel: 2 needs whole GPUs, cluster.rollout.gpus is 0.5",
        ),
        (
            "engine: {sleep: true, kind: scripted, script: x}",
            [],
            "settings of several sections (set in FILE): engine.sleep needs vLLM, engine.kind is scripted",
        ),
        (
            "engine: {sleep: true}\ngrpo: {steps: 1, staleness: 1}",
            [],
            "settings of several sections (set in FILE): engine.sleep needs grpo.staleness 0, is 1: engines would be busy",
        ),
        # wrong types
        ("run: {seed: 1.5}", [], "run.seed (set in FILE): should be a valid integer, not 1.5"),
        ("run: {seed: '1'}", [], "run.seed (set in FILE): should be a valid integer, not '1'"),
        ("sft: {control: 1}", [], "sft.control (set in FILE): should be a valid boolean, not 1"),
        ("run: 5", [], "run (set in FILE): should be a valid dictionary"),
        ("task: null", [], "task (set in FILE): should be a valid dictionary"),
        ("", ["undo.words=[a,3]"], "undo.words.1 (set in the command line): should be a valid string, not 3"),
        ("task: {families: [foo]}", [], "task.families.0 (set in FILE): should be 'chain', 'shop'"),
        # bounds
        ("sft: {lr: 2}", [], "sft.lr (set in FILE): should be less than or equal to 1, not 2"),
        ("", ["rollouts.samples=0"], "rollouts.samples (set in the command line): should be greater than or equal to 1, not 0"),
        ("run: {name: ../up}", [], "run.name (set in FILE): String should match pattern"),
        (
            "base: {prompt: hello}",
            [],
            "base.prompt (set in FILE): must hold {question} exactly once, and other braces doubled, not 'hello'",
        ),
        ('base: {prompt: "{question} {x}"}', [], "base.prompt (set in FILE): must hold {question} exactly once, and other braces"),
        ("base: {scratch: {width: 100}}", [], "base.scratch (set in FILE): width must be a multiple of 2 x heads (8), is 100"),
        ("task: {steps: [9, 3]}", [], "task (set in FILE): steps must be [fewest, most]"),
        ("task: {name: countdown, numbers: 2}", [], "task.numbers (set in FILE): should be greater than or equal to 3, not 2"),
        ("task: {name: countdown, ood_numbers: 4}", [], "task (set in FILE): ood_numbers must be above numbers, 4, is 4"),
        ("task: {ood_steps: [3, 4]}", [], "task (set in FILE): ood_steps must begin above the most steps of training, 4"),
        ("", ["decode.threshold=1.5"], "decode.threshold (set in the command line): should be less than or equal to 1, not 1.5"),
        ("decode: {threshold: -0.1}", [], "decode.threshold (set in FILE): should be greater than or equal to 0, not -0.1"),
        ("decode: {threshold: null, undo_bias: .inf}", [], "decode.undo_bias (set in FILE): should be less than or equal to 100"),
        ("decode: {threshold: null, undo_bias: .nan}", [], "decode.undo_bias (set in FILE): should be "),
        ("decode: {max_undos: 0}", [], "decode.max_undos (set in FILE): should be greater than or equal to 1, not 0"),
        ("decode: {max_undos_per_state: 0}", [], "decode.max_undos_per_state (set in FILE): should be greater than or equal to 1"),
        ("decode: {rewinding: later}", [], "decode.rewinding (set in FILE): should be 'deferred' or 'immediate', not 'later'"),
        (
            "",
            ["decode.undo_bias=1.5"],
            "decode (set in the command line): undo_bias has no effect beside a threshold: set undo_bias to 0, is 1.5, "
            "or threshold to null, is 0.7",
        ),
        (
            "sft: {rows: 8, accumulate: 3}",
            [],
            "settings of several sections (set in FILE): sft.rows must be a multiple of cluster.learner_workers x sft.accumulate "
            "= 1 x 3, is 8",
        ),
        (
            "sft: {rows: 8, accumulate: 2}",
            ["cluster.learner_workers=3", "base.model=there"],
            "settings of several sections (set in the command line): sft.rows must be a multiple of cluster.learner_workers x "
            "sft.accumulate = 3 x 2, is 8",
        ),
        ("", ["base.train.rows=5", "base.train.accumulate=2"], "settings of several sections (set in the command line): base.tra"),
        ("sft: {fsdp: {}}", [], "settings of several sections (set in FILE): sft.fsdp needs cluster.learner_workers of 2 or more"),
        ("sft: {deepspeed: a.json}", [], "settings of several sections (set in FILE): sft.deepspeed needs cluster.learner_wor"),
        ("sft: {fsdp: {}, deepspeed: a.json}", [], "sft (set in FILE): fsdp and deepspeed cannot both be set"),
        ("sft: {fsdp: 1}", [], "sft.fsdp (set in FILE): "),
        (
            "sft: {fsdp: {offload: true}}",
            [],
            "sft.fsdp.offload (set in FILE): no such key; known here: reshard_after_forward, cpu_",
        ),
        ("sft: {fsdp: {cpu_offload: 3}}", [], "sft.fsdp.cpu_offload (set in FILE): "),
        ("sft: {dtype: float16}", [], "sft.dtype (set in FILE): should be 'float32' or 'bfloat16', not 'float16'"),
        ("evaluate: {modes: []}", [], "evaluate.modes (set in FILE): List should have at least 1 item"),
        ("evaluate: {modes: [soft, soft]}", [], "evaluate.modes (set in FILE): must name each mode once, not ['soft', 'soft']"),
        (
            "evaluate: {modes: [forbidden]}",
            [],
            "evaluate.modes.0 (set in FILE): should be 'rewind', 'soft' or 'guided', not 'forbidden'",
        ),
        (
            "decode: {signal: {kind: luck}}",
            [],
            "decode.signal.kind (set in FILE): should be 'probability', 'margin', 'entropy', 'repeat' or 'score', not 'luck'",
        ),
        (
            "",
            ["decode.signal.threshold=1.5"],
            "decode.signal (set in the command line): threshold must lie in 0 .. 1 for kind probability, is 1.5",
        ),
        ("decode: {signal: {ngram: 0}}", [], "decode.signal.ngram (set in FILE): should be greater than or equal to 1"),
    ],
)
def test_wrong_settings(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    assert error_of(tmp_path, text, *overrides).startswith(message)


@pytest.mark.parametrize(
    ("text", "overrides", "culprit"),
    [
        ("sft: {lr: 2}", ["sft.steps=3"], "FILE"),
        ("sft: {lr: 2}", ["sft.lr=3"], "the command line"),
        ("sft: {lr: 1}", ["sft.lr=3"], "the command line"),
        ("run: {name: a}", ["run.name=null"], "the command line"),
        ("run: {name: a}", ["run=5"], "the command line"),
        ("task: {steps: [9, 3]}", ["task.train=100"], "FILE"),
        ("task: {steps: [2, 3]}", ["task.steps=[9,3]"], "the command line"),
        ("base: {scratch: {heads: 3}}", ["base.scratch.layers=2"], "FILE"),
        ("base: {scratch: {heads: 4}}", ["base.scratch.heads=3"], "the command line"),
    ],
)
def test_who_is_at_fault(tmp_path: Path, text: str, overrides: list[str], culprit: str) -> None:
    assert f"(set in {culprit}): " in error_of(tmp_path, text, *overrides)


@pytest.mark.parametrize("override", ["run.name", "=a", "run..name=a", ".name=a", "--steps=3", "task.steps.0=1", "run name=a"])
def test_bad_form_of_an_override(tmp_path: Path, override: str) -> None:
    assert error_of(tmp_path, "", override) == f"override {override!r} is not of the form key.sub=value"


@pytest.mark.parametrize("override", ["run.name=[a", "run.name={a: b: c}"])
def test_an_override_that_is_no_yaml(tmp_path: Path, override: str) -> None:
    assert override in error_of(tmp_path, "", override)


@pytest.mark.parametrize("text", ["a: b: c", "\tx: 1", "run: {name: a, name: b}", "run: &a {name: *a}", "run: {name: '${no}'}"])
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    assert error_of(tmp_path, text).startswith("FILE")


def test_a_file_of_another_shape(tmp_path: Path) -> None:
    assert error_of(tmp_path, "- a\n- b") == "FILE must hold keys and values at its top level"
    with pytest.raises(ConfigError, match=r"no configuration file .*absent\.yaml"):
        load_settings(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is no yaml file"):
        load_settings(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"binary\.yaml is no yaml file"):
        load_settings(tmp_path / "binary.yaml")


def test_overrides_win_and_leave_the_rest(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("sft: {steps: 5, lr: 0.5}\ntask: {steps: [2, 3]}\nrun: {name: a}")
    found = load_settings(tmp_path / "my.yaml", ["sft.steps=7", "sft.steps=9", "task.steps=[3,4]", "undo.words=[x]", "run.seed=3"])
    assert found.sft == SftSettings(steps=9, lr=0.5)
    assert isinstance(found.task, SyntheticTask) and found.task.steps == [3, 4]
    assert found.undo.words == ["x"] and found.run == RunSettings(name="a", seed=3)
    assert load_settings(tmp_path / "my.yaml", ["sft.lr=1e-4"]).sft.lr == 1e-4
    assert load_settings(tmp_path / "my.yaml", ["base.model=a/b=c"]).base.model == "a/b=c"
    sampled = load_settings(tmp_path / "my.yaml", ["decode.threshold=null", "decode.undo_bias=-2", "evaluate.modes=[soft]"])
    assert (sampled.decode.threshold, sampled.decode.undo_bias, sampled.evaluate.modes) == (None, -2, ["soft"])


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_settings(tmp_path / "empty.yaml") == Settings()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configurations_load_and_come_back(file: Path, tmp_path: Path) -> None:
    found = load_settings(file)
    (tmp_path / "again.yaml").write_text(dump_settings(found))
    assert load_settings(tmp_path / "again.yaml") == found


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_configuration_for_more_than_a_laptop_says_what_it_needs(file: Path) -> None:
    cluster = load_settings(file).cluster
    parts = [(cluster.rollout_actors, cluster.rollout), (cluster.learner_workers, cluster.learner), (1, cluster.judge)]
    cpus, gpus = (sum(count * getattr(part, key) for count, part in parts) for key in ("cpus", "gpus"))
    header = "".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    said = re.search(r"Needs (\d+) CPUs?(?: and (\d+) GPUs?)?\.", header)
    assert header and (said is not None or (cpus, gpus) == (2, 0))
    assert said is None or (float(said[1]), float(said[2] or 0)) == (cpus, gpus)


texts = st.text(st.characters(codec="utf-8", exclude_characters="$", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
odd_texts = st.sampled_from(["null", "yes", "1e3", "0x1", "1_0", "12:30", "2024-01-01", " a ", "a: b", "#", "- x", "a\nb", "{}"])


@hypothesis_settings(deadline=None)
@given(
    words=st.lists(texts | odd_texts, min_size=1, max_size=4),
    token=texts | odd_texts,
    noise=st.floats(0, 0.5),
    lr=st.floats(0, 1, exclude_min=True),
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,8}\Z"),
    seed=st.integers(0, 2**31 - 1),
)
def test_dumped_settings_come_back(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], token: str, noise: float, lr: float, name: str, seed: int
) -> None:
    before = Settings(
        run=RunSettings(name=name, seed=seed),
        undo=UndoSettings(words=words, token=token, noise=noise),
        sft=SftSettings(lr=lr),
    )
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump_settings(before), encoding="utf-8")
    assert load_settings(file) == before


def test_settings_are_read_without_torch_and_ray() -> None:
    code = (
        "import sys, pathlib; from pipeline.settings_file import load_settings; load_settings(pathlib.Path('configs/tiny.yaml'));"
        "print(*sorted({'torch', 'ray', 'transformers', 'datasets', 'vllm'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run.nmae=a"], ["run.nmae", "the command line", "no such key"]),
        (["run.name"], ["'run.name'", "key.sub=value"]),
        (["--config", "absent"], ["no configuration file", "absent.yaml"]),
        (["--config", "nowhere/mine.yaml"], ["no configuration file nowhere/mine.yaml"]),
        (["--only", "trace"], ["no stage 'trace'", "traces"]),
        (["--from", "sft", "--until", "judge"], ["--from sft", "--until judge"]),
        (["task.steps=[9,3]", "--print-config"], ["task (set in the command line)"]),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # a narrow terminal must not cut the line
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n")
    assert all(word in err for word in words)


def test_the_printed_configuration_loads_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--config", "smoke", "--print-config", "run.seed=5", "base.prompt=Q {question}"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    found = load_settings(tmp_path / "printed.yaml")
    assert found == load_settings(REPOSITORY / "configs" / "smoke.yaml", ["run.seed=5", "base.prompt=Q {question}"])
    assert yaml.safe_load((tmp_path / "printed.yaml").read_text())["run"]["seed"] == 5


def keys(section: BaseModel, prefix: str = "") -> list[tuple[str, Any]]:
    """Every setting below a section, with its value."""
    found = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        found += keys(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [(prefix + name, value)]
    return found


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    others = [Settings.model_validate({"task": {"name": name}}) for name in ("gsm8k", "countdown")]
    for key, value in [pair for settings in (Settings(), *others) for pair in keys(settings)]:
        mine = [line for line in lines if line.split("=")[0].split("  ")[0] == key]
        assert mine, key
        default = "null" if value is None else str(value)
        assert all(line.rpartition("  ")[2] for line in mine)
        if key != "task.name":
            assert any(line.startswith(f"{key}={default}".rstrip()) for line in mine), key
