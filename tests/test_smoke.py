"""The whole loop with real Ray, real vLLM and real training: every output, then reuse, then what one setting rebuilds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.decode import HfDecoder
from actors.prm import ProcessRewardModel
from actors.saved import SavedModel
from pipeline.backtrack.cursor import DecodeRequest, Decoding
from pipeline.backtrack.targets import trace_walk
from pipeline.backtrack.trace import Role, Trace
from pipeline.backtrack.undo import apply_undo
from pipeline.config import SftSettings, UndoSettings
from pipeline.runner import BESIDE
from pipeline.settings_file import load_settings
from pipeline.stages import evaluate, judge, problems, rollouts, traces
from pipeline.stages.io import Codec, read_problems
from pipeline.stages.rollouts import row_seed
from pipeline.stages.sft import training_set
from pipeline.store import Store

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent
STEPS = [(0, "problems"), (0, "base"), *((1, s) for s in ("rollouts", "judge", "traces", "sft", "evaluate", "report"))]


def run(folder: Path, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(folder, *arguments), capture_output=True, text=True, timeout=600, cwd=folder)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), "--config", "smoke", f"run.root={folder}", *arguments]


def states(output: str) -> dict[str, str]:
    """Stage -> reused, built or skipped, from the table that ends a run."""
    return dict(re.findall(r"^ *\d+  (\w+) +\S+ +\S+  (reused|built|skipped)$", output, re.MULTILINE))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run(folder).stdout


def copied(finished: tuple[Path, str], name: str) -> Path:
    """The finished run in a folder of its own, for tests whose outputs the others do not want."""
    folder = finished[0] / name
    folder.mkdir()
    subprocess.run(["cp", "-r", str(finished[0] / "smoke"), str(folder)], check=True)
    return folder


def test_every_stage_is_built_and_whole(finished: tuple[Path, str]) -> None:
    folder, output = finished
    assert states(output) == {stage: "built" for _, stage in STEPS}
    assert "engine: vllm" in output
    store = Store(folder / "smoke")
    for round, stage in STEPS:
        assert store.check(round, stage) is None


def test_outputs_have_their_schema_and_counts(finished: tuple[Path, str]) -> None:
    store = Store(finished[0] / "smoke")
    for round, module in ((0, problems), (1, rollouts), (1, judge), (1, traces)):
        stage = module.__name__.rpartition(".")[2]
        rows = load_from_disk(store.path(round, stage))
        assert rows.features == module.FEATURES
        assert len(rows) == store.manifest(round, stage).counts["rows"] > 0
    assert load_from_disk(store.path(1, "evaluate")).features == evaluate.ROWS
    assert load_from_disk(store.path(1, "evaluate") / "probes").features == evaluate.PROBES
    assert len(load_from_disk(store.path(0, "problems"))) == 64 + 16 + 16 + 8
    assert len(load_from_disk(store.path(1, "rollouts"))) == 2 * 64
    # soft, the control's votes and its likeliest samples on test alone
    assert len(load_from_disk(store.path(1, "evaluate"))) == 3 * (16 + 16 + 8 + 16) + 2 * 16


def test_rollouts_carry_ids_logprobs_and_the_weights_that_made_them(finished: tuple[Path, str]) -> None:
    store = Store(finished[0] / "smoke")
    undo_id = AutoTokenizer.from_pretrained(store.path(0, "base")).convert_tokens_to_ids(UndoSettings().token)
    for row in load_from_disk(store.path(1, "rollouts")):
        assert row["version"] == store.manifest(0, "base").digest
        assert len(row["logprobs"]) == len(row["token_ids"]) > 0
        assert all(logprob <= 0 for logprob in row["logprobs"])
        assert undo_id not in row["token_ids"]


def test_traces_never_target_a_wrong_decision(finished: tuple[Path, str]) -> None:
    store = Store(finished[0] / "smoke")
    trained = {row["id"] for row in load_from_disk(store.path(0, "problems")) if row["split"] == "train"}
    rule = Codec(store.path(0, "base"), UndoSettings(), "{question}\n").rule
    clean = load_from_disk(store.path(1, "traces") / traces.CLEAN)
    for row in load_from_disk(store.path(1, "traces")):
        assert row["problem"] in trained and row["split"] == "train"
        start, partner = row["roles"].count(Role.PROMPT), clean[row["partner"]]["input_ids"]
        if row["source"] != "clean":
            assert row["input_ids"][:start] + list(apply_undo(row["input_ids"][start:], rule).surviving) == partner
        trace = Trace(tuple(row["input_ids"]), tuple(row["roles"]))
        walk = trace_walk(trace, rule, training_set([trace], rule, SftSettings()).targets)
        assert walk.ids == trace.ids[trace.prompt_length :] == walk.targets
        for role, weight in zip(walk.roles or (), walk.weights or (), strict=True):
            assert weight == (role != Role.ERROR)


def test_models_are_ordinary_folders_with_the_undo_row_trained(finished: tuple[Path, str]) -> None:
    store = Store(finished[0] / "smoke")
    weights = {}
    for name, folder in (
        ("base", store.path(0, "base")),
        ("sft", store.path(1, "sft")),
        ("control", store.path(1, "sft") / "control"),
    ):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        weights[name] = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(UndoSettings().token)]
    assert not weights["base"].equal(weights["sft"])
    assert len({tensor.shape for tensor in weights.values()}) == 1


def test_the_newest_accepted_model_stands_beside_the_rounds_with_its_card(finished: tuple[Path, str]) -> None:
    store, exported = Store(finished[0] / "smoke"), finished[0] / "smoke" / "model"
    accepted = json.loads((store.path(1, "evaluate") / "metrics.json").read_text())["accepted"]
    made = AutoModelForCausalLM.from_pretrained(store.path(1, "sft") if accepted else store.path(0, "base")).state_dict()
    found = AutoModelForCausalLM.from_pretrained(exported)
    assert all(made[name].equal(tensor) for name, tensor in found.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert found.generation_config.eos_token_id == tokenizer.eos_token_id
    assert found.generation_config.pad_token_id == tokenizer.pad_token_id
    assert sorted(file.name for file in exported.iterdir() if file.suffix == ".json" or file.is_dir()) == [
        "config.json",
        "generation_config.json",
        "retract.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    usage = json.loads((exported / "retract.json").read_text())
    assert usage["undo_token"] in tokenizer.get_vocab() and (usage["threshold"], usage["mode"]) == (0.001, "rewind")
    assert SavedModel.load(exported, {}).settings.max_tokens == 96
    card = (exported / "README.md").read_text()
    assert "| sft | rewind | 0 | all | 16 |" in card and "sft-1" in card
    assert ("None of 1 rounds was accepted" in card) != accepted


def test_report_and_metrics_stand_beside_the_rounds(finished: tuple[Path, str]) -> None:
    folder = finished[0] / "smoke"
    metrics = json.loads((folder / "metrics.json").read_text())
    models = {(row["model"], row["mode"]) for row in metrics["evaluations"]}
    modes = ("rewind", "soft", "forbidden")
    trained = {(model, mode) for model in ("base", "clean_control", "sft") for mode in modes}
    assert models == trained | {("clean_control", mode) for mode in ("vote", "likeliest")}
    assert {one["mode"] for one in metrics["rounds"]} == {"rewind"}
    assert {one["after"] for one in metrics["comparisons"]} == {"sft rewind"}
    page = (folder / "report.html").read_text()
    assert all((folder / name).stat().st_size for name in BESIDE)
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "").replace("http://127.0.0.1", "")


def test_rewind_rows_are_what_the_decoder_makes_of_the_saved_models(finished: tuple[Path, str]) -> None:
    store = Store(finished[0] / "smoke")
    settings = load_settings(ROOT / "configs" / "smoke.yaml")
    codec = Codec(store.path(0, "base"), settings.undo, settings.base.prompt)
    known = {problem.id: problem for problem in read_problems(store.path(0, "problems"))}
    rows = [row for row in load_from_disk(store.path(1, "evaluate")) if row["mode"] == "rewind"]
    asked = settings.evaluate
    decoding = Decoding(
        "rewind",
        asked.temperature,
        asked.top_p,
        asked.max_tokens,
        codec.stop_id,
        codec.rule,
        **settings.decode.model_dump(),
    )
    for name, folder in (("base", store.path(0, "base")), ("sft", store.path(1, "sft"))):
        some = [row for row in rows if row["model"] == name][::4]
        seeds = [row_seed(settings.run.seed, f"evaluate/{row['problem']}") for row in some]
        requests = [DecodeRequest(codec.prompt_ids(known[row["problem"]]), seed) for row, seed in zip(some, seeds, strict=True)]
        found = HfDecoder.from_folder(folder, 3, row_tokens=512).decode(requests, decoding)
        assert [tuple(row["token_ids"]) for row in some] == [one.ids for one in found]
        assert [row["undos"] for row in some] == [one.undos for one in found]
    assert any(row["undos"] for row in rows)


def test_second_run_rebuilds_nothing(finished: tuple[Path, str]) -> None:
    output = run(finished[0]).stdout
    assert states(output) == {stage: "reused" for _, stage in STEPS}
    assert "Ray is up" not in output


def test_first_errors_by_rollouts(finished: tuple[Path, str]) -> None:
    """Another method of the judge samples prefixes with the run's own model; only the judge is rebuilt here."""
    folder = copied(finished, "other")
    output = run(folder, "--until", "judge", "judge.method=combined").stdout
    assert states(output)["judge"] == "built" and states(output)["rollouts"] == "reused"
    store = Store(folder / "smoke")
    rows = load_from_disk(store.path(1, "judge"))
    before = load_from_disk(Store(finished[0] / "smoke").path(1, "judge"))
    assert set(before["method"]) == {"exact"}
    assert {row["method"] for row in rows if not row["correct"] and row["steps"]} == {"combined"}
    assert any("completions of the first" in row["evidence"] for row in rows)
    for row in rows:
        if not row["correct"] and row["steps"]:
            assert 0 <= row["error_step"] < len(row["steps"])
            start, end = row["steps"][row["error_step"]]
            assert start <= row["error_chars"][0] < row["error_chars"][1] <= end
    assert store.manifest(1, "judge").counts["completions"] > 0


