"""The state machine of a decode with undo agrees with what the ids so far say, keeps its caps, and ends."""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from dataclasses import asdict, replace
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.backtrack.cursor import Cursor, Decoded, DecodeRequest, Decoding, Signal
from pipeline.backtrack.undo import UndoRule, Unit, apply_undo
from tests.pipeline.slow_decode import alternative_of, choose, doubts_of, logprobs_of, run_behind, slow_decode, uniforms_of

U, END, STOP, SIZE = 5, 3, 0, 6
NONE = frozenset[int]()


def rule(unit: Unit) -> UndoRule:
    return UndoRule(U, unit, frozenset({END}))


PLAIN = Decoding("rewind", 0, 1, 30, STOP, rule("token"), threshold=None)
AT_ONCE = replace(PLAIN, rewinding="immediate")
STEP = replace(PLAIN, rule=rule("step"))


@functools.lru_cache(100_000)
def logits_of(visible: tuple[int, ...]) -> tuple[float, ...]:
    """A model made of chance: every context has logits of its own, in which U is likely and the end is not."""
    rng = random.Random(repr(visible))
    logits = [rng.gauss(0, 2) for _ in range(SIZE)]
    logits[U] += 1.5
    logits[STOP] -= 2
    return tuple(logits)


def drive(request: DecodeRequest, decoding: Decoding) -> Decoded:
    """The smallest engine. Checks on the way what an engine relies on."""
    cursor, uniforms = Cursor(request, decoding, SIZE), uniforms_of(request, decoding)
    ids: list[int] = []
    while cursor.finish is None:
        seen, banned, forced = cursor.visible, cursor.banned(), cursor.forced
        run = run_behind(ids, decoding) if cursor.in_run else 0
        stack = apply_undo(ids[: len(ids) - run], decoding.rule).surviving + (U,) * run
        assert seen == request.prompt_ids + (tuple(ids) if decoding.mode == "soft" else stack)
        assert (len(seen), seen[-1]) == (cursor.length, cursor.last)
        assert len(banned) < SIZE
        logits = logits_of(seen)
        scores = logprobs_of(logits, banned, decoding.undo_bias, U)
        token = choose(scores, decoding, uniforms[cursor.emitted][cursor.in_run]) if forced is None else forced
        if forced is None and cursor.decides(math.exp(logprobs_of(logits, NONE)[U])):
            token = U
        emitted = cursor.emitted
        lost = cursor.take(token, scores[token], alternative_of(scores, token, U))
        ids += [token] * (cursor.emitted - emitted)
        if cursor.asks and doubts_of(decoding)(
            logprobs_of(logits, banned | {U}), token, apply_undo(ids, decoding.rule).surviving, cursor.visible
        ):
            cursor.doubt()
        # Some go from the end, or one comes, or nothing happens: only the last id is ever new to a cache.
        now, kept = cursor.visible, len(seen) - lost
        assert now[:kept] == seen[:kept] and len(now) - kept in ((0,) if lost else (0, 1))
    return cursor.result()


def assert_same(found: Decoded, wanted: Decoded, tolerance: float = 1e-9) -> None:
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=tolerance)
    assert replace(found, logprobs=()) == replace(wanted, logprobs=())


def variants(one: Decoding) -> list[Decoding]:
    """The same with what goes with some settings alone."""
    if one.threshold is None:
        return [replace(one, undo_bias=1.0)]
    return [] if one.mode == "guided" or one.defers else [replace(one, undo_epsilon=0.4)]


decodings = st.builds(
    Decoding,
    mode=st.sampled_from(["rewind", "rewind", "rewind", "soft", "forbidden", "guided", "guided"]),
    temperature=st.sampled_from([0, 0.7, 1.5]),
    top_p=st.sampled_from([1, 0.8]),
    max_tokens=st.integers(1, 30),
    stop_id=st.just(STOP),
    rule=st.sampled_from([rule("token"), rule("token"), rule("step"), rule("all")]),
    rewinding=st.sampled_from(["deferred", "immediate"]),
    threshold=st.sampled_from([None, None, 0.05, 0.3, 0.7]),
    ban_tried=st.sampled_from([True, True, False]),
    max_undos=st.sampled_from([2, 16, 100]),
    max_undos_per_state=st.sampled_from([1, 2, 100]),
    signal=st.builds(
        Signal, st.sampled_from(["probability", "margin", "entropy", "repeat"]), st.sampled_from([0.2, 0.6, 1.0]), st.integers(1, 3)
    ),
).flatmap(lambda one: st.sampled_from([one, *variants(one)]))
requests = st.builds(
    DecodeRequest,
    prompt_ids=st.lists(st.integers(0, SIZE - 2), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 9),
    forced_ids=st.lists(st.integers(0, SIZE - 1), max_size=6).map(tuple) | st.just(()),
)


