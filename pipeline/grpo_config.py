"""Settings of the stage grpo; a part of pipeline/config.py."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.reward_config import RewardSettings
from pipeline.task_config import Section


class LoraSettings(Section):
    rank: int = Field(16, ge=1, le=1024, description="Rank of the adapters, on all linear layers.")
    alpha: float = Field(32.0, gt=0, le=4096, description="Scale of the adapters, divided by the rank.")


class PolicyTraining(Section):
    """How a policy is trained on its trees, by whichever loss."""

    warmup: int = Field(5, ge=0, le=1_000_000, description="Steps of warm-up.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, le=1e6, description="Gradients longer than this are cut to it.")
    trainable: Literal["all", "undo_row", "lora"] = Field("all", description="Which weights are trained.")
    lora: LoraSettings = Field(LoraSettings(), description="For trainable: lora.")
    rows: int = Field(8, ge=1, le=4096, description="Packed rows in one forward and backward pass.")


class GrpoSettings(PolicyTraining):
    """Reinforcement learning of when to undo, see docs/grpo.md."""

    steps: int = Field(0, ge=0, le=10_000_000, description="Optimiser steps; 0 leaves the stage out.")
    problems: int = Field(32, ge=1, le=65_536, description="Training problems in one step.")
    group: int = Field(8, ge=2, le=4096, description="Rollouts of each problem, compared with each other.")
    max_tokens: int = Field(320, ge=1, le=131_072, description="Longest rollout, deleted tokens included.")
    engine: Literal["auto", "vllm", "hf"] = Field(
        "auto", description="What rolls out; auto takes transformers for models of less than 20M parameters on CPUs."
    )
    lr: float = Field(1e-4, gt=0, le=1, description="Peak learning rate (AdamW); it falls to 0 in a straight line.")
    updates: int = Field(1, ge=1, le=64, description="Optimiser steps on the same rollouts.")
    loss: Literal["grpo", "dr_grpo", "dapo"] = Field(
        "dapo", description="Mean over tokens within each rollout, sum over a constant length, or mean over all tokens."
    )
    scale: Literal["group", "batch", "none"] = Field("group", description="Standard deviation that advantages are divided by.")
    clip_low: float = Field(0.2, ge=0, lt=1, description="Probability ratios below 1 minus this earn nothing more.")
    clip_high: float = Field(0.28, ge=0, le=100, description="Probability ratios above 1 plus this earn nothing more.")
    beta: float = Field(0.0, ge=0, le=100, description="Weight of the KL divergence from the start model.")
    credit: Literal["sequence", "segment", "tree"] = Field(
        "sequence", description="Who earns a reward: whole rollouts, each run between undos, or each branch of the group's tree."
    )
    blame_deleted: bool = Field(
        True, description="Whether deleted ids of a rollout that earned little become less likely; they never become likelier."
    )
    undo_credit: float = Field(
        0.0, ge=0, le=100, description="Added to the advantage of an undo that makes a state right and ends right."
    )
    error_credit: float = Field(
        0.0,
        ge=0,
        le=100,
        description="Taken from the advantage of surviving wrong ids, times the share of the group that ends right.",
    )
    undo: Literal["sampled", "epsilon"] = Field(
        "sampled",
        description="Drawn like any token, with undo_bias; or decided by decode.threshold, at times the other way.",
    )
    undo_bias: float = Field(0.0, ge=-100, le=100, description="Undo sampled: added to its logit, in rollouts and in learning.")
    undo_epsilon: float = Field(
        0.005, gt=0, lt=1, description="Undo epsilon: share of the decisions that are turned round; every id is one."
    )
    importance: Literal["token", "sequence", "none"] = Field(
        "token",
        description="Weights for rollouts of another policy: of tokens, up to the cap; of rollouts, 0 beyond it; none.",
    )
    importance_cap: float = Field(2.0, ge=1, le=1000, description="Largest of these weights.")
    mask_overlong: bool = Field(False, description="Leave rollouts out of the loss that were cut at max_tokens.")
    refill: int = Field(0, ge=0, le=16, description="Times that groups without spread are replaced by other problems in a step.")
    empty_steps: int = Field(10, ge=1, le=1000, description="Steps in a row without any spread at which the stage stops.")
    staleness: int = Field(0, ge=0, le=16, description="Steps by which rollouts may be older than the model; they run beside it.")
    row_tokens: int = Field(1024, ge=32, le=131_072, description="Tokens of a packed row.")
    check_every: int = Field(20, ge=1, description="Steps between two measurements on dev problems, greedy, with undo and without.")
    check_problems: int = Field(150, ge=4, le=100_000, description="Dev problems in such a measurement.")
    keep: Literal["best", "last"] = Field(
        "best", description="The model that was right on most dev problems (the start is one of them), or that of the last step."
    )
    checkpoint_every: int = Field(10, ge=1, description="Steps between checkpoints, from which a killed run goes on.")
    control: bool = Field(False, description="The same for the clean control, without undo.")
    reward: RewardSettings = Field(RewardSettings(), description="What a rollout earns.")

    @model_validator(mode="after")
    def _dr_grpo_is_not_scaled(self) -> Self:
        if self.loss == "dr_grpo" and self.scale != "none":
            raise ValueError(f"loss dr_grpo needs scale: none, is {self.scale}: dividing by the spread is what it leaves out")
        if self.refill and self.staleness:
            raise ValueError(f"refill needs staleness 0, is {self.staleness}: other problems are drawn once rewards are known")
        return self
