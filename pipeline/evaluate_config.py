"""Settings of the stage evaluate, and of sampling wherever there is any; a part of pipeline/config.py."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.task_config import Section


class SamplingSettings(Section):
    temperature: float = Field(1.0, ge=0, le=5, description="0 decodes greedily.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling.")
    max_tokens: int = Field(320, ge=1, le=131_072, description="Longest completion, deleted tokens included.")


class EvaluateSettings(SamplingSettings):
    temperature: float = Field(0.0, ge=0, le=5, description="0 decodes greedily.")
    also_at: list[Annotated[float, Field(ge=0, le=5)]] = Field(
        [], description="More temperatures, at which the first mode decodes the test split again."
    )
    modes: list[Literal["rewind", "soft", "guided"]] = Field(
        ["rewind", "soft"],
        min_length=1,
        description="Deleted text leaves the context (rewind; guided: by decode.signal), or stays (soft). The first accepts a "
        "round, leads the page and is measured on all splits, the others on test.",
    )
    votes: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="Samples of the clean control's majority vote; null: as many as spend sft's tokens, 3 at least.",
    )
    vote_temperature: float = Field(0.7, gt=0, le=5, description="Temperature of these.")
    everywhere: bool = Field(
        False, description="Every mode on test and ood, at every temperature; else only the first mode leaves the test split."
    )
    samples: int = Field(
        0, ge=0, le=1024, description="Samples of the trained model with undo, for pass@k and maj@k beside the votes; 0: none."
    )
    biases: list[Annotated[float, Field(ge=-100, le=100)]] = Field(
        [], description="Added to the logit of undo, each in turn, undo drawn like any token: the trained model on test."
    )
    planted: int = Field(
        50, ge=0, le=100_000, description="Test problems with an error planted, for each kind, or an undo forced; 0: none."
    )
    test: int | None = Field(None, ge=1, description="Problems of the test split; null takes all.")
    dev: int = Field(350, ge=1, description="Problems of the dev split, on which a round is accepted.")
    ood: int | None = Field(None, ge=1, description="Problems of the ood split; null takes all.")
    accept_p: float = Field(
        0.2,
        gt=0,
        le=1,
        description="A round is refused where dev accuracy fell with a McNemar p of at most this; 1 refuses every fall.",
    )
    probes: int = Field(300, ge=1, description="Own errors on test problems at which P(undo) is measured.")

    @field_validator("modes")
    @classmethod
    def _no_repeats(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("must name each mode once")
        return value

    @field_validator("biases")
    @classmethod
    def _different(cls, value: list[float]) -> list[float]:
        if len(set(value)) < len(value):
            raise ValueError("must name each bias once")
        return value

    @model_validator(mode="after")
    def _other_temperatures(self) -> Self:
        if len({self.temperature, *self.also_at}) <= len(self.also_at):
            raise ValueError(f"also_at must name other temperatures than {self.temperature:g}, each once, is {self.also_at}")
        return self
