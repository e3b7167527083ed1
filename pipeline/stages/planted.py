"""What a model does with an error that it did not choose to make: errors planted behind a right beginning, undos forced and
forbidden, and undo made more or less likely. Called by evaluate; pipeline/causal.py makes figures of the outcomes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from datasets import Features, Value
from datasets import List as ListOf

from actors.engines import Completion
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding, Mode
from pipeline.backtrack.inject import random_injection
from pipeline.backtrack.undo import UndoRule, UndoStream, apply_undo
from pipeline.causal import RIGHT, Outcome
from pipeline.metrics import Evaluated
from pipeline.stages.io import Codec, decoding_of
from pipeline.stages.measured import Model, evaluated, evaluation_decoding, requests_of
from pipeline.stages.prm import named_signal
from pipeline.stages.probes import Case, spread
from pipeline.stages.rollouts import context_length, row_seed
from pipeline.stages.stage import Context
from pipeline.tasks.problem import Problem
from rewards.rollout import state_is_wrong, undo_runs
from verifiers.tasks import judge_of

OUTCOMES = Features(
    {
        "model": Value("string"),
        "problem": Value("string"),
        "family": Value("string"),
        "hindsight": Value("bool"),
        "kind": Value("string"),
        "arm": Value("string"),
        "delay": Value("int32"),
        "exact": Value("bool"),
        "spurious": Value("bool"),
        "correct": Value("bool"),
        "planted": Value("int32"),
        "token_ids": ListOf(Value("int32")),
    }
)
FORCED = ("own", "right")
"""Kinds at which U is forced and forbidden too: where it belongs, and where it does not."""
_ROOM = 32  # ids that a model has at least, behind what was planted
_EQUATION = re.compile(r"<<(?P<left>[^<>=]+)=(?P<value>-?\d+)>>(?P=value)(?!\d)")
_TWO = re.compile(r"(\d+)([+*])(\d+)")


@dataclass(frozen=True)
class Planted:
    """A text that a model is given as if it had written it."""

    problem: Problem
    kind: str
    ids: tuple[int, ...]
    place: int
    """The first id that an exact undo takes back, with unit token; right ones stand before it."""


def planted_outcomes(
    context: Context, models: Sequence[Model], problems: Sequence[Problem], cases: Sequence[Case], codec: Codec
) -> list[Outcome]:
    """What each model makes of planted texts on `evaluate.planted` problems of each kind.

    Args:
        problems: of the test split.
        cases: own errors of the start model on them.
    """
    settings, asked = context.settings, context.settings.evaluate
    if not asked.planted:
        return []
    texts = [*own(_evenly(cases, asked.planted), codec)]
    drawn = codec.plain_ids()
    for problem in spread(problems, "test", asked.planted):
        texts += in_solution(problem, codec, drawn, settings.traces.random_tokens, settings.run.seed)
    texts = [one for one in texts if len(one.ids) + _ROOM <= asked.max_tokens]
    also = [one for one in texts if one.kind in FORCED]
    mode: Mode = asked.modes[0]
    found: list[Outcome] = []
    with context.terminal.stage("planted", len(models) * (len(texts) + 2 * len(also))) as progress:
        for model in models if texts else ():
            for arm, some, how in (("free", texts, mode), ("forced", also, mode), ("forbidden", also, "forbidden")):
                decoding = causal_decoding(context, codec, how)
                decoding = replace(decoding, signal=named_signal(decoding.signal, context.inputs.get("prm"), model.name))
                wanted = [_request(one, arm, codec, settings.run.seed) for one in some]
                done = context.workers.decode(
                    model.folder, wanted, decoding, context_length(context), lambda rows, tokens: progress.advance(rows)
                )
                found += [outcome(model.name, one, arm, made, codec) for one, made in zip(some, done, strict=True)]
    return found


def causal_decoding(context: Context, codec: Codec, mode: Mode) -> Decoding:
    """As evaluation decodes in a mode; in mode soft U is drawn like any token, as an ordinary engine would."""
    decoding = evaluation_decoding(context.settings, codec, mode)
    most = decoding.max_tokens
    free = {"threshold": None, "undo_bias": 0.0, "ban_tried": False, "max_undos": most, "max_undos_per_state": most}
    return decoding_of(
        codec, context.settings.decode, mode, decoding.temperature, decoding.top_p, most, **free if mode == "soft" else {}
    )


def _evenly(cases: Sequence[Case], most: int) -> list[Case]:
    return [cases[i * len(cases) // most] for i in range(most)] if len(cases) > most else list(cases)


def _request(one: Planted, arm: str, codec: Codec, seed: int) -> DecodeRequest:
    undos = (codec.rule.undo_id,) * (_undos(one, codec.rule) if arm == "forced" else 0)
    return DecodeRequest(codec.prompt_ids(one.problem), row_seed(seed, f"planted/{one.kind}/{one.problem.id}"), one.ids + undos)


def _undos(one: Planted, rule: UndoRule) -> int:
    """How many U's take back all that was planted."""
    return len(one.ids) - one.place if rule.unit == "token" else 1