@settings(deadline=None, max_examples=600)
@given(requests, decodings)
@example(  # a decision turned round within a line that is then taken back
    DecodeRequest((1, 1), 0, (1, 1)),
    replace(STEP, temperature=0.7, max_tokens=11, threshold=0.3, max_undos_per_state=100, undo_epsilon=0.4),
)
def test_equals_the_definition_from_the_ids(request: DecodeRequest, decoding: Decoding) -> None:
    if decoding.mode == "forbidden":
        request = replace(request, forced_ids=tuple(token for token in request.forced_ids if token != U))
    found = drive(request, decoding)
    assert_same(found, slow_decode(logits_of, SIZE, request, decoding))
    assert len(found.ids) <= decoding.max_tokens
    chosen = found.ids[len(request.forced_ids) :]
    assert not (decoding.mode == "forbidden" and U in found.ids)
    assert found.noops == apply_undo(request.forced_ids[: len(found.ids)], decoding.rule).noops
    assert chosen.count(U) <= decoding.max_undos


@pytest.mark.parametrize("unit", ["token", "step", "all"])
@pytest.mark.parametrize("kind", ["probability", "margin", "entropy", "repeat"])
def test_a_signal_that_always_asks_ends_at_the_caps(unit: Unit, kind: Any) -> None:
    """The caps hold, and what they leave goes on without undos to the end."""
    signal = Signal(kind, threshold=0.0 if kind == "entropy" else 1.0, ngram=1)
    guided = replace(PLAIN, mode="guided", rule=rule(unit), signal=signal, max_tokens=60, max_undos=9, max_undos_per_state=3)
    found = [drive(DecodeRequest((4, seed), 0), guided) for seed in range(5)]
    assert all(one.finish == "stop" or len(one.ids) == 60 for one in found)
    assert 3 <= max(one.undos for one in found) <= 9


def test_what_the_model_says_of_u_counts_for_nothing_where_a_signal_guides() -> None:
    guided = replace(PLAIN, mode="guided", signal=Signal("probability", 0.5), threshold=0.1)
    cursor = cursor_at((1, 2), guided)
    assert cursor.asks and cursor.decides(0.99) is False and cursor.banned() == {U}
    with pytest.raises(ValueError, match=f"id {U} is not allowed"):
        cursor.take(U, -1)
    cursor.doubt()
    assert cursor.decides(0.0) is True
    assert cursor.take(U, -9) == 1 and cursor.visible == (4, 1)
    assert (cursor.result().logprobs[-1], cursor.result().banned[-1]) == (0, NONE)  # it was certain
    assert cursor.banned() == {2, U}
    cursor.doubt()  # what stands now has been asked about before
    assert not cursor.asks and not cursor.decides(0.99)
    cursor.take(3, -1)
    assert cursor.asks and not cursor.decides(0.99)  # a doubt does not outlive the id it was about


def test_forced_ids_and_the_end_are_not_asked_about() -> None:
    guided = replace(PLAIN, mode="guided", signal=Signal())
    cursor = Cursor(DecodeRequest((4,), 0, (1, 2)), guided, SIZE)
    asked = []
    for token in (1, 2, STOP):
        cursor.take(token, -1)
        asked.append(cursor.asks)
    assert asked == [False, True, False]  # behind the first the second must come, behind the last nothing comes


@settings(deadline=None, max_examples=100)
@given(requests.filter(lambda request: U not in request.forced_ids), decodings)
def test_a_state_is_returned_to_at_most_as_often_as_it_may(request: DecodeRequest, decoding: Decoding) -> None:
    ids, returns = drive(request, replace(decoding, mode="rewind", rewinding="immediate")).ids, dict[tuple[int, ...], int]()
    for index, token in enumerate(ids):
        if token == U:
            state = apply_undo(ids[: index + 1], decoding.rule).surviving
            returns[state] = returns.get(state, 0) + 1
    assert max(returns.values(), default=0) <= decoding.max_undos_per_state


def cursor_at(ids: tuple[int, ...], decoding: Decoding) -> Cursor:
    cursor = Cursor(DecodeRequest((4,), 0), decoding, SIZE)
    for token in ids:
        cursor.take(token, -1.0, -2.0)
    return cursor


