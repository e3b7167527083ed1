"""Injected errors: the reader always sees the solution, no wrong token is a target, no undo takes back what is right."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backtrack.inject import Injected, align, aligned_injection, random_injection, trivial_ids
from pipeline.backtrack.layout import IGNORE
from pipeline.backtrack.targets import Targets
from pipeline.backtrack.trace import Role, Trace
from pipeline.backtrack.undo import UndoRule, Unit, apply_undo
from tests.pipeline.tiny import labels_of

U, STOP, END, EQUALS = 9, 8, 0, 7
UNITS: tuple[Unit, ...] = ("token", "step", "all")
rules = st.builds(UndoRule, st.just(U), st.sampled_from(UNITS), st.just(frozenset({END})))
tokens = st.sampled_from([END, 1, 2, 3, EQUALS])
solutions = st.builds(lambda ids, stop: [*ids, *stop], st.lists(tokens, max_size=12), st.sampled_from([[], [STOP]])).filter(bool)
prompts = st.lists(tokens, min_size=1, max_size=3)
steps = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), max_size=4)


def taught_well(trace: Trace, solution: Sequence[int], rule: UndoRule) -> None:
    """Each target judged by the text that stands before it: right text asks for the solution's next token, wrong text for U."""
    completion = trace.ids[trace.prompt_length :]
    for at, target in enumerate(labels_of(trace, rule, Targets())[trace.prompt_length :]):
        state = list(apply_undo(completion[:at], rule).surviving)
        right = state == list(solution[: len(state)])
        if target == U:
            assert not right
        elif target != IGNORE:
            assert right and target == solution[len(state)]


def holds(injected: Injected, prompt: Sequence[int], solution: Sequence[int], rule: UndoRule) -> None:
    trace = injected.trace
    assert trace.ids[: trace.prompt_length] == tuple(prompt)
    undone = apply_undo(trace.ids[trace.prompt_length :], rule)
    assert undone.surviving == tuple(solution)
    assert undone.noops == 0 and undone.undos == trace.roles.count(Role.UNDO) > 0
    taught_well(trace, solution, rule)


@settings(deadline=None)
@given(prompts, solutions, st.integers(1, 5), st.integers(0, 99), rules)
def test_random_tokens(prompt: list[int], solution: list[int], k: int, seed: int, rule: UndoRule) -> None:
    vocab = [END, 1, 2, 3, 4, U]
    injected = random_injection(prompt, solution, vocab, k, random.Random(seed), rule)
    holds(injected, prompt, solution, rule)
    assert (injected.source, injected.k) == ("random", k)
    wrong = [token for token, role in zip(injected.trace.ids, injected.trace.roles, strict=True) if role == Role.ERROR]
    assert len(wrong) == k and set(wrong) <= set(vocab) - {U}
    assert wrong[0] != solution[injected.place]
    assert injected.trace.roles.count(Role.UNDO) == (k if rule.unit == "token" else 1)
    assert injected == random_injection(prompt, solution, vocab, k, random.Random(seed), rule)


def test_random_tokens_stand_everywhere() -> None:
    rng, rule = random.Random(0), UndoRule(U)
    found = [random_injection([], [1, 2, STOP], [1, 2, 3], 1, rng, rule) for _ in range(200)]
    assert {one.place for one in found} == {0, 1, 2}  # never behind the last token: something must follow the undo
    assert {one.trace.ids[one.place] for one in found} == {1, 2, 3}


def test_an_unfinished_line_is_written_again() -> None:
    rule = UndoRule(U, "step", frozenset({END}))
    found = (random_injection([5], [1, END, 2, 3], [4], 2, random.Random(seed), rule) for seed in range(100))
    assert next(one.trace.ids for one in found if one.place == 3) == (5, 1, END, 2, 4, 4, U, 2, 3)


