"""Where problems come from. Each task is one file with a `load` function; this one names them."""
