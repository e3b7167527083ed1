"""Settings of the engines; a part of pipeline/config.py."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

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
    simulated: SimulatedSettings = Field(SimulatedSettings(), description="Kind simulated: how long it takes.")

    @model_validator(mode="after")
    def _has_script(self) -> Self:
        if (self.kind == "scripted") != (self.script is not None):
            raise ValueError(f"kind scripted and a script belong together: kind is {self.kind}, script is {self.script}")
        return self
