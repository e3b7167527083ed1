"""Stage `rollouts`: the model's own tries at training problems. With the undo token forbidden, which is the default: first tries,
errors and all. Mode `rewind`: what survives where the model may undo, hence the errors that it has not seen.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any

from datasets import Features, List, Value

from actors.engines import Completion, Request, Sampling
from actors.parts import Quarantined
from actors.rollout import Method, OnRows, RolloutPool
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.backtrack.undo import apply_undo
from pipeline.rollout_log import Rolled
from pipeline.stages.graph import longest_completion
from pipeline.stages.io import Codec, decoding_of, read_problems, write_rows
from pipeline.stages.kept import Kept, tuples
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


def run(context: Context) -> None:
    settings = context.settings
    asked = settings.rollouts
    codec = Codec(context.inputs["model"], settings.undo, settings.base.prompt)
    problems = read_problems(context.inputs["problems"], "train")
    if asked.problems is not None and asked.problems < len(problems):
        # Every round draws other problems, the same ones for the same seed.
        problems = random.Random(f"{settings.run.seed}/{context.round}").sample(problems, asked.problems)
    # Samples of a problem beyond the ordinary ones are hot.
    tried = [(problem, sample) for problem in problems for sample in range(asked.samples + asked.hot_samples)]
    ids = [f"{problem.id}#{context.round}.{sample}" for problem, sample in tried]
    prompts = [codec.prompt_ids(problem) for problem, _ in tried]
    fits, too_long = within_context(context, [problem for problem, _ in tried], prompts)
    hot = {i: tried[i][1] >= asked.samples for i in fits}
    done, tokens = [0], [0]
    completions: dict[int, Completion] = {}
    version = ""
    with context.terminal.stage("rollouts", len(fits)) as progress:

        def on_rows(rows: int, new_tokens: int) -> None:
            done[0] += rows
            tokens[0] += new_tokens
            progress.update(done[0], f"{tokens[0]} tokens")

        pool = context.workers.pool(context.inputs["model"], context.digests["model"], context_length(context))
        for is_hot, temperature in ((False, asked.temperature), (True, asked.hot_temperature)):
            some = [i for i in fits if hot[i] == is_hot]
            seeds = [row_seed(settings.run.seed, ids[i]) for i in some]
            wanted = [DecodeRequest(prompts[i], seed) for i, seed in zip(some, seeds, strict=True)]
            if wanted:
                with Kept(context.resume / f"{'hot' if is_hot else 'plain'}.jsonl") as kept:
                    version = _tries(context, pool, [ids[i] for i in some], wanted, temperature, codec, on_rows, kept)
                    found = {i: kept.found[ids[i]] for i in some if ids[i] in kept.found}
                completions.update((i, Completion(*tuples(one[:3]))) for i, one in found.items())
    rows = [_row(ids[i], prompts[i], completions[i], hot[i], version) for i in fits if i in completions]
    write_rows(rows, FEATURES, context.out)
    cut = sum(completion.finish == "length" for completion in completions.values())
    context.counts.update(rows=len(rows), tokens=tokens[0], cut_at_max_tokens=cut, prompt_too_long=too_long)
    if lost := [ids[i] for i in fits if i not in completions]:
        context.counts["quarantined"] = len(lost)
        context.terminal.warn(f"rollouts: {len(lost)} rows could not be made and are left out: {', '.join(lost)}")


def _tries(
    context: Context,
    pool: RolloutPool,
    ids: Sequence[str],
    wanted: Sequence[DecodeRequest],
    temperature: float,
    codec: Codec,
    on_rows: OnRows,
    kept: Kept,
) -> str:
    """First tries, or what survives of tries with undo: errors that the model has not taken back, each in the state it was made in.

    Decoding without undo is plain generation, which engines do faster. Puts [ids, logprobs, finish, tokens spent] of each row into
    `kept`, as batches come; rows that are there already are not asked for. Returns the version of the weights.
    """
    settings = context.settings
    asked, spent = settings.rollouts, (temperature, settings.rollouts.top_p, settings.rollouts.max_tokens)
    had = [kept.found[one][-1] for one in ids if one in kept.found]
    on_rows(len(had), sum(had))
    missing = [at for at, one in enumerate(ids) if one not in kept.found]
    requests: list[DecodeRequest] | list[Request] = [wanted[at] for at in missing]
    how: Decoding | Sampling = decoding_of(codec, settings.decode, "rewind", *spent)
    method: Method = "decode"
    if asked.mode == "forbidden":
        requests = [Request(one.prompt_ids, one.seed) for one in requests]
        how = Sampling(*spent, codec.stop_id, (codec.rule.undo_id, *codec.spare_ids), logprobs=asked.logprobs)
        method = "generate"
    for start, batch in pool.stream(method, requests, how, asked.batch):
        made: dict[str, list[Any]] = {}
        names = [(row, row.partition("#")[0]) for row in (ids[at] for at in missing[start : start + len(batch.done)])]
        context.rollouts.write(rolled(names, batch.done, batch.version, asked.mode, temperature))
        for at, one in enumerate(batch.done, start):
            if not isinstance(one, Quarantined):
                row, spent_tokens = (
                    (_surviving(one, codec), len(one.ids)) if isinstance(one, Decoded) else (one, len(one.token_ids))
                )
                made[ids[missing[at]]] = [row.token_ids, row.logprobs, row.finish, spent_tokens]
        kept.add(made)
        on_rows(len(batch.done), sum(row[-1] for row in made.values()))
    return pool.version


def _surviving(one: Decoded, codec: Codec) -> Completion:
    source = apply_undo(one.ids, codec.rule).source
    return Completion(one.surviving, tuple(one.logprobs[index] for index in source), one.finish)


def _row(row_id: str, prompt: Sequence[int], completion: Completion, hot: bool, version: str) -> dict[str, object]:
    return {
        "id": row_id,
        "problem": row_id.partition("#")[0],
        "prompt_ids": prompt,
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "finish": completion.finish,
        "hot": hot,
        "version": version,
    }


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


def within_context(context: Context, problems: Sequence[Problem], prompts: Sequence[Sequence[int]]) -> tuple[list[int], int]:
    """Indices of the prompts that leave room for a completion, and how many do not: those are reported, never cut.

    Raises:
        StageError: none fits.
    """
    room = context_length(context) - longest_completion(context.settings)
    fits = [i for i, prompt in enumerate(prompts) if 0 < len(prompt) <= room]
    if not fits:
        raise StageError(
            f"rollouts: every prompt is longer than the {room} tokens that max_tokens leaves of the context; "
            "lower rollouts.max_tokens and evaluate.max_tokens or raise engine.max_prompt"
        )
    if len(fits) < len(prompts):
        worst = max(range(len(prompts)), key=lambda i: len(prompts[i]))
        context.terminal.warn(
            f"{len(prompts) - len(fits)} of {len(prompts)} prompts are longer than {room} tokens and were left out; "
            f"the longest, {problems[worst].id}, has {len(prompts[worst])} (engine.max_prompt)"
        )
    return fits, len(prompts) - len(fits)