OTHERS = [
    "sft.lr=5e-4",
    *(f"prm.{one}" for one in ("steps=4", "rows=2", "test=4", "head.steps=5")),
    *(f"search.{one}" for one in ("problems=6", "simulations=6", "max_tokens=96", "model=sft", "prm=run", "rollout=step")),
    *("search.batch=3", "search.temperature=1.0"),  # greedily this model ends no step
    *(f"dpo.{one}" for one in ("steps=2", "batch=4", "check_every=1", "check_pairs=8", "probes=8")),
    *(f"grpo.{one}" for one in ("steps=2", "problems=4", "group=3", "max_tokens=96", "row_tokens=512", "check_problems=8")),
    *("grpo.check_every=2", "grpo.control=true"),
]
"""Another learning rate, and behind sft every stage that is off by default."""


@pytest.fixture(scope="module")
def others(finished: tuple[Path, str]) -> tuple[Path, str]:
    folder = copied(finished, "others")
    return folder, run(folder, *OTHERS).stdout


def test_one_sft_setting_rebuilds_sft_and_what_follows(finished: tuple[Path, str], others: tuple[Path, str]) -> None:
    plan = run(finished[0], "--dry-run", "sft.lr=5e-4").stdout
    planned = dict(re.findall(r"^round \d  (\w+) +(\w+)", plan, re.MULTILINE))
    assert planned == {stage: "rebuild" if stage in ("sft", "evaluate", "report") else "reuse" for _, stage in STEPS}
    reused = ("problems", "base", "rollouts", "judge", "traces")
    built = ("sft", "prm", "search", "dpo", "grpo", "evaluate", "report")
    assert states(others[1]) == dict.fromkeys(reused, "reused") | dict.fromkeys(built, "built")


