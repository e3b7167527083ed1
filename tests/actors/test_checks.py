"""Checks while training: the values are those of plain forwards, a broken mask or loss is found, and the weights stay what they
would be without them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from transformers import AutoModelForCausalLM

import actors.dynamic as dynamic
from actors.by_hand import loss_by_hand, taught
from actors.checks import (
    COSINES,
    CheckError,
    Decodes,
    Graded,
    HeldOut,
    HeldOutError,
    Measured,
    alarms,
    masked_share,
    said,
    term_cosines,
)
from actors.learner import Curve, TrainingError, TreeTrainer, fit
from actors.packing import TrainingSet, collate, examples_of
from actors.probe import ProbeRow
from pipeline import report
from pipeline.backtrack.cursor import DecodeRequest, Decoding
from pipeline.backtrack.targets import Form, Targets
from pipeline.backtrack.trace import Detour, Role, WrongTry, build_trace
from pipeline.backtrack.undo import UndoRule
from pipeline.config import SftSettings
from tests.actors.drawn import LAYOUTS, PAD, ROW, model_of, traces
from tests.actors.test_resume import content, prepared
from tests.actors.test_tree_trainer import batch_of, slow_loss, ways_to_teach
from tests.pipeline.tiny import rule

COMMON: dict[str, Any] = {"steps": 6, "rows": 2, "row_tokens": 64, "lr": 1e-2, "log_every": 2, "checkpoint_every": 2}


def some_traces(undo: UndoRule) -> list[Any]:
    made = []
    for n in range(20):
        detours = [Detour(1, WrongTry((40 + n, 41), (True, False)))] if n % 2 else []
        made.append(build_trace([30 + n, 7], [50 + n, 60 + n, *range(70, 70 + n % 5)], detours, undo))
    return made


def held_out(undo: UndoRule, every: int = 4) -> HeldOut:
    """Two errors, one of them in hindsight, and three problems to decode."""
    errors = [
        HeldOutError(
            kind,
            ProbeRow((31, 7, 50, 40 + n, 41), (5, 3), (undo.undo_id, 40 + n)),
            ProbeRow((31, 7, 50, 60), (4,), (undo.undo_id,)),
            ProbeRow((31, 7, 50, 60 + n, 70), (3, 4), (60 + n, 70)),
        )
        for n, kind in enumerate((False, True))
    ]
    decoding = Decoding("soft", 0.0, 1.0, 6, 1, undo, threshold=None, ban_tried=False)
    requests = [DecodeRequest((30 + n, 7), n) for n in range(3)]
    grade = lambda index, ids: Graded(index == 0, sum(i == undo.undo_id for i in ids), 0)  # noqa: E731
    tried = lambda index, ids: Graded(index == 1 and undo.undo_id not in ids, 0, 0, 2 * index)  # noqa: E731
    kinds = (False, False, True)
    first = Decodes(requests, kinds, replace(decoding, mode="forbidden"), 4, 32, tried)
    return HeldOut(every, errors, Decodes(requests, kinds, decoding, 4, 32, grade), first)


def trained(folder: Path, name: str, checked: bool, undo: UndoRule, **more: Any) -> Curve:
    settings = SftSettings(**COMMON | more)
    data = TrainingSet(some_traces(undo), undo, Targets(settings.mask), Form("rewind", "immediate"), True)
    return fit(folder / "source", folder / name, data, settings, 0, Curve(), held_out=held_out(undo) if checked else None)


@pytest.mark.parametrize("form", LAYOUTS)
@settings(deadline=None, max_examples=15)
@given(traces(), ways_to_teach())
def test_the_loss_by_hand_is_that_of_the_tests(form: str, drawn: Any, targets: Targets) -> None:
    unit, some = drawn
    data = TrainingSet(some, rule(unit), targets, LAYOUTS[form])
    if unit != "token":
        data = replace(data, form=replace(data.form, rewinding="immediate"))
    wanted = slow_loss(model_of("llama"), data).item()
    assert loss_by_hand(model_of("llama"), data, range(len(some))) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def logit_gradient(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the batch's loss, by the definition of a cross entropy with weights."""
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits[batch["row"], batch["column"]]
    leaf = logits.detach().requires_grad_()
    losses = torch.nn.functional.cross_entropy(leaf, batch["target"], reduction="none")
    ends = batch["ends_run"]
    p = leaf.softmax(-1).gather(1, batch["target"][:, None])[:, 0]
    total = (torch.where(ends, -torch.log(1 - p), losses) * batch["weight"]).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    return gradient