def own(cases: Sequence[Case], codec: Codec) -> Iterator[Planted]:
    """The start model's own errors, up to their evidence."""
    for case in cases:
        start = len(codec.prompt_ids(case.problem))
        yield Planted(case.problem, "own", case.error.ids[start:], case.error.at[1] - start)


def in_solution(problem: Problem, codec: Codec, drawn: Sequence[int], most_random: int, seed: int) -> Iterator[Planted]:
    """Random tokens, a false result, a paraphrase and nothing at all behind a beginning of the gold solution. A kind for which the
    solution has no place is left out: a calculation has equations, and one that adds or multiplies can be turned round.

    Args:
        drawn: ids that random tokens are drawn from, at most `most_random` of them.
    """
    rng = random.Random(f"{seed}/planted/{problem.id}")
    solution = codec.encode(problem.solution)
    k = rng.randint(1, most_random)
    injected = random_injection(codec.prompt_ids(problem), solution, drawn, k, rng, codec.rule)
    start = injected.trace.prompt_length
    yield Planted(problem, "random", injected.trace.ids[start : start + injected.place + k], injected.place)
    equations = list(_EQUATION.finditer(problem.solution))
    if not equations:
        return
    chosen = rng.choice(equations)
    before, whole = problem.solution[: chosen.start()], problem.solution[: chosen.end()]
    right = codec.encode(whole)
    place = _shared(codec.encode(before), right)
    yield Planted(problem, "right", right, place)
    false = int(chosen["value"]) + rng.choice((-1, 1)) * rng.randint(1, 9)
    if false >= 0:
        wrong = codec.encode(f"{before}<<{chosen['left']}={false}>>{false}")
        yield Planted(problem, "arithmetic", wrong, _shared(wrong, right))
    turned = [(one, sides) for one in equations if (sides := _TWO.fullmatch(one["left"])) and sides[1] != sides[3]]
    if turned:
        chosen, sides = rng.choice(turned)
        before = problem.solution[: chosen.start()]
        text = f"{before}<<{sides[3]}{sides[2]}{sides[1]}={chosen['value']}>>{chosen['value']}"
        if not state_is_wrong(problem, text):
            ids = codec.encode(text)
            yield Planted(problem, "paraphrase", ids, _shared(codec.encode(before), ids))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def outcome(model: str, one: Planted, arm: str, made: Decoded, codec: Codec) -> Outcome:
    """What became of a planted text."""
    rule, ids, given = codec.rule, made.ids, len(one.ids)
    first = next((at for at in range(given, len(ids)) if ids[at] == rule.undo_id), None) if arm == "free" else None
    exact = spurious = False
    if first is not None:
        end = next((at for at in range(first, len(ids)) if ids[at] != rule.undo_id), len(ids))
        stream = UndoStream(rule)
        stream.feed(ids[:end])
        exact = stream.surviving == one.ids[: _left(one, rule)]
        if one.kind in RIGHT:
            runs = undo_runs(one.problem, ids[:end], rule, lambda state: codec.decode(state).text)
            spurious = runs[0].unnecessary > 0
    text = codec.decode(apply_undo(ids, rule).surviving).text
    return Outcome(
        model=model,
        problem=one.problem.id,
        family=one.problem.family,
        hindsight=one.problem.hindsight,
        kind=one.kind,
        arm=arm,
        delay=0 if first is None else first - given + 1,
        exact=exact,
        spurious=spurious,
        correct=judge_of(one.problem).correct(one.problem, text),
        planted=given,
        token_ids=ids,
    )


def _left(one: Planted, rule: UndoRule) -> int:
    """How many of the planted text's ids an exact undo leaves: all right ones, or as many as the unit allows."""
    if rule.unit == "token":
        return one.place
    ends = [at + 1 for at in range(one.place) if one.ids[at] in rule.step_end_ids]
    return max(ends, default=0) if rule.unit == "step" else 0


def biased_rows(
    context: Context, model: Model, rows: Sequence[Evaluated], test: Sequence[Problem], codec: Codec
) -> list[Evaluated]:
    """The test split decoded by the trained model with each of `evaluate.biases` on the logit of U, U drawn like any token; first
    tries are those of `rows`."""
    asked = context.settings.evaluate
    if not asked.biases:
        return []
    first = {row.problem: row for row in rows if row.model == model.name and row.temperature == asked.temperature}
    found = []
    with context.terminal.stage("biases", len(asked.biases) * len(test)) as progress:
        for bias in asked.biases:
            mode: Mode = "soft" if asked.modes[0] == "soft" else "rewind"
            decoding = replace(causal_decoding(context, codec, mode), threshold=None, undo_bias=bias)
            requests = requests_of(context.settings, codec, test)
            done = context.workers.decode(
                model.folder, requests, decoding, context_length(context), lambda count, tokens: progress.advance(count)
            )
            for problem, one in zip(test, done, strict=True):
                tried = Completion(tuple(first[problem.id].first_token_ids), (), "stop")
                made = Completion(one.ids, (), one.finish)
                found.append(evaluated(model.name, f"bias {bias:g}", asked.temperature, problem, made, tried, codec))
    return found