def test_reinforcement_learning_behind_fine_tuning(others: tuple[Path, str]) -> None:
    store = Store(others[0] / "smoke")
    assert store.manifest(1, "grpo").counts == {"rows": 2 * 4 * 3, "steps": 2} | {
        "tokens": store.manifest(1, "grpo").counts["tokens"]
    }
    metrics = json.loads((others[0] / "smoke" / "metrics.json").read_text())
    models = ["base", "clean_control", "sft", "dpo", "grpo_control", "grpo"]
    assert list(dict.fromkeys(one["model"] for one in metrics["evaluations"])) == models
    assert {one["after"] for one in metrics["comparisons"]} == {"grpo rewind"}
    page = (others[0] / "smoke" / "report.html").read_text()
    assert "round 1, GRPO: reward" in page and "round 1, GRPO of the control: right" in page
    saved = [store.path(1, "grpo") / "control", *(store.path(1, stage) for stage in ("grpo", "sft", "dpo"))]
    assert len({(folder / "model.safetensors").read_bytes() for folder in saved}) == 4


def test_preferences_behind_fine_tuning(others: tuple[Path, str]) -> None:
    counts = Store(others[0] / "smoke").manifest(1, "dpo").counts
    assert counts["rows"] == sum(counts[f"kind_{kind}"] for kind in ("undo", "step", "keep")) > 0 and counts["steps"] == 2
    assert "round 1, preferences: chosen preferred" in (others[0] / "smoke" / "report.html").read_text()


