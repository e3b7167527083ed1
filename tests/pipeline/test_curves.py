"""What the report draws of a training by reinforcement, from its records."""

from __future__ import annotations

from typing import Any

from pipeline.stages.curves import grpo_plots


def test_all_that_is_watched_is_drawn() -> None:
    """Steps and checks are different records; a step that was skipped has no figures of the learner."""
    components = {"outcome": {"mean": 0.5, "sd": 0.1}, "own": {"mean": 2.0, "sd": 0.0}}
    step: dict[str, Any] = {
        "step": 1,
        "reward": 1.0,
        "accuracy": 0.5,
        "components": components,
        "length": 30.0,
        "roll_seconds": 2.0,
    }
    learned = {"learn_seconds": 1.0, "entropy": 0.7, "clipped": 0.1, "kl": 0.01, "mismatch_undo": 1e-6, "mismatch_plain": 1e-7}
    records = [{"step": 0, "first_try_accuracy": 0.4}, step | {"judge_seconds": 0.5}, step | learned | {"step": 2}]
    drawn = {plot.title: {line.name: list(line.points) for line in plot.lines} for plot in grpo_plots({"grpo-1-control": records})}
    assert all(title.startswith("round 1, GRPO of the control: ") for title in drawn)
    found = {title.rpartition(": ")[2]: lines for title, lines in drawn.items()}
    assert found["reward by component, mean"] == {"outcome": [(1, 0.5), (2, 0.5)], "own": [(1, 2.0), (2, 2.0)]}
    assert found["ids of a rollout"] == {"mean": [(1, 30.0), (2, 30.0)]}
    assert found["seconds of a step"] == {"engine": [(1, 2.0), (2, 2.0)], "judge": [(1, 0.5)], "learner": [(2, 1.0)]}
    assert found["right"]["dev, first tries"] == [(0, 0.4)]
    away = found["away from what emitted the rollouts"]
    assert [points for points in away.values()] == [[(2, 0.1)], [(2, 0.01)], [(2, 1e-6)], [(2, 1e-7)]]
