"""One decode with undo as a state machine: what the model sees next, what it may not emit there, and what an undo changes.

Every engine drives it in the same way: show the model `visible`, forbid `banned()`, hand what was chosen to `take`. Ids and
log-probabilities in, ids out; no model, no tokenizer, no torch. What an undo deletes is UndoStream's word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from pipeline.backtrack.tree import Rewinding
from pipeline.backtrack.undo import UndoRule, UndoStream, apply_undo

Mode = Literal["soft", "rewind", "forbidden", "guided"]
SignalKind = Literal["probability", "margin", "entropy", "repeat", "score"]
ScoredBy = Literal["head", "prm"]
Finish = Literal["stop", "length"]

_NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Signal:
    """What asks for U in mode `guided`, behind each id that was chosen; actors/signals.py computes it.

    Raises:
        ValueError: an unknown kind, or a value out of its bounds.
    """

    kind: SignalKind = "probability"
    """`probability` of the id itself, `margin` between the two best ids, `entropy` of the choice in nats, `repeat` of the last
    ids in what was written before, `score` by a learned judge."""
    threshold: float = 0.3
    """U is due above it for `entropy`, below it for the others; `repeat` has none."""
    ngram: int = 8
    """How many ids `repeat` compares."""
    by: ScoredBy = "head"
    """Which learned judge gives `score`: a verifier head, or a process reward model."""
    folder: str | None = None
    """Where that stands; None is the folder of the model itself."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(SignalKind):
            raise ValueError(f"signal kind must be one of {', '.join(get_args(SignalKind))}, is {self.kind!r}")
        if self.by not in get_args(ScoredBy):
            raise ValueError(f"signal by must be one of {', '.join(get_args(ScoredBy))}, is {self.by!r}")
        if not math.isfinite(self.threshold) or (self.kind in ("probability", "margin") and not 0 <= self.threshold <= 1):
            bounds = "lie in 0 .. 1" if self.kind in ("probability", "margin") else "be finite"
            raise ValueError(f"signal threshold must {bounds} for kind {self.kind}, is {self.threshold}")
        if self.ngram < 1:
            raise ValueError(f"signal ngram must be at least 1, is {self.ngram}")


