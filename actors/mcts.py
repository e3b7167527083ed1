"""Monte-Carlo tree search on the tree of surviving text: which branch to grow next, and what is known of each state.

Pure logic, one tree a problem: it asks for completions (`wants`) and is told what came (`observe`, `settle`). It knows no engine,
no tokenizer and no judge; actors/search.py runs many trees side by side.

A state is a stack of surviving ids, and a node is a state: however the same ids were reached, they are one node, so the tree is its
own transposition table. Undo is an action: it leads back to the parent, a known state with its tried set.
"""

from __future__ import annotations

import math
import time
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.backtrack.searched import Searched
from pipeline.search_config import SearchSettings

Ids = tuple[int, ...]
Top = Sequence[Sequence[tuple[int, float]]]
Ending = Literal["stop", "length", "open"]
"""A finished solution, one that is as long as it may be, or a state that may go on."""
_PLACE, _TOKEN = 18, 21  # bits of a place in a step and of a token id
_ANEW = -1  # a way without given ids
_LEAST = 1e-12  # of a prior: branches of no probability still have an order


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The ids that mean something to a search."""

    step_ends: frozenset[int]
    stop: int
    undo: int
    forbidden: frozenset[int] = frozenset()
    """Never an alternative: spare rows of the embedding."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A simulation asked for: a completion of `ids`."""

    number: int
    node: int
    """The state that it starts in."""
    lead: Ids
    """First ids of its next step that are given."""
    logprob: float
    """Of these."""
    ids: Ids
    """Surviving ids that the completion continues: those of the state, and the lead."""
    seed: int
    finished: bool
    """The lead ends the solution, or reaches the longest one: there is nothing to generate."""


@dataclass(frozen=True, slots=True)
class Made:
    """What an engine made of it."""

    ids: Ids
    """Emitted ids, the stop id or the undo token included."""
    logprobs: tuple[float, ...]
    """[ids] At temperature 1; empty when not known, and then every id counts as certain."""
    top: Top = ()
    """[ids] Most probable ids of each place with their log-probabilities; empty when not known."""


class Node:
    """A state: the ids of its last step, its parent, what was tried in it and what came of that."""

    __slots__ = (
        "best", "children", "depth", "ends", "ids", "length", "open", "parent", "pending", "prior", "rest", "right", "rights",
        "state", "total", "undo_prior", "undone", "visits", "ways",
    )  # fmt: skip

    def __init__(self, parent: int, ids: Ids, prior: float, depth: int, length: int) -> None:
        self.parent, self.ids, self.depth = parent, ids, depth
        self.length = length
        """Surviving ids of the state."""
        self.prior = prior
        """P(this step | the parent's state)."""
        self.children: list[int] = []
        self.open: array[float] | None = None
        """Probabilities of what can be tried here, the largest last. What was tried is not in it. None saves memory."""
        self.ways: array[int] | None = None
        """For each of them the first ids of its step, see `Tree.lead`."""
        self.rest = 0.0
        """Probability, given this state, of ways that were not tried yet."""
        self.visits = 0
        self.pending = 0
        """Simulations through this node that are being evaluated."""
        self.total = 0.0
        self.best = 0.0
        """Best value of a simulation through this node."""
        self.state = math.nan
        """Value of the state by the process reward model."""
        self.right = -1
        """1 and 0: the end of a right and of a wrong solution; -1: no end, or one that could not be judged."""
        self.rights = self.ends = 0
        """Simulations through this node that ended right, and that were judged."""
        self.undo_prior = 0.0
        """Largest P(U) behind a token of this step."""
        self.undone = 0
        """Undo actions taken out of this node."""


