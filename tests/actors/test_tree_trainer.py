"""Packed rows teach what each of their traces alone would teach: same contexts, same targets, same weights, same gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import actors.learner as learner
from actors.learner import Curve, TreeTrainer, _arguments, fit, logits_only_at
from actors.packing import TrainingSet, collate, examples_of
from actors.segments import attends_by_segment
from actors.trainable import prepare
from pipeline.backtrack.curriculum import Schedule
from pipeline.backtrack.embedding import add_undo_token
from pipeline.backtrack.layout import lay_out
from pipeline.backtrack.targets import Form, Targets, Weights, segments, trace_walk
from pipeline.backtrack.trace import Detour, Role, Trace, WrongTry, build_trace
from pipeline.backtrack.undo import UndoRule, Unit, apply_undo
from pipeline.config import ScratchModel, TrainSettings
from pipeline.stages.base import new_model, train_tokenizer
from tests.actors.drawn import LAYOUTS, PAD, ROW, model_of, solved, traces
from tests.pipeline.tiny import END, FORMS, VOCABULARY, U, decisions, forward, rule, tiny_model

# ---- the loss ----


@dataclass(frozen=True)
class Taught:
    """One target of a trace by itself."""

    at: int
    """Index of the token in the trace."""
    context: tuple[int, ...]
    """What a rewound cache holds there; read in the rewind form alone."""
    target: int
    weight: float
    ends_run: bool = False
    """What is taught is not to emit the target."""


def taught(trace: Trace, data: TrainingSet) -> list[Taught]:
    """Every target of one trace, each found from the start of the trace again."""
    start, wanted, unit = trace.prompt_length, data.targets, data.rule.unit
    weights = (0.0, *(getattr(wanted.weights, name) for name in ("prefix", "error", "consequence", "undo", "correction")))
    found = [Taught(at, trace.ids[:at], trace.ids[at], 1.0) for at in range(1, start) if wanted.prompt]
    walk = trace_walk(trace, data.rule, wanted)
    step = 0
    for context, token, ends_run in decisions(walk, unit, data.form.rewinding):
        at = start + step
        if ends_run:  # is as much worth as the undos of the run
            found.append(Taught(at, context, U, weights[Role.UNDO], True))
            continue
        step += 1
        assert token == trace.ids[at]
        weight = weights[trace.roles[at]]
        if trace.roles[at] == Role.ERROR and wanted.mask != "none":
            weight = 0.0
        if trace.roles[at] == Role.CONSEQUENCE and wanted.mask == "span":
            weight = 0.0
        standing = [start + i for i in apply_undo(trace.ids[start:at], data.rule).source]
        error = next((i for i, place in enumerate(standing) if trace.roles[place] == Role.ERROR), None)
        due = error is not None and wanted.detect_at != "evidence"
        if wanted.detect_at == "step_end":
            due = due and any(trace.ids[place] == END for place in standing[error:])
        if due and token != U:
            token, weight = U, weights[Role.UNDO]
        found.append(Taught(at, context, token, weight))
    if data.form.context != "rewind":
        return [one for one in found if not one.ends_run]
    best: dict[tuple[tuple[int, ...], int, bool], Taught] = {}
    for one in found:  # an action that the trace repeats in the same state counts once
        key = (one.context, one.target, one.ends_run)
        if key not in best or one.weight > best[key].weight:
            best[key] = one
    return list(best.values())


def logprobs_before(model: Any, trace: Trace, some: Sequence[Taught], data: TrainingSet) -> torch.Tensor:
    """[targets, vocabulary] What an ordinary forward gives for each, by what is visible there."""
    form, start = data.form, trace.prompt_length
    if form.context == "rewind" or form.context == "soft":
        contexts = [one.context if form.context == "rewind" else trace.ids[: one.at] for one in some]
        longest = max(map(len, contexts))
        padded = torch.tensor([[*context, *[PAD] * (longest - len(context))] for context in contexts])
        ends = torch.tensor([len(context) - 1 for context in contexts])
        logits = model(input_ids=padded, use_cache=False).logits[torch.arange(len(contexts)), ends]
        return torch.log_softmax(logits, -1)
    ids = trace.ids
    sees = torch.eye(len(ids), dtype=torch.bool)
    positions = []
    for place, token in enumerate(ids):
        stands = {start + i for i in apply_undo(ids[start : place + 1], data.rule).source} | set(range(start))
        positions.append(place if form.positions == "kept" else sum(other < place for other in stands))
        for other in range(place):
            sees[place, other] = other in stands or (ids[other] == U and other >= start and not form.hide_undos)
        assert token != U or place not in stands
    out = model(
        input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), attention_mask=sees[None, None], use_cache=False
    )
    return torch.log_softmax(out.logits[0, [one.at - 1 for one in some]], -1)


def slow_loss(model: Any, data: TrainingSet) -> torch.Tensor:
    losses, total = [], 0.0
    for trace in data.traces:
        some = [one for one in taught(trace, data) if one.weight > 0]
        if not some:
            continue
        for one, logprobs in zip(some, logprobs_before(model, trace, some, data), strict=True):
            chosen = logprobs[one.target]
            losses.append(-one.weight * (torch.log(-torch.expm1(chosen)) if one.ends_run else chosen))
            total += one.weight
    return torch.stack(losses).sum() / total if losses else torch.zeros(())


@functools.cache
def model_by_segment(name: str) -> Any:
    model = tiny_model(name)
    assert attends_by_segment(model)
    return model


def fast_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the trainer computes. It takes logits in fp32."""
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(unwrap_model=lambda one: one), dynamic=None, joint=None)
    return TreeTrainer.compute_loss(trainer, model, batch, num_items_in_batch=float(batch["weight"].sum()))


