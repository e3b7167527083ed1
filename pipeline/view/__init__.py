"""Look at rollouts: `python -m pipeline.view RUN` serves a run's rollouts and search trees to a browser, or exports them as a file.

Reads outputs of the stages and never writes into a run. What a model wrote is untrusted text all the way.
"""
