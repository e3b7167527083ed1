"""The experiment without Ray: every variant and seed is trained and measured, finished ones not again; its figures are drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from datasets import load_from_disk
from ray import cloudpickle

from actors import learner
from actors.engines import Completion, Request, Sampling
from actors.learner import Curve, fit
from pipeline.backtrack.trace import Detour, Role, WrongTry, build_trace
from pipeline.config import CheckSettings, ExperimentSettings, Settings, SftSettings, variant
from pipeline.figures import figure
from pipeline.report import Page, render
from pipeline.stages import experiment, probes
from pipeline.stages.curves import experiment_plots, plots_of
from pipeline.stages.graph import steps
from pipeline.stages.io import Codec, write_rows
from pipeline.stages.stage import Context
from pipeline.stages.traces import FEATURES
from tests.pipeline.test_evaluate import PROBLEMS, _Terminal, inputs, settings_of

__all__ = ["inputs"]  # the fixture
VARIANTS = {"standard": {"form": "soft", "mask": "none"}, "state": {"form": "rewind"}}


def wrong(solution: str) -> str:
    """With another result in its first calculation, and so at its end."""
    solution = re.sub(r"#### .*", "#### 0", solution)
    return re.sub(r"=(\d+)>>\d+", lambda found: f"={int(found[1]) + 1}>>{int(found[1]) + 1}", solution, count=1)


class Workers:
    """Trains in this process; whatever is sampled is the gold solution with an error."""

    def __init__(self, codec: Codec) -> None:
        prompts = {codec.prompt_ids(problem): problem for problem in PROBLEMS}
        self.fitted: list[tuple[str, int]] = []

        def generate(requests: Sequence[Request], sampling: Sampling, *_: Any) -> tuple[list[Completion], str]:
            texts = [wrong(prompts[request.prompt_ids].solution) for request in requests]
            return [Completion(codec.solution_ids(text), (), "stop") for text in texts], ""

        self.pool = lambda *_: SimpleNamespace(generate=generate)
        self.watch = lambda *_: nullcontext(SimpleNamespace(curve=lambda curve: None))

    def fit(self, source: Path, target: Path, data: Any, settings: SftSettings, seed: int, show: Any, **more: Any) -> Curve:
        self.fitted.append((settings.form, seed))
        more["held_out"] = cloudpickle.loads(cloudpickle.dumps(more["held_out"]))  # as it reaches the learner's process
        return fit(source, target, data, settings, seed, Curve(), **more)


def settings() -> Settings:
    checks = CheckSettings(every=1, problems=8, first_tries=3)
    sft = SftSettings(steps=2, rows=1, row_tokens=400, log_every=1, control=False, checks=checks)
    asked = ExperimentSettings(variants=VARIANTS, seeds=[3, 5], problems=4)
    return settings_of(test=4, dev=4).model_copy(update={"sft": sft, "experiment": asked})


def context(inputs: dict[str, Path], folder: Path, workers: Any) -> Context:
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True)
    return cast(
        Context,
        SimpleNamespace(
            settings=settings(), round=1, out=folder / "out", scratch=folder / "scratch", resume=folder.parent / "resume",
            counts={}, inputs={name: inputs[name] for name in ("problems", "model", "traces")}, digests={"model": "a"},
            terminal=_Terminal(), workers=workers,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def ready(inputs: dict[str, Path]) -> tuple[dict[str, Path], Codec]:
    """With traces beside the problems and the model."""
    codec = Codec(inputs["model"], settings().undo, "{question}\n")
    rows = []
    for problem in [problem for problem in PROBLEMS if problem.split == "train"]:
        tried = WrongTry(codec.encode("so 9"), (True,) * len(codec.encode("so 9")))
        trace = build_trace(codec.prompt_ids(problem), codec.solution_ids(problem.solution), [Detour(0, tried)], codec.rule)
        texts = dict.fromkeys(("id", "problem", "family", "split", "source", "correction"), "")
        counts = {"errors": 1, "undos": trace.roles.count(Role.UNDO), "difficulty": 1, "partner": -1}
        rows.append(texts | counts | {"rollouts": [], "kinds": [], "input_ids": trace.ids, "roles": list(map(int, trace.roles))})
    folder = inputs["model"].parent / "traces"
    write_rows(rows, FEATURES, folder)
    return inputs | {"traces": folder}, codec


def test_every_variant_and_seed_once(ready: tuple[dict[str, Path], Codec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner, "redirect_process_output", lambda file: None)
    inputs, codec = ready
    workers = Workers(codec)
    context_ = context(inputs, tmp_path / "a", workers)
    experiment.run(context_)
    assert workers.fitted == [("soft", 3), ("soft", 5), ("rewind", 3), ("rewind", 5)]
    rows = load_from_disk(tmp_path / "a" / "out")
    assert rows.features == experiment.FEATURES and len(rows) == context_.counts["rows"]
    assert context_.counts["own_errors"] > 2
    assert {(row["variant"], row["seed"], row["step"]) for row in rows} == {
        (name, seed, step) for name in VARIANTS for seed in (3, 5) for step in (0, 1, 2)
    }
    named = {row["name"] for row in rows}
    assert named >= {"logp_error", "undo_rate", "spurious_rate", "accuracy", "p_undo_error", "p_undo_right", "p_correction"}
    assert named >= {"first_try_accuracy", "errors_per_try"}
    at_start = {row["value"] for row in rows if (row["step"], row["group"], row["name"]) == (0, "all", "logp_error")}
    assert max(at_start) - min(at_start) < 1e-6  # all begin with the same model
    shares = {(row["variant"], row["value"] > 0) for row in rows if row["name"] == "masked_share"}
    assert shares == {("standard", True), ("state", False)}

    (tmp_path / "resume" / "state-3.json").unlink()  # as if it had been killed there
    again = Workers(codec)
    experiment.run(context(inputs, tmp_path / "b", again))
    assert again.fitted == [("rewind", 3)]
    assert [dict(row) for row in load_from_disk(tmp_path / "b" / "out")] == [dict(row) for row in rows]

    metrics = json.loads((tmp_path / "a" / "out" / "metrics.json").read_text())
    plots = [plot for plot in experiment_plots(metrics) if any(line.points for line in plot.lines)]
    assert {line.name for plot in plots for line in plot.lines} == set(VARIANTS)
    assert "<svg" in figure(plots[0], "one")
    empty: dict[str, Any] = {"run": "x", "rounds": [], "evaluations": [], "comparisons": [], "probes": []}
    page = Page("x", "<U>", "step", 0.0, empty)
    html = render(replace(page, experiment=plots, compared=metrics))
    assert "form soft, mask none" in html and html.count("<svg") >= len(plots)
    assert 'id="experiment"' not in render(page)


def row(seed: int, value: float) -> dict[str, Any]:
    return {
        "variant": "a",
        "seed": seed,
        "step": 5,
        "group": "all",
        "name": "accuracy",
        "value": value,
        "low": 0.1,
        "high": 0.2,
        "n": 9,
    }


def test_intervals_are_over_seeds_or_over_problems_where_there_is_one() -> None:
    """Student's t with two degrees of freedom is 4.303 at 97.5 %."""
    (three,) = experiment.summarise([row(0, 0.5), row(1, 0.6), row(2, 0.7)])
    half = 4.3027 * 0.1 / 3**0.5
    assert (three["value"], three["low"], three["high"]) == pytest.approx((0.6, 0.6 - half, 0.6 + half), abs=1e-4)
    assert three["seeds"] == 3 and three["n"] == 9 and three["by_seed"] == {"0": 0.5, "1": 0.6, "2": 0.7}
    (one,) = experiment.summarise([row(0, 0.5)])
    assert (one["value"], one["low"], one["high"]) == (0.5, 0.1, 0.2)


