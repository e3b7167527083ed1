"""Judges of solutions: answers, arithmetic, steps and the first error. Pure functions that know no actor, reward or stage."""
