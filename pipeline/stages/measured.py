"""How a problem is decoded and judged for measuring; evaluate, its planted errors and pipeline.calibrate share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from actors.engines import Completion, Request, Sampling
from actors.parts import all_there
from pipeline.backtrack.cursor import DecodeRequest, Decoding, Mode
from pipeline.backtrack.undo import UndoRule, UndoStream, apply_undo
from pipeline.config import Settings
from pipeline.metrics import Evaluated
from pipeline.rollout_log import Rolled
from pipeline.stages.io import Codec, decoding_of
from pipeline.stages.prm import named_signal
from pipeline.stages.probes import errors_in, rationalises, spurious_undos
from pipeline.stages.rollouts import context_length, row_seed
from pipeline.stages.stage import Context
from pipeline.tasks.problem import Problem
from verifiers.tasks import judge_of


@dataclass(frozen=True)
class Model:
    """One model under evaluation."""

    name: str
    folder: Path
    version: str
    mode: Mode | None = None
    """The one that it is made for, where others say nothing of it."""


def silent(rows: int, tokens: int) -> None: ...


def decode(
    context: Context,
    model: Model,
    requests: Sequence[DecodeRequest],
    temperature: float,
    codec: Codec,
    mode: Mode,
    on_rows: Callable[[int, int], None] = silent,
) -> list[Completion]:
    """Completions by the engine of a mode. With log-probabilities (`Decoded.logprobs`), but for mode `soft`."""
    if mode == "soft":
        return generate(context, model, requests, temperature, codec, mode, on_rows)
    decoding, longest = evaluation_decoding(context.settings, codec, mode, temperature), context_length(context)
    decoding = replace(decoding, signal=named_signal(decoding.signal, context.inputs.get("prm"), model.name))
    done = context.workers.decode(model.folder, requests, decoding, longest, on_rows)
    return [Completion(one.ids, one.logprobs, one.finish) for one in done]


def generate(
    context: Context,
    model: Model,
    requests: Sequence[DecodeRequest],
    temperature: float,
    codec: Codec,
    mode: Mode,
    on_rows: Callable[[int, int], None] = silent,
) -> list[Completion]:
    """Completions by an ordinary engine: mode soft, or forbidden."""
    settings, asked = context.settings, context.settings.evaluate
    banned = (*codec.spare_ids, *((codec.rule.undo_id,) if mode == "forbidden" else ()))
    sampling = Sampling(temperature, asked.top_p, asked.max_tokens, codec.stop_id, banned)
    wanted = [Request(one.prompt_ids, one.seed) for one in requests]
    pool = context.workers.pool(model.folder, model.version, context_length(context))
    # Models are compared on the same problems: a test set that shrinks where a row fails would be another one.
    return all_there(pool.generate(wanted, sampling, settings.rollouts.batch, on_rows)[0])


def evaluation_decoding(settings: Settings, codec: Codec, mode: Mode, temperature: float | None = None) -> Decoding:
    """How evaluation decodes in a mode; at `evaluate.temperature` where no other is given."""
    asked = settings.evaluate
    at = asked.temperature if temperature is None else temperature
    return decoding_of(codec, settings.decode, mode, at, asked.top_p, asked.max_tokens)


def requests_of(settings: Settings, codec: Codec, problems: Sequence[Problem]) -> list[DecodeRequest]:
    """A problem has the same seed in every mode and for every model."""
    return [DecodeRequest(codec.prompt_ids(one), row_seed(settings.run.seed, f"evaluate/{one.id}")) for one in problems]


def evaluated(
    model: str, mode: str, temperature: float, problem: Problem, done: Completion, first: Completion, codec: Codec
) -> Evaluated:
    """A completion and its first try, judged."""
    undone = apply_undo(done.token_ids, codec.rule)
    text, first_text = codec.decode(undone.surviving).text, codec.decode(first.token_ids).text
    return Evaluated(
        model=model,
        mode=mode,
        problem=problem.id,
        split=problem.split,
        family=problem.family,
        hindsight=problem.hindsight,
        temperature=temperature,
        correct=judge_of(problem).correct(problem, text),
        first_correct=judge_of(problem).correct(problem, first_text),
        tokens=len(done.token_ids),
        undos=undone.undos,
        noops=undone.noops,
        spurious=spurious_undos(problem, done.token_ids, codec),
        finish=done.finish,
        token_ids=done.token_ids,
        first_token_ids=first.token_ids,
        steps=problem.solution.count("\n"),
        undo_lengths=undo_lengths(done.token_ids, codec.rule),
        first_errors=errors_in(problem, first_text),
        rationalised=rationalises(problem, text),
        first_rationalised=rationalises(problem, first_text),
    )


def undo_lengths(ids: Sequence[int], rule: UndoRule) -> tuple[int, ...]:
    """Tokens that each run of undo tokens took back."""
    stream, running = UndoStream(rule), False
    lengths: list[int] = []
    for token in ids:
        deleted = stream.take(token)
        if deleted >= 0 and running:
            lengths[-1] += deleted
        elif deleted >= 0:
            lengths.append(deleted)
        running = deleted >= 0
    return tuple(lengths)


def rolled_of(row: Evaluated, version: str) -> list[Rolled]:
    """A row for the log of rollouts, and its first try where that is another rollout."""
    name = f"{row.problem}#{row.model}"
    one = Rolled(
        f"{name}.{row.mode}.{row.temperature:g}", row.problem, row.token_ids, row.finish, version, row.mode, row.temperature,
        row.undos, model=row.model, correct=row.correct,
    )  # fmt: skip
    if tuple(row.first_token_ids) == tuple(row.token_ids):
        return [one]
    first = replace(
        one, id=f"{name}.{row.mode}.{row.temperature:g}.first", mode="forbidden", undos=0, token_ids=row.first_token_ids,
        correct=row.first_correct, finish="",
    )  # fmt: skip
    return [one, first]
