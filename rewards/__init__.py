"""What a rollout is rewarded for: one file a component, `combine` puts them together, see docs/rewards.md."""
