"""Everything that runs inside Ray actors and tasks: engines, rollouts, judges, the learner."""