def batch_of(data: TrainingSet, rows: int = 2, by_segment: bool = False) -> dict[str, Any]:
    """All traces once, in rows of several."""
    examples, left_out = examples_of(data, ROW)
    assert left_out == 0
    packed = [examples[number::rows] for number in range(rows)]
    return collate(packed, data, PAD, None if by_segment else ROW * 4, by_segment)


def gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])


@st.composite
def ways_to_teach(draw: st.DrawFn) -> Targets:
    weight = st.sampled_from([0.0, 0.5, 1.0, 2.0])
    return Targets(
        draw(st.sampled_from(["none", "decision", "span"])),
        draw(st.sampled_from(["first", "step_end", "evidence"])),
        draw(st.booleans()),
        Weights(*(draw(weight) for _ in range(5))) if draw(st.booleans()) else Weights(),
    )


@pytest.mark.parametrize("form", LAYOUTS)
@settings(deadline=None, max_examples=25)
@given(traces(), ways_to_teach(), st.booleans())
def test_the_loss_of_a_batch_is_that_of_its_traces_alone(form: str, drawn: Any, targets: Targets, together: bool) -> None:
    unit, some = drawn
    data = TrainingSet(some, rule(unit), targets, LAYOUTS[form], together)
    if unit != "token":
        data = replace(data, form=replace(data.form, rewinding="immediate"))
    model = model_of("llama")
    slow = slow_loss(model, data)
    for by_segment in (False, True):  # wide rows under a mask, and no wider than need be with attention within segments
        fast = fast_loss(model_by_segment("llama") if by_segment else model, batch_of(data, by_segment=by_segment))
        torch.testing.assert_close(fast.double(), slow.double(), rtol=1e-5, atol=1e-6)
        if slow.requires_grad:
            own = model_by_segment("llama") if by_segment else model
            torch.testing.assert_close(gradient(own, fast), gradient(model, slow), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("unit", "rewinding"), FORMS)
@pytest.mark.parametrize("form", ["soft", "hard", "rewind"])
def test_an_error_at_position_0(form: Any, unit: Unit, rewinding: Any) -> None:
    """The first token after the prompt is the error: everywhere it is masked, and what is taught adds up."""
    trace = build_trace((5,), (1, 0), [Detour(0, WrongTry((4, 6), (True, False)))], rule(unit))
    assert trace.roles[1] == Role.ERROR
    data = TrainingSet([trace], rule(unit), form=Form(form, rewinding))
    model, batch = model_of("llama"), batch_of(data, rows=1)
    torch.testing.assert_close(fast_loss(model, batch).double(), slow_loss(model, data), rtol=1e-5, atol=1e-6)
    assert (0, 0, 4) not in set(zip(*(batch[name].tolist() for name in ("row", "column", "target")), strict=True))


