"""Rounds of self-play among random kills end with the outputs of undisturbed ones, hash for hash.

The scripted engine answers by prompt and seed alone; with engines whose rounding depends on the batch, benchmarks/chaos.py compares
ids and counts.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.chaos import KINDS, among_kills, moved, outputs, run_in, scripted, undisturbed

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the undisturbed run."""
    found = tmp_path_factory.mktemp("chaos")
    undisturbed(found / "calm", scripted(found))
    return found


def test_two_rounds_among_kills_are_those_of_an_undisturbed_run(folder: Path) -> None:
    killed = among_kills(folder / "torn", scripted(folder), dict.fromkeys(KINDS, 2), random.Random(0)).killed
    expected = outputs(run_in(folder / "calm"))
    assert outputs(run_in(folder / "torn")) == expected and len(expected) == 14
    assert killed.total() > 1, killed  # how many, and of what, is chance: a fast machine is sooner done with what is to be killed


def test_a_run_at_a_url_goes_on_with_nothing_in_its_cache(folder: Path) -> None:
    """Its driver is killed among rollouts."""
    there = outputs(moved(folder / "store", (*scripted(folder), "run.rounds=1"), (1, "rollouts", 0.0)))
    assert there.items() <= outputs(run_in(folder / "calm")).items() and len(there) == 8
