"""Stage `evaluate`: start model, controls and trained models on the same problems, with undo in every mode and with undo
forbidden, and P(undo) in wrong and right states. Every row is kept, so that any two models can be compared later.

The main mode decodes every split; the others, which are there to be set beside it, the test split. So do further temperatures, in
the main mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from math import exp
from pathlib import Path

from datasets import Features, Value
from datasets import List as ListOf

from actors.engines import Completion, Request, Sampling
from actors.parts import all_there
from pipeline.backtrack.cursor import DecodeRequest, Decoding, Mode
from pipeline.backtrack.undo import apply_undo
from pipeline.config import Settings
from pipeline.metrics import Evaluated, Probed, acceptance, in_numbers, summarise, tokens_table
from pipeline.rollout_log import Rolled
from pipeline.stages.io import Codec, decoding_of, read_problems, write_json, write_rows
from pipeline.stages.kept import Kept, tuples
from pipeline.stages.prm import MODEL as PRM
from pipeline.stages.prm import named_signal
from pipeline.stages.probes import own_errors, spread, spurious_undos
from pipeline.stages.rollouts import context_length, rolled, row_seed, within_context
from pipeline.stages.sft import CONTROL
from pipeline.stages.stage import Context
from pipeline.stages.votes import VOTE, elected, requests_for, votes_needed
from pipeline.tasks.problem import Problem
from verifiers.tasks import judge_of

ROWS = Features(
    {
        "model": Value("string"),
        "mode": Value("string"),
        "problem": Value("string"),
        "split": Value("string"),
        "family": Value("string"),
        "hindsight": Value("bool"),
        "temperature": Value("float64"),
        "correct": Value("bool"),
        "first_correct": Value("bool"),
        "tokens": Value("int32"),
        "undos": Value("int32"),
        "noops": Value("int32"),
        "spurious": Value("int32"),
        "finish": Value("string"),
        "token_ids": ListOf(Value("int32")),
        "first_token_ids": ListOf(Value("int32")),
    }
)
PROBES = Features(
    {
        "model": Value("string"),
        "problem": Value("string"),
        "family": Value("string"),
        "hindsight": Value("bool"),
        "error": Value("string"),
        "p_undo_error": Value("float64"),
        "p_undo_right": Value("float64"),
        "logp_error": Value("float64"),
    }
)


@dataclass(frozen=True)
class Model:
    """One model under evaluation."""

    name: str
    folder: Path
    version: str


def run(context: Context) -> None:
    settings = context.settings
    codec = Codec(context.inputs["model"], settings.undo, settings.base.prompt)
    asked = settings.evaluate
    problems = read_problems(context.inputs["problems"])
    chosen = [
        p for split, most in (("test", asked.test), ("dev", asked.dev), ("ood", asked.ood)) for p in spread(problems, split, most)
    ]
    prompts = [codec.prompt_ids(problem) for problem in chosen]
    fits, too_long = within_context(context, chosen, prompts)
    chosen = [chosen[i] for i in fits]
    models = _models(context)
    rows: list[Evaluated] = []
    beside = (len(asked.modes) - 1 + len(asked.also_at)) * sum(problem.split == "test" for problem in chosen)
    of_model = len(chosen) + beside
    with context.terminal.stage("evaluate", len(models) * of_model) as progress, Kept(context.resume / "models.jsonl") as kept:
        for model in models:
            if model.name not in kept.found:  # a killed run may have left it behind
                progress.advance(0, model.name)
                found = _evaluate(context, model, chosen, codec, lambda count, tokens: progress.advance(count))
                context.rollouts.write([line for row in found for line in rolled_of(row, model.version)])
                kept.add({model.name: [astuple(row) for row in found]})
            else:
                progress.advance(of_model, model.name)
            rows += [Evaluated(*tuples(row)) for row in kept.found[model.name]]
    rows.sort(key=lambda row: row.temperature != asked.temperature)  # what is measured beside comes behind
    rows += _votes(context, models, rows, chosen, codec)
    with context.terminal.stage("probes", None) as progress:
        probes = _probe(context, models, [p for p in chosen if p.split == "test"], codec)
        progress.update(len(probes))
    write_rows([asdict(row) for row in rows], ROWS, context.out)
    write_rows([asdict(row) for row in probes], PROBES, context.out / "probes")
    main = asked.modes[0]
    metrics = summarise(rows, probes, context.round, main)
    for line in tokens_table(metrics["evaluations"]):
        context.terminal.info(line)
    metrics |= acceptance(rows, main, asked.accept_p) | {"mode": main}
    write_json(metrics, context.out / "metrics.json")
    if not metrics["accepted"]:
        fell = f"dev accuracy fell {in_numbers(metrics['dev'])}"
        context.terminal.warn(
            f"round {context.round} is not accepted: {fell}; what follows starts from {_origin(context.inputs['model'])} again"
        )
    context.counts.update(rows=len(rows), models=len(models), problems=len(chosen), probes=len(probes), prompt_too_long=too_long)


def _origin(model: Path) -> str:
    """An accepted model's output folder in words."""
    return "the base model" if model.name == "base" else f"the model of round {model.parent.name}"