def example_set(form: Form, together: bool = True) -> TrainingSet:
    some = [
        build_trace((5, 2), (1, 0, 3, 6), [Detour(2, WrongTry((4, 1), (True, False)))], rule("token")),
        build_trace((5, 2), (1, 0, 3, 6), (), rule("token")),
        build_trace((5, 2), (1, 6), [Detour(0, WrongTry((0, 3, 2), (True, False, False)))], rule("token")),
    ]
    return TrainingSet(some, rule("token"), form=form, together=together)


SHIFTS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "places to the right": lambda batch: {"column": batch["column"] + 1},
    "places to the left": lambda batch: {"column": (batch["column"] - 1).clamp(min=0)},
    "targets of the next place": lambda batch: {"target": batch["target"].roll(-1)},
    "targets of the place before": lambda batch: {"target": batch["target"].roll(1)},
    "weights": lambda batch: {"weight": batch["weight"].roll(1)},
    "everything visible": lambda batch: {"attention_mask": torch.ones_like(batch["attention_mask"]).tril()},
    "positions": lambda batch: {"position_ids": batch["position_ids"].roll(1, -1)},
}


@pytest.mark.parametrize("what", SHIFTS)
def test_an_off_by_one_is_noticed(what: str) -> None:
    data = example_set(Form("rewind", "immediate"))
    model, batch = model_of("llama"), batch_of(data, rows=1)
    slow = slow_loss(model, data)
    assert abs(fast_loss(model, batch) - slow) < 1e-5
    assert abs(fast_loss(model, batch | SHIFTS[what](batch)) - slow) > 1e-3


def test_what_a_tree_shares_is_there_once_and_counts_for_each() -> None:
    """Two traces begin with 1 behind the prompt: one place, one target, twice the weight."""
    some = [solved((5, 2), (1, 0)), solved((5, 2), (1, 6))]
    batch = batch_of(TrainingSet(some, rule("token"), form=Form("rewind"), together=True), rows=1)
    found = sorted(zip(*(batch[name].tolist() for name in ("row", "column", "target", "weight")), strict=True))
    assert found == [(0, 1, 1, 2.0), (0, 2, 0, 1.0), (0, 2, 6, 1.0)]
    assert batch["input_ids"][0, :6].tolist() == [5, 2, 1, 0, 6, PAD]


def test_a_batch_that_teaches_nothing() -> None:
    trace = solved((5, 2), (1, 0))
    data = TrainingSet([trace], rule("token"), Targets(weights=Weights(correction=0.0)))
    batch = batch_of(data, rows=1)
    assert batch["weight"].shape == batch["row"].shape == (0,)
    assert float(fast_loss(model_of("llama"), batch).detach()) == 0


def test_an_undo_token_in_the_prompt_is_refused() -> None:
    roles = (Role.PROMPT, Role.PROMPT, Role.CORRECTION)
    data = TrainingSet([Trace((5, U, 1), roles)], rule("token"), form=Form("rewind"))
    with pytest.raises(ValueError, match="the prompt of walk 0 holds the undo token"):
        examples_of(data, ROW)


# ---- logits where they are needed ----


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_logits_at_places_are_those_of_the_full_forward(name: str) -> None:
    model, data = model_of(name), example_set(Form("rewind", "deferred"))
    layout = lay_out(
        [segments(data.traces, data.rule, data.targets, data.form), segments(data.traces[:1], data.rule, data.targets, Form())]
    )
    with torch.no_grad():
        full = forward(model, layout).logits
        with logits_only_at(model, layout.row, layout.column):
            picked = forward(model, layout).logits
        again = forward(model, layout).logits
    assert picked.shape == (len(layout.row), VOCABULARY) and len(layout.row) > 10
    torch.testing.assert_close(picked, full[layout.row, layout.column], rtol=0, atol=1e-12)
    torch.testing.assert_close(again, full, rtol=0, atol=0)


def test_the_head_is_whole_again_after_an_error() -> None:
    model, nowhere = tiny_model("llama"), torch.zeros(0, dtype=torch.long)
    with pytest.raises(RuntimeError, match="boom"), logits_only_at(model, nowhere, nowhere):
        raise RuntimeError("boom")
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, VOCABULARY)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("what", ["undo_row", "lora"])
def test_logits_at_places_of_models_that_train_a_part(what: Any, tied: bool) -> None:
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    plain = new_model(ScratchModel(layers=1, width=32, heads=2, vocab=300), tokenizer, 0)
    if not tied:
        plain.config.tie_word_embeddings = False
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    model = prepare(plain, 299, what, 4, 8.0).eval()
    ids, row, column = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])
    with torch.no_grad():
        full = model(input_ids=ids).logits
        with logits_only_at(model, row, column):
            picked = model(input_ids=ids).logits
    torch.testing.assert_close(picked, full[row, column], rtol=0, atol=1e-5)