def test_a_deferred_run_is_seen_until_it_ends() -> None:
    cursor = cursor_at((1, 2, 3, U), PLAIN)
    assert (cursor.visible, cursor.in_run, cursor.banned()) == ((4, 1, 2, 3, U), True, NONE)
    assert cursor.take(U, -1) == 0
    assert cursor.visible == (4, 1, 2, 3, U, U)
    assert cursor.take(2, -1) == 4  # ends the run, and is not emitted
    assert (cursor.visible, cursor.in_run, cursor.emitted) == ((4, 1), False, 5)
    assert cursor.banned() == {2, U}  # the first of what the run deleted; U, or this would be the same run
    cursor.take(3, -1)
    assert cursor.banned() == NONE


def test_a_run_that_cannot_go_on_ends_at_once() -> None:
    assert cursor_at((1, 2), PLAIN).take(U, -1) == 0
    for cursor in (cursor_at((1,), PLAIN), cursor_at((1, 2), replace(PLAIN, max_undos=1))):
        emptied = cursor.emitted == 1
        assert cursor.take(U, -1) == 1 and cursor.visible == ((4,) if emptied else (4, 1)) and not cursor.in_run


def test_without_a_threshold_nothing_is_decided_and_with_one_u_is_never_sampled() -> None:
    assert cursor_at((1,), PLAIN).decides(0.99) is None and cursor_at((1,), PLAIN).banned() == NONE
    cursor = cursor_at((1,), replace(AT_ONCE, threshold=0.5))
    assert (cursor.decides(0.5), cursor.decides(0.51), cursor.banned()) == (False, True, {U})
    cursor.take(U, -9)
    assert cursor.result().logprobs == (-1, 0) and cursor.result().banned == ({U}, NONE)
    assert not cursor.decides(0.99)  # nothing is left to undo
    assert cursor.banned() == {1, U}


def test_a_run_that_had_to_end_is_said() -> None:
    cursor = cursor_at((1, 2, U), PLAIN)
    assert cursor.result().closed == NONE  # it may still go on
    cursor.take(3, -1)
    assert cursor.result().closed == NONE  # it was ended
    for how in (PLAIN, replace(PLAIN, max_undos=1)):
        assert cursor_at((1, U), how).result().closed == {1}


def test_decisions_that_are_turned_round_have_the_probability_that_is_said() -> None:
    """Over many seeds, each first decision and each id behind it is as frequent as its log-probability says."""
    decoding = Decoding("rewind", 1.0, 1.0, 2, STOP, rule("token"), "immediate", threshold=0.3, undo_epsilon=0.25)
    decoding = replace(decoding, max_tokens=4)
    seen: Counter[tuple[int, ...]] = Counter()
    said: dict[tuple[int, ...], float] = {}
    seeds = 6000
    for seed in range(seeds):
        one = drive(DecodeRequest((4,), seed), decoding)
        for count in range(1, len(one.ids) + 1):
            seen[one.ids[:count]] += 1
            said[one.ids[:count]] = math.exp(sum(one.logprobs[:count]))
    undone = [ids for ids in seen if U in ids]
    assert sum(seen[ids] for ids in undone) > 500
    for ids, times in seen.items():
        spread = math.sqrt(seeds * said[ids] * (1 - said[ids])) + 1
        assert abs(times - seeds * said[ids]) < 5 * spread, ids


def test_a_line_is_left_where_the_best_other_path_leaves() -> None:
    cursor = Cursor(DecodeRequest((4,), 0), STEP, SIZE)
    line = [(1, -0.1, -3.0), (2, -0.7, -0.8), (1, -0.1, -0.5), (END, -0.1, -9.0)]  # other paths: -3, -0.9, -1.3, -9.9
    for token, logprob, alternative in line:
        cursor.take(token, logprob, alternative)
    cursor.take(U, -1)
    assert cursor.visible == (4,) and cursor.banned() == {U}  # the beginning is not to blame
    cursor.take(1, -0.1, -3.0)
    assert cursor.banned() == {2}
    cursor.take(4, -0.4, -1.0)
    assert cursor.banned() == NONE


def test_a_line_without_any_other_path_loses_its_last_token() -> None:
    cursor = Cursor(DecodeRequest((4,), 0), STEP, SIZE)
    for token in (1, 2, U, 1):
        cursor.take(token, -0.1)
    assert cursor.banned() == {2}


