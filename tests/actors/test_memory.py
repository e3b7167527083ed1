"""Settings that save memory change no result, and a learner that runs out of it says what to lower."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError
from transformers import LlamaForCausalLM

from actors.cluster import ClusterError
from actors.learner import Curve, TrainingError, TreeTrainer, fit
from actors.memory import how_to_save, out_of_memory
from actors.workers import Workers
from pipeline.backtrack.targets import Form
from pipeline.config import BaseTraining, Settings, SftSettings
from tests.actors.trained import prepared, thirty_traces, weights

COMMON: dict[str, Any] = {"steps": 4, "rows": 4, "row_tokens": 64, "lr": 1e-2, "log_every": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    prepared(folder)
    return folder


def train(source: Path, target: Path, form: Any = "rewind", **more: Any) -> Curve:
    return fit(source, target, thirty_traces(source, Form(form)), SftSettings(**{**COMMON, **more}), 0, Curve())


def assert_equal(one: Curve, other: Curve, folders: tuple[Path, Path], tolerance: float) -> None:
    for (_, left), (_, right) in zip(one.losses, other.losses, strict=True):
        assert left == pytest.approx(right, rel=tolerance)
    left, right = map(weights, folders)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("form", ["soft", "hard", "rewind"])
@pytest.mark.parametrize("what", ["all", "lora", "undo_row"])
def test_memory_savers_change_nothing(source: Path, tmp_path: Path, what: str, form: str) -> None:
    """Parts of a step, and activations computed twice: the same losses, the same weights."""
    whole = train(source, tmp_path / "whole", form, trainable=what)
    assert whole.losses[0][1] > whole.losses[-1][1] or what == "undo_row"
    for name, saver in {"parts": {"accumulate": 2}, "twice": {"gradient_checkpointing": True, "accumulate": 4}}.items():
        saved = train(source, tmp_path / name, form, trainable=what, **saver)
        assert_equal(whole, saved, (tmp_path / "whole", tmp_path / name), 1e-6)
        assert (saved.tokens, saved.target_tokens) == (whole.tokens, whole.target_tokens)


@pytest.mark.parametrize("what", ["all", "lora"])
def test_activations_are_really_computed_twice(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    calls = 0
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(*given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*given, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    train(source, tmp_path / "once", trainable=what)
    once, calls = calls, 0
    train(source, tmp_path / "twice", trainable=what, gradient_checkpointing=True)
    assert calls == 2 * once >= 2 * COMMON["steps"]


def test_bfloat16_computes_coarsely_and_keeps_the_weights_fine(source: Path, tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    step = TreeTrainer.compute_loss

    def watched(self: Any, model: Any, *given: Any, **more: Any) -> Any:
        layer = self.accelerator.unwrap_model(model).model.layers[0].mlp.gate_proj
        hook = layer.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
        try:
            return step(self, model, *given, **more)
        finally:
            hook.remove()

    fine = train(source, tmp_path / "fine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeTrainer, "compute_loss", watched)
        coarse = train(source, tmp_path / "coarse", dtype="bfloat16")
    assert set(seen) == {torch.bfloat16}
    assert {part.dtype for part in weights(tmp_path / "coarse").values()} == {torch.float32}
    assert coarse.losses != fine.losses
    for (_, left), (_, right) in zip(fine.losses, coarse.losses, strict=True):
        assert left == pytest.approx(right, rel=2e-2)


# ---- out of memory ----

# What torch's allocators and the system really say.
SAID: list[Exception] = [
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "4611686018427387904 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 by."),
    RuntimeError("CUDA error: out of memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", SAID, ids=lambda error: f"{type(error).__name__}: {str(error)[-20:]}")
def test_out_of_memory_names_step_and_settings(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    forward, calls = LlamaForCausalLM.forward, 0

    def small(self: Any, *given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return forward(self, *given, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", small)
    with pytest.raises(TrainingError) as caught:
        train(source, tmp_path / "target")
    assert str(caught.value) == (
        "out of memory at step 3: raise sft.accumulate (now 1; sft.rows is 4), or lower sft.rows or sft.row_tokens "
        "(now 4 and 64), or set sft.gradient_checkpointing to true"
    )
    assert not (tmp_path / "target").exists()


def test_the_real_allocator_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    try:
        raise ValueError("within another library") from caught.value
    except ValueError as wrapped:
        assert out_of_memory(wrapped)


def test_a_learner_that_decodes_says_how_to_save_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training has said at which step, and by which settings, before it comes here."""
    workers = Workers(Settings.model_validate({"engine": {"max_num_seqs": 96}}), tmp_path, print)
    told = TrainingError("out of memory at step 3: lower sft.rows")
    for cause, wanted, said in (
        (SAID[0], ClusterError, r"^the learner is out of memory: lower engine\.max_num_seqs \(now 96\)$"),
        (told, TrainingError, "^out of memory at step 3: lower sft.rows$"),
        (KeyError("x"), KeyError, "x"),
    ):
        failed = RayTaskError("decode", "its traceback", cause)
        monkeypatch.setattr("actors.workers.ray.get", lambda ref, failed=failed: (_ for _ in ()).throw(failed))
        with pytest.raises(wanted, match=said):
            workers._get(None)


def test_other_errors_are_not_taken_for_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(LlamaForCausalLM, "forward", broken)
    with pytest.raises(RuntimeError, match="size of tensor"):
        train(source, tmp_path / "target")


def test_what_is_done_already_is_not_advised() -> None:
    said = how_to_save(BaseTraining(rows=4, accumulate=4, gradient_checkpointing=True))
    assert said == "lower base.train.rows or base.train.row_tokens (now 4 and 256)"