# ---- a step of the trainer ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, UndoRule]:
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    model = new_model(ScratchModel(layers=1, width=32, heads=2, vocab=300), tokenizer, 0)
    undo_id = add_undo_token(model, tokenizer, "<|BACKTRACK|>", "mean", [], "", 0.02, 0)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, UndoRule(undo_id, "all")


def uneven_set(undo: UndoRule) -> TrainingSet:
    """Eight traces, the last ones with many more targets than the first."""
    some = [
        build_trace((40, 41), range(50, 52 + 3 * number), [Detour(1, WrongTry((90, 91), (True, False)))] * (number % 2), undo)
        for number in range(8)
    ]
    return TrainingSet(some, undo, Targets(weights=Weights(undo=2.0)), Form("rewind"))


@pytest.mark.parametrize("what", ["all", "lora"])
def test_accumulated_gradients_are_those_of_one_batch(folder: tuple[Path, UndoRule], tmp_path: Path, what: Any) -> None:
    """The loss is a mean over all targets of a step, however they are split; and it is what a plain forward gives."""
    path, undo = folder
    data = uneven_set(undo)
    examples, _ = examples_of(data, 64)
    logs = []
    for rows, accumulated in ((8, 1), (4, 2), (2, 4)):
        args = _arguments(TrainSettings(steps=1, rows=8, row_tokens=64, log_every=1), 0, str(tmp_path))
        args.per_device_train_batch_size, args.gradient_accumulation_steps = rows, accumulated
        torch.manual_seed(0)
        model = prepare(learner.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), undo.undo_id, what, 4, 8.0)
        trainer = TreeTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"row": list(range(8))}),
            data_collator=lambda batch: collate([[examples[item["row"]]] for item in batch], data, PAD, 64),
            processing_class=learner.AutoTokenizer.from_pretrained(path),
        )
        trainer.train()
        logs.append(trainer.state.log_history[0] | {"targets": trainer.targets_seen})
    fresh = learner.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = 0.0
    weight = 0.0
    with torch.no_grad():
        for trace in data.traces:
            some = [one for one in taught_by_role(trace, undo) if one.weight]
            logprobs = logprobs_before(fresh, trace, some, data)
            expected -= sum(one.weight * float(row[one.target]) for one, row in zip(some, logprobs, strict=True))
            weight += sum(one.weight for one in some)
    for log in logs:
        assert log["loss"] == pytest.approx(expected / weight, rel=1e-4)
        assert log["targets"] == weight
        assert log["loss"] == pytest.approx(logs[0]["loss"], rel=1e-5)
        assert log["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-4)


def taught_by_role(trace: Trace, undo: UndoRule) -> list[Taught]:
    """Unit `all`, rewind: contexts from the surviving ids, undos count twice, errors nothing; repeats once."""
    start, best = trace.prompt_length, {}
    for at in range(start, len(trace.ids)):
        context = trace.ids[:start] + apply_undo(trace.ids[start:at], undo).surviving
        weight = {Role.ERROR: 0.0, Role.UNDO: 2.0}.get(Role(trace.roles[at]), 1.0)
        best[context, trace.ids[at]] = Taught(at, context, trace.ids[at], weight)
    return list(best.values())


def test_a_training_run_keeps_to_its_schedule(
    folder: tuple[Path, UndoRule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 0 to 3 see clean rows alone, and rows are trained on in the order in which they were packed."""
    path, undo = folder
    data = replace(uneven_set(undo), most_undos=Schedule(((0, 0), (4, 9))))
    seen: list[list[int]] = []

    def watched(rows: Any, *rest: Any) -> dict[str, torch.Tensor]:
        seen.append([example.undos for row in rows for example in row])
        return collate(rows, *rest)

    monkeypatch.setattr(learner, "collate", watched)
    curve = fit(path, tmp_path / "out", data, TrainSettings(steps=8, rows=2, row_tokens=32, log_every=8), 0, Curve())
    assert curve.step == len(seen) == 8
    assert not any(count for step in seen[:4] for count in step)
    assert any(count for step in seen[4:] for count in step)
