"""The stages of a round, one file each; graph.py says how they hang together."""
