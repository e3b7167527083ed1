"""Settings of the stage dpo; a part of pipeline/config.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pipeline.grpo_config import PolicyTraining


class DpoSettings(PolicyTraining):
    """Learning from preferences between two ways to go on from the same text, see docs/dpo.md."""

    steps: int = Field(0, ge=0, le=10_000_000, description="Optimiser steps; 0 leaves the stage out.")
    batch: int = Field(32, ge=1, le=65_536, description="Pairs in one step.")
    loss: Literal["dpo", "tdpo1", "tdpo2", "sft"] = Field(
        "tdpo2", description="Sequence or token level DPO; sft is the control: cross entropy on the chosen sides alone."
    )
    form: Literal["soft", "rewind"] = Field(
        "rewind", description="What the model sees of deleted tokens; soft with loss dpo is trained by TRL's DPOTrainer."
    )
    beta: float = Field(0.1, gt=0, le=100, description="How much a change of log-probability counts as reward.")
    alpha: float = Field(0.5, ge=0, le=100, description="Loss tdpo2: weight of the difference of the sequential KL terms.")
    pairs: Literal["own", "search", "both"] = Field("own", description="Pairs of judged rollouts, of the stage search, or both.")
    kinds: list[Literal["undo", "step", "keep"]] = Field(
        ["undo", "step", "keep"],
        min_length=1,
        description="Undo against going on with an error; a right step against a wrong one; a right way against undo.",
    )
    horizon: int | None = Field(
        None, ge=1, le=1000, description="Own pairs, kind undo: steps kept of the correction and of the error's continuation."
    )
    margin: float = Field(0.0, ge=0, le=1, description="Least difference in value of the two sides, where it is known.")
    lr: float = Field(2e-5, gt=0, le=1, description="Peak learning rate (AdamW); it falls to 0 in a straight line.")
    row_tokens: int = Field(512, ge=32, le=131_072, description="Tokens of a packed row; longer pairs are left out.")
    check_every: int = Field(25, ge=1, description="Steps between two measurements on pairs that are held out.")
    check_pairs: int = Field(128, ge=0, le=100_000, description="Pairs held out by problem, a fifth of all at most.")
    probes: int = Field(200, ge=0, le=100_000, description="Dev problems on which own errors are sampled, to warn of planted ones.")
    checkpoint_every: int = Field(50, ge=1, description="Steps between checkpoints, from which a killed run goes on.")

    @field_validator("kinds")
    @classmethod
    def _no_repeats(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("must name each kind once")
        return value