def _models(context: Context) -> list[Model]:
    """base is the model the round started from; in the first round that is the base model itself."""
    models = [Model("base", context.inputs["model"], context.digests["model"])]
    if (context.inputs["sft"] / CONTROL).is_dir():
        models.append(Model("clean_control", context.inputs["sft"] / CONTROL, f"{context.digests['sft']}/{CONTROL}"))
    models.append(Model("sft", context.inputs["sft"], context.digests["sft"]))
    if preferring := context.inputs.get("dpo"):
        models.append(Model("dpo", preferring, context.digests["dpo"]))
    if learned := context.inputs.get("grpo"):
        if (learned / CONTROL).is_dir():
            models.append(Model("grpo_control", learned / CONTROL, f"{context.digests['grpo']}/{CONTROL}"))
        models.append(Model("grpo", learned, context.digests["grpo"]))
    return models


def _evaluate(
    context: Context, model: Model, problems: Sequence[Problem], codec: Codec, on_rows: Callable[[int, int], None]
) -> list[Evaluated]:
    asked = context.settings.evaluate
    test = [problem for problem in problems if problem.split == "test"]
    rows = _at(context, model, problems, asked.temperature, asked.modes, codec, on_rows)
    for temperature in asked.also_at:
        rows += _at(context, model, test, temperature, asked.modes[:1], codec, on_rows)
    return rows


def _at(
    context: Context,
    model: Model,
    problems: Sequence[Problem],
    temperature: float,
    modes: Sequence[Mode],
    codec: Codec,
    on_rows: Callable[[int, int], None],
) -> list[Evaluated]:
    """The first mode on all of the problems, the others on those of the test split."""
    main = modes[0]
    of_mode = {mode: [i for i, p in enumerate(problems) if mode == main or p.split == "test"] for mode in modes}
    written = {
        mode: _decode(context, model, [problems[i] for i in of_mode[mode]], temperature, codec, mode, on_rows) for mode in modes
    }
    # First tries come from the engine of the main mode with the same seeds, so that undo alone makes a difference. Without an
    # undo token a row is its own first try, unless U was among the ids that were drawn from.
    drawn = temperature > 0 and (main == "soft" or (main == "rewind" and context.settings.decode.threshold is None))
    again = [i for i, done in enumerate(written[main]) if drawn or codec.rule.undo_id in done.token_ids]
    decode_first = _generate if main == "soft" else _decode
    tried = decode_first(context, model, [problems[i] for i in again], temperature, codec, "forbidden")
    first = dict(enumerate(written[main])) | dict(zip(again, tried, strict=True))
    return [
        evaluated(model.name, mode, temperature, problems[i], done, first[i], codec)
        for mode, rows in written.items()
        for i, done in zip(of_mode[mode], rows, strict=True)
    ]


