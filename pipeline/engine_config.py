"""Settings of the engines; a part of pipeline/config.py."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.cluster_config import ClusterSettings
from pipeline.grpo_config import GrpoSettings
from pipeline.task_config import Section


class SimulatedSettings(Section):
    """How long an engine without a model takes; it sleeps as long, see actors/simulated.py."""

    tokens: float = Field(100, ge=1, le=131_072, description="Ids of a row, mean; max_tokens cuts longer ones.")
    tokens_sd: float = Field(0.5, ge=0, le=3, description="Standard deviation of the logarithm of a row's length (log-normal).")
    token_ms: float = Field(20, ge=0, le=60_000, description="Milliseconds from one id of a row to the next, mean over batches.")
    token_ms_sd: float = Field(0.1, ge=0, le=3, description="Standard deviation of their logarithm, from batch to batch.")
    prompt_ms: float = Field(50, ge=0, le=600_000, description="Milliseconds before a row's first id.")


class EngineSettings(Section):
    kind: Literal["auto", "vllm", "hf", "scripted", "simulated"] = Field(
        "auto",
        description="auto takes vllm where it is installed; scripted and simulated have no model: for tests, for measuring scale.",
    )
    script: str | None = Field(None, min_length=1, description="Kind scripted: dataset of problems whose solutions it writes.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Numbers the engine computes in.")
    max_prompt: int = Field(256, ge=1, le=131_072, description="Longest prompt in tokens; longer ones are reported and left out.")
    max_num_seqs: int = Field(256, ge=1, le=4096, description="Rows that the engine decodes at a time.")
    kv_cache_gib: int = Field(1, ge=1, le=1024, description="Memory for vLLM's KV cache on CPUs.")
    gpu_memory: float = Field(0.5, gt=0, le=1, description="Share of a GPU's memory for vLLM.")
    sleep: bool = Field(
        False,
        description="vLLM leaves its GPU to the learner while that trains: weights in main memory, no cache. Nothing on CPUs.",
    )
    simulated: SimulatedSettings = Field(SimulatedSettings(), description="Kind simulated: how long it takes.")
    handover: Literal["store", "nccl"] = Field(
        "store", description="How the GRPO learner's weights come: through Ray's object store, or from GPU to GPU (vLLM)."
    )

    @model_validator(mode="after")
    def _has_script(self) -> Self:
        if (self.kind == "scripted") != (self.script is not None):
            raise ValueError(f"kind scripted and a script belong together: kind is {self.kind}, script is {self.script}")
        return self


def check_sleep(engine: EngineSettings, grpo: GrpoSettings) -> None:
    """
    Raises:
        ValueError: the engine cannot sleep while the learner trains.
    """
    if not engine.sleep:
        return
    if engine.kind not in ("auto", "vllm"):
        raise ValueError(f"engine.sleep needs vLLM, engine.kind is {engine.kind}")
    if grpo.steps and grpo.staleness:
        raise ValueError(f"engine.sleep needs grpo.staleness 0, is {grpo.staleness}: engines would be busy")


def check_processes(engine: EngineSettings, cluster: ClusterSettings) -> None:
    """
    Raises:
        ValueError: this engine cannot be spread over processes.
    """
    if cluster.tensor_parallel == 1:
        return
    if engine.kind not in ("auto", "vllm"):
        raise ValueError(f"cluster.tensor_parallel: {cluster.tensor_parallel} needs vLLM, engine.kind is {engine.kind}")
    if cluster.rollout.gpus % 1:
        raise ValueError(
            f"cluster.tensor_parallel: {cluster.tensor_parallel} needs whole GPUs, cluster.rollout.gpus is {cluster.rollout.gpus:g}"
        )


def check_handover(engine: EngineSettings, cluster: ClusterSettings, grpo: GrpoSettings) -> None:
    """
    Raises:
        ValueError: weights cannot go from GPU to GPU.
    """
    if engine.handover == "store":
        return
    kinds = {"engine.kind": engine.kind, "grpo.engine": grpo.engine}
    if others := [f"{key} is {kind}" for key, kind in kinds.items() if kind not in ("auto", "vllm")]:
        raise ValueError(f"engine.handover: nccl needs vLLM, {others[0]}")
    gpus = {"cluster.rollout.gpus": cluster.rollout.gpus, "cluster.learner.gpus": cluster.learner.gpus}
    if lacking := [key for key, count in gpus.items() if count < 1]:
        raise ValueError(f"engine.handover: nccl needs {lacking[0]} of 1 or more, is {gpus[lacking[0]]:g}")
    if cluster.tensor_parallel > 1:
        raise ValueError(f"engine.handover: nccl needs cluster.tensor_parallel 1, is {cluster.tensor_parallel}")
    if grpo.staleness:
        raise ValueError(f"engine.handover: nccl needs grpo.staleness 0, is {grpo.staleness}: engines would be busy")
