"""Decoding with undo said once more without a state machine: before each id, everything is found again from the ids so far."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding, Finish
from pipeline.backtrack.undo import apply_undo

LogitsOf = Callable[[tuple[int, ...]], Sequence[float]]
State = tuple[int, ...]
Doubts = Callable[[list[float], int, tuple[int, ...], tuple[int, ...]], bool]
"""(log-probabilities of what was open, the id chosen from it, the surviving ids with it, all visible ids) -> U is due."""


def logprobs_of(logits: Sequence[float], banned: frozenset[int], bias: float = 0.0, undo_id: int = 0) -> list[float]:
    kept = [-math.inf if token in banned else logit + bias * (token == undo_id) for token, logit in enumerate(logits)]
    top = max(kept)
    norm = top + math.log(sum(math.exp(logit - top) for logit in kept))
    return [logit - norm for logit in kept]


def choose(logprobs: Sequence[float], decoding: Decoding, uniform: float) -> int:
    """Greedy, or the first id with which the probabilities add up to more than the uniform number's part of them all."""
    order = list(range(len(logprobs)))
    if decoding.temperature == 0:
        return max(order, key=lambda token: logprobs[token])
    top = max(logprobs)
    weights = [math.exp((logprob - top) / decoding.temperature) for logprob in logprobs]
    if decoding.top_p < 1:
        order.sort(key=lambda token: -weights[token])
        kept: list[int] = []
        while sum(weights[token] for token in kept) < decoding.top_p * sum(weights):
            kept.append(order[len(kept)])
        order = kept
    wanted = uniform * sum(weights[token] for token in order)
    return next(token for at, token in enumerate(order) if sum(weights[one] for one in order[: at + 1]) > wanted)


def uniforms_of(request: DecodeRequest, decoding: Decoding) -> list[list[float]]:
    numbers: list[list[float]] = np.random.Generator(np.random.Philox(request.seed)).random((decoding.max_tokens, 2)).tolist()
    return numbers


def alternative_of(logprobs: Sequence[float], chosen: int, undo_id: int) -> float:
    return max((logprob for token, logprob in enumerate(logprobs) if token not in (chosen, undo_id)), default=-math.inf)


def run_behind(ids: Sequence[int], decoding: Decoding) -> int:
    """U's of the deferred run at the end."""
    run = 0
    while decoding.defers and run < len(ids) and ids[-1 - run] == decoding.rule.undo_id:
        run += 1
    return run


class History:
    """What the ids so far say about returns and bans. A deferred run at their end counts when it is `ended`.

    `logprobs` are the ids' own: what the decision for or against an undo was worth says nothing about the other paths."""

    def __init__(
        self, ids: list[int], logprobs: list[float], alternatives: list[float], decoding: Decoding, size: int, ended: bool
    ) -> None:
        self.returns: Counter[State] = Counter()
        self.tried: defaultdict[State, set[int]] = defaultdict(set)
        rule, undo_id = decoding.rule, decoding.rule.undo_id
        end = 0
        while end < len(ids):
            begin, end = end, end + 1
            if ids[begin] != undo_id:
                continue
            while decoding.defers and end < len(ids) and ids[end] == undo_id:
                end += 1
            if decoding.defers and end == len(ids) and not ended:
                continue
            stands = apply_undo(ids[:end], rule)
            deleted = [index for index in apply_undo(ids[:begin], rule).source if index not in stands.source]
            if not deleted:
                continue
            self.returns[stands.surviving] += 1
            if not decoding.ban_tried:
                continue
            wrong = deleted[0]
            if rule.unit != "token":
                paths = [sum(logprobs[i] for i in deleted[:at]) + alternatives[d] for at, d in enumerate(deleted)]
                wrong = deleted[-1] if max(paths) == -math.inf else deleted[paths.index(max(paths))]
            tried = self.tried[apply_undo(ids[:wrong], rule).surviving]
            tried.add(ids[wrong])
            if len(tried) == size - 1:
                tried.clear()


def doubts_of(decoding: Decoding) -> Doubts:
    """The training-free signals, each by its definition."""
    signal = decoding.signal
    assert signal is not None
    kind, threshold, ngram = signal.kind, signal.threshold, signal.ngram

    def doubts(scores: list[float], token: int, surviving: tuple[int, ...], visible: tuple[int, ...]) -> bool:
        probabilities = [math.exp(score) for score in scores]
        best, second = sorted(probabilities)[-1], sorted(probabilities)[-2]
        if kind == "probability":
            return probabilities[token] < threshold
        if kind == "margin":
            return best - second < threshold
        if kind == "entropy":
            return -sum(p * math.log(p) for p in probabilities if p) > threshold
        earlier = [surviving[start : start + ngram] for start in range(len(surviving) - ngram)]
        return surviving[-ngram:] in earlier

    return doubts


