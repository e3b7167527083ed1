"""Many tree searches side by side: each round asks the engine once for all leaves of all trees.

Knows problems and token ids; what a right solution is, and what a state is worth, the caller says. Anything with the pool's
`generate` serves as engine. search_workers.py runs this in Ray actors.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from actors.engines import Completion, Request, Sampling
from actors.mcts import Ending, Made, Tree, Vocabulary, Wanted
from actors.parts import Quarantined
from pipeline.backtrack.searched import Searched
from pipeline.search_config import SearchSettings
from pipeline.tasks.problem import Problem

Ids = tuple[int, ...]
IsRight = Callable[[Problem, Ids], bool]
"""Whether the finished surviving ids solve the problem."""
StateValue = Callable[[Sequence[tuple[Problem, Ids, Ids]]], Sequence[float]]
"""Values in 0 .. 1 of states, each a problem with its prompt and the surviving ids: the process reward model."""


class SearchError(RuntimeError):
    """An engine or a value function that does not do what it is asked for. One line."""


class Pool(Protocol):
    """The part of a rollout pool that a search needs."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, batch: int
    ) -> tuple[Sequence[Completion | Quarantined], str]: ...


@dataclass(frozen=True)
class Case:
    """A problem to search."""

    problem: Problem
    prompt: Ids


@dataclass
class Meter:
    """What a search has cost so far."""

    rounds: int = 0
    simulations: int = 0
    tokens: int = 0
    engine_seconds: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)
    """What did not work, by kind: `missing` completions, `unjudged` ends, values that are `not_a_number`, trees that are
    left out (`quarantined`)."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first of each kind, in words."""

    def note(self, kind: str, what: str) -> None:
        self.failed[kind] += 1
        self.examples.setdefault(kind, what)

    def add(self, other: Meter) -> None:
        """Count what another search has cost, too."""
        self.rounds += other.rounds
        self.simulations += other.simulations
        self.tokens += other.tokens
        self.engine_seconds += other.engine_seconds
        self.failed.update(other.failed)
        self.examples = other.examples | self.examples


