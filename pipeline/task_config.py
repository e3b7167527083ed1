"""Settings of the tasks, from which problems come; a part of pipeline/config.py."""

from __future__ import annotations

import typing
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


FamilyName = Literal["chain", "shop", "compare", "boxes", "budget", "legs", "rows"]


class SyntheticTask(Section):
    """Word problems from templates, seven families, see pipeline/tasks/families.py."""

    name: Literal["synthetic"] = Field("synthetic", description="Made here from templates.")
    train: int = Field(7473, ge=8, le=1_000_000, description="Training problems; fixed, and as many as GSM8K has.")
    dev: int = Field(350, ge=8, le=20_000, description="Problems for early stopping and for accepting a round.")
    test: int = Field(700, ge=8, le=20_000, description="Problems for evaluation.")
    ood: int = Field(210, ge=8, le=20_000, description="Problems with more steps than any training problem.")
    families: list[FamilyName] = Field(
        ["chain", "shop", "boxes", "budget", "legs"],
        min_length=1,
        description=f"Families to draw from: {', '.join(typing.get_args(FamilyName))}.",
    )
    hindsight_share: float = Field(0.4, ge=0, le=1, description="Share of problems in which a choice precedes its evidence.")
    steps: list[int] = Field([2, 4], min_length=2, max_length=2, description="Fewest and most steps of a solution.")
    ood_steps: list[int] = Field([5, 8], min_length=2, max_length=2, description="The same for the ood split.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for key in ("steps", "ood_steps"):
            low, high = getattr(self, key)
            if not 2 <= low <= high <= 12:
                raise ValueError(f"{key} must be [fewest, most] with 2 <= fewest <= most <= 12, is [{low}, {high}]")
        if self.ood_steps[0] <= self.steps[1]:
            raise ValueError(f"ood_steps must begin above the most steps of training, {self.steps[1]}")
        return self


class Gsm8kTask(Section):
    """Problems in GSM8K's format, from the hub or from jsonl files with `question` and `answer`."""

    name: Literal["gsm8k"] = Field(description="GSM8K or files of the same format.")
    train_file: str | None = Field(None, description="jsonl file for training; null loads hub_id.")
    test_file: str | None = Field(None, description="jsonl file for evaluation; null loads hub_id.")
    hub_id: str = Field("openai/gsm8k", description="Dataset of the hub, used where no file is given.")
    dev: int = Field(350, ge=1, description="Problems taken from the training file for the dev split.")
    max_train: int | None = Field(None, ge=1, description="At most this many training problems; null takes all.")
    max_test: int | None = Field(None, ge=1, description="At most this many test problems; null takes all.")
    on_bad_row: Literal["fail", "skip"] = Field("fail", description="What a malformed line does; skipped ones are counted.")


class CountdownTask(Section):
    """Reach a target from numbers with + - * /, each number used exactly once; made here, see pipeline/tasks/countdown.py."""

    name: Literal["countdown"] = Field(description="countdown: reach a target from numbers with + - * /.")
    train: int = Field(7473, ge=8, le=1_000_000, description="Training problems.")
    dev: int = Field(350, ge=8, le=20_000, description="Problems for early stopping and for accepting a round.")
    test: int = Field(700, ge=8, le=20_000, description="Problems for evaluation.")
    ood: int = Field(210, ge=8, le=20_000, description="Problems with more numbers than any training problem.")
    numbers: int = Field(4, ge=3, le=6, description="How many numbers a problem gives; a solution takes one step less.")
    ood_numbers: int | None = Field(None, ge=4, le=7, description="The same for the ood split; null takes one more than numbers.")
    largest: int = Field(12, ge=5, le=100, description="Largest number that is given; the smallest is 1.")
    largest_target: int = Field(100, ge=10, le=1000, description="Largest target, and largest result on the way to it.")

    @model_validator(mode="after")
    def _more_numbers_in_ood(self) -> Self:
        if self.ood_numbers is not None and self.ood_numbers <= self.numbers:
            raise ValueError(f"ood_numbers must be above numbers, {self.numbers}, is {self.ood_numbers}")
        return self
