"""Reward components, one file each; reinforcement learning is what needs them, and no stage does that yet."""
