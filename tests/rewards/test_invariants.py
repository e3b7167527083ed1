"""Nothing pays for an undo that is not needed: of rollouts with the same surviving text the one with fewer undos never has less.

Random rollouts, random settings within their bounds. What is asserted of every component by itself holds for any weights and
for any normalisation within a group; the combined rewards are looked at too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations

import pytest

from benchmarks.rewards import CORNERS, SETTINGS, mixed_batch, pushes
from pipeline.backtrack.undo import Unit
from pipeline.reward_config import RewardSettings
from rewards.combine import Rewards, Scored
from rewards.rollout import JudgedRollout, judged
from tests.rewards.made import PROBLEMS, STOP, UNITS, WORDS, any_settings, any_undos, detours, judge_ids, rule, solution

ROUNDING = 1e-9


def assert_fewer_never_less(rollouts: Sequence[JudgedRollout], scored: Scored) -> int:
    """Over all pairs with the same surviving ids; how many of them differ in their undos."""
    pairs = 0
    columns = {**scored.components, "reward": scored.rewards}
    for a, b in combinations(range(len(rollouts)), 2):
        fewer, more = (a, b) if rollouts[a].undos <= rollouts[b].undos else (b, a)
        if rollouts[a].surviving != rollouts[b].surviving or rollouts[a].undos == rollouts[b].undos:
            continue
        pairs += 1
        for name, values in columns.items():
            assert values[fewer] >= values[more] - ROUNDING, (name, rollouts[fewer], rollouts[more])
    return pairs


def test_fewer_undos_never_have_less_whatever_they_did() -> None:
    """Thousands of rollouts whose undos are judged at random, so that no judge has to be right for it."""
    draw, pairs, rollouts = random.Random(0), 0, 0
    bases = [judge_ids(one, [*WORDS.encode(solution(one, draw)), STOP]) for one in PROBLEMS for _ in range(3)]
    for _ in range(1500):
        settings = any_settings(draw)
        counts = draw.choice([range(6), range(18, 24), [draw.randint(0, 30) for _ in range(5)]])
        batch = [any_undos(base, count, draw) for base in draw.sample(bases, 2) for count in counts]
        groups = [0] * len(batch)
        pairs += assert_fewer_never_less(batch, Rewards(settings).score(batch, groups, draw.random()))
        rollouts += len(batch)
    assert pairs > 20_000 and rollouts > 10_000


@pytest.mark.parametrize("unit", UNITS)
def test_fewer_undos_never_have_less_on_judged_rollouts(unit: Unit) -> None:
    draw, pairs = random.Random(unit), 0
    for problem in PROBLEMS:
        ends = [[*WORDS.encode(solution(problem, draw)), *draw.choice([[], [STOP]])] for _ in range(2)]
        batch = [judge_ids(problem, detours(problem, end, unit, draw), unit) for end in ends for _ in range(4)]
        for _ in range(3):
            scored = Rewards(any_settings(draw)).score(batch, [0] * len(batch), draw.random())
            pairs += assert_fewer_never_less(batch, scored)
    assert pairs > 500


@pytest.mark.parametrize("unit", UNITS)
def test_planting_an_error_never_beats_being_right_at_once(unit: Unit) -> None:
    """Neither behind the same text nor behind any other; and it has strictly less where undos count at all."""
    draw = random.Random(unit)
    for problem in PROBLEMS:
        gold = [*WORDS.encode(problem.solution), STOP]
        at_once = judge_ids(problem, gold, unit)
        planted = [detours(problem, gold, unit, draw) for _ in range(4)]
        others = [detours(problem, [*WORDS.encode(solution(problem, draw)), STOP], unit, draw) for _ in range(3)]
        batch = [at_once, *(judge_ids(problem, ids, unit) for ids in planted + others)]
        for settings in (RewardSettings(), RewardSettings(combine="gdpo"), any_settings(draw)):
            scored = Rewards(settings).score(batch, [0] * len(batch), draw.random())
            usual = settings.budget == RewardSettings().budget  # gold solutions keep within it
            for row, one in enumerate(batch[1:], 1):
                same = one.surviving == at_once.surviving
                for name, values in scored.components.items():
                    assert values[0] >= values[row] or name == "budget" and not same, (name, one)
                if same or usual:
                    assert scored.rewards[0] >= scored.rewards[row] - ROUNDING
                if one.undos:
                    assert scored.components["backtrack"][0] > scored.components["backtrack"][row]


@pytest.mark.parametrize("combine", ["sum", "gdpo"])
def test_a_bad_rollout_shifts_no_other(combine: str) -> None:
    """Components of a row depend on that row alone; in a sum the reward too, with gdpo it depends on the row's group alone."""
    draw = random.Random(1)
    settings = RewardSettings.model_validate({"combine": combine})
    rewards = Rewards(settings)
    for problem in PROBLEMS[:20]:
        good = [judge_ids(problem, detours(problem, WORDS.encode(solution(problem, draw)), "step", draw)) for _ in range(4)]
        bad = [judged(problem, WORDS.encode(text), "length", rule(), WORDS.decode) for text in ("", "\ufffd<<", "#### #### 1")]
        alone = rewards.score(good, [0] * len(good), 0.5)
        rows = [0, 2, 4, 6]
        mixed: list[JudgedRollout] = [good[0], bad[0], good[1], bad[1], good[2], bad[2], good[3]]
        together = rewards.score(mixed, [0 if row in rows else 1 for row in range(7)], 0.5)
        assert [together.rewards[row] for row in rows] == list(alone.rewards)
        for name, values in alone.components.items():
            assert [together.components[name][row] for row in rows] == list(values)


@pytest.mark.parametrize("error", [0.15, 0.4, 0.8])
def test_neither_never_nor_always_undoing_is_a_fixed_point(error: float) -> None:
    """On groups of its own rollouts each policy is pushed towards undoing what is wrong and nothing else."""
    found = {policy.name: pushes(policy, 40, 16, error) for policy in CORNERS}
    for name in SETTINGS:
        more_at_wrong, _ = found["never undoes"][name]
        _, more_at_right = found["always undoes"][name]
        assert more_at_wrong > 0 > more_at_right
        detect, alarm = found["tosses a coin"][name]
        assert detect > 0 > alarm


def test_policies_in_one_batch() -> None:
    """The better undos are used the higher the advantage."""
    taught = mixed_batch(60, 2)
    for name in SETTINGS:
        gains = {policy: one.advantages[name] for policy, one in taught.items()}
        assert gains["undoes wrong lines, nine of ten"] > gains["undoes wrong lines, half of them"] > gains["never undoes"]
        assert gains["undoes wrong lines, nine of ten"] > gains["undoes every line once"]
        assert gains["plants, never undoes else"] < gains["never undoes"]
