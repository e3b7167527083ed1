"""A rollout actor: one engine, what it is asked for, and the proof that it generates with the weights it should have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors import metrics
from actors.engines import MODELLESS, Engine, Request, Sampling, make_engine
from actors.parcel import Source
from pipeline.backtrack.cursor import DecodeRequest, Decoding
from pipeline.config import Settings
from pipeline.telemetry import redirect_process_output

if TYPE_CHECKING:  # needs torch, which an actor whose engine has no model does not load
    from actors.weights import Probe, Weights


@dataclass(frozen=True)
class Batch:
    """What an actor made of one batch."""

    done: list[Any]
    """[rows] Completion or Decoded, or a single Quarantined."""
    version: str
    """Digest of the weights that generated it."""


class _Rollout:
    """Holds one engine."""

    def __init__(self, source: Source, settings: Settings, context: int, log_file: str) -> None:
        redirect_process_output(Path(log_file))
        self._dtype = settings.engine.dtype
        self._version = source.version
        self._probe: Probe | None = None  # of the weights of now
        self._asleep = False
        with source.opened() as folder:
            if settings.cluster.tensor_parallel > 1:
                from actors.tensor_parallel import TensorParallelEngine

                self._engine: Engine = TensorParallelEngine(folder, settings, context, Path(log_file))
            else:
                self._engine = make_engine(folder, settings.engine, context, settings.run.seed)
            self._check_folder(folder, source.folder)
        self._busy = metrics.busy_actor(metrics.own_name())

    def ready(self) -> str:
        return self._engine.kind

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Batch:
        with self._busy.work():
            return Batch(self._engine.generate(requests, sampling), self._version)

    def decode(self, requests: Sequence[DecodeRequest], decoding: Decoding) -> Batch:
        with self._busy.work():
            return Batch(self._engine.decode(requests, decoding), self._version)

    def load_weights(self, source: Source) -> None:
        with source.opened() as folder:
            self._engine.load_weights(folder)
            self._check_folder(folder, source.folder)
        self._version = source.version

    def set_weights(self, weights: Weights, version: str) -> None:
        self._engine.set_weights(weights.tensors())
        self._check(weights.probe, version)
        self._version = version

    def transfer(self, call: str, *given: dict[str, Any]) -> None:
        self._engine.transfer(call, *given)  # type: ignore[attr-defined]  # the settings see to it that it is vLLM

    def transferred(self, probe: Probe, version: str) -> None:
        """Weights came from GPU to GPU: those that the probe tells."""
        self._check(probe, version)
        self._version = version

    def sleep(self) -> None:
        if not self._asleep:
            self._engine.sleep()  # type: ignore[attr-defined]  # the pool sees to it that it is vLLM
            self._asleep = True

    def wake(self) -> None:
        """An actor that was started meanwhile is awake already. The engine has to come back with the weights it went with."""
        if self._asleep:
            self._engine.wake()  # type: ignore[attr-defined]
            self._asleep = False
            if self._probe is not None:
                self._check(self._probe, f"{self._version}, behind its sleep")

    def _check_folder(self, folder: Path, name: str) -> None:
        if self._engine.kind in MODELLESS:
            return
        from actors.weights import probe_of_folder

        self._check(probe_of_folder(folder), name)

    def _check(self, probe: Probe, what: str) -> None:
        from actors.weights import check_weights

        check_weights(self._engine, probe, self._dtype, what)
        self._probe = probe


RolloutActor: Any = ray.remote(_Rollout)
