"""The loop from problems to a model that takes back its own mistakes: settings, stages, and what a person sees."""
