"""Searches for the first error by rollouts: against every possible place, with a noiseless and with a noisy model."""

from __future__ import annotations

import random
from itertools import product
from math import exp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom

from verifiers.judge import FirstError, Verdict
from verifiers.localise import BinarySearch, PosteriorSearch, Search, log_beta_binomial, run_together, symbolic_prior
from verifiers.steps import Step


def perfect(error: int, kept: int, completions: int = 4) -> tuple[int, int]:
    """A model that mends no error and never adds one."""
    return (completions if kept <= error else 0), completions


def drive(search: Search, error: int) -> int:
    """Answers a search as a perfect model does; how many prefixes it asked for."""
    asked = 0
    while (kept := search.wants()) is not None:
        assert 0 < kept < search.steps and kept not in search.asked
        search.observe(kept, *perfect(error, kept))
        asked += 1
    return asked


@pytest.mark.parametrize(("steps", "error"), [(steps, error) for steps in range(1, 18) for error in range(steps)])
def test_binary_search_finds_every_place(steps: int, error: int) -> None:
    search = BinarySearch(steps)
    asked = drive(search, error)
    assert search.step() == error
    assert asked <= (steps - 1).bit_length()


@pytest.mark.parametrize(("steps", "error"), [(steps, error) for steps in range(1, 10) for error in range(steps)])
def test_posterior_search_finds_every_place(steps: int, error: int) -> None:
    search = PosteriorSearch([1.0] * steps, solve_rate=0.8, sure=0.95)
    drive(search, error)
    assert search.step() == error


def test_posterior_is_bayes() -> None:
    """Against scipy's beta-binomial probabilities, multiplied out."""
    prior, asked, rate = [0.2, 0.5, 0.3], {1: (2, 4), 2: (1, 4)}, 0.6
    search = PosteriorSearch(prior, rate)
    weights = list(prior)
    for kept, (right, completions) in asked.items():
        search.observe(kept, right, completions)
        for index in range(3):
            a, b = (rate / 2, 1 - rate / 2) if index >= kept else (0.1, 2.9)
            weights[index] *= betabinom.pmf(right, completions, a, b)
    assert search.posterior() == pytest.approx([weight / sum(weights) for weight in weights])


@pytest.mark.parametrize(("a", "b"), [(0.1, 2.9), (1.0, 1.0), (1.6, 0.4)])
def test_beta_binomial_sums_to_one(a: float, b: float) -> None:
    choose = [1, 4, 6, 4, 1]
    assert sum(choose[right] * exp(log_beta_binomial(right, 4, a, b)) for right in range(5)) == pytest.approx(1)


def test_ties_go_to_the_earlier_step() -> None:
    assert PosteriorSearch([1.0, 1.0, 1.0], 0.5).step() == 0
    assert PosteriorSearch([0.2, 0.4, 0.4], 0.5).step() == 1


def test_a_budget_ends_a_search() -> None:
    search = PosteriorSearch([1.0] * 20, 0.5, sure=0.999, budget=3)
    assert drive(search, 13) == 3
    assert PosteriorSearch([1.0], 0.5).wants() is None
    assert PosteriorSearch([0.02, 0.96, 0.02], 0.5, sure=0.9).wants() is None  # sure from the start


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 11), st.booleans()), max_size=20), st.randoms(use_true_random=False))
def test_searches_together_equal_searches_alone(cases: list[tuple[int, int, bool]], draw: random.Random) -> None:
    def make() -> list[Search]:
        return [BinarySearch(n) if binary else PosteriorSearch([1.0] * n, 0.7) for n, _, binary in cases]

    errors = [min(error, steps - 1) for steps, error, _ in cases]
    noise = {key: draw.randint(0, 4) for key in product(range(len(cases)), range(13))}

    def seen(index: int, kept: int) -> tuple[int, int]:
        return (noise[index, kept] if kept <= errors[index] else noise[index, kept] // 4), 4

    together, alone = make(), make()
    calls = run_together(together, lambda wanted: [seen(index, kept) for index, kept in wanted])
    lengths = [0]
    for index, search in enumerate(alone):
        while (kept := search.wants()) is not None:
            search.observe(kept, *seen(index, kept))
        lengths.append(len(search.asked))
    assert [search.step() for search in together] == [search.step() for search in alone]
    assert [search.asked for search in together] == [search.asked for search in alone]
    assert calls == max(lengths)  # one call a round for all searches


def verdict(kind: str, step: int, steps: int) -> Verdict:
    error = FirstError(step, 0, 1, kind, "") if kind else None
    return Verdict(False, None, tuple(Step(i, i, i + 1, "x") for i in range(steps)), error)


def test_prior_follows_the_symbolic_verdict() -> None:
    prior = symbolic_prior(verdict("operand", 2, 5))
    assert sum(prior) == pytest.approx(1) and max(prior) == prior[2]
    assert sum(prior[:2]) > sum(prior[3:])  # symbolic verdicts are late more often than early
    unsure = symbolic_prior(verdict("answer", 4, 5))
    assert unsure[4] < 0.5 and unsure[0] == unsure[3]
    assert symbolic_prior(verdict("", 0, 4)) == [0.25] * 4
    assert symbolic_prior(verdict("operand", 0, 1)) == [1.0]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="without steps"):
        BinarySearch(0)
    with pytest.raises(ValueError, match="positive sum"):
        PosteriorSearch([0.0, 0.0], 0.5)
    with pytest.raises(ValueError, match="5 of 4"):
        BinarySearch(3).observe(1, 5, 4)
