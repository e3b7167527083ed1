"""All components of a batch of rollouts, and the reward of each rollout made from them. What the learner calls.

Components are computed rollout by rollout; only their combination looks at groups. Anything that cannot be rewarded is an error
that names the reward and the row: a 0 in its place would be a reward like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import isfinite
from numbers import Real
from statistics import fmean, pstdev

from pipeline.backtrack.curriculum import over_training, part_of
from pipeline.reward_config import CustomReward, PhaseWeights, RewardSettings
from rewards.backtrack import Backtrack
from rewards.budget import Budget
from rewards.format import Format
from rewards.outcome import Outcome
from rewards.process import Process, StepValues
from rewards.rollout import JudgedRollout

Component = Callable[[Sequence[JudgedRollout], float], Sequence[float]]
"""(rollouts, share of training done) -> a value for each rollout."""

FLAT = 1e-9
"""Values of a group that differ by no more are the same: rounding, not a difference to learn from."""


class RewardError(ValueError):
    """What cannot be rewarded, in one line."""


@dataclass(frozen=True)
class ComponentStatistics:
    """One component over a batch, before its weight."""

    mean: float
    sd: float
    """Over all rollouts, of the population."""
    without_spread: float
    """Share of the groups in which all rollouts have the same value: they teach nothing about it."""


@dataclass(frozen=True)
class Scored:
    """A batch with its rewards."""

    components: dict[str, tuple[float, ...]]
    """By name, [rollouts], before the weights."""
    weights: dict[str, float]
    """By name, at this point of the training."""
    rewards: tuple[float, ...]
    """[rollouts]"""
    statistics: dict[str, ComponentStatistics]


class Rewards:
    """The rewards of a run. Can be pickled where its custom functions and its process reward model can.

    Example:
        scored = Rewards(settings).score(rollouts, groups=[0, 0, 1, 1], progress=0.1)

    Args:
        step_values: a process reward model that stands in for the judge in `process`.

    Raises:
        RewardError: a custom reward that cannot be imported or called.
    """

    def __init__(self, settings: RewardSettings, step_values: StepValues | None = None) -> None:
        self.settings = settings
        self._components: dict[str, Component] = {
            "outcome": Outcome(settings.partial_credit),
            "process": Process(step_values),
            "backtrack": Backtrack(settings.backtrack),
            "format": Format(),
            "budget": Budget(settings.budget),
        }
        for name, custom in settings.custom.items():
            self._components[name] = _imported(name, custom)

    def weights(self, progress: float) -> dict[str, float]:
        """Weight of each component once this share of the training is done."""
        fixed = self.settings.weights.model_dump()
        own = {name: custom.weight for name, custom in self.settings.custom.items()}
        phase = self._phase(progress)
        return fixed | (phase.model_dump() if phase else {}) | own

    def _phase(self, progress: float) -> PhaseWeights | None:
        phases = self.settings.phases
        if phases is None:
            return None
        index = over_training([(0, 0), (phases.middle_from, 1), (phases.late_from, 2)]).at(part_of(progress))
        return (phases.early, phases.middle, phases.late)[int(index)]

    def score(self, rollouts: Sequence[JudgedRollout], groups: Sequence[int], progress: float) -> Scored:
        """Reward a batch.

        Args:
            groups: for each rollout the number of its group; rollouts of a group need not stand together.
            progress: share of the training that is done.

        Raises:
            RewardError: a rollout that is missing, or a component that raises, or returns something else than a finite number
                for each rollout. No rollout of the batch is rewarded then.
        """
        _check(rollouts, groups, progress)
        components = {name: _values(name, component, rollouts, progress) for name, component in self._components.items()}
        members = members_of(groups)
        weights = self.weights(progress)
        terms = components if self.settings.combine == "sum" else {n: normalised(v, members) for n, v in components.items()}
        rewards = tuple(sum(weights[name] * terms[name][row] for name in terms) for row in range(len(rollouts)))
        return Scored(components, weights, rewards, {name: _statistics(v, members) for name, v in components.items()})


def normalised(values: Sequence[float], members: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """(value - mean) / sd within each group, 0 in groups without spread: one component of GDPO (Liu et al. 2026).

    Args:
        values: [rollouts]
        members: for each group, its rows.
    """
    out = [0.0] * len(values)
    for rows in members:
        group = [values[row] for row in rows]
        if _is_flat(group):
            continue
        mean, sd = fmean(group), pstdev(group)
        for row in rows:
            out[row] = (values[row] - mean) / sd
    return tuple(out)


def _is_flat(group: Sequence[float]) -> bool:
    return max(group) - min(group) <= FLAT


def members_of(groups: Sequence[int]) -> list[list[int]]:
    """The rows of each group."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    return list(members.values())


def _statistics(values: Sequence[float], members: Sequence[Sequence[int]]) -> ComponentStatistics:
    flat = sum(_is_flat([values[row] for row in rows]) for rows in members)
    return ComponentStatistics(fmean(values), pstdev(values), flat / len(members))


def _check(rollouts: Sequence[JudgedRollout], groups: Sequence[int], progress: float) -> None:
    if not rollouts:
        raise RewardError("there are no rollouts to reward")
    for row, one in enumerate(rollouts):
        if not isinstance(one, JudgedRollout):
            raise RewardError(f"row {row}: a judged rollout is missing, there is {one!r:.80}")
    if len(groups) != len(rollouts):
        raise RewardError(f"{len(rollouts)} rollouts need as many group numbers, there are {len(groups)}")
    if not 0 <= progress <= 1:
        raise RewardError(f"progress must be a share of the training, 0 .. 1, is {progress}")


def _values(name: str, component: Component, rollouts: Sequence[JudgedRollout], progress: float) -> tuple[float, ...]:
    """What a component gives, once it is known to be a finite number for each rollout."""
    try:
        values = list(component(rollouts, progress))
    except Exception as error:  # it may be anyone's function
        where = _first_that_raises(component, rollouts, progress)
        raise RewardError(f"reward {name}, {where}: {_line(error)}") from error
    if len(values) != len(rollouts):
        first = min(len(values), len(rollouts))
        wanted = f"{len(rollouts)} rollouts need as many values"
        raise RewardError(f"reward {name}, row {first}: {wanted}, it returned {len(values)}")
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value):
            raise RewardError(f"reward {name}, row {row} ({rollouts[row].problem.id}): must be a finite number, is {value!r:.80}")
    return tuple(float(value) for value in values)


def _first_that_raises(component: Component, rollouts: Sequence[JudgedRollout], progress: float) -> str:
    """Names the row that makes a component raise, found by asking for each row alone."""
    for row, one in enumerate(rollouts):
        try:
            component([one], progress)
        except Exception:
            return f"row {row} ({one.problem.id})"
    return f"rows 0 to {len(rollouts) - 1} together"


def _line(error: Exception) -> str:
    """An error of someone else's code in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _imported(name: str, custom: CustomReward) -> Component:
    module, _, function = custom.function.partition(":")
    try:
        found = getattr(import_module(module), function)
    except Exception as error:  # importing runs anyone's code
        raise RewardError(f"custom.{name}: cannot import {custom.function}: {_line(error)}") from error
    if not callable(found):
        raise RewardError(f"custom.{name}: {custom.function} must be a function, is a {type(found).__name__}")
    component: Component = found
    return component
