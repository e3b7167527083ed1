"""Problems by their id, for stages whose rows name theirs. Knows nothing of what the problems are for."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pipeline.stages.io import Problems
from pipeline.tasks.problem import Problem


class ById:
    """Reads problems when they are asked for, and holds 16 bytes of each.

    Example:
        found = ById(read_problems(folder, "train")).find(["synthetic/train/chain/3"])
    """

    def __init__(self, problems: Problems) -> None:
        hashes = np.fromiter(map(_hashed, problems.ids()), np.int64, len(problems))
        self._problems, self._order = problems, np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def find(self, names: Iterable[str]) -> dict[str, Problem]:
        """The problems with these ids; some hundreds at a time, since one alone takes as long as many.

        Raises:
            KeyError: there is none with one of these ids.
        """
        found: dict[str, Problem] = {}
        names = list(dict.fromkeys(names))
        wanted = np.array([_hashed(name) for name in names], np.int64)
        left = dict(zip(names, np.searchsorted(self._hashes, wanted).tolist(), strict=True))
        while left:
            for name, place in left.items():
                if place == len(self._hashes) or self._hashes[place] != _hashed(name):
                    raise KeyError(name)
            read = zip(left, self._problems.read(self._order[list(left.values())].tolist()), strict=True)
            found |= {name: problem for name, problem in read if problem.id == name}
            left = {name: place + 1 for name, place in left.items() if name not in found}  # another id has the same hash
        return found


def _hashed(name: str) -> int:
    return hash(name)
