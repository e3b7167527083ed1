"""pass@k and maj@k against counting every choice, the bootstrap, and the test for trend against every order."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from math import erfc, isclose, sqrt
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.breakdown import FirstTries, planting
from pipeline.passes import Sample, majority_at_k, pass_at_k, passes, plurality, sizes
from pipeline.statistics import bootstrap, mean, trend
from verifiers.vote import majority


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_counts_every_choice(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    slow = fmean(any(chosen) for chosen in itertools.combinations(right, k))
    assert isclose(pass_at_k(len(right), sum(right), k), slow)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over 3 of a coin's throws is what 2 throws give; the usual 1 - (1 - share)^k is not."""
    throws = list(itertools.product([True, False], repeat=3))
    assert fmean(pass_at_k(3, sum(one), 2) for one in throws) == 0.75
    assert fmean(1 - (1 - sum(one) / 3) ** 2 for one in throws) < 0.67
    for n, k in ((3, 0), (3, 4)):
        with pytest.raises(ValueError, match=r"k must lie in 1 .. 3"):
            pass_at_k(n, 1, k)


def sample(number: int, answer: str | None, problem: str = "a", hindsight: bool = False) -> Sample:
    right, tokens = answer == "7", 10 + number
    return Sample("sft", "rewind", problem, number, "test", "boxes", hindsight, 0.7, right, answer, tokens, None, 0, "stop", ())


def test_votes_do_not_share_samples() -> None:
    some = [sample(i, answer) for i, answer in enumerate(["7", "7", "3", "3", "3", "7", "7"])]
    assert majority_at_k(some, 1) == 4 / 7
    assert majority_at_k(some, 3) == 0.5  # 7 7 3 | 3 3 7, the last one is left out
    assert majority_at_k(some, 7) == 1
    assert sizes(6) == [1, 2, 4, 6] and sizes(8) == [1, 2, 4, 8] and sizes(0) == []


@given(st.lists(st.sampled_from(["#### 7", "#### 7.0", "#### 3", "nothing", "#### 1/2"]), min_size=1, max_size=9))
def test_the_vote_on_answers_is_the_vote_on_texts(texts: list[str]) -> None:
    values = {"#### 7": "7", "#### 7.0": "7", "#### 3": "3", "nothing": None, "#### 1/2": "1/2"}
    answers = [values[text] for text in texts]
    counted = [(-sum(one == other for other in answers), i) for i, one in enumerate(answers) if one is not None]
    first = min(counted)[1] if counted else 0
    assert plurality(answers) == majority(texts) == first


def test_what_k_samples_are_worth_and_cost() -> None:
    """Problem a is right in one of three samples and elects it never; b is always right."""
    some = [sample(i, answer) for i, answer in enumerate(["3", "3", "7"])]
    some += [sample(i, "7", "b", True) for i in range(3)]
    found = {(one["group"], one["k"]): one for one in passes(some, 1)}
    assert set(found) == {(group, k) for group in ("all", "forward", "hindsight") for k in (1, 2, 3)}
    assert found["all", 1]["pass"] == pytest.approx(2 / 3) and found["all", 2]["pass"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["forward", 3]["pass"] == 1 and found["forward", 3]["majority"] == 0 and found["all", 3]["majority"] == 0.5
    assert [found["all", k]["tokens"] for k in (1, 2, 3)] == [11, 22, 33] and found["all", 2]["n"] == 2
    assert found["all", 1]["pass_ci95"] is None  # of two problems
    many = [replace(sample(i, "7" if j % 2 else "3", str(j)), number=i) for j in range(40) for i in range(2)]
    low, high = next(iter(passes(many, 1)))["pass_ci95"]
    assert 0.3 < low < 0.5 < high < 0.7


def test_the_bootstrap_agrees_with_students_t_where_that_holds() -> None:
    rng = random.Random(0)
    values = [rng.gauss(5, 2) for _ in range(300)]
    found, told = bootstrap(values), mean(values)
    assert found and told and found.low and found.high and told.low and told.high
    assert found.value == told.value and abs(found.low - told.low) < 0.05 and abs(found.high - told.high) < 0.05
    assert bootstrap(values) == found and bootstrap([]) is None and bootstrap([1.0, float("nan")]) is None
    few = bootstrap([1.0] * 9)
    assert few and few.value == 1 and few.low is few.high is None


def test_a_trend_is_told_from_every_order_within_problems() -> None:
    """The exact test shuffles the outcomes of each problem in every way."""
    rng = random.Random(1)
    scores = [0.0, 1.0, 3.0]
    outcomes = [[float(rng.random() < 0.3 + 0.12 * t + 0.4 * (problem % 2)) for t in scores] for problem in range(6)]
    x = np.array(scores) - np.mean(scores)
    orders = [[sum(x * np.array(one)) for one in itertools.permutations(row)] for row in outcomes]
    mine = sum(sum(x * np.array(row)) for row in outcomes)
    sums = np.array([sum(one) for one in itertools.product(*orders)])
    found = trend(scores, outcomes)
    assert found and found.n == 6 and found.low is None
    z = abs(mine) / float(np.sqrt(np.mean(sums**2)))  # the variance over all orders is what the formula says
    assert found.p == pytest.approx(erfc(z / sqrt(2)))
    assert abs(found.p - float(np.mean(np.abs(sums) >= abs(mine) - 1e-9))) < 0.12
    assert found.slope == pytest.approx(mine / float(x @ x) / 6)


def test_no_trend_is_found_where_there_is_none_to_find() -> None:
    flat = trend([0, 1, 2], [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert flat and flat.slope == 0 and flat.p == 1
    assert trend([1, 1], [[0.0, 1.0]]) is None and trend([0, 1], []) is None and trend([0, 1], [[0.0, float("nan")]]) is None
    falling = trend([0, 1, 2], [[1.0, 1.0, 0.0]] * 20)
    assert falling and falling.low is not None and falling.slope == -0.5 == falling.high and falling.p < 1e-6


def test_planting_pairs_problems_over_time() -> None:
    def tries(at: float, right: int, errors: int, names: range = range(20)) -> FirstTries:
        return FirstTries(at, [str(i) for i in names], [i < right for i in names], [errors * (i >= right) for i in names])

    found = planting("sft, round 1", "step", [tries(0, 16, 1), tries(300, 14, 1), tries(600, 10, 2, range(-3, 20))])
    assert found and found["n"] == 20
    assert [one["first_try_accuracy"] for one in found["points"]] == [0.8, 0.7, 0.5]
    assert [one["errors_per_try"] for one in found["points"]] == [0.2, 0.3, 1.0]
    assert found["accuracy_trend"]["slope"] == pytest.approx(-0.3 / 600) and found["accuracy_trend"]["p"] < 0.05
    assert found["errors_trend"]["slope"] > 0 and found["errors_trend"]["p"] < 0.01
    assert planting("x", "step", [tries(0, 1, 1)]) is None
    assert planting("x", "step", [tries(0, 1, 1), tries(1, 1, 1, range(20, 30))]) is None
