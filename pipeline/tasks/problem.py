"""The one shape that every task gives its problems in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

SPLITS = ("train", "dev", "test", "ood")
_DEV_SHARE, _TEST_SHARE = 0.15, 0.15  # of the number space of each family, not of the problems asked for


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


def split_of(core: str) -> str:
    """Where generated problems with these numbers belong, by a hash of them: train, dev or test, whatever seed and sizes are."""
    place = int.from_bytes(hashlib.sha256(core.encode()).digest()[:8], "big") / 2**64
    if place < _DEV_SHARE:
        return "dev"
    return "test" if place < _DEV_SHARE + _TEST_SHARE else "train"
