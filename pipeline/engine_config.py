"""Settings of the engines; a part of pipeline/config.py."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.task_config import Section


class EngineSettings(Section):
    kind: Literal["auto", "vllm", "hf", "scripted"] = Field(
        "auto", description="auto takes vllm where it is installed; scripted has no model and is for tests of the machinery."
    )
    script: str | None = Field(None, min_length=1, description="Kind scripted: dataset of problems whose solutions it writes.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Numbers the engine computes in.")
    max_prompt: int = Field(256, ge=1, le=131_072, description="Longest prompt in tokens; longer ones are reported and left out.")
    max_num_seqs: int = Field(256, ge=1, le=4096, description="Rows that the engine decodes at a time.")
    kv_cache_gib: int = Field(1, ge=1, le=1024, description="Memory for vLLM's KV cache on CPUs.")
    gpu_memory: float = Field(0.5, gt=0, le=1, description="Share of a GPU's memory for vLLM.")

    @model_validator(mode="after")
    def _has_script(self) -> Self:
        if (self.kind == "scripted") != (self.script is not None):
            raise ValueError(f"kind scripted and a script belong together: kind is {self.kind}, script is {self.script}")
        return self
