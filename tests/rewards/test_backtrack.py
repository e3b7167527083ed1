"""The backtrack component by hand, and where it leaves the formula that it bounds."""

from __future__ import annotations

import pickle
from itertools import pairwise
from math import sqrt

import pytest

from pipeline.reward_config import BacktrackSettings
from rewards.backtrack import Backtrack
from rewards.rollout import JudgedRollout
from tests.rewards.made import LAST, LINE_1, LINE_2, WRONG_1, WRONG_2, rollout

BACKTRACK = Backtrack(BacktrackSettings())
RIGHT = (LINE_1, LINE_2, LAST)


def value(*pieces: str | int, unit: str = "step") -> float:
    return BACKTRACK([rollout(*pieces, unit=unit)], 0.5)[0]  # type: ignore[arg-type]


def test_what_the_formula_gives_stays_where_nothing_is_bounded() -> None:
    assert value(*RIGHT) == 0.75
    assert value(LINE_1, LINE_2, "#### 15") == -0.1
    assert value(WRONG_1, 1, *RIGHT) == pytest.approx(0.4 + 0.25)
    assert value(WRONG_1, *[1, WRONG_1] * 20, 1, *RIGHT) == -1  # 21 undos
    # One run of several undos that corrects: .4 + .25 / sqrt(n).
    ending = "7>>7 apples.\n"
    assert value("Ana has 3+4=<<3+4=8>>", 1, 1, "7>>7 apples.\n", LINE_2, LAST, unit="token") > 0.5
    assert value("Ana has 3+4=<<3+4=85", 2, ending, LINE_2, LAST, unit="token") == pytest.approx(0.4 + 0.25 / sqrt(2))
    assert value("Ana has 3+4=<<3+4=8", 1, ending, LINE_2, LAST, unit="token") == pytest.approx(0.65)


def test_raw_by_hand() -> None:
    """Three runs of five undos: one corrects, one removes a right line, one keeps the error and meets the empty stack twice."""
    one = rollout(2, WRONG_1, 1, LINE_1, 1, *RIGHT[:1], WRONG_2, 1, LINE_2, LAST)
    assert one.undos == 5 and one.noops == 2 and one.unnecessary == 1
    corrected = 0.4 + 0.25 / sqrt(5)
    assert BACKTRACK.raw(one) == pytest.approx(2 * corrected - 2 * 0.3 - 0.2 - 2 * 0.2)
    best, worst = 4 * corrected, -4 * 0.3 - 5 * 0.2
    assert BACKTRACK.quality(one) == pytest.approx((BACKTRACK.raw(one) - worst) / (best - worst))
    low, high = 0.4 + 0.25 / sqrt(6), 0.4 + 0.25 / sqrt(5)
    assert BACKTRACK([one], 0) == [pytest.approx(low + BACKTRACK.quality(one) * (high - low))]


def test_the_raw_formula_pays_for_planted_errors() -> None:
    """Why it is bounded: two planted errors have more than one, and one more than being right at once would have."""
    twice = rollout(WRONG_1, 1, LINE_1, WRONG_2, 1, LINE_2, LAST)
    once = rollout(WRONG_1, 1, *RIGHT)
    assert BACKTRACK.raw(twice) == pytest.approx(0.8 + 0.5 / sqrt(2)) and BACKTRACK.raw(twice) > BACKTRACK.raw(once) > 0
    assert BACKTRACK.raw(rollout(*RIGHT)) == 0
    assert 0.75 > BACKTRACK([once], 0)[0] > BACKTRACK([twice], 0)[0]


def test_the_same_number_of_undos_is_ranked_by_what_they_did() -> None:
    for ending in (LAST, "#### 15"):
        corrects = value(WRONG_1, 1, LINE_1, LINE_2, ending)
        removes_right = value(LINE_1, 1, LINE_1, LINE_2, ending)
        noop = value(1, LINE_1, LINE_2, ending)
        keeps = value(WRONG_1, LINE_1, 1, LINE_2, ending)
        assert corrects > max(removes_right, noop)
        assert corrects > keeps or ending == LAST  # with LAST the error's own line is wrong and the answer is right
    # A removed right line costs about what the formula says, measured from being right at once.
    assert 0.1 < value(*RIGHT) - value(LINE_1, 1, *RIGHT) < 0.2


def test_wrong_answers_with_undos_have_no_more_than_without() -> None:
    assert value(WRONG_1, 1, LINE_1, LINE_2, "#### 15") == pytest.approx(-0.1)
    assert -0.2 < value(LINE_1, 1, LINE_1, LINE_2, "#### 15") < -0.1


@pytest.mark.parametrize("correct", [True, False])
def test_bands_do_not_overlap(correct: bool) -> None:
    ceilings = [BACKTRACK.ceiling(undos, correct) for undos in range(1, 23)]
    assert all(high > low for high, low in pairwise(ceilings)) and ceilings[-1] > -1
    assert ceilings[0] == pytest.approx(0.65 if correct else -0.1)


def test_it_knows_no_group_and_can_be_pickled() -> None:
    rows: list[JudgedRollout] = [rollout(*RIGHT), rollout(WRONG_1, 1, *RIGHT), rollout("")]
    assert BACKTRACK(rows, 0) == [BACKTRACK([one], 1)[0] for one in rows]
    assert pickle.loads(pickle.dumps(BACKTRACK)) == BACKTRACK and BACKTRACK([], 0) == []


def test_settings_of_zero() -> None:
    free = Backtrack(BacktrackSettings(correction_bonus=0, efficiency=0, unnecessary=0, failed=0, noop=0, wrong_without_undo=0))
    assert free([rollout(1, *RIGHT), rollout(1, "#### 2"), rollout("#### 2"), rollout(*RIGHT)], 0) == [0, 0, 0, 0.75]
