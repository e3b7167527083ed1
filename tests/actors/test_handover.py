"""Weights by vLLM's own transfer into a real vLLM: all of it but NCCL, in whose place a queue stands that has its one call."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer import nccl_common

from actors import handover
from actors.engines import VllmEngine
from actors.handover import ModelSource, Sender
from actors.weights import check_weights, probe_of
from pipeline.config import EngineSettings
from tests.actors.test_engines import save_model


class Wire:
    """A communicator whose group is this process: what rank 0 broadcasts, the others receive."""

    lines: dict[int, queue.Queue[Tensor]]
    joined: list[tuple[int, int]]

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self.joined.append((rank, size))

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        if self._rank == src:
            for rank in range(1, self._size):
                self.lines[rank].put(tensor.clone())
            return
        sent = self.lines[self._rank].get(timeout=60)
        assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
        tensor.copy_(sent)

    def destroy(self) -> None: ...


@pytest.fixture
def wired(monkeypatch: pytest.MonkeyPatch) -> None:
    Wire.lines, Wire.joined = {rank: queue.Queue() for rank in (1, 2)}, []

    def join(master_address: str, master_port: int, rank: int, world_size: int, device: Any) -> Wire:
        return Wire(rank, world_size)

    monkeypatch.setattr(nccl_common, "stateless_init_process_group", join)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(handover.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(handover.ray, "get", lambda refs, timeout: [thread.result(timeout) for thread in refs])


class Running(threading.Thread):
    """What a call of an actor is: it runs beside its caller."""

    def __init__(self, call: Any, given: tuple[Any, ...]) -> None:
        super().__init__(daemon=True)
        self._call, self._given, self._error = call, given, None
        self.start()

    def run(self) -> None:
        try:
            self._call(*self._given)
        except BaseException as error:
            self._error = error

    def result(self, timeout: float) -> None:
        self.join(timeout)
        if self._error is not None:
            raise self._error


def actor_of(transfer: Any) -> Any:
    return SimpleNamespace(transfer=SimpleNamespace(remote=lambda *given: Running(transfer, given)))


class Listener:
    """An engine that only writes down what comes."""

    def __init__(self) -> None:
        self.got: dict[str, Tensor] = {}
        self.calls: list[str] = []

    def transfer(self, call: str, *given: dict[str, Any]) -> None:
        self.calls.append(call)
        if call == "init_weight_transfer_engine":
            info = given[0]["init_info"]
            self._wire = Wire(info["rank_offset"], info["world_size"])
        if call == "update_weights":
            info = given[0]["update_info"]
            for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
                self.got[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                self._wire.broadcast(self.got[name], 0)


def model_of(folder: Path, seed: int) -> Any:
    return AutoModelForCausalLM.from_pretrained(save_model(folder / str(seed), seed), dtype=torch.float32).eval()


def test_engines_generate_with_what_was_sent(tmp_path: Path, wired: None) -> None:
    """Two engines, each with a rank of its own; new weights go the same way again, and a new engine makes a new group."""
    engine = VllmEngine(save_model(tmp_path / "start", 0), EngineSettings(handover="nccl"), context=128, seed=0)
    listener, sender = Listener(), Sender(60)
    actors = [actor_of(engine.transfer), actor_of(listener.transfer)]
    for seed in (1, 2):
        model = model_of(tmp_path, seed)
        with pytest.raises(RuntimeError, match="does not generate with the weights"):
            check_weights(engine, probe_of(model), "float32", "the model")
        sender.send(model, "float32", actors)
        check_weights(engine, probe_of(model), "float32", "the model")
        assert listener.got.keys() == {name for name, _ in model.named_parameters()}
        assert all(torch.equal(listener.got[name], part) for name, part in model.named_parameters())
    assert sorted(Wire.joined) == [(0, 3), (1, 3), (2, 3)]
    one_update = ["start_weight_update", "update_weights", "finish_weight_update"]
    assert listener.calls == ["init_weight_transfer_engine", *one_update, *one_update]
    sender.send(model_of(tmp_path, 3), "float32", actors[:1])
    check_weights(engine, probe_of(model_of(tmp_path, 3)), "float32", "the model")
    assert sorted(Wire.joined) == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_an_engine_that_fails_is_no_wait_for_ever(tmp_path: Path, wired: None) -> None:
    def broken(call: str, *given: dict[str, Any]) -> None:
        if call == "start_weight_update":
            raise ValueError("this engine cannot")

    with pytest.raises(ValueError, match="this engine cannot"):
        Sender(60).send(model_of(tmp_path, 1), "float32", [actor_of(broken)])


def test_weights_are_sent_in_the_dtype_of_the_engines_and_tied_ones_once(tmp_path: Path) -> None:
    model = model_of(tmp_path, 1)
    model.lm_head.weight = model.get_input_embeddings().weight
    source = ModelSource(model, "bfloat16")
    sent = dict(source)
    assert [(one.name, one.dtype, one.shape) for one in source.metadata()] == [
        (name, torch.bfloat16, tuple(part.shape)) for name, part in sent.items()
    ]
    assert {part.dtype for part in sent.values()} == {torch.bfloat16} and "lm_head.weight" not in sent
    assert torch.equal(sent["model.norm.weight"], model.model.norm.weight.bfloat16())
