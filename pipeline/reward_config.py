"""Settings of the rewards of reinforcement learning; a part of pipeline/config.py. docs/rewards.md says what they do."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.task_config import Section

COMPONENTS = ("outcome", "process", "backtrack", "format", "budget")
"""Names of the rewards that are built in."""


class RewardWeights(Section):
    """No weight is negative: a component that never pays for an undo would then pay for it."""

    outcome: float = Field(1.0, ge=0, le=10, description="Weight of the surviving answer being right.")
    process: float = Field(0.7, ge=0, le=10, description="Weight of the surviving steps being right.")
    backtrack: float = Field(0.6, ge=0, le=10, description="Weight of undoing what is wrong and nothing else.")
    format: float = Field(0.3, ge=0, le=10, description="Weight of a well-formed solution.")
    budget: float = Field(0.1, ge=0, le=10, description="Weight of staying within the token budget; small, so that it breaks ties.")


class PhaseWeights(Section):
    """The three weights that change over training; the others stay."""

    outcome: float = Field(ge=0, le=10, description="Weight of outcome in this phase.")
    process: float = Field(ge=0, le=10, description="Weight of process in this phase.")
    backtrack: float = Field(ge=0, le=10, description="Weight of backtrack in this phase.")


class Phases(Section):
    early: PhaseWeights = Field(
        PhaseWeights(outcome=0.5, process=0.8, backtrack=0.8), description="From the start of training: how to get there."
    )
    middle: PhaseWeights = Field(PhaseWeights(outcome=0.7, process=0.7, backtrack=0.6), description="From middle_from on.")
    late: PhaseWeights = Field(
        PhaseWeights(outcome=1.0, process=0.5, backtrack=0.4), description="From late_from on: whether it ends right."
    )
    middle_from: float = Field(0.33, ge=0.01, le=0.98, description="Share of training done at which the middle phase begins.")
    late_from: float = Field(0.67, ge=0.02, le=0.99, description="Share of training done at which the late phase begins.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.late_from < self.middle_from + 0.01:
            raise ValueError(f"late_from must be at least middle_from + 0.01 = {self.middle_from + 0.01:g}, is {self.late_from}")
        return self


class BacktrackSettings(Section):
    """All values are those of the component, before its weight. Penalties are given as sizes."""

    correction_bonus: float = Field(0.4, ge=0, le=1, description="For undos that turn a wrong state into a right one.")
    efficiency: float = Field(0.25, ge=0, le=1, description="Divided by the square root of the number of undos.")
    unnecessary: float = Field(0.2, ge=0, le=1, description="Penalty for each undo that removed right tokens.")
    failed: float = Field(0.3, ge=0, le=1, description="Penalty for each run of undos that did not improve the state.")
    noop: float = Field(0.2, ge=0, le=1, description="Penalty for each undo that met an empty stack.")
    wrong_without_undo: float = Field(0.1, ge=0, le=1, description="Penalty for a wrong answer without any undo.")
    right_at_once: float = Field(
        0.75, gt=0, le=2, description="For a right answer without any undo; the component's highest value."
    )
    max_undos: int = Field(20, ge=1, le=1000, description="Undo tokens above which the component is -1.")

    @model_validator(mode="after")
    def _never_pays_for_an_error(self) -> Self:
        best = self.correction_bonus + self.efficiency
        if self.right_at_once <= best:
            raise ValueError(
                f"right_at_once must be above correction_bonus + efficiency = {best:g}, is {self.right_at_once:g}: "
                "otherwise an error that is planted and undone pays"
            )
        if self.wrong_without_undo + self.efficiency > 1:
            raise ValueError(
                f"wrong_without_undo + efficiency must be at most 1, is {self.wrong_without_undo + self.efficiency:g}: "
                "otherwise some undos score below -1, which stands for too many"
            )
        return self


class BudgetSettings(Section):
    """The budget falls in a straight line from `start` to `end`."""

    start: int = Field(512, ge=1, le=1_000_000, description="Tokens that a completion may spend at the start of training.")
    end: int = Field(256, ge=1, le=1_000_000, description="The same once it has decayed.")
    until: float = Field(0.8, ge=0.01, le=1, description="Share of training done at which the budget has decayed.")
    undo_tokens: int = Field(
        32, ge=1, le=100_000, description="Tokens that one undo usually deletes: n undos are charged n - 1 to n times as many."
    )

    @model_validator(mode="after")
    def _decays(self) -> Self:
        if self.end > self.start:
            raise ValueError(f"end must be at most start, {self.start}, is {self.end}: the budget decays")
        return self


_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class CustomReward(Section):
    """A reward of one's own: `function(rollouts, progress) -> list[float]`, a value for each rollout."""

    function: str = Field(max_length=300, description="Where it stands, as module:function.")
    weight: float = Field(1.0, ge=0, le=10, description="Its weight in the reward.")

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        if not _FUNCTION.fullmatch(value):
            raise ValueError(f"must be module:function, such as my_rewards:short, is {value!r:.80}")
        return value


class RewardSettings(Section):
    """What a rollout is rewarded for, see docs/rewards.md."""

    weights: RewardWeights = Field(RewardWeights(), description="What each component counts.")
    phases: Phases | None = Field(None, description="Weights that change over training; {} for the usual ones, null for none.")
    combine: Literal["sum", "gdpo"] = Field(
        "sum", description="Weighted sum of the components, or of the components each normalised within its group."
    )
    partial_credit: float = Field(
        0.5, ge=0, le=0.9, description="Outcome of a wrong answer that reached all gold intermediate results."
    )
    process_model: bool = Field(False, description="Process: steps are valued by the process reward model, not by the judge.")
    backtrack: BacktrackSettings = Field(BacktrackSettings(), description="What undos earn and cost.")
    budget: BudgetSettings = Field(BudgetSettings(), description="What a completion may spend.")
    custom: dict[str, CustomReward] = Field({}, description="{name: {function: module:function, weight}}: more components.")

    @field_validator("custom")
    @classmethod
    def _have_names(cls, value: dict[str, CustomReward]) -> dict[str, CustomReward]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"the name {name!r:.80} must be of a-z, 0-9 and _, and begin with a letter")
            if name in COMPONENTS:
                raise ValueError(f"the name {name} belongs to a component that is built in; these are {', '.join(COMPONENTS)}")
        return value

    @model_validator(mode="after")
    def _rewards_something(self) -> Self:
        own = [one.weight for one in self.custom.values()]
        fixed = [self.weights.format, self.weights.budget, *own]
        phases = [self.weights] if self.phases is None else [self.phases.early, self.phases.middle, self.phases.late]
        for phase in phases:
            if not any((*fixed, phase.outcome, phase.process, phase.backtrack)):
                raise ValueError("at least one weight must be above 0 (in every phase), otherwise all rewards are 0")
        return self
