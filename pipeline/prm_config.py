"""Settings of the stage prm: the process reward model and the verifier head. A part of pipeline/config.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.task_config import Section


class HeadSettings(Section):
    """The verifier head: P(should undo now) from the policy's hidden states, see docs/verifiers.md."""

    steps: int = Field(1500, ge=1, le=10_000_000, description="Optimiser steps; the policy itself stays as it is.")
    states: int = Field(200_000, ge=2, le=100_000_000, description="States of traces that are kept in memory, at most.")
    batch: int = Field(1024, ge=2, le=1_000_000, description="States in one step.")
    width: int = Field(128, ge=1, le=65_536, description="Hidden units.")
    lr: float = Field(1e-3, gt=0, le=1, description="Peak learning rate (AdamW), with cosine decay to 10 %.")


class PrmSettings(Section):
    """Learned verifiers, see docs/verifiers.md."""

    steps: int = Field(0, ge=0, le=10_000_000, description="Optimiser steps of the process reward model; 0 leaves the stage out.")
    labels: Literal["judge", "search", "both"] = Field(
        "judge", description="What steps are labelled by: the judge (right so far), search (share of right ends below), or both."
    )
    every_token: bool = Field(
        False, description="Labels by the judge: train at every token, not at the ends of steps alone, where values are read."
    )
    backbone: Literal["sft", "start"] = Field("sft", description="Model it begins as: the fine-tuned one, or the round's start.")
    rows: int = Field(16, ge=1, le=4096, description="Packed rows in one step.")
    row_tokens: int = Field(512, ge=32, le=131_072, description="Tokens of a packed row.")
    lr: float = Field(5e-4, gt=0, le=1, description="Peak learning rate (AdamW).")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of the steps that warm up; then cosine decay to 10 %.")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay.")
    width: int = Field(128, ge=1, le=65_536, description="Hidden units of its head.")
    held_out: float = Field(
        0.1, gt=0, lt=1, description="Share of the training problems that choose the step that is kept, and the thresholds."
    )
    check_every: int = Field(100, ge=1, description="Steps between two measurements of the loss on these problems.")
    checkpoint_every: int = Field(200, ge=1, description="Steps between checkpoints, from which a killed run goes on.")
    test: int = Field(700, ge=2, description="Test problems with one own solution each, at temperature 1: what figures are of.")
    score: Literal["last", "min", "product"] = Field(
        "last", description="Score of a whole solution, for best-of-n: value of its last step, least value, or product of all."
    )
    head: HeadSettings = Field(HeadSettings(), description="The verifier head.")
