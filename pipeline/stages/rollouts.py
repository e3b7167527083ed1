"""Stage `rollouts`: the model's own tries at training problems. With the undo token forbidden, which is the default: first tries,
errors and all. Mode `rewind`: what survives where the model may undo, hence the errors that it has not seen.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, List, Value

from actors.engines import Completion, Request, Sampling
from actors.parts import Quarantined
from actors.rollout import Method, OnRows, RolloutPool, emitted
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.backtrack.undo import apply_undo
from pipeline.rollout_log import Rolled
from pipeline.stages.graph import longest_completion
from pipeline.stages.io import CHUNK, Codec, decoding_of, read_problems, write_tables
from pipeline.stages.kept import KeptRows
from pipeline.stages.stage import Context, StageError
from pipeline.tasks.problem import Problem

FEATURES = Features(
    {
        "id": Value("string"),
        "problem": Value("string"),
        "prompt_ids": List(Value("int32")),
        "token_ids": List(Value("int32")),
        "logprobs": List(Value("float32")),
        "finish": Value("string"),
        "hot": Value("bool"),
        "version": Value("string"),
    }
)


_KEPT = pa.schema(
    [*(FEATURES.arrow_schema.field(name) for name in FEATURES if name not in ("hot", "version")), ("spent", pa.int32())]
)
"""Of the rows made so far: `spent` are their tokens, deleted ones included."""


@dataclass(frozen=True)
class _Try:
    """A row to be made."""

    number: int
    """Its place in the dataset, if every row can be made; all samples of a problem stand together."""
    id: str
    problem: str
    prompt_ids: tuple[int, ...]


def run(context: Context) -> None:
    settings = context.settings
    asked = settings.rollouts
    codec = Codec(context.inputs["model"], settings.undo, settings.base.prompt)
    problems = read_problems(context.inputs["problems"], "train")
    if asked.problems is not None and asked.problems < len(problems):
        # Every round draws other problems, the same ones for the same seed.
        problems = problems.take(random.Random(f"{settings.run.seed}/{context.round}").sample(range(len(problems)), asked.problems))
    # Samples of a problem beyond the ordinary ones are hot.
    samples = asked.samples + asked.hot_samples
    room = Room(context)
    if not any(room.holds(problem, prompt) for problem, prompt in codec.prompts(problems)):
        raise room.error()
    lost: list[str] = []
    with context.terminal.stage("rollouts", len(problems) * samples) as progress:
        pool = context.workers.pool(context.inputs["model"], context.digests["model"], context_length(context))
        with KeptRows(context.resume / "rows.arrow", _KEPT) as kept:
            had = np.zeros(len(problems) * samples, bool)
            had[kept.numbers] = True
            done, tokens = [len(kept.numbers)], [0]

            def on_rows(rows: int, new_tokens: int) -> None:
                done[0] += rows
                tokens[0] += new_tokens
                progress.update(done[0] + len(room.left_out) * samples, f"{tokens[0]} tokens")

            def untried(some: range) -> Iterator[_Try]:
                for place, (problem, prompt) in enumerate(codec.prompts(problems)):
                    for sample in some if room.holds(problem, prompt) else ():
                        number = place * samples + sample
                        if not had[number]:
                            yield _Try(number, f"{problem.id}#{context.round}.{sample}", problem.id, prompt)

            on_rows(0, 0)
            plain, hot = range(asked.samples), range(asked.samples, samples)
            for some, temperature in ((plain, asked.temperature), (hot, asked.hot_temperature)):
                if some:
                    lost += _tries(context, pool, untried(some), temperature, codec, on_rows, kept)
            room.warn(context, len(problems), samples)
            spent = cut = 0

            def tables() -> Iterator[pa.Table]:
                nonlocal spent, cut
                for table in kept.in_order(CHUNK):
                    spent += pc.sum(table["spent"]).as_py()
                    cut += pc.sum(pc.equal(table["finish"], "length")).as_py()
                    is_hot = pa.array(table["number"].to_numpy() % samples >= asked.samples)
                    own = table.append_column("hot", is_hot).append_column("version", pa.array([pool.version] * len(table)))
                    yield own.select(list(FEATURES)).cast(FEATURES.arrow_schema)

            write_tables(tables(), FEATURES, context.out)
            rows = len(kept.numbers)
    context.counts.update(rows=rows, tokens=spent, cut_at_max_tokens=cut, prompt_too_long=len(room.left_out) * samples)
    if lost:
        context.counts["quarantined"] = len(lost)
        context.terminal.warn(f"rollouts: {len(lost)} rows could not be made and are left out: {', '.join(lost)}")


def _tries(
    context: Context,
    pool: RolloutPool,
    wanted: Iterable[_Try],
    temperature: float,
    codec: Codec,
    on_rows: OnRows,
    kept: KeptRows,
) -> list[str]:
    """First tries, or what survives of tries with undo: errors that the model has not taken back, each in the state it was made in.

    Decoding without undo is plain generation, which engines do faster. Puts the rows into `kept`, as batches come, and returns the
    ids of those that cannot be made.
    """
    settings = context.settings
    asked, spent = settings.rollouts, (temperature, settings.rollouts.top_p, settings.rollouts.max_tokens)
    how: Decoding | Sampling = decoding_of(codec, settings.decode, "rewind", *spent)
    method: Method = "decode"
    request: type[DecodeRequest | Request] = DecodeRequest
    if asked.mode == "forbidden":
        how = Sampling(*spent, codec.stop_id, (codec.rule.undo_id, *codec.spare_ids), logprobs=asked.logprobs)
        method, request = "generate", Request
    under_way: dict[int, _Try] = {}  # place in the stream -> what was asked for there
    lost = []

    def requests() -> Iterator[DecodeRequest | Request]:
        for place, one in enumerate(wanted):
            under_way[place] = one
            yield request(one.prompt_ids, row_seed(settings.run.seed, one.id))

    for start, batch in pool.stream(method, requests(), how, asked.batch):
        tries = [under_way.pop(place) for place in range(start, start + len(batch.done))]
        context.rollouts.write(rolled([(one.id, one.problem) for one in tries], batch.done, batch.version, asked.mode, temperature))
        made: list[tuple[_Try, Completion, int]] = []
        for one, done in zip(tries, batch.done, strict=True):
            if isinstance(done, Quarantined):
                lost.append(one.id)
            else:
                made.append((one, _surviving(done, codec) if isinstance(done, Decoded) else done, emitted(done)))
        kept.add(
            [one.number for one, _, _ in made],
            {
                "id": [one.id for one, _, _ in made],
                "problem": [one.problem for one, _, _ in made],
                "prompt_ids": [one.prompt_ids for one, _, _ in made],
                "token_ids": [row.token_ids for _, row, _ in made],
                "logprobs": [row.logprobs for _, row, _ in made],
                "finish": [row.finish for _, row, _ in made],
                "spent": [tokens for _, _, tokens in made],
            },
        )
        on_rows(len(batch.done), sum(tokens for _, _, tokens in made))
    return lost


def _surviving(one: Decoded, codec: Codec) -> Completion:
    source = apply_undo(one.ids, codec.rule).source
    return Completion(one.surviving, tuple(one.logprobs[index] for index in source), one.finish)


def rolled(names: Sequence[tuple[str, str]], made: Sequence[object], version: str, mode: str, temperature: float) -> list[Rolled]:
    """Completions and decodes for the log of rollouts; anything else among them is left out.

    Args:
        names: id and problem of each.
    """
    rows = []
    for (row_id, problem), one in zip(names, made, strict=True):
        if isinstance(one, Completion | Decoded):
            ids, undos = (one.token_ids, 0) if isinstance(one, Completion) else (one.ids, one.undos)
            rows.append(Rolled(row_id, problem, ids, one.finish, version, mode, temperature, undos, one.logprobs))
    return rows


def row_seed(seed: int, row_id: str) -> int:
    """A row's seed comes from its id, not from where or when it runs."""
    return zlib.crc32(f"{seed}/{row_id}".encode()) & 0x7FFFFFFF


