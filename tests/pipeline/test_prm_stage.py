"""The stage prm: labels, figures against their plain definitions, the whole stage in one process, and who reads what it writes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from datasets import Features, List, Value
from pydantic import ValidationError

from actors.decode import HfDecoder
from actors.engines import HfEngine
from actors.probe import probe
from actors.verifier_actor import Verifying
from actors.watch import Watch
from pipeline.backtrack.cursor import DecodeRequest, Signal
from pipeline.backtrack.targets import Form, Targets
from pipeline.backtrack.trace import Detour, WrongTry, build_trace
from pipeline.backtrack.undo import Unit
from pipeline.config import EngineSettings, RolloutSettings, Settings
from pipeline.stages import judge, prm, rollouts, traces
from pipeline.stages.graph import steps
from pipeline.stages.io import Codec, decoding_of, write_rows
from pipeline.stages.stage import Context, StageError
from pipeline.stages.step_labels import is_held_out, judged_solution, right_so_far, searched_rows, some_of, undo_states
from pipeline.step_metrics import (
    Valued,
    best_threshold,
    calibration_error,
    first_error,
    first_error_f1,
    step_figures,
)
from tests.pipeline.saved import PROBLEMS, save_problems_and_models
from tests.pipeline.tiny import END, rule

STOP = 1

# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "error", "labels"),
    [
        (True, -1, (1, 1, 1)),
        (False, 0, (0, 0, 0)),
        (False, 4, (1, 0, 0)),
        (False, 8, (1, 1, 0)),
        (False, 9, (1, 1, 0)),  # behind the last step: it breaks off
        (False, -1, (1, 1, 0)),
        (True, 4, (1, 0, 0)),  # a right answer may carry a false equation
    ],
)
def test_steps_are_right_up_to_the_first_error(correct: bool, error: int, labels: tuple[int, ...]) -> None:
    assert right_so_far((2, 5, 8), correct, error) == labels


def test_a_solution_without_a_step_has_no_row() -> None:
    assert judged_solution("p", (5,), (), False, -1, rule("step"), STOP) is None
    assert judged_solution("p", (5,), (STOP,), False, -1, rule("step"), STOP) is None
    found = judged_solution("p", (5, 5), (4, END, 6, STOP), False, 2, rule("step"), STOP)
    assert found and found.every_token.at == (2, 3, 4) and found.every_token.labels == (1, 1, 0)
    assert found.row.at == (3, 4) and found.row.labels == (1, 0) and found.row.segment.ids == (5, 5, 4, END, 6, STOP)


STEPS = Features(
    {
        "problem": Value("string"), "prompt_ids": List(Value("int32")), "ids": List(Value("int32")), "value": Value("float32"),
        "q": Value("float32"), "samples": Value("int32"),
    }
)  # fmt: skip


def searched(folder: Path, *rows: tuple[Sequence[int], float | None, int]) -> Path:
    made = [
        {"problem": "p", "prompt_ids": [5, 6], "ids": list(ids), "value": value, "q": 0.0, "samples": samples}
        for ids, value, samples in rows
    ]
    write_rows(made, STEPS, folder / "steps")
    return folder


def test_searched_states_that_begin_alike_share_a_row(tmp_path: Path) -> None:
    folder = searched(tmp_path, ((4, END), 0.5, 2), ((4, END, 2, END), 1.0, 1), ((3, END), 0.0, 4), ((4, END), 1.0, 2))
    rows = searched_rows(folder)
    assert [problem for problem, _ in rows] == ["p", "p"]
    assert [(row.segment.ids, row.at, row.labels) for _, row in rows] == [
        ((5, 6, 4, END, 2, END), (3, 5), (0.75, 1.0)),  # two measurements of a state count by their samples
        ((5, 6, 3, END), (3,), (0.0,)),
    ]


@pytest.mark.parametrize(("ids", "value"), [((4,), None), ((4,), 1.5), ((4,), float("nan")), ((), 0.5)])
def test_search_values_that_are_no_labels(tmp_path: Path, ids: Sequence[int], value: float | None) -> None:
    with pytest.raises(StageError, match=r"prm.labels: .*steps, row 1: needs ids and a value of 0 to 1"):
        searched_rows(searched(tmp_path, ((4,), 0.5, 1), (ids, value, 1)))
    with pytest.raises(StageError, match="has no dataset steps"):
        searched_rows(tmp_path / "nowhere")


@pytest.mark.parametrize("unit", ["token", "step", "all"])
def test_undo_is_due_where_the_targets_say_so(unit: Unit) -> None:
    """By the ids that stand in each state: positive behind the wrong try alone."""
    trace = build_trace((5, 5), (2, END, 4, END), [Detour(2, WrongTry((1, 6, END), (True, False, False)))], rule(unit))
    row = undo_states(trace, rule(unit), Targets(), Form("rewind"))
    assert row is not None and row.labels is not None
    segment, states = row.segment, {}
    for at, label in zip(row.at, row.labels, strict=True):
        states[tuple(segment.ids[j] for j in range(at + 1) if segment.enter[j] <= segment.enter[at] < segment.leave[j])] = label
    before = (5, 5, 2, END)
    # The step behind the wrong decision is masked: nothing is asked of the state before it in which the error was made.
    wanted = {(5, 5): 0, (5, 5, 2): 0, before: 0, (*before, 4): 0, (*before, 1): 0, (*before, 1, 6): 0, (*before, 1, 6, END): 1}
    assert states == wanted


def test_states_are_limited_and_drawn_by_the_seed() -> None:
    trace = build_trace((5, 5), (2, END, 4, END), [], rule("step"))
    row = undo_states(trace, rule("step"), Targets(), Form("rewind"))
    assert row is not None and len(row.at) == 4
    assert len(some_of([row] * 9, 13, 0)) == 3 and len(some_of([row] * 9, 1, 0)) == 1 and some_of([], 5, 0) == []


def test_the_split_is_by_problem_and_of_its_share() -> None:
    held = [is_held_out(f"p{number}", 0.1, 0) for number in range(2000)]
    assert 150 < sum(held) < 250 and held == [is_held_out(f"p{number}", 0.1, 0) for number in range(2000)]
    assert held != [is_held_out(f"p{number}", 0.1, 1) for number in range(2000)]


# --- figures ----------------------------------------------------------------------------------------------------------


def valued(values: Sequence[float], labels: Sequence[float], **more: Any) -> Valued:
    given = {"problem": "p", "family": "chain", "hindsight": True, "correct": all(labels)} | more
    return Valued(labels=tuple(labels), values=tuple(values), **given)


def drawn_rows(seed: int, count: int) -> list[Valued]:
    drawn = random.Random(seed)
    found = []
    for _ in range(count):
        size, wrong = drawn.randint(1, 5), drawn.randint(0, 6)
        labels = [float(at < wrong) for at in range(size)]
        found.append(valued([min(1.0, max(0.0, 0.3 + 0.4 * one + drawn.uniform(-0.3, 0.3))) for one in labels], labels))
    return found


def slow_auroc(labels: Sequence[float], values: Sequence[float]) -> float:
    """Every pair of a right and a wrong one."""
    wins = [
        (value > other) + 0.5 * (value == other)
        for value, label in zip(values, labels, strict=True)
        for other, another in zip(values, labels, strict=True)
        if label and not another
    ]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_the_plain_definitions(seed: int) -> None:
    rows, threshold = drawn_rows(seed, 40), 0.45
    values = [value for row in rows for value in row.values]
    labels = [label for row in rows for label in row.labels]
    (found,) = [one for one in step_figures(rows, threshold, lambda some: some[-1]) if one["group"] == "all"]
    assert found["auroc"] == pytest.approx(slow_auroc(labels, values))
    assert found["auroc_solutions"] == pytest.approx(slow_auroc([row.correct for row in rows], [row.values[-1] for row in rows]))
    slow = 0.0
    for low in range(10):
        some = [at for at, value in enumerate(values) if low / 10 <= value < (low + 1) / 10 or (low == 9 and value == 1)]
        if some:
            gap = sum(values[at] for at in some) / len(some) - sum(labels[at] for at in some) / len(some)
            slow += len(some) / len(values) * abs(gap)
    assert found["ece"] == pytest.approx(slow)
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for row in rows:
        said = [at for at, value in enumerate(row.values) if value < threshold][:1]
        true = [at for at, label in enumerate(row.labels) if label == 0][:1]
        hits[bool(true)].append(said == true)
    wrong, right = (sum(hits[kind]) / len(hits[kind]) for kind in (True, False))
    assert found["first_error"]["f1"] == pytest.approx(2 * wrong * right / (wrong + right))
    assert (found["first_error"]["found"]["n"], found["first_error"]["none_found"]["n"]) == (len(hits[True]), len(hits[False]))


def test_figures_that_are_not_defined_are_none() -> None:
    (found, *_) = step_figures([valued((0.9, 0.8), (1, 1))], 0.5, lambda some: some[-1])
    assert found["auroc"] is None and found["auroc_solutions"] is None and found["first_error"]["f1"] is None
    assert found["first_error"]["found"] == {"n": 0, "share": None, "ci95": None}
    assert calibration_error([], []) is None
    assert best_threshold([valued((0.9,), (1,))]) == 0.5
    assert first_error_f1([valued((0.9, 0.8), (1, 0)), valued((0.1,), (1,))], 0.5)["f1"] == 0


def test_the_threshold_is_chosen_by_f1() -> None:
    rows = [valued((0.9, 0.35), (1, 0)), valued((0.9, 0.65), (1, 1))]
    assert best_threshold(rows) == 0.5 and first_error((0.9, 0.35), 0.5) == 1
    assert best_threshold([valued((0.9, 0.8), (1, 0)), valued((0.9,), (1,))]) == pytest.approx(0.85)


# --- the stage --------------------------------------------------------------------------------------------------------

MAX_TOKENS = 40


class Verifiers(Verifying):
    """The learner's part in this process."""

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, name)
        if name not in ("fit_prm", "fit_head", "step_values", "values", "p_should_undo"):
            return own

        def call(*given: Any) -> Any:
            shown = given[:-1] if name.startswith("fit") else given
            return own(*(str(one) if isinstance(one, Path) else one for one in shown))

        return call


