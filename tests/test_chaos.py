"""Processes of a run of two rounds are killed at random, more than 20 of them: nothing is lost, doubled or otherwise changed."""

from __future__ import annotations

from pathlib import Path

from benchmarks.chaos import KILLS, digests, disturbed, scripted, undisturbed


def test_a_run_whose_processes_are_killed_ends_with_the_same_datasets(tmp_path: Path) -> None:
    """Rollout, search, judge and learner processes; the engine's answers depend on prompt and seed alone."""
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    calm.mkdir()
    killed.mkdir()
    more = scripted(tmp_path)
    undisturbed(calm, *more)
    _, hit = disturbed(killed, 0, KILLS, *more)
    assert digests(killed) == digests(calm)
    assert len(hit) >= 20 and {one.partition("/")[2] for one in hit} == {"rollout", "search", "judge", "learner"}, hit
