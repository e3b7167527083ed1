"""Where a wrong solution first went wrong, judged by what a model still makes of its prefixes, alone or with a symbolic prior.

Pure searches: they say which prefix they want completions of, and are told how many of these came out right. Whoever has an
engine asks for the prefixes of all searches in one call (`actors.localise`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import lgamma, log

from verifiers.judge import Verdict

UNSURE = ("answer", "step")
"""Kinds of symbolic errors that only say that the solution ends wrong."""

# Shares of first errors by distance from the symbolic verdict, measured on 48 human-labelled solutions (docs/judge.md) and
# smoothed: a symbolic verdict is rarely early, and late by any distance.
EXACT, EARLIER, LATER = 0.80, 0.15, 0.05
EXACT_UNSURE, EARLIER_UNSURE = 0.25, 0.75
WRONG_PREFIX = (0.1, 2.9)
"""Beta prior of the success rate behind an error: a model mends 3 % of them by luck or rationalisation."""


class Search(ABC):
    """The search for the first wrong step among `steps`; a prefix of n steps is right when the first error is not in it."""

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError("a solution without steps has no wrong step")
        self.steps = steps
        self.asked: dict[int, tuple[int, int]] = {}
        """steps kept -> (right completions, completions)"""

    @abstractmethod
    def wants(self) -> int | None:
        """How many steps the next prefix keeps; None when the search is over."""

    @abstractmethod
    def step(self) -> int:
        """Index of the first wrong step by what is known now."""

    def observe(self, kept: int, right: int, completions: int) -> None:
        """`right` of `completions` continuations of the first `kept` steps ended in the right answer."""
        if not 0 <= right <= completions or completions < 1:
            raise ValueError(f"{right} of {completions} completions cannot be right")
        self.asked[kept] = (right, completions)

    def evidence(self) -> str:
        """What was seen around the found step, in words."""
        said = []
        for kept in (self.step(), self.step() + 1):
            if kept in self.asked:
                right, completions = self.asked[kept]
                said.append(f"{right} of {completions} completions of the first {kept} steps end right")
        return ", ".join(said) or "nothing was sampled"


class BinarySearch(Search):
    """Halves the steps: a prefix is right when any of its completions is (OmegaPRM, arXiv:2406.06592).

    The empty prefix counts as right and the whole solution as wrong, so about log2(steps) prefixes are asked for.
    """

    def wants(self) -> int | None:
        good, bad = self._bounds()
        return None if bad - good <= 1 else (good + bad) // 2

    def step(self) -> int:
        return self._bounds()[0]

    def _bounds(self) -> tuple[int, int]:
        good = max((kept for kept, (right, _) in self.asked.items() if right), default=0)
        bad = min((kept for kept, (right, _) in self.asked.items() if not right and kept > good), default=self.steps)
        return good, bad


class PosteriorSearch(Search):
    """Bayes over the first wrong step: a prior, and for each asked prefix the chance of so many right completions.

    Completions of a right prefix succeed with a Beta(m / 2, 1 - m / 2) rate, m being the model's own success rate; behind an error
    with WRONG_PREFIX. Asks for the prefix that splits the posterior best and ends when one step holds `sure` of it.
    """

    def __init__(self, prior: Sequence[float], solve_rate: float, sure: float = 0.9, budget: int | None = None) -> None:
        super().__init__(len(prior))
        total = sum(prior)
        if total <= 0 or min(prior) < 0:
            raise ValueError("a prior needs a positive sum and no negative share")
        self._prior = [share / total for share in prior]
        # Problems that were got wrong are harder than the average one: half its rate, and little trust in that.
        rate = min(max(solve_rate, 0.1), 0.95) / 2
        self._right_prefix = (rate, 1 - rate)
        self._sure, self._budget = sure, len(prior) if budget is None else budget

    def wants(self) -> int | None:
        shares = self.posterior()
        if len(self.asked) >= self._budget or max(shares) >= self._sure:
            return None
        # share of a prefix of n steps being right: the first error comes at step n or later
        open_prefixes = [kept for kept in range(1, self.steps) if kept not in self.asked]
        return min(open_prefixes, key=lambda kept: (abs(sum(shares[kept:]) - 0.5), kept), default=None)

    def step(self) -> int:
        shares = self.posterior()
        best = max(shares)
        return next(index for index, share in enumerate(shares) if share >= best * (1 - 1e-9))  # the earlier one on ties

    def posterior(self) -> list[float]:
        """[steps] probability of each step being the first wrong one."""
        weights = []
        for index, share in enumerate(self._prior):
            weight = log(share) if share > 0 else float("-inf")
            for kept, (right, completions) in self.asked.items():
                weight += log_beta_binomial(right, completions, *(self._right_prefix if index >= kept else WRONG_PREFIX))
            weights.append(weight)
        top = max(weights)
        scaled = [2.718281828459045 ** (weight - top) for weight in weights]
        return [weight / sum(scaled) for weight in scaled]


def log_beta_binomial(right: int, completions: int, a: float, b: float) -> float:
    """log P(right of completions) under a Beta(a, b) success rate, the binomial coefficient left out."""
    return lgamma(a + right) + lgamma(b + completions - right) - lgamma(a + b + completions) + lgamma(a + b) - lgamma(a) - lgamma(b)


def symbolic_prior(verdict: Verdict) -> list[float]:
    """[steps] how probable each step is the first wrong one, given the symbolic verdict."""
    steps = len(verdict.steps)
    error = verdict.error
    if error is None:
        return [1 / steps] * steps
    exact, earlier, later = (EXACT_UNSURE, EARLIER_UNSURE, 0.0) if error.kind in UNSURE else (EXACT, EARLIER, LATER)
    before, behind = error.step, steps - error.step - 1
    prior = [earlier / max(before, 1)] * before + [exact] + [later / max(behind, 1)] * behind
    return [share / sum(prior) for share in prior]


def run_together(searches: Sequence[Search], ask: Callable[[list[tuple[int, int]]], list[tuple[int, int]]]) -> int:
    """Run searches side by side: each round asks once for the wanted prefixes of all of them.

    ask: [(index of the search, steps kept)] -> [(right completions, completions)], in the same order.

    Returns: how many rounds it took.
    """
    rounds = 0
    while True:
        wanted = [(index, kept) for index, search in enumerate(searches) if (kept := search.wants()) is not None]
        if not wanted:
            return rounds
        rounds += 1
        for (index, kept), (right, completions) in zip(wanted, ask(wanted), strict=True):
            searches[index].observe(kept, right, completions)