def test_when_everything_was_tried_trying_begins_again() -> None:
    cursor = Cursor(DecodeRequest((4,), 0), replace(AT_ONCE, max_undos_per_state=100), SIZE)
    for token in (1, 2, 3):
        cursor.take(token, -1)
        cursor.take(U, -1)
    assert cursor.banned() == {1, 2, 3, U}
    cursor.take(4, -1)
    cursor.take(U, -1)
    assert cursor.banned() == {1, 2, 3, 4, U}  # the stop id is left
    small = Cursor(DecodeRequest((4,), 0), replace(AT_ONCE, stop_id=9, max_undos_per_state=100), SIZE)
    for token in (0, 1, 2, 3, 4):
        small.take(token, -1)
        small.take(U, -1)
    assert small.banned() == {U}


def test_a_forced_id_is_scored_without_bans() -> None:
    cursor = Cursor(DecodeRequest((4,), 0, forced_ids=(U, 1, U, 1)), replace(AT_ONCE, threshold=0.5), SIZE)
    while cursor.forced is not None:
        assert cursor.banned() == NONE
        cursor.take(cursor.forced, -1.5)
    done = cursor.result()
    assert (done.surviving, done.undos, done.noops, done.logprobs) == ((1,), 2, 1, (-1.5,) * 4)


def test_an_id_that_is_not_allowed_is_refused() -> None:
    for ids, token in (((1, U), 1), ((), U), ((1, U), U)):
        with pytest.raises(ValueError, match=f"id {token} is not allowed behind"):
            cursor_at(ids, AT_ONCE).take(token, -1)
    with pytest.raises(ValueError, match="behind the end of a decode"):
        cursor_at((1, STOP), PLAIN).take(1, -1)
    with pytest.raises(ValueError, match="not allowed"):
        Cursor(DecodeRequest((4,), 0, (2,)), PLAIN, SIZE).take(1, -1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "hard"}, "mode must be one of soft, rewind, forbidden, guided, is 'hard'"),
        ({"mode": "guided"}, "mode guided needs a Signal, signal is None"),
        ({"rewinding": "later"}, "rewinding must be one of immediate, deferred, is 'later'"),
        ({"temperature": -0.1}, "temperature must be 0 or more, is -0.1"),
        ({"temperature": math.nan}, "temperature must be 0 or more, is nan"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, is 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, is 0"),
        ({"max_undos": 0}, "max_undos must be at least 1, is 0"),
        ({"max_undos_per_state": 0}, "max_undos_per_state must be at least 1, is 0"),
        ({"stop_id": U}, "stop_id and the undo token are the same id, 5"),
        ({"threshold": 1.5}, "threshold must lie in 0 .. 1 or be None, is 1.5"),
        ({"threshold": 0.5, "undo_bias": 1}, "undo_bias must be finite, and 0 beside a threshold, is 1"),
        ({"undo_bias": math.inf}, "undo_bias must be finite"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Decoding(**{name: getattr(PLAIN, name) for name in asdict(PLAIN)} | wrong)


def test_a_wrong_signal_is_named() -> None:
    with pytest.raises(ValueError, match="signal kind must be one of probability, margin, entropy, repeat, score, is 'luck'"):
        Signal(cast(Any, "luck"))
    with pytest.raises(ValueError, match=r"signal threshold must lie in 0 \.\. 1 for kind margin, is 1\.5"):
        Signal("margin", 1.5)
    with pytest.raises(ValueError, match="signal threshold must be finite for kind score, is nan"):
        Signal("score", math.nan)
    with pytest.raises(ValueError, match="signal ngram must be at least 1, is 0"):
        Signal("repeat", ngram=0)


def test_a_wrong_request_is_named() -> None:
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        DecodeRequest((), 0)
    with pytest.raises(ValueError, match="seed must be 0 or more, is -1"):
        DecodeRequest((1,), -1)
    with pytest.raises(ValueError, match="prompt_ids contains the undo token 5"):
        Cursor(DecodeRequest((1, U), 0), PLAIN, SIZE)
    with pytest.raises(ValueError, match="forced_ids contains the undo token 5, which the mode forbids"):
        Cursor(DecodeRequest((1,), 0, (U,)), replace(PLAIN, mode="forbidden"), SIZE)
    for request, decoding, said in (
        (DecodeRequest((1, SIZE), 0), PLAIN, f"prompt_ids: the model has no id {SIZE}, its ids are 0 .. {SIZE - 1}"),
        (DecodeRequest((-1, 1), 0), PLAIN, "prompt_ids: the model has no id -1"),
        (DecodeRequest((1,), 0, (1, 99)), PLAIN, "forced_ids: the model has no id 99"),
        (DecodeRequest((1,), 0), replace(PLAIN, rule=UndoRule(SIZE)), f"rule: the model has no id {SIZE}"),
    ):
        with pytest.raises(ValueError, match=said):
            Cursor(request, decoding, SIZE)