@dataclass
class Searcher:
    """How problems are searched: everything but the problems."""

    pool: Pool
    how: SearchSettings
    words: Vocabulary
    seed: int
    rows: int
    """Requests handed to an engine at a time."""
    is_right: IsRight
    state_value: StateValue | None = None
    meter: Meter = field(default_factory=Meter)
    on_round: Callable[[Meter], None] = lambda meter: None

    def search(self, cases: Sequence[Case]) -> Iterator[Searched]:
        """The trees, each as soon as it is finished. `how.batch` of them are open at a time.

        Raises:
            SearchError: an engine that answers nothing at all, or more than it was asked for; a value function that gives too few
                values.
        """
        waiting = list(reversed(cases))
        open_trees: list[_Open] = []
        asked: list[tuple[_Open, Wanted]] = []
        while waiting or open_trees:
            while waiting and len(open_trees) < self.how.batch:
                open_trees.append(self._open(waiting.pop()))
            for one in open_trees:
                asked += [(one, wanted) for wanted in one.tree.wants()]
            asked = self._round(asked)
            open_trees = [one for one in open_trees if not one.lost]
            still: list[_Open] = []
            missing = {id(one) for one, _ in asked}
            for one in open_trees:
                if one.tree.done and not one.tree.waiting and id(one) not in missing:
                    yield self._closed(one)
                else:
                    still.append(one)
            open_trees = still

    def _open(self, case: Case) -> _Open:
        seed = zlib.crc32(f"{self.seed}/search/{case.problem.id}".encode()) & 0x7FFFFFFF
        return _Open(case, Tree(case.prompt, self.how, self.words, seed))

    def _closed(self, one: _Open) -> Searched:
        return one.tree.result(one.case.problem.id)

    def _round(self, asked: list[tuple[_Open, Wanted]]) -> list[tuple[_Open, Wanted]]:
        """Ask the engine once, value what came, back it up. What the engine has left out is returned, to be asked again."""
        if not asked:
            return []
        silent = [pair for pair in asked if pair[1].finished]
        spoken = [pair for pair in asked if not pair[1].finished]
        room = self.how.max_tokens
        requests = [Request(one.case.prompt + wanted.ids, wanted.seed, room - len(wanted.ids)) for one, wanted in spoken]
        made = self._generate(requests) if spoken else []
        missing = spoken[len(made) :]
        for (one, _), row in zip(spoken, made, strict=False):
            if isinstance(row, Quarantined) and not one.lost:
                one.lost = True
                self.meter.note("quarantined", f"{one.case.problem.id}: {row.why}")
        missing = [(one, wanted) for one, wanted in missing if not one.lost]
        done = [(one, wanted, Made((), ())) for one, wanted in silent if not one.lost]
        for (one, wanted), row in zip(spoken, made, strict=False):
            if one.lost or isinstance(row, Quarantined):
                continue
            if not row.token_ids:
                self.meter.note("empty", f"{one.case.problem.id}: an engine has generated nothing")
            done.append((one, wanted, Made(row.token_ids, row.logprobs, row.top)))
        passed = [(one, wanted, *one.tree.observe(wanted, what)) for one, wanted, what in done]
        states = self._values([(one, node) for one, _, nodes, _ in passed for node in nodes if not one.tree.valued(node)])
        for one, wanted, nodes, ending in passed:
            right = self._judged(one, nodes[-1], ending)
            one.tree.settle(wanted, nodes[-1], right, {node: states[id(one), node] for node in nodes if (id(one), node) in states})
        self.meter.rounds += 1
        self.meter.simulations += len(passed)
        self.meter.tokens += sum(len(row.token_ids) for row in made if isinstance(row, Completion))
        self.on_round(self.meter)
        return missing

    def _generate(self, requests: list[Request]) -> Sequence[Completion | Quarantined]:
        began = time.perf_counter()
        made, _ = self.pool.generate(requests, self.sampling, self.rows)
        self.meter.engine_seconds += time.perf_counter() - began
        if not made or len(made) > len(requests):
            raise SearchError(f"an engine answered {len(made)} completions where {len(requests)} were asked for")
        if len(made) < len(requests):
            self.meter.failed["missing"] += len(requests) - len(made)
            self.meter.examples.setdefault("missing", f"{len(made)} completions came, {len(requests)} were asked for")
        return made

    @property
    def sampling(self) -> Sampling:
        """How all completions of a search are decoded."""
        how, words = self.how, self.words
        barred = tuple(sorted(words.forbidden | ({words.undo} if how.undo == "forbidden" else frozenset())))
        stops = ({words.undo} if how.undo == "model" else set()) | (words.step_ends if how.rollout == "step" else set())
        named = how.k + 1 if how.expand == "alternatives" else 0
        return Sampling(how.temperature, 1.0, how.max_tokens, words.stop, barred, True, named, tuple(sorted(stops)))

    def _judged(self, one: _Open, end: int, ending: Ending) -> bool | None:
        """The verdict on an end; a way that was cut for its length solves nothing, a state that may go on has no verdict yet."""
        if ending != "stop":
            return False if ending == "length" else None
        try:
            return bool(self.is_right(one.case.problem, one.tree.surviving(end)))
        except Exception as error:  # a judge that cannot read one solution must not end the search of all problems
            self.meter.note("unjudged", f"{one.case.problem.id}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return None

    def _values(self, states: list[tuple[_Open, int]]) -> dict[tuple[int, int], float]:
        if self.state_value is None or not states:
            return {}
        unique = {(id(one), node): (one, node) for one, node in states}
        asked = [(one.case.problem, one.case.prompt, one.tree.surviving(node)) for one, node in unique.values()]
        values = list(self.state_value(asked))
        if len(values) != len(asked):
            raise SearchError(f"a value function gave {len(values)} values for {len(asked)} states")
        for (problem, _, _), value in zip(asked, values, strict=True):
            if value != value:
                self.meter.note("not_a_number", f"{problem.id}: the value of a state is no number")
        return dict(zip(unique, values, strict=True))


@dataclass
class _Open:
    """A tree that grows."""

    case: Case
    tree: Tree
    lost: bool = False
    """A completion of it could not be made, so what its states are worth is not known: it is left out."""