@pytest.mark.parametrize("form", LAYOUTS)
@settings(deadline=None, max_examples=15)
@given(traces(), ways_to_teach())
def test_masked_targets_have_no_share_of_the_gradient(form: str, drawn: Any, targets: Targets) -> None:
    unit, some = drawn
    if targets.mask == "none":
        targets = replace(targets, mask="span")
    data = TrainingSet(some, rule(unit), targets, LAYOUTS[form], together=True)
    if unit != "token":
        data = replace(data, form=replace(data.form, rewinding="immediate"))
    examples, _ = examples_of(data, ROW)
    batch = batch_of(data, rows=1)
    gradient = logit_gradient(model_of("llama"), batch)
    assert masked_share(gradient, batch, examples, data, PAD, ROW * 4) == 0


@pytest.mark.parametrize("form", ["soft", "hard", "rewind"])
def test_a_mask_that_lets_errors_through_shows(form: Any) -> None:
    """The batch is made as if nothing were masked, the check is told that wrong decisions are."""
    trace = build_trace((5, 2), (1, 0, 3, 6), [Detour(2, WrongTry((4, 1), (True, False)))], rule("step"))
    data = TrainingSet([trace], rule("step"), Targets("decision"), Form(form, "immediate"))
    examples, _ = examples_of(data, ROW)
    shares = []
    for mask in ("none", "decision"):
        batch = collate([examples], replace(data, targets=Targets(mask)), PAD, ROW)  # type: ignore[arg-type]
        shares.append(masked_share(logit_gradient(model_of("llama"), batch), batch, examples, data, PAD, ROW))
    assert shares[0] > 0.02 and shares[1] == 0


def test_weights_are_those_of_a_training_without_checks(tmp_path: Path) -> None:
    undo = prepared(tmp_path / "source")
    curves = [trained(tmp_path, name, checked, undo) for name, checked in (("with", True), ("without", False))]
    assert content(tmp_path / "with") == content(tmp_path / "without")
    assert curves[0].losses == curves[1].losses and not curves[1].probes


def test_values_are_those_of_plain_forwards(tmp_path: Path) -> None:
    """At the start and behind the last step, whose models are known."""
    undo = prepared(tmp_path / "source")
    curve = trained(tmp_path, "target", True, undo)
    assert sorted({one.step for one in curve.probes}) == [0, 4, 6]
    for step, folder in ((0, "source"), (6, "target")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32).eval()

        def logprob(token: int, *context: int, model: Any = model) -> float:
            with torch.no_grad():
                return float(model(input_ids=torch.tensor([context])).logits[0, -1].log_softmax(-1)[token])

        u = undo.undo_id
        wanted = {
            "p_undo_error": [math.exp(logprob(u, 31, 7, 50, 40 + n, 41)) for n in (0, 1)],
            "p_undo_right": [math.exp(logprob(u, 31, 7, 50, 60))] * 2,
            "p_correction": [math.exp(logprob(60 + n, 31, 7, 50) + logprob(70, 31, 7, 50, 60 + n)) for n in (0, 1)],
            "logp_error": [logprob(40 + n, 31, 7, 50) for n in (0, 1)],
        }
        found = {(one.group, one.name): one for one in curve.probes if one.step == step}
        for name, (forward, hindsight) in wanted.items():
            assert found["all", name].value == pytest.approx((forward + hindsight) / 2, rel=1e-4)
            assert found["forward", name].value == pytest.approx(forward, rel=1e-4) and found["forward", name].low is None
            assert found["hindsight", name].value == pytest.approx(hindsight, rel=1e-4)
            assert found["all", name].n == 2
        assert found["batch", "masked_share"].value == 0
        assert found["batch", "loss"].value == pytest.approx(found["batch", "loss_by_hand"].value, rel=1e-4)
        assert found["all", "accuracy"][3:] == pytest.approx((1 / 3, 0.0615, 0.7923, 3), abs=1e-3)
        assert found["hindsight", "accuracy"].value == 0 and found["all", "undo_rate"].n == 3
        assert (found["all", "errors_per_try"].value, found["hindsight", "errors_per_try"].value) == (2, 4)
        assert found["forward", "first_try_accuracy"].value == 0.5 and found["all", "first_try_accuracy"].n == 3
    assert [step for step, _ in curve.right_states] == [0, 4, 6]
    assert curve.first_tries == [(step, (False, True, False), (0, 2, 4)) for step in (0, 4, 6)]


