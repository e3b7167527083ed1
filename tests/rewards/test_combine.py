"""Components put together, against numbers computed by hand; and what cannot be rewarded, named in one line."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest

from pipeline.reward_config import RewardSettings
from rewards.combine import RewardError, Rewards, members_of, normalised
from rewards.rollout import JudgedRollout
from tests.rewards.made import LAST, LINE_1, LINE_2, PROBLEMS, WRONG_1, rollout

ROWS = [rollout(LINE_1, LINE_2, LAST), rollout(WRONG_1, 1, LINE_1, LINE_2, LAST), rollout(LINE_1, LINE_2, "#### 15"), rollout("")]


def settings(**values: Any) -> RewardSettings:
    return RewardSettings.model_validate(values)


def length(rollouts: Sequence[JudgedRollout], progress: float) -> list[float]:
    """A custom reward: progress and tokens."""
    return [progress + len(one.token_ids) for one in rollouts]


def test_a_weighted_sum_by_hand() -> None:
    scored = Rewards(settings()).score(ROWS, [0, 0, 0, 0], 0)
    assert scored.weights == {"outcome": 1, "process": 0.7, "backtrack": 0.6, "format": 0.3, "budget": 0.1}
    assert scored.components["outcome"] == (1, 1, 0.5, 0)
    assert scored.components["process"] == (1, 1, pytest.approx(2 / 3), 0)
    assert scored.components["backtrack"] == (0.75, pytest.approx(0.65), -0.1, -0.1)
    assert scored.components["format"] == (1, 1, 1, 0)
    assert scored.components["budget"] == (0, 0, 0, 0)
    wanted = [1 + 0.7 + 0.45 + 0.3, 1 + 0.7 + 0.39 + 0.3, 0.5 + 0.7 * 2 / 3 - 0.06 + 0.3, -0.06]
    assert list(scored.rewards) == pytest.approx(wanted)


def test_statistics_by_hand() -> None:
    scored = Rewards(settings()).score(ROWS, [7, 7, 3, 3], 0)
    outcome = scored.statistics["outcome"]
    assert (outcome.mean, outcome.sd, outcome.without_spread) == (0.625, pytest.approx(pstdev([1, 1, 0.5, 0])), 0.5)
    assert scored.statistics["budget"].without_spread == 1 and scored.statistics["backtrack"].without_spread == 0.5
    assert scored.statistics["process"].without_spread == 0.5 and list(scored.statistics) == list(scored.components)


def test_gdpo_normalises_each_component_in_its_group() -> None:
    groups = [1, 0, 1, 0]
    plain = Rewards(settings()).score(ROWS, groups, 0)
    scored = Rewards(settings(combine="gdpo")).score(ROWS, groups, 0)
    assert scored.components == plain.components and scored.statistics == plain.statistics
    wanted = [0.0] * 4
    for name, values in plain.components.items():
        for rows in ([0, 2], [1, 3]):
            group = [values[row] for row in rows]
            for row in rows if max(group) > min(group) else []:
                wanted[row] += plain.weights[name] * (values[row] - fmean(group)) / pstdev(group)
    assert list(scored.rewards) == pytest.approx(wanted)
    assert scored.rewards[0] == pytest.approx(1 + 0.7 + 0.6) == pytest.approx(-scored.rewards[2])  # format and budget: no spread


def test_groups_without_spread_or_of_one_count_nothing() -> None:
    assert normalised([0.1 + 0.2, 0.3, 5.0], [[0, 1], [2]]) == (0, 0, 0)  # a rounding error is no difference
    assert normalised([1.0, 3.0, 8.0, 8.0], [[0, 1], [2, 3]]) == (-1, 1, 0, 0)
    assert members_of([5, 2, 5]) == [[0, 2], [1]]


def test_phases_change_three_weights() -> None:
    rewards = Rewards(settings(phases={}))
    early, middle, late = (rewards.weights(share) for share in (0.0, 0.5, 1.0))
    assert early == {"outcome": 0.5, "process": 0.8, "backtrack": 0.8, "format": 0.3, "budget": 0.1}
    assert (middle["outcome"], middle["process"], middle["backtrack"]) == (0.7, 0.7, 0.6)
    assert (late["outcome"], late["process"], late["backtrack"]) == (1.0, 0.5, 0.4)
    assert rewards.weights(0.329) == early and rewards.weights(0.33) == rewards.weights(0.669) == middle
    assert rewards.weights(0.67) == late
    assert rewards.score(ROWS, [0] * 4, 0.0).rewards[0] == pytest.approx(0.5 + 0.8 + 0.8 * 0.75 + 0.3)


def test_a_custom_reward_has_its_weight() -> None:
    rewards = Rewards(settings(custom={"length": {"function": f"{__name__}:length", "weight": 0.5}}))
    scored, plain = rewards.score(ROWS, [0] * 4, 0.25), Rewards(settings()).score(ROWS, [0] * 4, 0.25)
    assert scored.components["length"] == tuple(0.25 + len(one.token_ids) for one in ROWS) and scored.weights["length"] == 0.5
    assert scored.rewards == pytest.approx([a + b / 2 for a, b in zip(plain.rewards, scored.components["length"], strict=True)])
    again = pickle.loads(pickle.dumps(rewards))
    assert again.score(pickle.loads(pickle.dumps(ROWS)), [0] * 4, 0.25) == scored


def test_a_process_reward_model_is_used() -> None:
    scored = Rewards(settings(), lambda some: [[0.5] * len(one.verdict.steps) for one in some]).score(ROWS, [0] * 4, 0)
    assert scored.components["process"] == (0.5, 0.5, 0.5, 0)


# --- what cannot be rewarded ------------------------------------------------------------------------------------------

MODULE = """
import numpy as np
NUMBER = 3
def nan(rollouts, progress): return [0.0, float("nan"), *[0.0] * (len(rollouts) - 2)]
def infinite(rollouts, progress): return [float("inf") for _ in rollouts]
def none(rollouts, progress): return [0.0, 0.0, None, 0.0]
def true(rollouts, progress): return [True for _ in rollouts]
def short(rollouts, progress): return [0.0] * (len(rollouts) - 1)
def long(rollouts, progress): return [0.0] * (len(rollouts) + 1)
def number(rollouts, progress): return 1.0
def raises(rollouts, progress):
    if any(not one.text for one in rollouts): raise KeyError("no\\ntext")
    return [0.0 for _ in rollouts]
