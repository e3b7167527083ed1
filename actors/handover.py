"""Weights from a learner's GPU into engines on others, by vLLM's weight transfer over NCCL: nothing passes through host memory.

The way through Ray's object store (actors/weights.py) is the default and the only one on CPUs. A rollout actor that is started
again takes that way too, since its rank in the group is gone; the next transfer makes a new group.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from torch import Tensor

from actors.weights import unique

BACKEND = "nccl"


class ModelSource:
    """A model's weights in the dtype of the engines, each once: what vLLM calls a WeightSource."""

    def __init__(self, model: Any, dtype: str) -> None:
        self._weights, self._dtype = unique(dict(model.named_parameters())), getattr(torch, dtype)

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, self._dtype, tuple(part.shape)) for name, part in self._weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, part in self._weights.items():
            yield name, part.detach().to(self._dtype)


class EngineClient:
    """The engines' side of a transfer: vLLM's four calls, to every rollout actor at once.

    Each engine is a world of its own to vLLM, so that all would take the same ranks: they are told apart here.
    """

    def __init__(self, actors: Sequence[Any], timeout: float) -> None:
        """`timeout`: seconds that all may take for a call."""
        self._actors, self._timeout = actors, timeout

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offset = init_info["rank_offset"]
        infos = [{"init_info": init_info | {"rank_offset": offset + at}} for at in range(len(self._actors))]
        self._call("init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("update_weights", [{"update_info": update_info}] * len(self._actors))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update")

    def _call(self, name: str, given: Sequence[dict[str, Any]] | None = None) -> None:
        each = [()] * len(self._actors) if given is None else [(one,) for one in given]
        ray.get([actor.transfer.remote(name, *more) for actor, more in zip(self._actors, each, strict=True)], timeout=self._timeout)


class Sender:
    """The learner's side of a transfer."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._actors: list[Any] = []
        self._engine: Any = None

    def send(self, model: Any, dtype: str, actors: Sequence[Any]) -> None:
        """The model's weights of now into the engines of all actors.

        Raises:
            GetTimeoutError, RayActorError: an engine did not answer.
        """
        source = ModelSource(model, dtype)
        if list(actors) != self._actors:
            # The former group is left as it is: ending it would wait for ranks that have died.
            self._engine = self._connected(source, EngineClient(actors, self._timeout), len(actors))
            self._actors = list(actors)
        self._engine.source = source
        self._engine.send_weights()

    def _connected(self, source: Any, client: Any, engines: int) -> Any:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        address = ray.util.get_node_ip_address()
        info = NCCLTrainerInitInfo(address, port, 1 + engines, packed=torch.cuda.is_available(), rank=0)
        return NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)