class Tree:
    """The search of one problem.

    Raises:
        ValueError: an empty prompt, or one that holds the undo token.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        how: SearchSettings,
        words: Vocabulary,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not prompt or words.undo in prompt:
            raise ValueError("a search needs a prompt, and the undo token is no part of it")
        self.prompt = tuple(prompt)
        self.nodes = [Node(-1, (), 1.0, 0, 0)]
        self.simulations = self.tokens = 0
        """Simulations that are settled, and tokens that were generated for them, deleted ones included."""
        self.solved_at: int | None = None
        """Simulations when the first right end was found; None before."""
        self.first_tokens = -1
        """Tokens when it was found; -1 before."""
        self._how, self._words, self._seed, self._clock = how, words, seed, clock
        self._asked = 0
        self._began: float | None = None
        self._cursor = 0
        self._waiting: dict[int, int] = {}  # number of a simulation -> node that carries its virtual loss
        self._offer(0)
        self._recount(0)

    # What is asked

    @property
    def done(self) -> bool:
        """Whether nothing more is asked: proved right and seen around, out of budget, or everything tried. Cheap."""
        how = self._how
        if self.solved_at is not None and self._asked >= self.solved_at + how.after_right:
            return True
        if self._asked >= how.simulations or how.tokens is not None and self.tokens >= how.tokens:
            return True
        if how.seconds is not None and self._began is not None and self._clock() - self._began >= how.seconds:
            return True
        return self.nodes[0].rest <= 0 and not self._waiting

    @property
    def waiting(self) -> bool:
        """Whether simulations that were asked for have not come back."""
        return bool(self._waiting)

    def wants(self) -> list[Wanted]:
        """The next leaves, `leaves` at most with those that are still waited for. None once the search is done."""
        if self._began is None:
            self._began = self._clock()
        found: list[Wanted] = []
        while len(self._waiting) < self._how.leaves and not self.done:
            one = self._select()
            if one is None:
                break
            found.append(one)
        return found

    def _select(self) -> Wanted | None:
        """Walk from the root by PUCT, undos included, to a way that was not tried; None where every one is being tried."""
        if self.nodes[0].rest <= 0:
            return None
        how, nodes = self._how, self.nodes
        at, undos = 0, 0
        left: set[int] = set()  # nodes that this walk has taken back: an undo never leads in a circle
        while True:
            node = nodes[at]
            explore = how.c_puct * math.sqrt(1 + node.visits + node.pending)
            value = self.value(at)
            best_score, best_child = -math.inf, -2
            if node.open:
                best_score, best_child = value + explore * node.open[-1], -1
            for child in node.children:
                other = nodes[child]
                if other.rest > 0 and child not in left:
                    prior = other.prior * (other.rest if how.mass else 1.0)
                    score = self.value(child) + explore * prior / (1 + other.visits + how.virtual_loss * other.pending)
                    if score > best_score:
                        best_score, best_child = score, child
            if at and undos < how.max_undos:
                parent = nodes[node.parent]
                elsewhere = parent.open or any(
                    child != at and child not in left and nodes[child].rest > 0 for child in parent.children
                )
                undo = how.discount * self.value(node.parent) + explore * node.undo_prior / (1 + node.undone)
                if elsewhere and undo > best_score:
                    node.undone += 1
                    undos += 1
                    left.add(at)
                    at = node.parent
                    continue
            assert best_child > -2, "nothing is open in a state that was entered for what is open there"
            if best_child < 0:
                return self._take(at)
            at = best_child

    def _take(self, at: int) -> Wanted:
        node, number = self.nodes[at], self._asked
        assert node.open is not None and node.ways is not None
        prior, lead = node.open.pop(), self.lead(node.ways.pop())
        self._asked += 1
        self._waiting[number] = at
        for above in self.path(at):
            self.nodes[above].pending += 1
        self._recount(at)
        ids = self.surviving(at) + lead
        finished = bool(lead) and lead[-1] == self._words.stop or len(ids) >= self._how.max_tokens
        seed = zlib.crc32(f"{self._seed}/{number}".encode()) & 0x7FFFFFFF
        return Wanted(number, at, lead, math.log(max(prior, _LEAST)) if lead else 0.0, ids, seed, finished)

    # What comes back

    def observe(self, wanted: Wanted, made: Made) -> tuple[list[int], Ending]:
        """Put a completion into the tree. Nothing is valued yet: `settle` follows.

        Returns:
            (the nodes of its steps from the first to the last, how the last one ends). A completion without any ids has the node
            that it started in.

        Raises:
            ValueError: lengths that differ, or a simulation that is not waited for.
        """
        if wanted.number not in self._waiting:
            raise ValueError(f"simulation {wanted.number} is not waited for")
        if made.logprobs and len(made.logprobs) != len(made.ids) or made.top and len(made.top) != len(made.ids):
            raise ValueError(f"a completion of {len(made.ids)} ids with {len(made.logprobs)} logprobs and {len(made.top)} top")
        how, words = self._how, self._words
        self.tokens += len(made.ids) + (1 if wanted.lead else 0)  # the lead's last id is as good as generated
        cut = next((at for at, token in enumerate(made.ids) if token == words.undo), len(made.ids))
        room = how.max_tokens - len(wanted.ids)
        cut = min(cut, room)
        ids = wanted.lead + made.ids[:cut]
        taken_back = cut < min(len(made.ids), room) and made.ids[cut] == words.undo
        given = len(wanted.lead)
        logprobs = (0.0,) * (given - 1) + (wanted.logprob,) * (given > 0) + (made.logprobs[:cut] or (0.0,) * cut)
        at, begin, passed = wanted.node, 0, []
        for end in self._ends(ids):
            child = self._child(at, ids[begin:end], math.exp(max(sum(logprobs[begin:end]), math.log(_LEAST))))
            passed.append(child)
            if made.top and how.expand == "alternatives":
                # An undo within a step stands where another id could: its rivals are ways to end that step.
                upto = end + (taken_back and end == len(ids) and self._unfinished(ids))
                self._branch(
                    at, child, ids[begin:end], logprobs[begin:end], made.top[max(begin - given, 0) : upto - given], given - begin
                )
            at, begin = child, end
        finished = bool(ids) and ids[-1] == words.stop
        if taken_back:
            self.nodes[at].undone += 1
            if made.top and how.expand == "alternatives" and not self._unfinished(ids):
                self._branch(at, -1, (), (), made.top[cut : cut + 1], 0)
        elif not finished:
            self._offer(at, len(ids) > given)
        for one in dict.fromkeys([*reversed(passed), wanted.node]):
            self._recount(one)
        ending: Ending = "stop" if finished else "length" if self.nodes[at].length >= how.max_tokens else "open"
        return passed or [wanted.node], ending

    def settle(self, wanted: Wanted, end: int, right: bool | None, states: Mapping[int, float] | None = None) -> float:
        """Value a simulation that `observe` has put in and back its value up.

        Args:
            end: the last of its nodes.
            right: whether the finished solution is right; None where it is not finished or could not be judged.
            states: values of nodes by the process reward model; what is no number is not taken.

        Returns:
            The value that was backed up: 1 or 0 where it was judged, else that of the state, else 0.
        """
        at = self._waiting.pop(wanted.number)
        for above in self.path(at):
            self.nodes[above].pending -= 1
        for node, value in (states or {}).items():
            if math.isfinite(value):
                self.nodes[node].state = min(max(value, 0.0), 1.0)
        leaf = self.nodes[end]
        if right is not None:
            leaf.right = int(right)
        value = float(right) if right is not None else leaf.state if leaf.state == leaf.state else 0.0
        backed = value
        for above in reversed(self.path(end)):
            one = self.nodes[above]
            one.visits += 1
            one.total += backed
            one.best = max(one.best, backed)
            if right is not None:
                one.ends += 1
                one.rights += right
            backed *= self._how.discount
        self._walk(wanted.node, end)
        self.simulations += 1
        if right and self.solved_at is None:
            self.solved_at, self.first_tokens = self.simulations, self.tokens
        return value

    # What is known

    def value(self, at: int) -> float:
        """Q of a node: a mix of the mean and the best of its simulations and of its state's own value."""
        how, node = self._how, self.nodes[at]
        count = node.visits + how.virtual_loss * node.pending
        known = node.state == node.state
        if not node.visits:
            return node.state * (1 / (1 + how.virtual_loss * node.pending)) if known else 0.0
        mixed = (1 - how.max_share) * node.total / count + how.max_share * node.best
        return (1 - how.state_weight) * mixed + how.state_weight * node.state if known else mixed

    def path(self, at: int) -> list[int]:
        """Nodes from the root to this one."""
        found = []
        while at >= 0:
            found.append(at)
            at = self.nodes[at].parent
        return found[::-1]

    def surviving(self, at: int) -> Ids:
        """The ids of the state."""
        return tuple(token for node in self.path(at) for token in self.nodes[node].ids)

    def lead(self, way: int) -> Ids:
        """First ids of a step that was not tried: those of a tried step up to a place, and another id there. Packed into one
        number, since a tree has thousands of them."""
        if way == _ANEW:
            return ()
        token, place = way & (1 << _TOKEN) - 1, way >> _TOKEN & (1 << _PLACE) - 1
        beside = way >> _TOKEN + _PLACE
        return (*self.nodes[beside].ids[:place], token)

    def valued(self, at: int) -> bool:
        """Whether the process reward model has valued the state."""
        return self.nodes[at].state == self.nodes[at].state

    def result(self, problem: str) -> Searched:
        """The tree as columns."""
        nodes = self.nodes
        q = tuple(self.value(at) for at in range(len(nodes)))
        return Searched(
            problem,
            self.prompt,
            tuple(node.parent for node in nodes),
            tuple(node.ids for node in nodes),
            tuple(node.rights / node.ends if node.ends else q[at] for at, node in enumerate(nodes)),
            q,
            tuple(node.ends for node in nodes),
            tuple(node.visits for node in nodes),
            tuple(node.prior for node in nodes),
            tuple(node.right for node in nodes),
            tuple(node.undone for node in nodes),
            self.solved_at is not None,
            self.simulations,
            self.tokens,
            self.first_tokens,
        )

    # How it grows

    def _ends(self, ids: Ids) -> list[int]:
        """Where the steps end; the last one may be unfinished."""
        if self._how.unit == "token":
            return list(range(1, len(ids) + 1))
        ends = [at + 1 for at, token in enumerate(ids) if token in self._words.step_ends or token == self._words.stop]
        return ends if not ids or ends and ends[-1] == len(ids) else [*ends, len(ids)]

    def _unfinished(self, ids: Ids) -> bool:
        return self._how.unit == "step" and bool(ids) and ids[-1] not in self._words.step_ends and ids[-1] != self._words.stop

    def _child(self, at: int, ids: Ids, prior: float) -> int:
        parent = self.nodes[at]
        for child in parent.children:
            if self.nodes[child].ids == ids:
                return child
        self.nodes.append(Node(at, ids, prior, parent.depth + 1, parent.length + len(ids)))
        child = len(self.nodes) - 1
        parent.children.append(child)
        if self._how.expand == "samples" and ids[-1] in self._words.step_ends:
            self._offer(child)
        return child

    def _offer(self, at: int, grown: bool = True) -> None:
        """Let the state be continued from where it stands: once, or as often as samples are drawn.

        Args:
            grown: whether anything came when that was asked last; a state in which an engine says nothing is not asked again.
        """
        node, how = self.nodes[at], self._how
        if not grown or node.depth >= how.depth or node.length >= how.max_tokens:
            return
        times = how.k if how.expand == "samples" else 1
        if not node.children and not node.open:
            node.open, node.ways = array("d", [1.0 / times] * times), array("q", [_ANEW] * times)

    def _branch(self, at: int, child: int, ids: Ids, logprobs: Sequence[float], top: Top, given: int) -> None:
        """Alternatives to the ids of one step, and P(U) on the way.

        Args:
            child: the node of the step; -1 where an undo stands instead.
            top: of the ids behind the first `given` ones, which were not generated now.
        """
        how, node, words = self._how, self.nodes[at], self._words
        given = max(given, 0)
        reached = sum(logprobs[:given])
        barred = node.depth >= how.depth
        least = math.log(max(how.floor, _LEAST))  # most of what is named is less likely, and costs no more than this comparison
        found: list[tuple[float, int]] = []
        for place, likely in enumerate(top, start=given):
            chosen = ids[place] if place < len(ids) else words.undo
            for token, logprob in likely:
                if token == words.undo:
                    behind = self.nodes[child] if place and child >= 0 else node
                    behind.undo_prior = max(behind.undo_prior, math.exp(logprob))
                elif logprob >= least and token != chosen and token not in words.forbidden and not barred:
                    found.append(
                        (math.exp(max(reached + logprob, math.log(_LEAST))), (max(child, 0) << _PLACE | place) << _TOKEN | token)
                    )
            if place < len(logprobs):
                reached += logprobs[place]
        if found:
            ranked = sorted([*zip(node.open or (), node.ways or (), strict=True), *found])[-how.k :]
            node.open, node.ways = array("d", [prior for prior, _ in ranked]), array("q", [way for _, way in ranked])

    def _recount(self, at: int) -> None:
        """Bring `rest` up to date from a node to the root."""
        while at >= 0:
            node = self.nodes[at]
            rest = sum(node.open or ())
            for child in node.children:
                rest += self.nodes[child].prior * self.nodes[child].rest
            node.rest = min(rest, 1.0)
            at = node.parent

    def _walk(self, start: int, end: int) -> None:
        """The walk of this search moves from where the last simulation ended to where this one began: by undos."""
        onto = set(self.path(start))
        while self._cursor not in onto:
            self.nodes[self._cursor].undone += 1
            self._cursor = self.nodes[self._cursor].parent
        self._cursor = end