def context_length(context: Context) -> int:
    """Longest row of the engines: what all stages that generate may need, within what the model can see."""
    settings = context.settings
    longest = longest_completion(settings) + settings.engine.max_prompt
    limit = model_context(context)
    return min(longest, limit) if limit else longest


def model_context(context: Context) -> int | None:
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(context.inputs["model"]), "max_position_embeddings", None)


class Room:
    """Which prompts leave room for a completion. Those that do not are reported, never cut."""

    def __init__(self, context: Context) -> None:
        self.tokens = context_length(context) - longest_completion(context.settings)
        self.left_out: dict[str, int] = {}
        """Tokens of the prompts without room, by problem."""

    def holds(self, problem: Problem, prompt: Sequence[int]) -> bool:
        if 0 < len(prompt) <= self.tokens:
            return True
        self.left_out[problem.id] = len(prompt)
        return False

    def error(self) -> StageError:
        """That none has."""
        return StageError(
            f"rollouts: every prompt is longer than the {self.tokens} tokens that max_tokens leaves of the context; "
            "lower rollouts.max_tokens and evaluate.max_tokens or raise engine.max_prompt"
        )

    def warn(self, context: Context, problems: int, samples: int = 1) -> None:
        """Say which of so many were left out."""
        if self.left_out:
            worst = max(self.left_out, key=lambda problem: self.left_out[problem])
            context.terminal.warn(
                f"{len(self.left_out) * samples} of {problems * samples} prompts are longer than {self.tokens} tokens and were "
                f"left out; the longest, {worst}, has {self.left_out[worst]} (engine.max_prompt)"
            )


def within_context(context: Context, problems: Sequence[Problem], prompts: Sequence[Sequence[int]]) -> tuple[list[int], int]:
    """Indices of the prompts that leave room for a completion, and how many do not.

    Raises:
        StageError: none fits.
    """
    room = Room(context)
    fits = [i for i, prompt in enumerate(prompts) if room.holds(problems[i], prompt)]
    if not fits:
        raise room.error()
    room.warn(context, len(prompts))
    return fits, len(prompts) - len(fits)
