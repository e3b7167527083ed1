"""Traces from other sources than the model's own judged errors: random tokens, and steps of another, wrong solution.

Pure functions on token ids; whoever calls them owns the tokenizer and the judge.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from pipeline.backtrack.trace import Detour, Trace, WrongTry, build_trace
from pipeline.backtrack.undo import UndoRule

_ARTICLES = frozenset({"a", "an", "the"})
_PART_OF_A_CHARACTER = "\ufffd"  # how decoders show a token that holds some bytes of a character


@dataclass(frozen=True)
class Injected:
    """A trace and where its error comes from. Its surviving completion is the solution."""

    trace: Trace
    source: Literal["random", "aligned"]
    place: int
    """Tokens of the solution that stand before the wrong try."""
    k: int
    """Tokens of the wrong try."""


def random_injection(
    prompt: Sequence[int], solution_ids: Sequence[int], vocab_ids: Sequence[int], k: int, rng: random.Random, rule: UndoRule
) -> Injected:
    """k random tokens before a random token of the solution, their undos, then the solution goes on.

    The first one differs from the token that belongs there, so that no undo takes back a right token. The undo token is never
    drawn; with unit `step` neither are step ends, so that one U takes back the line that they spoilt.

    Args:
        vocab_ids: ids to draw from; the caller leaves special tokens out.

    Raises:
        ValueError: no solution, k below 1, nothing to draw from, or an undo token in the prompt or the solution.
    """
    if not solution_ids:
        raise ValueError("an empty solution has no place for an error")
    if k < 1:
        raise ValueError(f"k must be at least 1, is {k}")
    never = {rule.undo_id} | (rule.step_end_ids if rule.unit == "step" else set())
    place = rng.randrange(len(solution_ids))
    drawn: list[int] = []
    while len(drawn) < k:
        barred = never if drawn else never | {solution_ids[place]}
        if not drawn and all(token in barred for token in vocab_ids):
            raise ValueError("vocab_ids holds no token that could be an error here")
        token = rng.choice(vocab_ids)
        if token not in barred:
            drawn.append(token)
    wrong_try = WrongTry(tuple(drawn), (True,) * k)
    return Injected(build_trace(prompt, solution_ids, [Detour(place, wrong_try)], rule), "random", place, k)


def aligned_injection(
    prompt: Sequence[int],
    solution_ids: Sequence[int],
    wrong_ids: Sequence[int],
    step_end_ids: Collection[int],
    rule: UndoRule,
    *,
    stop_id: int | None = None,
    trivial: Collection[int] = frozenset(),
) -> Injected | None:
    """The first step in which a wrong solution of the same problem differs, as a wrong try in place of the right step.

    Steps are compared without `trivial` tokens, step ends and the stop token. A wrong step counts as different when it then has a
    token where the right one has another or none; so a step that merely breaks off, or that differs in nothing but an `=`,
    is passed over. In the try, all from the first token that the right step does not have there is an error: whether what
    follows it is right inference is not known here.

    Args:
        step_end_ids: ids that end a step; with unit `step` the rule's own.
        stop_id: what ends a completion. The trace ends with it where the solution does; a wrong try never holds it.
        trivial: ids that make no difference, see `trivial_ids`.

    Returns:
        None when no aligned step differs.

    Raises:
        ValueError: an empty solution, or an undo token in one of them or in the prompt.
    """
    if rule.undo_id in wrong_ids:
        raise ValueError("the wrong solution holds the undo token")
    if not solution_ids or not wrong_ids:
        raise ValueError(f"the {'wrong ' if solution_ids else ''}solution is empty")
    rights, wrongs = (_steps(ids, step_end_ids, stop_id) for ids in (solution_ids, wrong_ids))
    ignored = {*trivial, *step_end_ids}
    for i, j in align(rights, wrongs):
        if _differs(rights[i], wrongs[j], ignored):
            same = _same(rights[i], wrongs[j])
            place = sum(map(len, rights[:i]))
            wrong_try = WrongTry(wrongs[j], tuple(at >= same for at in range(len(wrongs[j]))))
            trace = build_trace(prompt, solution_ids, [Detour(place, wrong_try)], rule)
            return Injected(trace, "aligned", place, len(wrongs[j]))
    return None


def trivial_ids(texts: Mapping[int, str]) -> frozenset[int]:
    """Ids of tokens that make no difference worth an undo: no letter and no digit (`=`, `,`, a space), or a lone article.

    This takes `+` and `-` in too: a step whose only difference is its operator is passed over.

    Args:
        texts: id -> its text, decoded alone. A token that holds part of a character only counts as a letter.
    """

    def trivial(text: str) -> bool:
        word = text.strip()
        return word.casefold() in _ARTICLES or not any(char.isalnum() or char == _PART_OF_A_CHARACTER for char in word)

    return frozenset(token for token, text in texts.items() if trivial(text))


def align(rights: Sequence[Sequence[int]], wrongs: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Pairs (right step, wrong step), rising in both, with the largest total similarity.

    Similarity is the Dice coefficient of the token multisets, 2 |A ∩ B| / (|A| + |B|); a step without a partner scores 0.
    Of several best alignments it is the one that pairs the earliest right step with the earliest wrong step, and so on.
    Global alignment after Needleman and Wunsch (1970), exact in rational numbers. No step may be empty.
    """
    bags = [[Counter(step) for step in steps] for steps in (rights, wrongs)]
    alike = [[Fraction(2 * (a & b).total(), a.total() + b.total()) for b in bags[1]] for a in bags[0]]
    # best[i][j]: of rights[i:] with wrongs[j:]
    best = [[Fraction(0)] * (len(wrongs) + 1) for _ in range(len(rights) + 1)]
    for i in reversed(range(len(rights))):
        for j in reversed(range(len(wrongs))):
            best[i][j] = max(alike[i][j] + best[i + 1][j + 1], best[i + 1][j], best[i][j + 1])
    pairs, j = [], 0
    for i in range(len(rights)):
        partner = next((at for at in range(j, len(wrongs)) if alike[i][at] + best[i + 1][at + 1] == best[i][j]), None)
        if partner is not None:
            pairs.append((i, partner))
            j = partner + 1
    return tuple(pairs)


def _steps(ids: Sequence[int], ends: Collection[int], stop_id: int | None) -> list[tuple[int, ...]]:
    """Steps of a completion, each with its end; the stop token and what follows it is left out."""
    steps: list[list[int]] = []
    whole = True
    for token in ids:
        if token == stop_id:
            break
        if whole:
            steps.append([])
        steps[-1].append(token)
        whole = token in ends
    return [tuple(step) for step in steps]


def _differs(right: Sequence[int], wrong: Sequence[int], ignored: Collection[int]) -> bool:
    """Whether the wrong step, without what is ignored, is anything but the right one or its beginning."""
    rest_right, rest_wrong = ([token for token in step if token not in ignored] for step in (right, wrong))
    return rest_right[: len(rest_wrong)] != rest_wrong


def _same(right: Sequence[int], wrong: Sequence[int]) -> int:
    """How many first tokens two steps share."""
    return next((at for at, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b), min(len(right), len(wrong)))