def test_the_stage_is_part_of_a_run_with_variants_alone() -> None:
    assert [name for _, name in ((round, stage.name) for round, stage in steps(Settings()))] == [
        "problems", "base", "rollouts", "judge", "traces", "sft", "evaluate", "report",
    ]  # fmt: skip
    some = [(round, stage.name) for round, stage in steps(settings())]
    assert some[-2:] == [(1, "experiment"), (1, "report")]
    report = steps(settings())[-1][1]
    assert "experiment" in [one.name for one in report.inputs(1)]


def test_a_variant_changes_what_it_names_alone() -> None:
    made = Settings.model_validate(
        {"sft": {"weights": {"undo": 2.0}}, "experiment": {"variants": {"a": {"weights": {"prefix": 0.5}, "lr": 1e-4}}}}
    )
    sft = variant(made, "a")
    assert (sft.weights.undo, sft.weights.prefix, sft.lr) == (2.0, 0.5, 1e-4)
    assert sft.model_copy(update={"weights": made.sft.weights, "lr": made.sft.lr}) == made.sft


def test_corrections_are_asked_in_the_form_that_is_trained(ready: tuple[dict[str, Path], Codec]) -> None:
    _, codec = ready
    dev = [problem for problem in PROBLEMS if problem.split == "dev"]
    completions = [Completion(codec.solution_ids(wrong(problem.solution)), (), "stop") for problem in dev]
    cases = probes.cases_of(dev, completions, codec)
    assert len(cases) > 2
    for case in cases:
        assert codec.rule.undo_id not in case.rewound.ids and codec.rule.undo_id in case.emitted.ids
        assert case.rewound.tokens == case.emitted.tokens
        assert case.rewound.ids[: len(codec.prompt_ids(case.problem))] == codec.prompt_ids(case.problem)
        text = codec.decode(case.rewound.ids[len(codec.prompt_ids(case.problem)) :]).text
        assert case.problem.solution.startswith(text) and len(text) > 0
        for form, asked in (("rewind", case.rewound), ("soft", case.emitted), ("hard", case.emitted)):
            assert probes.held_out(SftSettings(form=cast(Any, form)), [case]).errors[0].corrected == asked


def test_figures_of_checks() -> None:
    probes_ = [
        [step, group, name, value, value - 0.1, value + 0.1, 9]
        for step in (0, 300)
        for group in ("all", "forward", "hindsight")
        for name, value in (("p_undo_error", 0.5), ("p_undo_right", 0.2), ("logp_error", -2.0), ("p_correction", 0.4))
    ]
    curves = {"sft-1": {"losses": [[20, 1.0]], "probes": probes_}}
    plots = plots_of(curves)
    assert [plot.title for plot in plots[1:]] == [
        "round 1: P(undo), hindsight", "round 1: P(undo), forward",
        "round 1: log p(error | prefix), nats", "round 1: P(correction | after undo)",
    ]  # fmt: skip
    assert [tuple(point) for point in plots[1].lines[0].points] == [(0, 0.5), (300, 0.5)]
    assert plots[3].lines[0].band == [(0, -2.1, -1.9), (300, -2.1, -1.9)]
    assert all("<svg" in figure(plot, f"p{i}") for i, plot in enumerate(plots))
    assert len(plots_of({"sft-1": {"losses": [[20, 1.0]]}})) == 1
