"""Settings of what is compared: ways to fine-tune within a run, and whole runs; a part of pipeline/config.py."""

from __future__ import annotations

import re
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from pipeline.task_config import Section

_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")


class Compared(Section):
    """Variants by name, and seeds."""

    variants: dict[str, dict[str, Any]] = Field({}, description="{name: settings that differ, ..}.")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="Seeds.")

    @field_validator("variants")
    @classmethod
    def _have_names(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in value:
            if not _VARIANT.fullmatch(name):
                raise ValueError(f"the name {name!r:.80} must be of letters, digits, - and _, 48 at most")
        return value

    @field_validator("seeds")
    @classmethod
    def _are_seeds(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value) or not all(0 <= seed < 2**31 for seed in value):
            raise ValueError("must be different whole numbers from 0 to 2147483647")
        return value


class ExperimentSettings(Compared):
    """Ways to fine-tune, compared from the same model on the same traces, see pipeline/stages/experiment.py."""

    variants: dict[str, dict[str, Any]] = Field({}, description="{name: settings of sft that differ, ..}; none: no experiment.")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="Seeds of training; each variant is trained with every one.")
    problems: int = Field(150, ge=1, le=100_000, description="Dev problems decoded at every check.")


class StudySettings(Compared):
    """Whole runs, compared: one for each variant and seed, see pipeline/study."""

    variants: dict[str, dict[str, Any]] = Field(
        {}, description="{name: {section: settings that differ}, ..}: a run for each in run.root/run.name; none: one ordinary run."
    )
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="A run of each variant for every one, as run.seed.")
    against: str | None = Field(None, description="The variant that the others are compared with; null is the first.")

    @model_validator(mode="after")
    def _against_one_of_them(self) -> Self:
        if self.against is not None and self.against not in self.variants:
            known = ", ".join(self.variants) or "of which there are none"
            raise ValueError(f"against must be one of the variants, {known}, is {self.against}")
        return self