@dataclass(frozen=True)
class Decoding:
    """How a batch is decoded.

    Raises:
        ValueError: a value out of its bounds, or a bias on top of a threshold.
    """

    mode: Mode
    """`rewind`: deleted tokens are gone; `soft`: the model sees all that was emitted; `forbidden`: no undo at all; `guided`: as
    `rewind`, but what the model says of U counts for nothing: U stands exactly where `signal` asks for it."""
    temperature: float
    """0 is greedy."""
    top_p: float
    max_tokens: int
    """Most ids emitted, undo tokens and deleted ones included."""
    stop_id: int
    """The decode ends with this id, which is part of it."""
    rule: UndoRule
    rewinding: Rewinding = "deferred"
    """For mode `rewind` and unit `token`; the other units delete by one U and always rewind at once."""
    threshold: float | None = 0.7
    """U is emitted exactly where P(U), at temperature 1 and before any ban, is above it. None: U is sampled like any id."""
    undo_bias: float = 0.0
    """Added to the logit of U where U is sampled, before the temperature."""
    ban_tried: bool = True
    """Whether what was taken back is forbidden in the state where it was emitted."""
    max_undos: int = 16
    """Undo tokens a sample; from then on U is forbidden."""
    max_undos_per_state: int = 4
    """Returns to one state; from then on U is forbidden wherever it would return there."""
    signal: Signal | None = None
    """For mode `guided`, which needs it."""
    undo_epsilon: float = 0.0
    """Share of the threshold's decisions that are turned round: what a learner needs to hear of both."""
    vocabulary: int | None = None
    """Ids from this one on, spare rows of the embedding, are never chosen. None: all may be."""

    def __post_init__(self) -> None:
        for name, kinds in (("mode", Mode), ("rewinding", Rewinding)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, is {getattr(self, name)!r}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, is {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, is {self.top_p}")
        for name in ("max_tokens", "max_undos", "max_undos_per_state"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, is {getattr(self, name)}")
        if self.stop_id == self.rule.undo_id:
            raise ValueError(f"stop_id and the undo token are the same id, {self.stop_id}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in 0 .. 1 or be None, is {self.threshold}")
        if not math.isfinite(self.undo_bias) or (self.undo_bias and self.threshold is not None):
            raise ValueError(f"undo_bias must be finite, and 0 beside a threshold, is {self.undo_bias}")
        if not 0 <= self.undo_epsilon < 1:
            raise ValueError(f"undo_epsilon must be 0 or more and below 1, is {self.undo_epsilon}")
        if self.undo_epsilon and (self.threshold is None or self.mode == "guided" or self.defers):
            raise ValueError("undo_epsilon needs a threshold that decides each undo by itself: no deferred rewinding, not guided")
        if self.vocabulary is not None and self.vocabulary <= max(self.stop_id, self.rule.undo_id):
            raise ValueError(f"vocabulary must hold stop_id and the undo token, is {self.vocabulary}")
        if self.mode == "guided" and not isinstance(self.signal, Signal):
            raise ValueError(f"mode guided needs a Signal, signal is {self.signal!r}")

    @property
    def defers(self) -> bool:
        """Whether a run of U's is seen until it ends. A signal asks for one U at a time, so there is no run to see."""
        return self.mode == "rewind" and self.rewinding == "deferred" and self.rule.unit == "token"

    @property
    def weighs_paths(self) -> bool:
        """Whether `Cursor.take` needs its `alternative`."""
        return self.ban_tried and self.mode != "forbidden" and self.rule.unit != "token"


@dataclass(frozen=True)
class DecodeRequest:
    """One decode asked for.

    Raises:
        ValueError: an empty prompt, or a negative seed.
    """

    prompt_ids: tuple[int, ...]
    seed: int
    """Of this row alone, so that a row does not depend on the batch it is in."""
    forced_ids: tuple[int, ...] = ()
    """Emitted first as if the model had chosen them: a beginning, an error planted to be found. May contain U."""

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty: nothing predicts the first id; begin it with one token at least")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, is {self.seed}")


@dataclass(frozen=True)
class Decoded:
    """What became of a request. `Walk(prompt, ids, logprobs, banned, closed=closed)` puts it on the token tree."""

    ids: tuple[int, ...]
    """[n] As emitted: forced ids, undo tokens, deleted ones and the stop id included."""
    surviving: tuple[int, ...]
    """What the reader sees."""
    logprobs: tuple[float, ...]
    """[n] At temperature 1, bans renormalised and `undo_bias` applied; a forced id's is the model's for it. A U that the
    threshold or the signal decided was certain: 0. With `undo_epsilon` a decision has a probability, which counts with the id."""
    banned: tuple[frozenset[int], ...]
    """[n] What was renormalised away. Empty for a U that the threshold or the signal decided, which has no rival; with
    `undo_epsilon` U was one of the choices wherever it was possible."""
    undos: int
    """U's emitted, no-ops included."""
    noops: int
    """U's that met an empty stack; only a forced one can."""
    finish: Finish
    closed: frozenset[int] = frozenset()
    """Indices of U's behind which a deferred run had to end: no choice of the model's."""


class _State:
    """A node of the trie of what has survived at some time."""

    __slots__ = ("children", "returns", "tried")

    def __init__(self) -> None:
        self.children: dict[int, _State] = {}
        self.tried = _NONE
        self.returns = 0


class _Push(NamedTuple):
    state: _State  # where the token was emitted
    token: int
    logprob: float
    alternative: float


class Cursor:
    """One request on its way.

    With deferred rewinding the question behind a U is only whether the run goes on: an id other than U ends it there and is
    not emitted, and the next id is chosen in the state to which the run returns. A run that cannot go on ends at once.

    Example:
        >>> decoding = Decoding("rewind", 0, 1, 9, stop_id=0, rule=UndoRule(undo_id=7), rewinding="immediate")
        >>> cursor = Cursor(DecodeRequest((5,), seed=0), decoding, vocab_size=8)
        >>> [cursor.take(token, -1.0) for token in (1, 2, 7)], cursor.visible, sorted(cursor.banned())
        ([0, 0, 1], (5, 1), [2, 7])

    Raises:
        ValueError: the prompt contains U, the forced ids do while U is forbidden, or an id that the model does not know.
    """

    def __init__(self, request: DecodeRequest, decoding: Decoding, vocab_size: int) -> None:
        undo_id = decoding.rule.undo_id
        if undo_id in request.prompt_ids:
            raise ValueError(f"prompt_ids contains the undo token {undo_id}: a prompt is never undone")
        if decoding.mode == "forbidden" and undo_id in request.forced_ids:
            raise ValueError(f"forced_ids contains the undo token {undo_id}, which the mode forbids")
        for what, ids in (("rule", (undo_id,)), ("prompt_ids", request.prompt_ids), ("forced_ids", request.forced_ids)):
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                wrong = next(token for token in ids if not 0 <= token < vocab_size)
                raise ValueError(f"{what}: the model has no id {wrong}, its ids are 0 .. {vocab_size - 1}")
        self.finish: Finish | None = None
        """None while it goes on."""
        self._decoding, self._vocab_size = decoding, vocab_size
        self._forced = request.forced_ids
        self._undo_id, self._undo_alone = undo_id, frozenset({undo_id})
        self._guided = decoding.mode == "guided"
        self._defers, self._decided = decoding.defers, self._guided or decoding.threshold is not None
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._bans: list[frozenset[int]] = []
        self._seen = list(request.prompt_ids)
        self._stream = UndoStream(decoding.rule)
        self._state = _State()
        self._path: list[_Push] = []  # one for each id on the stack
        self._run = 0  # U's of the deferred run that is still seen
        self._gone: list[_Push] = []  # what that run has deleted, the earliest last
        self._behind_run = False
        self._capped = False  # whether any state has been returned to as often as it may
        self._fresh = False  # whether the last id emitted stands on the stack: not when it was U
        self._closed: list[int] = []
        self._explores = decoding.undo_epsilon > 0
        self._luck: list[float] = []  # for each id emitted: whether the threshold's decision is turned round
        self._decision = 0.0  # log-probability of what was decided last
        if self._explores:
            # The row's other numbers come from its seed alone.
            self._luck = np.random.Generator(np.random.Philox([request.seed, 1])).random(decoding.max_tokens).tolist()
        self._doubted = False
        self._settle()

    @property
    def visible(self) -> tuple[int, ...]:
        """The ids that the model sees now. A copy; `length` and `last` cost nothing."""
        return tuple(self._seen)

    @property
    def length(self) -> int:
        """How many ids the model sees now. All but the last were seen before, in the same places: a cache has them."""
        return len(self._seen)

    @property
    def last(self) -> int:
        """The last visible id, whose logits decide what comes next."""
        return self._seen[-1]

    @property
    def decoding(self) -> Decoding:
        return self._decoding

    @property
    def emitted(self) -> int:
        return len(self._ids)

    def emitted_since(self, count: int) -> tuple[int, ...]:
        """The ids emitted behind the first `count`."""
        return tuple(self._ids[count:])

    @property
    def surviving(self) -> tuple[int, ...]:
        """What the reader sees so far."""
        return self._stream.surviving

    @property
    def in_run(self) -> bool:
        """Whether the model sees U's of a deferred run: what is chosen now either continues it or ends it."""
        return self._run > 0

    @property
    def forced(self) -> int | None:
        """The id that must be taken next; None when the model chooses."""
        done = len(self._ids)
        return self._forced[done] if done < len(self._forced) else None

    def banned(self) -> frozenset[int]:
        """Ids forbidden now. Never the whole vocabulary. For a forced id nothing is, but for the U behind a deferred run."""
        return self._banned

    @property
    def asks(self) -> bool:
        """Whether the signal is to be asked about the last id: it can be taken back, and nothing else must come next."""
        return self._guided and self._fresh and self._may_undo and self.forced is None and self.finish is None

    def doubt(self) -> None:
        """The signal wants the last id taken back: U is next. Of no effect where `asks` is false."""
        self._doubted = self.asks

    def decides(self, p_undo: float) -> bool | None:
        """Whether U is emitted now, given P(U) at temperature 1 before any ban. None: it is sampled, if `banned` has it not."""
        if self._guided:
            return self._doubted
        threshold = self._decoding.threshold
        if threshold is None:
            return None
        wanted = self._may_undo and p_undo > threshold
        if self._explores and self._may_undo:
            turned = self._luck[len(self._ids)] < self._decoding.undo_epsilon
            self._decision = math.log(self._decoding.undo_epsilon if turned else 1 - self._decoding.undo_epsilon)
            return wanted is not turned
        return wanted

    def take(self, token: int, logprob: float, alternative: float = -math.inf) -> int:
        """Move on by the chosen id.

        Args:
            logprob: as in `Decoded.logprobs`.
            alternative: log-probability of the best id allowed here other than this one and U, on the same scale. Read where
                `Decoding.weighs_paths`.

        Returns:
            How many of the visible ids are gone from the end.

        Raises:
            ValueError: the decode has ended, or the id is not allowed here.
        """
        if self.finish is not None:
            raise ValueError(f"id {token} behind the end of a decode")
        before = len(self._seen)
        if self._run and token != self._undo_id:
            self._end_run()
            self._settle()
            return before - len(self._seen)
        forced = self.forced
        certain = self._decided and token == self._undo_id and forced is None
        if certain:
            allowed = self._doubted if self._guided else self._may_undo
        else:
            allowed = token not in self._banned and forced in (None, token)
        if not allowed:
            raise ValueError(f"id {token} is not allowed behind {self._ids}")
        explored = self._explores and self._may_undo and forced is None
        self._ids.append(token)
        self._logprobs.append((0.0 if certain else logprob) + (self._decision if explored else 0.0))
        self._bans.append(self._banned - self._undo_alone if explored else _NONE if certain else self._banned)
        self._behind_run = self._doubted = False
        deleted = self._stream.take(token)
        self._fresh = deleted < 0
        if self._fresh:
            self._seen.append(token)
            self._path.append(_Push(self._state, token, logprob, alternative))
            child = self._state.children.get(token)
            if child is None:
                child = self._state.children[token] = _State()
            self._state = child
        else:
            self._undo(deleted)
        if token == self._decoding.stop_id:
            self.finish = "stop"
        elif len(self._ids) == self._decoding.max_tokens:
            self.finish = "length"
        self._settle()
        return max(0, before - len(self._seen))

    def end(self) -> None:
        """Nothing more is wanted: the decode is over."""
        self.finish = self.finish or "length"

    def result(self) -> Decoded:
        """What was decoded; before the end, what there is so far."""
        stream = self._stream
        return Decoded(
            tuple(self._ids),
            stream.surviving,
            tuple(self._logprobs),
            tuple(self._bans),
            stream.undos,
            stream.noops,
            self.finish or "length",
            frozenset(self._closed),
        )

    def _undo(self, count: int) -> None:
        start = len(self._path) - count
        deleted = self._path[start:]
        del self._path[start:]
        if deleted:
            self._state = deleted[0].state
        if self._defers:
            self._seen.append(self._undo_id)
            self._run += 1
            self._gone += deleted
            forced = self.forced
            if not (self._undo_allowed() if forced is None else forced == self._undo_id):
                self._closed.append(len(self._ids) - 1)
                self._end_run()
            return
        if self._decoding.mode == "soft":
            self._seen.append(self._undo_id)
        else:
            del self._seen[len(self._seen) - count :]
        if deleted:
            self._return(deleted)

    def _end_run(self) -> None:
        gone, self._gone = self._gone, []
        del self._seen[len(self._seen) - self._run - len(gone) :]
        self._run, self._behind_run = 0, True
        if gone:
            self._return(gone[-1:])

    def _return(self, deleted: list[_Push]) -> None:
        """Count the return, and forbid what was tried. Bans stay with the state: greedy decoding walks to it again.

        One U of unit `token` takes back one decision. A line or a whole text is taken back for one decision in it, and often
        begins alike in every try: forbidden is the id at which the most probable other path leaves.
        """
        state = deleted[0].state
        state.returns += 1
        self._capped = self._capped or state.returns >= self._decoding.max_undos_per_state
        if not self._decoding.ban_tried:
            return
        wrong, best, before = deleted[-1], -math.inf, 0.0
        for push in deleted:
            if before + push.alternative > best:
                wrong, best = push, before + push.alternative
            before += push.logprob
        tried = wrong.state.tried | {wrong.token}
        # All but U have been tried: begin again rather than leave nothing to choose from.
        wrong.state.tried = tried if len(tried) + 1 < self._vocab_size else _NONE

    def _undo_allowed(self) -> bool:
        decoding = self._decoding
        if decoding.mode == "forbidden" or self._behind_run or not self._path:
            return False
        # An undo with no room for an id behind it repairs nothing.
        if self._stream.undos >= decoding.max_undos or len(self._ids) + 2 > decoding.max_tokens:
            return False
        if not self._capped:
            return True
        depth = len(apply_undo((*self._stream.surviving, self._undo_id), decoding.rule).surviving)
        return self._path[depth].state.returns < decoding.max_undos_per_state

    def _settle(self) -> None:
        """What may be chosen in the state just reached."""
        self._may_undo = self._undo_allowed()
        if self.forced is not None:
            self._banned = self._undo_alone if self._behind_run else _NONE
            return
        tried = _NONE if self._run else self._state.tried
        if self._decided or not self._may_undo:
            self._banned = tried | self._undo_alone if tried else self._undo_alone
        else:
            self._banned = tried