def test_a_search_values_states_by_the_process_reward_model_of_its_round(others: tuple[Path, str]) -> None:
    """One step a simulation: a state that was seen once, with nothing below it, is worth what that model says."""
    store = Store(others[0] / "smoke")
    model, seen = ProcessRewardModel.load(store.path(1, "prm") / "prm"), 0
    for tree in load_from_disk(store.path(1, "search") / "trees"):
        below: dict[int, tuple[int, ...]] = {}
        for node, parent in enumerate(tree["parent"]):
            below[node] = (below[parent] if node else ()) + tuple(tree["ids"][node])
        leaves = [node for node in below if node not in tree["parent"] and tree["right"][node] < 0 and tree["visits"][node] == 1]
        leaves = [node for node in leaves if len(below[node]) < 96]  # what is too long to be finished is wrong
        wanted = model.value_of([(tree["prompt_ids"], below[node]) for node in leaves])
        assert [tree["value"][node] for node in leaves] == pytest.approx(wanted, abs=1e-3)
        seen += len(leaves)
    assert seen


def test_a_second_round_trains_on_the_traces_of_both(finished: tuple[Path, str]) -> None:
    output = run(finished[0], "run.rounds=2").stdout
    assert re.findall(r"^ *(\d)  (\w+) +\S+ +\S+  built$", output, re.MULTILINE) == [
        *(("2", stage) for stage in ("rollouts", "judge", "traces", "sft", "evaluate")),
        ("2", "report"),
    ]
    store = Store(finished[0] / "smoke")
    rows = [store.manifest(round, "traces").counts["rows"] for round in (1, 2)]
    assert store.manifest(2, "sft").counts["rows"] == sum(rows)
    questions = [set(load_from_disk(store.path(round, "rollouts"))["id"]) for round in (1, 2)]
    assert not questions[0] & questions[1]
    metrics = json.loads((finished[0] / "smoke" / "metrics.json").read_text())
    assert {row["round"] for row in metrics["evaluations"]} == {1, 2}


def test_a_damaged_output_is_rebuilt_and_never_used(finished: tuple[Path, str]) -> None:
    store = Store(finished[0] / "smoke")
    file = next(store.path(0, "problems").glob("*.arrow"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "does not match its checksum" in run(finished[0], "--dry-run").stdout
    refused = run(finished[0], "--only", "report", expect=1)
    assert refused.stderr.count("\n") == 1 and "does not match its checksum" in refused.stderr
    rebuilt = run(finished[0], "--only", "problems")
    assert states(rebuilt.stdout)["problems"] == "built"
    assert file.read_bytes() == whole  # equal content, so nothing that reads it is out of date
    assert "rebuild" not in run(finished[0], "--dry-run").stdout


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_leaves_no_actor_and_continues(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    endless = ("base.train.steps=100000", "base.train.check_every=100000")  # a check could find that it has stopped learning
    first = subprocess.Popen(
        command(tmp_path, *endless),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("[base]") and "loss" in line:
            break
    second = run(tmp_path, expect=1)
    assert f"is in use by process {first.pid} " in second.stderr
    first.send_signal(sent)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == code
    assert "the same command continues" in errors
    assert not actors_of(tmp_path)
    plan = run(tmp_path, "--dry-run", *endless).stdout
    assert "problems  reuse" in plan and "base      rebuild  not built yet" in plan
    assert not list((tmp_path / "smoke" / "0").glob("base*"))


def actors_of(folder: Path) -> list[str]:
    """Command lines of processes that still belong to a run folder; Ray workers get some seconds to end."""
    for _ in range(50):
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in environment and process.name != str(os.getpid()):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        if not found:
            return []
        time.sleep(0.2)
    return found