def raises_together(rollouts, progress):
    if len(rollouts) > 1: raise ZeroDivisionError("spread")
    return [0.0]
def fine(rollouts, progress): return np.ones(len(rollouts), dtype=np.float32)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards_of_a_test.py").write_text(MODULE)
    (tmp_path / "broken_rewards_of_a_test.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nan", r"reward mine, row 1 \(gsm8k/train/0\): must be a finite number, is nan"),
        ("infinite", r"reward mine, row 0 \(.*\): must be a finite number, is inf"),
        ("none", r"reward mine, row 2 \(.*\): must be a finite number, is None"),
        ("true", r"reward mine, row 0 \(.*\): must be a finite number, is True"),
        ("short", "reward mine, row 3: 4 rollouts need as many values, it returned 3"),
        ("long", "reward mine, row 4: 4 rollouts need as many values, it returned 5"),
        ("number", r"reward mine, rows 0 to 3 together: TypeError: .*"),
        ("raises", r"reward mine, row 3 \(gsm8k/train/0\): KeyError: 'no.*text'"),
        ("raises_together", "reward mine, rows 0 to 3 together: ZeroDivisionError: spread"),
    ],
)
def test_a_bad_custom_reward_names_itself_and_the_row(own: None, function: str, message: str) -> None:
    rewards = Rewards(settings(custom={"mine": {"function": f"own_rewards_of_a_test:{function}"}}))
    with pytest.raises(RewardError, match=f"^{message}$") as caught:
        rewards.score(ROWS, [0] * 4, 0)
    assert "\n" not in str(caught.value)


def test_arrays_are_numbers_too(own: None) -> None:
    rewards = Rewards(settings(custom={"mine": {"function": "own_rewards_of_a_test:fine"}}))
    assert rewards.score(ROWS, [0] * 4, 0).components["mine"] == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("own_rewards_of_a_test:missing", "custom.mine: cannot import own_rewards_of_a_test:missing: AttributeError: .*"),
        ("no_such_module_at_all:f", "custom.mine: cannot import no_such_module_at_all:f: ModuleNotFoundError: .*"),
        ("broken_rewards_of_a_test:f", "custom.mine: cannot import broken_rewards_of_a_test:f: SyntaxError: .*"),
        ("own_rewards_of_a_test:NUMBER", "custom.mine: own_rewards_of_a_test:NUMBER must be a function, is a int"),
    ],
)
def test_a_custom_reward_that_is_not_there(own: None, function: str, message: str) -> None:
    with pytest.raises(RewardError, match=f"^{message}$") as caught:
        Rewards(settings(custom={"mine": {"function": function}}))
    assert "\n" not in str(caught.value)


def test_a_process_reward_model_answers_for_every_rollout() -> None:
    with pytest.raises(RewardError, match="asked about 4 rollouts, answered for 1"):
        Rewards(settings(), lambda some: [[0.5]] if len(some) > 1 else [[0.5]] * len(some)).score(ROWS, [0] * 4, 0)


def test_a_process_reward_model_that_fails_is_named_with_its_row() -> None:
    rewards = Rewards(settings(), lambda some: [[0.5] if one.text else [2.0] for one in some])
    with pytest.raises(RewardError, match=r"reward process, row 3 \(gsm8k/train/0\): ValueError: .* values of 0 to 1"):
        rewards.score(ROWS, [0] * 4, 0)


@pytest.mark.parametrize(
    ("rows", "groups", "progress", "message"),
    [
        ([], [], 0, "there are no rollouts to reward"),
        ([ROWS[0], None], [0, 0], 0, "row 1: a judged rollout is missing, there is None"),
        (ROWS, [0, 0], 0, "4 rollouts need as many group numbers, there are 2"),
        (ROWS, [0] * 4, 1.5, "progress must be a share of the training, 0 .. 1, is 1.5"),
        (ROWS, [0] * 4, float("nan"), "progress must be a share of the training, 0 .. 1, is nan"),
    ],
)
def test_a_batch_that_is_not_whole(rows: Any, groups: list[int], progress: float, message: str) -> None:
    with pytest.raises(RewardError, match=f"^{message}$"):
        Rewards(settings()).score(rows, groups, progress)


def test_rows_of_several_problems() -> None:
    rows = [rollout(one.solution, problem=one) for one in PROBLEMS[:6]]
    scored = Rewards(settings()).score(rows, [0, 1, 2, 0, 1, 2], 0.5)
    assert scored.rewards == pytest.approx([1 + 0.7 + 0.45 + 0.3] * 6)