@pytest.mark.parametrize(("part", "message"), [("weight", "of the gradient comes from masked targets"), ("loss", "trace by trace")])
def test_a_training_that_teaches_something_else_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, message: str
) -> None:
    """Wrong decisions are counted after all; the loss is one percent off."""
    undo = prepared(tmp_path / "source")
    if part == "weight":
        import actors.packing as packing
        from pipeline.backtrack.targets import segments

        monkeypatch.setattr(
            packing, "segments", lambda some, rule, targets, *more: segments(some, rule, replace(targets, mask="none"), *more)
        )
    else:
        compute = TreeTrainer.compute_loss

        def off(self: Any, model: Any, inputs: Any, **more: Any) -> Any:
            return compute(self, model, inputs, **more) * 1.01

        monkeypatch.setattr(TreeTrainer, "compute_loss", off)
    with pytest.raises(TrainingError, match=f"a check failed: step 0: .*{message}"):
        trained(tmp_path, "target", True, undo)
    assert issubclass(CheckError, RuntimeError) and not (tmp_path / "target").exists()


def test_dynamic_masking_learns_which_targets_are_wrong_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = prepared(tmp_path / "source")
    data = TrainingSet(some_traces(undo), undo, Targets("none"), Form("rewind", "immediate"), True)
    settings = SftSettings(**COMMON | {"steps": 40, "checkpoint_every": 10}, mask="none", dynamic=True)
    monkeypatch.setattr(dynamic, "_LR", 1e-2)
    shares = {}
    for name, some in (("one", settings), ("plain", settings.model_copy(update={"dynamic": False}))):
        curve = fit(tmp_path / "source", tmp_path / name, data, some, 0, Curve(), held_out=held_out(undo, 20))
        shares[name] = [one.value for one in curve.probes if one.name == "masked_share"]
        assert any(one.name == "loss_by_hand" for one in curve.probes) == (name == "plain")
    assert 0 < shares["one"][-1] < 0.3 * shares["plain"][-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeTrainer, "training_step", interrupted(TreeTrainer.training_step, 25))
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "source", tmp_path / "two", data, settings, 0, Curve(), resume=tmp_path / "resume")
    fit(tmp_path / "source", tmp_path / "two", data, settings, 0, Curve(), resume=tmp_path / "resume")
    assert content(tmp_path / "one") == content(tmp_path / "two")


def interrupted(original: Any, at: int) -> Any:
    """A training step that ends the run at a step."""

    def patched(trainer: Any, *given: Any, **more: Any) -> Any:
        if trainer.state.global_step == at:
            raise KeyboardInterrupt
        return original(trainer, *given, **more)

    return patched


def test_a_killed_training_has_the_checks_of_both_parts(tmp_path: Path) -> None:
    undo = prepared(tmp_path / "source")
    data = TrainingSet(some_traces(undo), undo, Targets(), Form("rewind", "immediate"), True)
    settings = SftSettings(**COMMON)

    def run(name: str, resume: Path | None) -> Curve:
        return fit(tmp_path / "source", tmp_path / name, data, settings, 0, Curve(), resume=resume, held_out=held_out(undo, 2))

    whole = run("whole", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeTrainer, "training_step", interrupted(TreeTrainer.training_step, 5))
        with pytest.raises(KeyboardInterrupt):
            run("again", tmp_path / "resume")
    again = run("again", tmp_path / "resume")
    ignored = {"seconds": 0}
    assert json.dumps(asdict(again) | ignored) == json.dumps(asdict(whole) | ignored)
    assert all(isinstance(one, Measured) for one in again.probes)
    assert content(tmp_path / "again") == content(tmp_path / "whole")


def mean_of(step: int, value: float, half: float) -> Measured:
    return Measured(step, "all", "p_undo_right", value, value - half, value + half, 50)