def settings_of(**asked: Any) -> Settings:
    small = {"steps": 6, "rows": 2, "row_tokens": 400, "check_every": 3, "held_out": 0.3, "test": 8, "width": 8}
    return Settings(
        engine=EngineSettings(kind="hf", max_prompt=400, max_num_seqs=8),
        rollouts=RolloutSettings(max_tokens=MAX_TOKENS),
        prm=cast(Any, small | {"head": {"steps": 20, "batch": 8, "width": 8}} | asked),
    )


class Terminal:
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.lines: list[str] = []

    @contextmanager
    def stage(self, *_: Any) -> Iterator[Any]:
        yield SimpleNamespace(update=lambda *_: None)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def info(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Gold solutions and spoiled ones as rollouts, judged by hand, and traces with the same errors."""
    folder = tmp_path_factory.mktemp("inputs")
    names = ("problems", "model", "sft", "rollouts", "judge", "traces")
    found = {name: folder / name for name in names}
    save_problems_and_models({name: found[name] for name in ("problems", "model", "sft")})
    settings = settings_of()
    codec = Codec(found["model"], settings.undo, settings.base.prompt)
    tries: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    made: list[dict[str, Any]] = []
    blank_verdict = {
        "answer": "", "steps": [], "error_step": -1, "error_chars": [-1, -1], "error_kind": "", "evidence": "", "method": "exact",
        "later_errors": [], "try_start": -1, "try_text": "", "try_wrong": [], "try_own": False, "continuation": [],
    }  # fmt: skip
    for problem in (one for one in PROBLEMS if one.split == "train"):
        prompt, gold = codec.prompt_ids(problem), codec.solution_ids(problem.solution)
        wrong = codec.encode("so 7 = 8\n")
        for number, ids in enumerate((gold, (*wrong, *gold))):
            row = {"id": f"{problem.id}#{number}", "problem": problem.id, "prompt_ids": prompt, "token_ids": ids}
            tries.append(row | {"logprobs": [], "finish": "stop", "hot": False, "version": ""})
            error = 0 if number else -1
            verdict = {"id": row["id"], "problem": problem.id, "correct": not number, "error_tokens": [error, error]}
            verdicts.append(blank_verdict | verdict)
        detour = Detour(0, WrongTry(wrong, (True, *(False,) * (len(wrong) - 1))))
        trace = build_trace(prompt, gold, [detour], codec.rule)
        blank: dict[str, Any] = {"family": "", "split": "", "source": "", "correction": "", "kinds": [], "rollouts": []}
        numbers = dict.fromkeys(("errors", "undos", "difficulty", "partner"), 0)
        made.append(blank | numbers | {"id": "", "problem": problem.id, "input_ids": trace.ids, "roles": trace.roles})
    write_rows(tries, rollouts.FEATURES, found["rollouts"])
    write_rows(verdicts, judge.FEATURES, found["judge"])
    write_rows(made, traces.FEATURES, found["traces"])
    return found


def context_of(inputs: dict[str, Path], out: Path, settings: Settings) -> Any:
    verifiers = Verifiers()

    def pool(folder: Path, version: str, context: int) -> Any:
        engine = HfEngine.from_folder(folder, EngineSettings(max_num_seqs=8), context)
        return SimpleNamespace(generate=lambda requests, sampling, batch: (engine.generate(requests, sampling), version))

    workers = SimpleNamespace(pool=pool, verifiers=lambda: verifiers, probe=probe, watch=partial(Watch, out.parent / "logs"))
    return SimpleNamespace(
        settings=settings, round=1, out=out, resume=out.parent / "resume", counts={}, inputs=inputs,
        digests={"model": "m", "sft": "s"}, terminal=Terminal(), workers=workers,
    )  # fmt: skip


def test_the_stage_writes_both_verifiers_and_figures(inputs: dict[str, Path], tmp_path: Path) -> None:
    short = {"rollouts": RolloutSettings(max_tokens=2)}  # solutions of one step, and a random model writes none that is right
    context = context_of(inputs, tmp_path / "out", settings_of().model_copy(update=short))
    context.out.mkdir()
    prm.run(cast(Context, context))
    metrics = json.loads((context.out / "metrics.json").read_text())
    assert metrics["prm"][0]["group"] == "all" and metrics["prm"][0]["solutions"] == 8
    assert metrics["prm"][0]["auroc"] is None
    assert any("steps on test problems are wrong: AUROC is not defined" in line for line in context.terminal.warnings)
    assert set(metrics["heads"]) == {"base", "sft"}
    assert context.counts["rows"] + context.counts["held_out"] == 16 and context.counts["states"] > 0
    settings, codec = settings_of(), Codec(inputs["sft"], settings_of().undo, settings_of().base.prompt)
    request = DecodeRequest(codec.prompt_ids(PROBLEMS[0]), 0)
    for by in ("head", "prm"):
        signal = prm.named_signal(Signal("score", 0.5, by=cast(Any, by)), context.out, "grpo")
        how = decoding_of(codec, settings.decode, "guided", 0.0, 1.0, 12, signal=signal)
        (done,) = HfDecoder.from_folder(inputs["sft"], 2, 500).decode([request], how)
        assert len(done.ids) <= 12


def test_a_named_folder_and_other_signals_stay(tmp_path: Path) -> None:
    for signal in (None, Signal("entropy", 1.0), Signal("score", 0.5, folder="mine")):
        assert prm.named_signal(signal, tmp_path, "sft") == signal
    assert prm.named_signal(Signal("score", 0.5), None, "sft") == Signal("score", 0.5)
    for model, begun_as in {"grpo_control": "clean_control", "dpo": "sft", "base": "base"}.items():
        named = prm.named_signal(Signal("score", 0.5), tmp_path, model)
        assert named and named.folder == str(tmp_path / "head" / begun_as)


def test_the_graph_reads_what_the_settings_ask_for() -> None:
    def inputs_of(**more: Any) -> dict[str, list[str]]:
        return {stage.name: [one.name for one in stage.inputs(1)] for _, stage in steps(Settings.model_validate(more))}

    assert "prm" not in inputs_of()
    found = inputs_of(prm={"steps": 5, "labels": "both"}, grpo={"steps": 5}, search={"problems": 1})
    assert "search" in found["prm"] and "prm" in found["evaluate"] and "prm" not in found["grpo"]
    assert list(found).index("sft") < list(found).index("prm") < list(found).index("grpo")
    assert "prm" in inputs_of(prm={"steps": 5}, grpo={"steps": 5, "reward": {"process_model": True}})["grpo"]
    with pytest.raises(ValidationError, match="needs the stage prm"):
        Settings.model_validate({"grpo": {"steps": 5, "reward": {"process_model": True}}})
    with pytest.raises(ValidationError, match=r"threshold must lie in 0 \.\. 1 for kind score"):
        Settings.model_validate({"decode": {"signal": {"kind": "score", "threshold": 2}}})