def _votes(
    context: Context, models: Sequence[Model], rows: Sequence[Evaluated], problems: Sequence[Problem], codec: Codec
) -> list[Evaluated]:
    """The clean control, or the start model where there is none, by majority vote on the test split."""
    asked, trained = context.settings.evaluate, models[-1].name
    model = next(one for one in reversed(models) if one.name in ("clean_control", "base"))
    test = [problem for problem in problems if problem.split == "test"]
    if asked.votes == 0 or not test:
        return []
    main = [row for row in rows if (row.mode, row.split, row.temperature) == (asked.modes[0], "test", asked.temperature)]
    spent, own = ([row for row in main if row.model == name] for name in (trained, model.name))
    count = votes_needed(spent, own) if asked.votes is None else asked.votes
    wanted = requests_for(test, codec, count, context.settings.run.seed)
    decoding = evaluation_decoding(context.settings, codec, "forbidden", asked.vote_temperature)
    with context.terminal.stage("votes", len(wanted)) as progress:
        done = context.workers.decode(
            model.folder, wanted, decoding, context_length(context), lambda count, tokens: progress.advance(count)
        )
    completions = [Completion(one.ids, (), one.finish) for one in done]
    names = [(f"{test[i // count].id}#{model.name}.{VOTE}.{i % count}", test[i // count].id) for i in range(len(done))]
    context.rollouts.write(rolled(names, done, model.version, VOTE, asked.vote_temperature))
    by_problem = {row.problem: row for row in own}
    found = elected(test, completions, count, by_problem, codec)
    if verifiers := context.inputs.get("prm"):
        states = [(request.prompt_ids, one.token_ids) for request, one in zip(wanted, completions, strict=True)]
        values = context.workers.verifiers().step_values(verifiers / PRM, states)
        found += elected(test, completions, count, by_problem, codec, values, context.settings.prm.score)
    return found


def _silent(rows: int, tokens: int) -> None: ...


def _decode(
    context: Context,
    model: Model,
    problems: Sequence[Problem],
    temperature: float,
    codec: Codec,
    mode: Mode,
    on_rows: Callable[[int, int], None] = _silent,
) -> list[Completion]:
    """Completions by the engine of a mode."""
    if mode == "soft":
        return _generate(context, model, problems, temperature, codec, mode, on_rows)
    decoding, longest = evaluation_decoding(context.settings, codec, mode, temperature), context_length(context)
    decoding = replace(decoding, signal=named_signal(decoding.signal, context.inputs.get("prm"), model.name))
    wanted = requests_of(context.settings, codec, problems)
    return [Completion(one.ids, (), one.finish) for one in context.workers.decode(model.folder, wanted, decoding, longest, on_rows)]


def _generate(
    context: Context,
    model: Model,
    problems: Sequence[Problem],
    temperature: float,
    codec: Codec,
    mode: Mode,
    on_rows: Callable[[int, int], None] = _silent,
) -> list[Completion]:
    """Completions by an ordinary engine: mode soft, or forbidden."""
    settings, asked = context.settings, context.settings.evaluate
    banned = (*codec.spare_ids, *((codec.rule.undo_id,) if mode == "forbidden" else ()))
    sampling = Sampling(temperature, asked.top_p, asked.max_tokens, codec.stop_id, banned)
    requests = [Request(one.prompt_ids, one.seed) for one in requests_of(settings, codec, problems)]
    pool = context.workers.pool(model.folder, model.version, context_length(context))
    # Models are compared on the same problems: a test set that shrinks where a row fails would be another one.
    return all_there(pool.generate(requests, sampling, settings.rollouts.batch, on_rows)[0])


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
    return Evaluated(
        model=model,
        mode=mode,
        problem=problem.id,
        split=problem.split,
        family=problem.family,
        hindsight=problem.hindsight,
        temperature=temperature,
        correct=judge_of(problem).correct(problem, codec.decode(undone.surviving).text),
        first_correct=judge_of(problem).correct(problem, codec.decode(first.token_ids).text),
        tokens=len(done.token_ids),
        undos=undone.undos,
        noops=undone.noops,
        spurious=spurious_undos(problem, done.token_ids, codec),
        finish=done.finish,
        token_ids=done.token_ids,
        first_token_ids=first.token_ids,
    )


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


def _probe(context: Context, models: Sequence[Model], problems: Sequence[Problem], codec: Codec) -> list[Probed]:
    """Own errors of the start model on test problems, and the same states made right, under every model."""
    cases = own_errors(context, models[0].folder, models[0].version, problems, codec)[: context.settings.evaluate.probes]
    found: list[Probed] = []
    for model in models if cases else ():
        questions = [question for case in cases for question in (case.error, case.right)]
        answers = context.workers.probe(model.folder, questions)
        for case, error, right in zip(cases, answers[::2], answers[1::2], strict=True):
            found.append(
                Probed(
                    model=model.name,
                    problem=case.problem.id,
                    family=case.problem.family,
                    hindsight=case.problem.hindsight,
                    error=case.kind,
                    p_undo_error=exp(error[0]),
                    p_undo_right=exp(right[0]),
                    logp_error=sum(error[1:]),
                )
            )
    return found