@pytest.mark.parametrize(
    ("before", "now", "half", "threshold", "expected"),
    [
        ([0.01] * 50, [0.01] * 50, 0.001, 0.7, None),
        ([0.01] * 50, [0.01] * 49 + [0.9], 0.02, 0.7, "above decode.threshold 0.7 in 2.0% of the held-out right states, 0.0%"),
        ([0.01] * 49 + [0.9], [0.01] * 49 + [0.9], 0.02, 0.7, None),  # it has not risen
        ([0.001] * 50, [0.05] * 50, 0.01, 0.7, "has risen to 0.050 from 0.001"),
        ([0.001] * 50, [0.05] * 50, 0.03, 0.7, None),  # within the intervals
        ([0.001] * 50, [0.01] * 50, 0.001, 0.7, None),  # clear, but too little to matter
        ([0.0] * 50, [0.01] * 45 + [0.9] * 5, 0.2, None, None),  # no threshold, and not clear
    ],
)
def test_alarms(before: list[float], now: list[float], half: float, threshold: float | None, expected: str | None) -> None:
    states = [(0, before), (300, now)]
    probes = [mean_of(step, sum(some) / 50, half) for step, some in states]
    lines = alarms(probes, states, threshold)
    assert len(lines) == (expected is not None)
    if expected:
        assert lines[0].startswith("step 300: ") and expected in lines[0]


def test_alarms_of_a_curve_without_probes() -> None:
    assert alarms([], [], 0.7) == []


def test_every_check_is_a_line() -> None:
    at = [(0, "all", "p_undo_right", 0.01), (0, "batch", "loss", 2.0), (0, "all", "p_undo_error", 0.02)]
    later = [(0, "forward", "accuracy", 0.9)]
    later += [(300, "all", "p_undo_error", 0.5), (300, "all", "logp_error", -2.25), (300, "hindsight", "p_undo_error", 0.7)]
    probes = [Measured(step, group, name, value, None, None, 9) for step, group, name, value in (*at, *later)]
    assert said(probes) == [
        "step 0: P(undo | own error) 0.020, P(undo | right) 0.010",
        "step 300: P(undo | own error) 0.500, log p(error) -2.250",
    ]
    assert said([one for one in probes if one.group == "batch"]) == said([]) == []


def test_alarms_of_a_check_that_is_under_way() -> None:
    """The driver polls a training, which may stand between its states and their means."""
    probes = [Measured(step, "all", "p_undo_right", value, 0.0, 1.0, 2) for step, value in ((0, 0.0), (50, 0.9))]
    states = [(0, (0.0, 0.0)), (50, (0.9, 0.9)), (100, (0.9, 0.9))]
    assert alarms(probes, states, 0.7) == alarms(probes, states[:2], 0.7) != []


@pytest.mark.parametrize("form", ["soft", "rewind"])
def test_cosines_are_those_of_plain_forwards(form: Any) -> None:
    """Every place alone, its context from the start; whatever is masked."""
    tries = [[], [Detour(2, WrongTry((4, 1), (True, False)))], [], [Detour(2, WrongTry((2, 6, 0), (False, True, False)))]]
    made = [build_trace((5, n), (1, 3, n, 6), some, rule("step")) for n, some in enumerate(tries)]
    data = TrainingSet(made, rule("step"), Targets("decision"), Form(form, "immediate"))
    model = model_of("llama")
    sums: dict[str, Any] = {}
    for trace in data.traces:
        if Role.UNDO not in trace.roles:
            continue
        for one in taught(trace, replace(data, targets=Targets("none"))):
            terms = {Role.ERROR: "error", Role.UNDO: "undo", Role.CORRECTION: "correction"}
            if term := terms.get(Role(trace.roles[one.at])):
                logits = model(input_ids=torch.tensor([one.context]), use_cache=False).logits[0, -1]
                sums[term] = sums.get(term, 0) + logits.log_softmax(-1)[one.target]
    found = {}
    for term, total in sums.items():
        parts = torch.autograd.grad(total, list(model.parameters()), retain_graph=True, allow_unused=True)
        found[term] = torch.cat([part.flatten() for part in parts if part is not None])
    cosines = term_cosines(model, data, range(4), PAD)
    assert list(cosines) == list(COSINES) == list(report.COSINES)  # which has the words for them
    for name, value in cosines.items():
        a, b = name.split("_")[1:]
        assert value == pytest.approx(float(torch.nn.functional.cosine_similarity(found[a], found[b], dim=0)), abs=1e-4)
    assert all(weight.grad is None for weight in model.parameters())
    assert term_cosines(model, data, [0, 2], PAD) == {}  # clean rows
