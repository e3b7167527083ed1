"""The one shape that every task gives its problems in."""

from __future__ import annotations

from dataclasses import dataclass

SPLITS = ("train", "dev", "test", "ood")


@dataclass(frozen=True)
class Problem:
    """A question with its gold solution."""

    id: str
    """Unique within a run; says where it comes from, e.g. `synthetic/train/17` or `gsm8k/test/3`."""
    split: str
    """One of `SPLITS`; `ood` is harder than anything in `train`."""
    family: str
    """The kind of problem; every figure of a report is split by it."""
    hindsight: bool
    """Whether a choice comes before its evidence, so that an undo can pay."""
    question: str
    solution: str
    """Gold solution in GSM8K format: lines with `<<a*b=c>>` annotations; the last line is `#### n`."""
    answer: str
    params: str = "{}"
    """JSON of what the problem was made from; empty for problems that were not generated."""


class TaskError(ValueError):
    """Problems that cannot be used: one line that says what is wrong and where."""
