"""First errors by rollouts: completions of the prefixes of many wrong solutions, all that are wanted at a time in one engine call.

Knows token ids and searches; what a right completion is, the caller says.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.cluster import ClusterError
from actors.engines import Completion, Request, Sampling
from actors.rollout import RolloutPool
from verifiers.localise import Search, run_together


@dataclass(frozen=True)
class Case:
    """A wrong solution as token ids."""

    id: str
    prompt: tuple[int, ...]
    prefixes: tuple[tuple[int, ...], ...]
    """prefixes[n]: ids of the first n steps, n from 0 to the number of steps - 1."""


@dataclass(frozen=True)
class Found:
    """Where a search ended."""

    step: int
    evidence: str
    right: tuple[tuple[int, ...], ...]
    """Right completions of the prefix before that step: the model's own corrections."""


@dataclass
class Localiser:
    """Samples for searches; one per stage run."""

    pool: RolloutPool
    sampling: Sampling
    samples: int
    """Completions for each prefix."""
    batch: int
    seed: int
    is_right: Callable[[int, tuple[int, ...]], bool]
    """(index of the case, ids of prefix and completion) -> ends right."""
    on_rows: Callable[[int], None] = lambda rows: None
    """Told how many completions were made so far."""
    completions: int = 0
    tokens: int = 0

    def locate(self, cases: Sequence[Case], searches: Sequence[Search]) -> list[Found]:
        """Run the searches, then sample once more where nothing was sampled yet before the found step."""
        right: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        count: dict[tuple[int, int], int] = {}

        def ask(wanted: list[tuple[int, int]]) -> list[tuple[int, int]]:
            requests = [
                Request((*cases[index].prompt, *cases[index].prefixes[kept]), self._seed(cases[index].id, kept, sample))
                for index, kept in wanted
                for sample in range(self.samples)
            ]
            made, _ = self.pool.generate(requests, self.sampling, self.batch)
            there = [one for one in made if isinstance(one, Completion)]
            self.completions += len(there)
            self.tokens += sum(len(completion.token_ids) for completion in there)
            self.on_rows(self.completions)
            for at, (index, kept) in enumerate(wanted):
                mine = [one for one in made[at * self.samples : (at + 1) * self.samples] if isinstance(one, Completion)]
                if not mine:
                    raise ClusterError(f"{cases[index].id}: no completion of its first {kept} steps could be made")
                count[index, kept] = len(mine)
                ended = (tuple(completion.token_ids) for completion in mine if completion.finish == "stop")
                prefix = cases[index].prefixes[kept]
                right[index, kept] = [ids for ids in ended if self.is_right(index, prefix + ids)]
            return [(len(right[key]), count[key]) for key in wanted]

        run_together(searches, ask)
        steps = [search.step() for search in searches]
        if unseen := [(index, step) for index, step in enumerate(steps) if (index, step) not in right]:
            ask(unseen)
        return [
            Found(step, search.evidence(), tuple(right[index, step]))
            for index, (step, search) in enumerate(zip(steps, searches, strict=True))
        ]

    def _seed(self, case_id: str, kept: int, sample: int) -> int:
        return zlib.crc32(f"{self.seed}/localise/{case_id}/{kept}/{sample}".encode()) & 0x7FFFFFFF
