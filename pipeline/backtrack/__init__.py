"""Ground floor: what an undo does, how a trace is made of roles, which tokens are targets. Pure functions, no Ray."""
