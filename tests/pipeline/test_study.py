"""Studies without Ray: which runs they have, what these share, what is refused, and what becomes of their figures."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.cli import main
from pipeline.compare import Evaluation, Row
from pipeline.runner import Pipeline, Selection
from pipeline.settings_file import ConfigError, load_settings, vary
from pipeline.stages.graph import steps
from pipeline.statistics import mean, paired
from pipeline.store import RunLock, Store
from pipeline.store.shared import SharedStore
from pipeline.study.page import in_words, plots, render, table
from pipeline.study.results import Result, compared, differences
from pipeline.study.runs import identities, plan, runs_of, silent
from tests.pipeline.reported import parsed

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENTS = sorted((CONFIGS / "experiments").glob("*.yaml"))
TWO = "study: {seeds: [3, 5], variants: {span: {sft: {mask: span}}, decision: {}}}\n"


def file(folder: Path, text: str, name: str = "my.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


# ---- which runs, and what is refused ----


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda config: config.stem)
@pytest.mark.parametrize("more", [[], ["gsm8k-qwen.yaml"]], ids=["tiny", "qwen"])
def test_every_experiment_is_planned(config: Path, more: list[str], tmp_path: Path) -> None:
    """With a model for GPUs too; three seeds, and what no variant changes is built once a seed."""
    settings = load_settings([config, *(CONFIGS / name for name in more)])
    if not settings.study.variants:
        assert settings.experiment.variants and len(settings.experiment.seeds) == 3
        return
    runs = runs_of(settings, tmp_path)
    planned = list(plan(runs, Selection()))
    built = [(one.round, one.stage) for one in planned if one.state == "rebuild"]
    assert len(settings.study.seeds) == 3 and len(runs) == 3 * len(settings.study.variants)
    assert len(built) + sum(one.state == "share" for one in planned) == len(planned)
    assert built.count((0, "problems")) == 3 and built.count((0, "report")) == 0
    assert sum(one.stage == "report" and one.state == "rebuild" for one in planned) == len(runs)
    if config.stem != "init":
        assert built.count((0, "base")) == 3


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ("variants: {a: {sft: {mask: spam}}}", "study.variants.a: sft.mask: should be 'none', 'decision' or 'span', not 'spam'"),
        ("variants: {a: {sft: {maks: span}}}", "study.variants.a: sft.maks: no such key; known here: steps, rows"),
        ("variants: {a: {stf: {mask: span}}}", "study.variants.a: stf: no such key; known here: run, task"),
        ("variants: {b: {}, a: {run: {seed: 3}}}", "study.variants.a: run.seed is the same for the whole study"),
        ("variants: {a: {run: {name: b}}}", "study.variants.a: run.name is the same for the whole study"),
        ("variants: {a: {study: {seeds: [1]}}}", "study.variants.a: study is the same for the whole study"),
        ("variants: {a: {run: 3}}", "study.variants.a: run: should be a valid dictionary"),
        ("variants: {a: 3}", "study.variants.a (set in FILE): should be a valid dictionary, not 3"),
        ("variants: {'a b': {}}", "study.variants (set in FILE): the name 'a b' must be of letters, digits, - and _, 48 at most"),
        ("variants: {a: {grpo: {steps: 1, row_tokens: 100}}}", "study.variants.a: grpo.row_tokens must hold"),
        ("variants: {a: {}}\n  against: b", "study (set in FILE): against must be one of the variants, a, is b"),
        ("variants: {a: {}}\n  seeds: [1, 1]", "study.seeds (set in FILE): must be different whole numbers"),
        ("variants: {a: {}}\n  seeds: []", "study.seeds (set in FILE): List should have at least 1 item"),
    ],
)
def test_wrong_variants_end_in_one_line(study: str, message: str, tmp_path: Path) -> None:
    config = file(tmp_path, f"study:\n  {study}\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(config)
    told = str(caught.value).replace(str(config), "FILE")
    assert told.startswith(message) and "\n" not in told


def test_a_run_is_an_ordinary_one_of_its_variant_and_seed(tmp_path: Path) -> None:
    settings = load_settings(file(tmp_path, f"run: {{name: mine, root: there}}\n{TWO}"))
    runs = runs_of(settings, tmp_path / "there" / "mine")
    assert [run.name for run in runs] == ["span-3", "decision-3", "span-5", "decision-5"]
    one = runs[2].settings
    assert (one.run.name, one.run.root, one.run.seed, one.sft.mask) == ("span-5", "there/mine", 5, "span")
    assert one.study.variants == {} and runs[1].settings.sft == settings.sft
    assert cli.run_folder(one).parts[-3:] == ("there", "mine", "span-5")


def test_later_files_win_and_another_task_takes_nothing_of_the_first(tmp_path: Path) -> None:
    first = file(tmp_path, "task: {train: 80}\nsft: {steps: 3, rows: 2}\nrun: {name: a}", "a.yaml")
    second = file(tmp_path, "task: {name: gsm8k, dev: 5}\nsft: {steps: 4}", "b.yaml")
    found = load_settings([first, second], ["sft.lr=0.5"])
    assert (found.task.name, found.task.dev, found.sft.steps, found.sft.rows, found.sft.lr) == ("gsm8k", 5, 4, 2, 0.5)
    back = load_settings([second, file(tmp_path, "task: {name: synthetic}\nsft: {steps: 3}", "c.yaml")])
    assert (back.task.name, back.task.dev, back.sft.steps) == ("synthetic", 350, 3)
    with pytest.raises(ConfigError, match=r"^sft.setps \(set in \S*b.yaml\): no such key"):
        load_settings([first, file(tmp_path, "sft: {setps: 4}", "b.yaml")])
    with pytest.raises(ConfigError, match=r"^sft.rowz \(set in \S*a.yaml\): no such key"):
        load_settings([file(tmp_path, "sft: {rowz: 4}", "a.yaml"), file(tmp_path, "run: {name: x}", "b.yaml")])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run.root=s3://bucket/runs"], 2, "a study cannot stand at a URL"),
        (["run.name=taken"], 2, "taken holds a run; a study needs a folder of its own: set run.name"),
        (["--from-round", "2"], 2, "--from-round must lie in 1 .. run.rounds = 1, is 2"),
        (["--only", "stf"], 2, "no stage 'stf'"),
    ],
)
def test_what_a_study_cannot_be(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken" / "0" / "problems").mkdir(parents=True)
    assert main(["--config", str(file(tmp_path, TWO)), f"run.root={tmp_path}", *arguments]) == code
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_a_plan_says_what_is_shared_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "runs"
    assert main(["--config", str(file(tmp_path, TWO)), f"run.root={root}", "--dry-run", "--until", "sft"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "decision-3  round 1  traces    share    as in span-3" in lines
    assert "decision-3  round 1  sft       rebuild  problems is rebuilt" in lines
    assert lines[-1] == "4 runs, 32 outputs: 14 to rebuild, 10 to share, 8 to skip" and not root.exists()


def test_the_first_run_that_fails_or_is_stopped_ends_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (1, 130, 143):
        ran = []

        def run(settings: Any, *_: Any, code: int = code, ran: list[str] = ran) -> int:
            ran.append(settings.run.name)
            return code if len(ran) == 2 else 0

        monkeypatch.setattr(cli, "_run", run)
        assert main(["--config", str(file(tmp_path, TWO)), f"run.root={tmp_path / 'runs'}"]) == code
        assert ran == ["span-3", "decision-3"]
    assert not (tmp_path / "runs" / "tiny" / "study.html").exists()  # nothing was evaluated


def test_one_study_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(tmp_path / "tiny"):
        assert main(["--config", str(file(tmp_path, TWO)), f"run.root={tmp_path}"]) == 1
    assert "is in use by process" in capsys.readouterr().err


# ---- what runs share ----


def test_identities_know_neither_name_nor_folder_but_seed_and_settings(tmp_path: Path) -> None:
    text = "study: {variants: {a: {}, b: {}, span: {sft: {mask: span}}, more: {run: {rounds: 2}}}}"
    one = load_settings(file(tmp_path, f"run: {{name: one}}\n{text}"))
    other = load_settings(file(tmp_path, f"run: {{name: other, root: /elsewhere}}\n{text}"))
    a = identities(vary(one, "a", 0))

    def equal(found: dict[tuple[int, str], str]) -> list[str]:
        return [stage for (_, stage), identity in found.items() if identity in a.values()]

    everything = [stage.name for _, stage in steps(one)]
    assert equal(identities(vary(one, "b", 0))) == everything[:-1]  # a report has a name
    assert equal(identities(vary(other, "a", 0))) == everything
    assert equal(identities(vary(one, "span", 0))) == ["problems", "base", "rollouts", "judge", "traces"]
    assert equal(identities(vary(one, "more", 0))) == everything[:-1]
    assert equal(identities(vary(one, "a", 1))) == []
    second = identities(vary(one, "more", 0))
    assert len(set(second.values())) == len(second)


ASKED: dict[str, Any] = {"settings": {}, "inputs": {}, "seed": 0}


def sibling(folder: Path, key: str = "k", text: str = "weights") -> Store:
    store = Store(folder)
    folder.mkdir(exist_ok=True)
    with store.write(0, "base", key=key, **ASKED) as draft:
        (draft.path / "part").mkdir()
        (draft.path / "part" / "model").write_text(text)
    return store


def test_an_output_of_equal_key_is_linked_whole_and_is_each_runs_own(tmp_path: Path) -> None:
    """What one run does with its output later is nothing to the other."""
    there = sibling(tmp_path / "a")
    here = SharedStore(tmp_path / "b", (tmp_path / "none", tmp_path / "a"))
    assert here.adopt(0, "base", "another") is None and not (tmp_path / "b" / "0").exists()
    assert here.adopt(0, "base", "k") == "a"
    assert here.check(0, "base") is None and here.manifest(0, "base") == there.manifest(0, "base")
    ours, theirs = (store.path(0, "base") / "part" / "model" for store in (here, there))
    assert os.path.samefile(ours, theirs) and not ours.stat().st_mode & 0o222
    with here.write(0, "base", key="new", **ASKED) as draft:
        (draft.path / "model").write_text("others")
    assert there.check(0, "base") is None and theirs.read_text() == "weights"
    here.remove(0, "base")
    assert here.adopt(0, "base", "k") == "a" and there.check(0, "base") is None


def test_what_is_damaged_in_use_or_older_than_asked_is_not_taken(tmp_path: Path) -> None:
    there = sibling(tmp_path / "a")
    here = SharedStore(tmp_path / "b", (tmp_path / "a",))
    with RunLock(tmp_path / "a"):
        assert here.adopt(0, "base", "k") is None
    manifest = there.manifest(0, "base")
    assert manifest and SharedStore(tmp_path / "b", (tmp_path / "a",), f"{manifest.created}~").adopt(0, "base", "k") is None
    (there.path(0, "base") / "part" / "model").write_text("weightz")
    assert here.adopt(0, "base", "k") is None and not (tmp_path / "b" / "0").exists()
    sibling(tmp_path / "a")
    assert here.adopt(0, "base", "k") == "a"


def test_a_disk_without_links_has_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    there = sibling(tmp_path / "a")
    monkeypatch.setattr(os, "link", refuse)
    here = SharedStore(tmp_path / "b", (tmp_path / "a",))
    assert here.adopt(0, "base", "k") == "a" and here.check(0, "base") is None
    ours, theirs = (store.path(0, "base") / "part" / "model" for store in (here, there))
    assert not os.path.samefile(ours, theirs)


def test_a_run_takes_what_it_would_build_and_says_from_where(tmp_path: Path) -> None:
    """The key is that which the stage would have here."""
    settings = load_settings(file(tmp_path, TWO))
    first, second = runs_of(settings, tmp_path)[:2]
    (planned,) = [stage for _, stage in steps(first.settings) if stage.name == "problems"]
    key = Pipeline(first.settings, first.folder, Selection(), silent())._resolve(0, planned).key
    with Store(first.folder).write(0, "problems", key=key, **ASKED) as draft:
        (draft.path / "rows").write_text("")
    store = SharedStore(second.folder, (first.folder,))
    pipeline = Pipeline(second.settings, second.folder, Selection(only=("problems",)), silent(), store)
    (tmp_path / "decision-3").mkdir()
    assert next(line.state for line in pipeline.run()) == "reused"
    assert store.check(0, "problems") is None


# ---- what they have measured ----


def result(variant: str, seed: int, right: Sequence[bool], model: str = "sft", questions: str = "q", **more: Any) -> Result:
    """With every second problem a hindsight one; a control beside it that is right on the first two."""
    names = [f"{i}" for i in range(len(right))]

    def rows(correct: Sequence[bool], tokens: int) -> dict[str, Row]:
        return {name: Row(name, "f", i % 2 == 0, correct[i], tokens) for i, name in enumerate(names)}

    control = [i < 2 for i in range(len(right))]
    evaluation = Evaluation(
        variant,
        1,
        {name: (f"{questions}{seed}/{name}", "1") for name in names},
        {(model, "rewind", 0.0): rows(right, 30), ("clean_control", "vote", 0.0): rows(control, 90)},
    )
    place = {"split": "test", "temperature": 0.0}
    figures = [
        place
        | {"model": name, "mode": mode, "group": group, "n": len(some), "accuracy": sum(some) / len(some)}
        | {"first_try_accuracy": 0.25, "undo_rate": 0.5, "spurious_undo_rate": 0.0, "tokens_per_problem": tokens}
        for name, mode, all_, tokens in ((model, "rewind", right, 30), ("clean_control", "vote", control, 90))
        for group, some in (("all", all_), ("forward", all_[1::2]), ("hindsight", all_[::2]))
    ]
    wrong = sum(not one for one in right[::2])
    made_to_fit = place | {"model": model, "mode": "rewind", "n": len(right[::2]), "wrong": wrong, "rationalised": wrong // 2}
    kind = {"model": model, "error": "choice", "n": 4, "p_undo_error": 0.5, "p_undo_right": 0.1, "logp_error_change": -1.0 - seed}
    metrics = {"mode": "rewind", "evaluations": figures, "rationalisation": [made_to_fit], "error_kinds": [kind]}
    return Result(variant, seed, model, "rewind", 0.0, metrics, evaluation, {"cos_error_undo": 0.1 * seed}, **more)


A = {0: [True] * 10 + [False] * 30, 1: [True] * 12 + [False] * 28, 2: [True] * 11 + [False] * 29}
B = {seed: [not one for one in right[:2]] + [True] * 30 + right[32:] for seed, right in A.items()}


def test_pooled_pairs_are_those_of_all_rows_in_one_list() -> None:
    a, b = ([result(name, seed, right) for seed, right in some.items()] for name, some in (("a", A), ("b", B)))
    found = {one.group: one for one in differences(a, b)}
    assert list(found) == ["all", "forward", "hindsight"]
    for group, part in (("all", slice(None)), ("forward", slice(1, None, 2)), ("hindsight", slice(0, None, 2))):
        before, after = ([one for right in some.values() for one in right[part]] for some in (A, B))
        assert found[group].pooled == paired(before, after)
        by_seed = {seed: paired(A[seed][part], B[seed][part]) for seed in A}
        assert found[group].by_seed == by_seed
        assert found[group].over_seeds == mean([one.difference for one in by_seed.values() if one])
        assert found[group].verdict == "better"
    assert [one.verdict for one in differences(b, a)] == ["worse"] * 3


def test_a_verdict_needs_both_problems_and_seeds() -> None:
    """Two seeds up and one down: the problems alone would decide it."""
    after = {0: B[0], 1: B[1], 2: [False] * 40}
    a, b = ([result(name, seed, right) for seed, right in some.items()] for name, some in (("a", A), ("b", after)))
    one = next(differences(a, b))
    assert one.pooled.low is not None and one.pooled.low > 0 and one.over_seeds.low is not None and one.over_seeds.low < 0
    assert one.verdict == "not decided"
    alone = next(differences(a[:1], b[:1]))
    assert alone.verdict == "better" and alone.over_seeds.low is None
    few = [result(name, 0, right[:4]) for name, right in (("a", A[0]), ("b", B[0]))]
    assert [one.verdict for one in differences(few[:1], few[1:])] == ["not decided"] * 3


def records(**changes: Any) -> dict[str, Any]:
    runs = [result(name, seed, right) for name, some in (("a", A), ("b", B)) for seed, right in some.items()]
    found = compared(changes.get("runs", runs), ["a", "b"], "a")
    told = [
        {"name": name, "changes": {"sft.mask": "<b>span"}, "runs": [{"seed": 0, "folder": f"{name}-0", "evaluated": True}]}
        for name in ("a", "b")
    ]
    return {"against": "a", "variants": told, **found, "sentences": [in_words(one, "a") for one in found["differences"]]}


def test_every_figure_by_seed_and_over_seeds() -> None:
    found = records()
    of_a = next(one for one in found["figures"] if (one["variant"], one["group"], one["trained"]) == ("a", "all", True))
    assert of_a["accuracy"]["by_seed"] == {"0": 0.25, "1": 0.3, "2": 0.275} and of_a["n"] == 120
    assert of_a["accuracy"]["value"] == pytest.approx(0.275) and of_a["pooled_ci95"][0] < 0.275 < of_a["pooled_ci95"][1]
    rows = list(csv.DictReader(io.StringIO(table(found))))
    assert {row["seed"] for row in rows} == {"0", "1", "2", "mean"} and len(rows) == 2 * 2 * 3 * 4
    control = next(
        one for one in found["controls"] if (one["variant"], one["model"], one["group"]) == ("b", "clean_control", "all")
    )
    assert (control["mode"], control["before"], control["tokens_before"], control["tokens_after"]) == ("vote", 0.05, 90, 30)
    assert control["difference"] == pytest.approx(sum(sum(right) - 2 for right in B.values()) / 120)
    fit = next(one for one in found["rationalisation"] if (one["variant"], one["mode"]) == ("a", "rewind"))
    wrong = [sum(not one for one in right[::2]) for right in A.values()]
    assert (fit["wrong"], fit["rationalised"], fit["n"]) == (sum(wrong), sum(one // 2 for one in wrong), 60)
    kind = found["error_kinds"][0]
    assert kind["logp_error_change"]["value"] == -2 and kind["logp_error_change"]["ci95"][1] < 0.5 and kind["n"] == 12
    assert found["cosines"][0]["by_seed"] == {"0": 0.0, "1": 0.1, "2": 0.2}
    json.dumps(found, allow_nan=False)


def test_what_cannot_be_compared_says_why() -> None:
    a = [result("a", 0, A[0])]
    for b, why in (
        ([result("b", 0, B[0], questions="other")], "their test problems differ"),
        ([result("b", 1, B[1])], "no seed of both is evaluated"),
        ([], "no seed of both is evaluated"),
    ):
        found = records(runs=[*a, *b])
        assert found["sentences"] == [f"b cannot be compared with a: {why}."]
    other_model = records(runs=[*a, result("b", 0, B[0], model="grpo")])
    assert other_model["differences"][0]["difference"] > 0  # another model and its place, on the same problems


def test_what_is_no_number_is_missing(tmp_path: Path) -> None:
    one = result("a", 0, A[0])
    for figure in one.metrics["evaluations"]:
        figure["undo_rate"] = None
    found = records(runs=[one])
    assert found["figures"][0]["undo_rate"] is None
    assert next(iter(csv.DictReader(io.StringIO(table(found)))))["undo_rate"] == ""
    parsed(render(load_settings(file(tmp_path, TWO)), found, {}))


def test_the_page_is_whole_and_escaped(tmp_path: Path) -> None:
    settings = load_settings(file(tmp_path, TWO))
    found = records()
    html = render(settings, found, {"torch": "1"})
    text = "".join(parsed(html).text)
    for sentence in found["sentences"]:
        assert sentence.split(":")[0] in text
    assert "b is better than a on all problems" in text and "sft.mask <b>span" in text and "<b>span" not in html
    assert "src=" not in html and html.count("<svg") >= 2
    assert render(settings, found, {"torch": "1"}) == html
    assert [plot.title.split(":")[0] for plot in plots(found)] == ["hindsight", "forward"]
    empty = records(runs=[])
    parsed(render(settings, empty, {}))
