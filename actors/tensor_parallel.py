"""One vLLM engine over several processes of one node, each with its share of every weight: tensor parallelism.

Every process runs the whole engine: scheduler, logits processors, cursors of decoding with undo. All are asked the same in the same
order, and so schedule and draw the same; only the layers exchange numbers (what vLLM calls an external launcher). Workers that
one engine drives, vLLM's other way, would hold the logits processors apart from the cursors, which live in the engine's process.

The first process is a rollout actor and asks the others; to whoever asks it, it is an engine like any other.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import metrics
from actors.cluster import environment, on_this_node
from actors.engines import Completion, Request, Sampling, VllmEngine
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.cluster_config import ActorResources
from pipeline.config import Settings
from pipeline.telemetry import redirect_process_output

if TYPE_CHECKING:
    from torch import Tensor

EXECUTOR = "actors.tensor_executor.TcpExecutor"
_LOOK_SECONDS = 0.2
_GRACE_SECONDS = 20.0  # for an error that all processes meet to be raised here too


@dataclass(frozen=True)
class Place:
    """One process among those of an engine."""

    rank: int
    processes: int
    host: str
    port: int
    """Where the first one listens."""

    def take(self) -> dict[str, Any]:
        """Make this process the one with this rank; what its engine has to be told."""
        found: dict[str, object] = {"RANK": self.rank, "LOCAL_RANK": 0, "WORLD_SIZE": self.processes}
        found |= {"MASTER_ADDR": self.host, "MASTER_PORT": self.port}
        os.environ.update({name: str(value) for name, value in found.items()})
        return {
            "tensor_parallel_size": self.processes,
            "distributed_executor_backend": EXECUTOR,
            # It asks for the topology of GPUs that this process does not see; NCCL takes its place.
            "disable_custom_all_reduce": True,
        }


class _Member:
    """A process of an engine beside the first one."""

    def __init__(self, folder: str, settings: Settings, context: int, place: Place, log_file: str) -> None:
        redirect_process_output(Path(log_file))
        self._engine = VllmEngine(Path(folder), settings.engine, context, settings.run.seed, place.take())

    def ready(self) -> None: ...

    def do(self, method: str, *args: Any) -> int:
        """A call of the engine; a digest of what it drew."""
        return _digest(getattr(self._engine, method)(*args))

    def set_weights(self, arrays: Mapping[str, Any], dtype: str) -> None:
        from actors.weights import as_tensors

        self._engine.set_weights(as_tensors(arrays, dtype))


Member: Any = ray.remote(_Member)


class TensorParallelEngine:
    """The engine as its first process has it, which starts the others. They end with it, and it ends with any of them."""

    kind = "vllm"

    def __init__(self, folder: Path, settings: Settings, context: int, log_file: Path) -> None:
        """Called in an actor that holds the first bundle of a placement group, one bundle a process.

        Raises:
            ValueError: vLLM cannot divide this model so; it says why.
        """
        cluster = settings.cluster
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        processes, host = cluster.tensor_parallel, ray.util.get_node_ip_address()
        places = [Place(rank, processes, host, port) for rank in range(processes)]
        self._dtype, self._others = settings.engine.dtype, []
        for place in places[1:]:
            log = str(log_file.with_name(f"{log_file.stem}-{place.rank}.log"))
            member = Member.options(**_options(cluster.rollout, place.rank))
            self._others.append(member.remote(str(folder), settings, context, place, log))
        with _LeavingWith([one.ready.remote() for one in self._others]):
            self._engine = VllmEngine(folder, settings.engine, context, settings.run.seed, places[0].take())

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        found: list[Completion] = self._all("generate", requests, sampling)
        return found

    def decode(self, requests: Sequence[DecodeRequest], decoding: Decoding) -> list[Decoded]:
        found: list[Decoded] = self._all("decode", requests, decoding)
        return found

    def load_weights(self, folder: Path) -> None:
        self._all("load_weights", folder)

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        from actors.weights import as_arrays

        arrays = ray.put(as_arrays(weights))
        refs = [one.set_weights.remote(arrays, self._dtype) for one in self._others]
        with _LeavingWith(refs):
            self._engine.set_weights(weights)
        ray.get(refs)

    def sleep(self) -> None:
        self._all("sleep")

    def wake(self) -> None:
        self._all("wake")

    def _all(self, method: str, *args: Any) -> Any:
        """A call of the engine in all processes, and what it gave in this one.

        Raises:
            RuntimeError: another process drew something else.
        """
        given = [ray.put(one) for one in args]
        refs = [one.do.remote(method, *given) for one in self._others]
        with _LeavingWith(refs):
            found = getattr(self._engine, method)(*args)
        if any(digest != _digest(found) for digest in ray.get(refs)):
            raise RuntimeError("the processes of a tensor-parallel engine drew different ids")
        return found


class _LeavingWith:
    """Ends this process if one of the others fails while it computes, since it would wait for that one's numbers for ever."""

    def __init__(self, refs: Sequence[Any]) -> None:
        self._refs, self._over = list(refs), threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        waiting = self._refs
        while waiting and not self._over.wait(_LOOK_SECONDS):
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0)
            for ref in ready:
                try:
                    ray.get(ref)
                except RayActorError as error:
                    self._leave(error)
                except RayError as error:
                    if not self._over.wait(_GRACE_SECONDS):
                        self._leave(error)

    @staticmethod
    def _leave(error: RayError) -> None:
        print(f"another process of this engine failed: {error}", flush=True)
        os._exit(1)


def _options(resources: ActorResources, rank: int) -> dict[str, Any]:
    """Of another process: as large as this one, in the placement group's bundle of its rank; on this node where there is none."""
    options = {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "name": f"{metrics.own_name()}-{rank}",
        "runtime_env": {"env_vars": environment(int(os.environ["OMP_NUM_THREADS"]))},
    }
    group = ray.util.get_current_placement_group()
    if group is None:
        return on_this_node(options)
    return options | {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)}


def _digest(drawn: Any) -> int:
    """Of ids, the same in every process; 0 of what draws none."""
    return hash(tuple(one.token_ids if isinstance(one, Completion) else one.ids for one in drawn or ()))
