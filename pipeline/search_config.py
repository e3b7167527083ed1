"""Settings of the stage search; a part of pipeline/config.py."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.prm_config import PrmSettings
from pipeline.task_config import Section


class SearchSettings(Section):
    """Tree search over continuations and undos, see docs/search.md."""

    problems: int = Field(0, ge=0, le=10_000_000, description="Training problems to search; 0 leaves the stage out.")
    model: Literal["start", "sft"] = Field(
        "start", description="Searches with the round's start model, for its own traces, or with the fine-tuned one, for the next."
    )
    only: Literal["all", "failed"] = Field("all", description="All problems drawn, or those that greedy decoding gets wrong.")
    workers: int = Field(2, ge=1, le=4096, description="Ray actors that grow trees; while one thinks, another's rows are decoded.")
    batch: int = Field(128, ge=1, le=65_536, description="Problems that a worker has open at a time.")
    simulations: int = Field(32, ge=1, le=1_000_000, description="Simulations of a problem, at most.")
    tokens: int | None = Field(
        None, ge=1, description="Generated tokens of a problem after which nothing more is asked; null: any."
    )
    seconds: float | None = Field(None, gt=0, description="Seconds of a problem, likewise; with it, outcomes depend on the clock.")
    after_right: int = Field(8, ge=0, le=1_000_000, description="Simulations that still follow the first right end.")
    leaves: int = Field(1, ge=1, le=1024, description="Leaves of one tree that are evaluated at once.")
    virtual_loss: float = Field(1.0, ge=0, le=100, description="Visits without value that a leaf under evaluation counts for.")
    unit: Literal["step", "token"] = Field("step", description="What a node of the tree holds, and an undo in it takes back.")
    expand: Literal["alternatives", "samples"] = Field(
        "alternatives", description="New branches: ids beside the chosen ones, each way once; or samples drawn anew."
    )
    k: int = Field(8, ge=1, le=256, description="Alternatives that a state keeps, or samples that are drawn in it, at most.")
    floor: float = Field(1e-3, ge=0, lt=1, description="Least probability of an alternative.")
    temperature: float = Field(0.0, ge=0, le=5, description="How a branch is continued; 0 is greedily. Samples need more than 0.")
    rollout: Literal["end", "step"] = Field(
        "end", description="A simulation runs to the end of a solution, which is judged; or for one step, which is valued."
    )
    prm: str | None = Field(
        None,
        min_length=1,
        description="Process reward model that values states: run is the newest of the stage prm, anything else a folder; "
        "null: none, ends alone have a value.",
    )
    max_tokens: int = Field(160, ge=1, le=131_072, description="Longest solution in tokens, and longest completion.")
    depth: int = Field(64, ge=1, le=131_072, description="Nodes above one another, at most; below, nothing branches.")
    c_puct: float = Field(1.0, ge=0, le=1000, description="What the policy's prior weighs against values, in PUCT.")
    mass: bool = Field(True, description="The prior of a branch is that of its untried part, else that of the whole branch.")
    max_share: float = Field(
        0.5, ge=0, le=1, description="Share of the best value below a node in its value; the rest is the mean."
    )
    discount: float = Field(1.0, gt=0, le=1, description="What a value keeps a node further up.")
    state_weight: float = Field(
        0.5, ge=0, le=1, description="Share of the process reward model in a node's value, where it is asked."
    )
    undo: Literal["forbidden", "model"] = Field(
        "forbidden", description="Undo token in continuations: never; or it ends them where the model emits it, as its undo."
    )
    max_undos: int = Field(8, ge=0, le=131_072, description="Undo actions on the way to one leaf, at most.")
    margin: float = Field(0.5, gt=0, le=1, description="Least difference of the Monte-Carlo values of a preference pair.")
    pairs: int = Field(4, ge=0, le=1024, description="Preference pairs of each kind from one tree, at most.")
    dumps: int = Field(20, ge=0, le=10_000, description="Trees that are drawn and written as JSON.")

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.expand == "samples" and self.temperature == 0:
            raise ValueError("expand: samples needs a temperature above 0: greedy samples are all alike")
        return self


def stands_behind_prm(search: SearchSettings, prm: PrmSettings) -> bool:
    """Whether a search can ask the process reward model of its own round: it makes no labels for that one, and waits for the
    fine-tuned model anyway."""
    return search.prm == "run" and search.model == "sft" and prm.labels == "judge"


def check_values(search: SearchSettings, prm: PrmSettings, rounds: int) -> None:
    """
    Raises:
        ValueError: nothing that could value states where they need it.
    """
    if search.rollout == "step" and search.prm is None:
        raise ValueError("search.rollout: step needs search.prm, run or a folder: the model that values the states it ends in")
    if search.prm == "run" and not prm.steps:
        raise ValueError("search.prm: run needs the stage prm: set prm.steps, or name a folder")
    if search.prm == "run" and rounds == 1 and not stands_behind_prm(search, prm):
        raise ValueError(
            "search.prm: run is never there in the only round: the stage prm stands behind the search. Set run.rounds, "
            "search.model: sft with prm.labels: judge, or name a folder"
        )
