"""Settings of what is watched while a run goes on; a part of pipeline/config.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pipeline.task_config import Section


class MonitorSettings(Section):
    report_to: list[Literal["wandb", "trackio"]] = Field(
        [], description="Where figures of trainings go beside TensorBoard: wandb, trackio."
    )
    rollout_mib: int = Field(64, ge=1, le=65_536, description="Size of a file of logs/rollouts at which the next one begins, MiB.")
    rollout_files: int = Field(8, ge=1, le=10_000, description="Files of logs/rollouts kept for a stage of a round, at most.")

    @field_validator("report_to")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("names one twice")
        return value