@pytest.mark.parametrize(
    ("prompt", "solution", "vocab", "k", "unit", "message"),
    [
        ([], [], [1], 1, "token", "an empty solution"),
        ([], [1], [2], 0, "token", "k must be at least 1, is 0"),
        ([], [1], [], 1, "token", "no token that could be an error"),
        ([], [1], [U], 1, "token", "no token that could be an error"),
        ([], [1], [1, U], 1, "all", "no token that could be an error"),
        ([], [1], [END], 1, "step", "no token that could be an error"),
        ([U], [1], [2], 1, "token", "the prompt holds the undo token"),
        ([], [U, U], [2], 1, "token", "holds the undo token"),
    ],
)
def test_random_tokens_refused(prompt: list[int], solution: list[int], vocab: list[int], k: int, unit: Unit, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_injection(prompt, solution, vocab, k, random.Random(0), UndoRule(U, unit, frozenset({END})))


def matchings(rights: int, wrongs: int) -> Iterator[tuple[tuple[int, int], ...]]:
    for size in range(min(rights, wrongs) + 1):
        for left in itertools.combinations(range(rights), size):
            for right in itertools.combinations(range(wrongs), size):
                yield tuple(zip(left, right, strict=True))


def similarity(a: Sequence[int], b: Sequence[int]) -> Fraction:
    rest, common = list(b), 0
    for token in a:
        if token in rest:
            rest.remove(token)
            common += 1
    return Fraction(2 * common, len(a) + len(b))


@settings(deadline=None)
@given(steps, steps)
def test_the_alignment_is_the_best_of_all(rights: list[list[int]], wrongs: list[list[int]]) -> None:
    """Most similarity; then pairs as early as can be, one more pair being earlier than none."""
    scored = [(sum(similarity(rights[i], wrongs[j]) for i, j in pairs), pairs) for pairs in matchings(len(rights), len(wrongs))]
    most = max(score for score, _ in scored)
    assert align(rights, wrongs) == min((pairs for score, pairs in scored if score == most), key=lambda pairs: (*pairs, (99, 99)))


def lines(ids: Sequence[int]) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in itertools.takewhile(lambda token: token != STOP, ids):
        found[-1].append(token)
        if token == END:
            found.append([])
    return [line for line in found if line]


@settings(deadline=None)
@given(prompts, solutions, solutions, rules, st.sampled_from([frozenset(), frozenset({EQUALS})]))
def test_aligned_steps(prompt: list[int], solution: list[int], wrong: list[int], rule: UndoRule, trivial: frozenset[int]) -> None:
    """The first pair of steps that differ in more than trivial tokens; all from their first difference on is an error."""
    injected = aligned_injection(prompt, solution, wrong, {END}, rule, stop_id=STOP, trivial=trivial)
    rights, wrongs = lines(solution), lines(wrong)

    def content(line: list[int]) -> str:
        return "".join(str(token) for token in line if token not in {END, *trivial})

    pairs = [(i, j) for i, j in align(rights, wrongs) if not content(rights[i]).startswith(content(wrongs[j]))]
    if injected is None:
        assert not pairs
        return
    holds(injected, prompt, solution, rule)
    i, j = pairs[0]
    assert (injected.source, injected.place, injected.k) == ("aligned", sum(map(len, rights[:i])), len(wrongs[j]))
    errors = [token for token, role in zip(injected.trace.ids, injected.trace.roles, strict=True) if role == Role.ERROR]
    shared = injected.k - len(errors)
    assert wrongs[j] == [*rights[i][:shared], *errors]
    assert rights[i][shared : shared + 1] != errors[:1]
    assert set(errors) - {END, STOP, *trivial}


@settings(deadline=None)
@given(solutions, rules)
def test_no_difference_no_trace(solution: list[int], rule: UndoRule) -> None:
    assert aligned_injection([], solution, solution, {END}, rule, stop_id=STOP) is None


RULE = UndoRule(U, "step", frozenset({END}))


def test_the_first_step_that_differs() -> None:
    """An extra step has no partner; what the wrong solution makes of its error later is not used."""
    right, wrong = [1, 1, END, 2, 3, END, 4, STOP], [1, 1, END, 5, 5, END, 2, 6, END, 6, STOP]
    injected = aligned_injection([], right, wrong, {END}, RULE, stop_id=STOP)
    assert injected is not None
    assert injected.trace.ids == (1, 1, END, 2, 6, END, U, 2, 3, END, 4, STOP)
    assert injected.trace.roles == (1, 1, 1, 3, 2, 2, 4, 5, 5, 5, 5, 5)
    assert (injected.place, injected.k) == (3, 3)


def test_an_error_in_the_first_step() -> None:
    injected = aligned_injection([5], [1, 2], [1, 3], {END}, UndoRule(U))
    assert injected is not None and injected.place == 0
    assert injected.trace.ids == (5, 1, 3, U, 2)


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ([1, EQUALS, 2, END], [1, 2, END], None),  # a lone `=`
        ([1, 2, END], [EQUALS, 1, 2, END], None),
        ([1, 2, END], [1, 2], None),  # a line break is left out
        ([1, 2, END], [1, END], None),  # breaks off
        ([1, EQUALS, 2, END], [1, 3, END], (1, 3, END, U)),  # more than the `=`; 3 stands where `=` does and is an error too
        ([1, 2, END], [1, 2, 3, END], (1, 2, 3, END, U)),  # goes on for too long
        ([1, 2, END, 3, STOP], [EQUALS, 1, 2, END, 4, STOP], (1, 2, END, 4, U)),  # the later difference counts
    ],
)
def test_what_makes_a_difference(right: list[int], wrong: list[int], expected: tuple[int, ...] | None) -> None:
    injected = aligned_injection([], right, wrong, {END}, RULE, stop_id=STOP, trivial={EQUALS})
    assert (injected and injected.trace.ids) == (expected and (*expected, *right[right.index(3) if 3 in right else 0 :]))


@pytest.mark.parametrize(
    ("prompt", "right", "wrong", "message"),
    [
        ([], [], [1], "the solution is empty"),
        ([], [1], [], "the wrong solution is empty"),
        ([U], [1], [2], "the prompt holds the undo token"),
        ([], [1, U], [2], "the solution holds the undo token"),
        ([], [1, END, U, END, 2], [1, END, U, END, 3], "the wrong solution holds the undo token"),
    ],
)
def test_aligned_steps_refused(prompt: list[int], right: list[int], wrong: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aligned_injection(prompt, right, wrong, {END}, RULE)


def test_tokens_that_make_no_difference() -> None:
    texts = ["=", " the", "An", "\n", "", " +", "5", " apples", "$1", "é", "\ufffd", "then", "²", "、"]
    assert {texts[token] for token in trivial_ids(dict(enumerate(texts)))} == {"=", " the", "An", "\n", "", " +", "、"}