def slow_decode(
    logits_of: LogitsOf, size: int, request: DecodeRequest, decoding: Decoding, doubts: Doubts | None = None
) -> Decoded:
    rule, undo_id = decoding.rule, decoding.rule.undo_id
    guided, threshold = decoding.mode == "guided", decoding.threshold
    if guided:
        doubts, threshold = doubts or doubts_of(decoding), 2.0  # P(U) is never above it
    uniforms = uniforms_of(request, decoding)
    epsilon = decoding.undo_epsilon
    luck = np.random.Generator(np.random.Philox([request.seed, 1])).random(decoding.max_tokens).tolist()
    closed: set[int] = set()
    ids: list[int] = []
    own: list[float] = []
    decisions: list[float] = []
    alternatives: list[float] = []
    banned: list[frozenset[int]] = []
    doubted = False
    none, undo_alone = frozenset[int](), frozenset({undo_id})

    def emit(token: int, scores: list[float], bans: frozenset[int], certain: bool = False, explored: bool = False) -> None:
        turned = explored and luck[len(ids)] < epsilon
        ids.append(token)
        own.append(0.0 if certain else scores[token])
        decisions.append(math.log(epsilon if turned else 1 - epsilon) if explored else 0.0)
        alternatives.append(alternative_of(scores, token, undo_id))
        banned.append(bans - undo_alone if explored else none if certain else bans)

    def may_go_on() -> bool:
        """Whether a run may or must go on."""
        forced = request.forced_ids[len(ids)] if len(ids) < len(request.forced_ids) else None
        return forced == undo_id or forced is None and may_undo(ended=False)

    def may_undo(ended: bool) -> bool:
        if decoding.mode == "forbidden" or ids.count(undo_id) >= decoding.max_undos or len(ids) >= decoding.max_tokens - 1:
            return False
        history = History(ids, own, alternatives, decoding, size, ended)
        back = apply_undo([*ids, undo_id], rule)
        return back.noops == apply_undo(ids, rule).noops and history.returns[back.surviving] < decoding.max_undos_per_state

    while len(ids) < decoding.max_tokens and not (ids and ids[-1] == decoding.stop_id):
        forced = request.forced_ids[len(ids)] if len(ids) < len(request.forced_ids) else None
        uniform = uniforms[len(ids)]
        last_doubted, doubted = doubted, False
        surviving, run = apply_undo(ids, rule).surviving, run_behind(ids, decoding)
        if run and not may_go_on():
            closed.add(len(ids) - 1)
        elif run:
            logits = logits_of(request.prompt_ids + apply_undo(ids[:-run], rule).surviving + (undo_id,) * run)
            scores = logprobs_of(logits, none, decoding.undo_bias, undo_id)
            if forced is not None or threshold is None:
                goes_on = forced is not None or choose(scores, decoding, uniform[1]) == undo_id
            else:
                goes_on = math.exp(scores[undo_id]) > threshold
            if goes_on:
                emit(undo_id, scores, none, forced is None and threshold is not None)
                continue
        logits = logits_of(request.prompt_ids + (tuple(ids) if decoding.mode == "soft" else surviving))

        def is_doubted(token: int, bans: frozenset[int], before: State = surviving, logits: Sequence[float] = logits) -> bool:
            if doubts is None or token == undo_id:
                return False
            open_scores = logprobs_of(logits, bans | undo_alone)
            return doubts(open_scores, token, (*before, token), (*request.prompt_ids, *before, token))

        if forced is not None:
            bans = undo_alone if run else none
            emit(forced, logprobs_of(logits, bans, decoding.undo_bias, undo_id), bans)
            doubted = is_doubted(forced, bans)
            continue
        allowed = not run and may_undo(ended=True)
        if allowed and last_doubted:
            emit(undo_id, logprobs_of(logits, none), none, True)
            continue
        history = History(ids, own, alternatives, decoding, size, ended=True)
        explored = allowed and epsilon > 0
        if allowed and threshold is not None:
            wanted = math.exp(logprobs_of(logits, none)[undo_id]) > threshold
            if wanted != (explored and luck[len(ids)] < epsilon):
                emit(undo_id, logprobs_of(logits, none), frozenset(history.tried[surviving]), True, explored)
                continue
        bans = frozenset(history.tried[surviving]) | (none if allowed and threshold is None else undo_alone)
        scores = logprobs_of(logits, bans, decoding.undo_bias, undo_id)
        emit(choose(scores, decoding, uniform[0]), scores, bans, explored=explored)
        doubted = is_doubted(ids[-1], bans)
    run = run_behind(ids, decoding)
    if run and not may_go_on():
        closed.add(len(ids) - 1)
    undone = apply_undo(ids, rule)
    finish: Finish = "stop" if ids[-1] == decoding.stop_id else "length"
    logprobs = tuple(one + decision for one, decision in zip(own, decisions, strict=True))
    return Decoded(tuple(ids), undone.surviving, logprobs, tuple(banned), undone.undos, undone.noops, finish, frozenset(closed))
