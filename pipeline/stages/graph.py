"""The loop at a glance: every stage with what it reads and which settings matter to it. Imports no stage's code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import Settings
from pipeline.search_config import stands_behind_prm
from pipeline.stages.stage import Input, Stage, StageError
from pipeline.task_config import Gsm8kTask

MODEL = "model"
"""Stands for the newest accepted model before a round: an earlier round's grpo, dpo or sft output, or base."""

_PROBLEMS = Input("problems", 0, "problems")
_BASE = Input("base", 0, "base")


def _model(round: int) -> Input:
    return Input(MODEL, round, MODEL)


def _problem_settings(settings: Settings) -> dict[str, Any]:
    task = settings.task
    files = [task.train_file, task.test_file] if isinstance(task, Gsm8kTask) else []
    # A changed file is a changed input, whatever its name.
    return {"task": task.model_dump(mode="json"), "seed": settings.run.seed, "files": [_digest(f) for f in files if f]}


def _digest(file: str) -> str:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise StageError(f"task: cannot read {file}: {error.strerror}") from error


def _tree_digest(folder: str | None) -> str:
    """Digest of a dataset of search trees: changed trees are a changed input, whatever the folder's name."""
    files = sorted(Path(folder or "").glob("*.arrow"))
    if not files:
        raise StageError(f"traces.search_trees: no dataset in {folder}")
    return hashlib.sha256("".join(_digest(str(file)) for file in files).encode()).hexdigest()


def _prm_digest(folder: str | None) -> str | None:
    """Digest of a process reward model outside the run; None where none is named."""
    if folder in (None, "run"):
        return None
    files = sorted(file for file in Path(str(folder)).glob("*") if file.suffix in (".json", ".safetensors"))
    if "prm.json" not in {file.name for file in files}:
        raise StageError(f"search.prm: no process reward model in {folder}: it has no prm.json; the stage prm writes one")
    return hashlib.sha256("".join(_digest(str(file)) for file in files).encode()).hexdigest()


def longest_trace(settings: Settings) -> int:
    """Tokens of a trace that both the learner's rows and a model made here have room for."""
    scratch = settings.base.model == "scratch"
    return min(settings.sft.row_tokens, settings.base.scratch.context) if scratch else settings.sft.row_tokens


def longest_pair(settings: Settings) -> int:
    """The same for a pair of preferences."""
    scratch = settings.base.model == "scratch"
    return min(settings.dpo.row_tokens, settings.base.scratch.context) if scratch else settings.dpo.row_tokens


def longest_completion(settings: Settings) -> int:
    """Most tokens that any stage generates."""
    learned = settings.grpo.max_tokens if settings.grpo.steps else 0
    searched = settings.search.max_tokens if settings.search.problems else 0
    return max(settings.rollouts.max_tokens, settings.evaluate.max_tokens, learned, searched)


def _engine(settings: Settings) -> dict[str, Any]:
    """What rows depend on; of an engine that simulates, how long they are too."""
    more = {"simulated"} if settings.engine.kind == "simulated" else set[str]()
    return settings.engine.model_dump(mode="json", include={"kind", "dtype", "max_prompt"} | more)


def _generation(settings: Settings) -> dict[str, Any]:
    """What every stage that generates depends on."""
    longest = longest_completion(settings)
    return {"engine": _engine(settings), "longest": longest, "prompt": settings.base.prompt, "seed": settings.run.seed}


def _own_errors(settings: Settings) -> dict[str, Any]:
    """What the errors depend on at which a training is checked; how much room the engine has for longer rows is not of it."""
    return {"engine": _engine(settings), "max_tokens": settings.rollouts.max_tokens}


def samples_prefixes(settings: Settings) -> bool:
    """Whether the judge stage needs the model: the chosen method samples, or auto meets a task that no judge decides exactly."""
    method = settings.judge.method
    return method in ("rollouts", "combined") or method == "auto" and isinstance(settings.task, Gsm8kTask)


def _judge_settings(settings: Settings) -> dict[str, Any]:
    wanted: dict[str, Any] = {"token": settings.undo.token, "prompt": settings.base.prompt}
    if not samples_prefixes(settings):
        return wanted
    sampling = settings.rollouts.model_dump(mode="json", include={"temperature", "top_p", "max_tokens"})
    return (
        wanted | _generation(settings) | {"judge": settings.judge.model_dump(mode="json", exclude={"batch"}), "sampling": sampling}
    )


STAGES: tuple[Stage, ...] = (
    Stage("problems", 3, lambda round: (), _problem_settings, per_round=False),
    Stage(
        "base",
        2,
        lambda round: (_PROBLEMS,),
        lambda s: {
            "base": s.base.model_dump(mode="json", exclude={"train": {"checkpoint_every"}}),
            "undo": s.undo.model_dump(mode="json", exclude={"unit"}),
            "seed": s.run.seed,
        },
        per_round=False,
    ),
    Stage(
        "rollouts",
        3,
        lambda round: (_PROBLEMS, _model(round)),
        lambda s: (
            _generation(s)
            | {"rollouts": s.rollouts.model_dump(mode="json", exclude={"batch"}), "token": s.undo.token}
            | ({"decode": s.decode.model_dump(mode="json"), "unit": s.undo.unit} if s.rollouts.mode == "rewind" else {})
        ),
    ),
    Stage(
        "judge",
        4,
        lambda round: (_PROBLEMS, _model(round), Input("rollouts", round, "rollouts")),
        _judge_settings,
    ),
    Stage(
        "search",
        3,
        lambda round: (_PROBLEMS, _model(round)),
        lambda s: (
            _generation(s)
            | {
                "search": s.search.model_dump(mode="json", exclude={"workers"}),
                "prm": _prm_digest(s.search.prm),
                "undo": s.undo.model_dump(mode="json", include={"token", "unit"}),
            }
        ),
    ),
    Stage(
        "traces",
        3,
        lambda round: (_PROBLEMS, _model(round), Input("rollouts", round, "rollouts"), Input("judge", round, "judge")),
        lambda s: {
            "traces": s.traces.model_dump(mode="json", exclude={"replay"}),
            "longest": longest_trace(s),
            "form": s.sft.form if s.traces.filters.loss.margin is not None else None,
            "search_trees": _tree_digest(s.traces.search_trees) if s.traces.mix.search and s.traces.search_trees else None,
            "undo": s.undo.model_dump(mode="json", include={"token", "unit"}),
            "prompt": s.base.prompt,
            "seed": s.run.seed,
        },
    ),
    Stage(
        "sft",
        3,
        lambda round: (_PROBLEMS, _BASE, _model(round), *(Input(f"traces-{r}", r, "traces") for r in range(1, round + 1))),
        lambda s: {
            "sft": s.sft.model_dump(mode="json", exclude={"checkpoint_every"}),
            "replay": s.traces.replay,
            "undo": s.undo.model_dump(mode="json", include={"token", "unit"}),
            "prompt": s.base.prompt,
            "seed": s.run.seed,
            "own_errors": _own_errors(s) if s.sft.checks.every else None,
        },
    ),
    Stage(
        "prm",
        1,
        lambda round: (
            _PROBLEMS,
            _model(round),
            *(Input(name, round, name) for name in ("rollouts", "judge", "traces", "sft")),
        ),
        lambda s: (
            _generation(s)
            | {
                "prm": s.prm.model_dump(mode="json", exclude={"checkpoint_every"}),
                "sft": s.sft.model_dump(mode="json", include={"form", "rewinding", "hide_undos", "positions", "mask", "detect_at"}),
                "sampling": s.rollouts.max_tokens,
                "undo": s.undo.model_dump(mode="json", include={"token", "unit"}),
            }
        ),
    ),
    Stage(
        "dpo",
        1,
        lambda round: (_PROBLEMS, _model(round), Input("sft", round, "sft")),
        lambda s: {
            "dpo": s.dpo.model_dump(mode="json", exclude={"checkpoint_every"}),
            "longest": longest_pair(s),
            "traces": s.traces.model_dump(mode="json", include={"nearness"}),
            "rewinding": s.decode.rewinding,
            "undo": s.undo.model_dump(mode="json", include={"token", "unit"}),
            "prompt": s.base.prompt,
            "seed": s.run.seed,
            "own_errors": _own_errors(s) if s.dpo.probes else None,
        },
    ),
    Stage(
        "grpo",
        4,
        lambda round: (_PROBLEMS, _model(round), Input("sft", round, "sft")),
        lambda s: (
            _generation(s)
            | {
                "grpo": s.grpo.model_dump(mode="json", exclude={"checkpoint_every"}),
                "decode": s.decode.model_dump(mode="json"),
                "undo": s.undo.model_dump(mode="json", include={"token", "unit"}),
            }
        ),
    ),
    Stage(
        "evaluate",
        9,
        lambda round: (_PROBLEMS, _model(round), Input("sft", round, "sft")),
        lambda s: (
            _generation(s)
            | {
                "evaluate": s.evaluate.model_dump(mode="json"),
                "decode": s.decode.model_dump(mode="json"),
                "undo": s.undo.model_dump(mode="json", include={"token", "unit"}),
            }
        ),
    ),
    Stage(
        "experiment",
        2,
        lambda round: (_PROBLEMS, _model(1), Input("traces", 1, "traces")),
        lambda s: (
            _generation(s)
            | {
                "experiment": s.experiment.model_dump(mode="json"),
                "sft": s.sft.model_dump(mode="json", exclude={"checkpoint_every", "control"}),
                "own_errors": _own_errors(s),
                "evaluate": s.evaluate.model_dump(mode="json", include={"temperature", "top_p", "max_tokens"}),
                "decode": s.decode.model_dump(mode="json"),
                "undo": s.undo.model_dump(mode="json", include={"token", "unit"}),
            }
        ),
        per_round=False,
    ),
    Stage(
        "report",
        10,
        lambda round: (
            _PROBLEMS,
            _BASE,
            *(
                Input(f"{name}-{r}", r, name)
                for r in range(1, round + 1)
                for name in ("rollouts", "judge", "traces", "sft", "evaluate")
            ),
        ),
        lambda s: {
            "report": s.report.model_dump(mode="json"),
            "undo": s.undo.model_dump(mode="json", include={"token", "unit"}),
            "name": s.run.name,
            "config": s.model_dump(mode="json", exclude={"run": {"root"}}),
        },
        per_round=False,
    ),
)
NAMES = tuple(stage.name for stage in STAGES)


def steps(settings: Settings) -> list[tuple[int, Stage]]:
    """(round, stage) in the order of a run: what is made once, the rounds (with search, prm, dpo and grpo where the settings want
    them), an experiment on the first round's traces where one is configured, the report of all of them."""
    rounds = settings.run.rounds
    stages = {stage.name: stage for stage in STAGES}
    for place in (_place_prm, _place_dpo, _place_grpo, _place_search):
        stages = place(settings, stages)
    before = [(0, stages[name]) for name in ("problems", "base")]
    within = [(round, stage) for round in range(1, rounds + 1) for stage in stages.values() if stage.per_round]
    if not settings.experiment.variants:
        return [*before, *within, (rounds, stages["report"])]
    report = _reads(stages["report"], lambda round: [Input("experiment", 1, "experiment")])
    return [*before, *within, (1, stages["experiment"]), (rounds, report)]


def _place_prm(settings: Settings, stages: dict[str, Stage]) -> dict[str, Stage]:
    if not settings.prm.steps:
        return _without("prm", stages)
    found = _measured("prm", stages)
    if settings.prm.labels != "judge":
        found["prm"] = _reads(found["prm"], lambda round: [Input("search", round, "search")])
    if settings.grpo.reward.process_model:
        found["grpo"] = _reads(found["grpo"], lambda round: [Input("prm", round, "prm")])
    return found


def _place_dpo(settings: Settings, stages: dict[str, Stage]) -> dict[str, Stage]:
    if not settings.dpo.steps:
        return _without("dpo", stages)
    own = [] if settings.dpo.pairs == "search" else ["rollouts", "judge"]
    read = own if settings.dpo.pairs == "own" else [*own, "search"]
    found = _measured("dpo", stages)
    found["dpo"] = _reads(found["dpo"], lambda round: [Input(name, round, name) for name in read])
    found["grpo"] = _reads(found["grpo"], lambda round: [Input("dpo", round, "dpo")])
    return found


def _place_grpo(settings: Settings, stages: dict[str, Stage]) -> dict[str, Stage]:
    return _measured("grpo", stages) if settings.grpo.steps else _without("grpo", stages)


def _place_search(settings: Settings, stages: dict[str, Stage]) -> dict[str, Stage]:
    """Before traces with the start model; or behind sft with the fine-tuned one, whose trees the traces of the next round read.
    States are valued by this round's prm where that can stand before it, else by that of the round before."""
    others = _without("search", stages)
    if not settings.search.problems:
        return others
    search, fine_tuned = stages["search"], settings.search.model == "sft"
    if settings.traces.mix.search:
        others["traces"] = _reads(
            others["traces"], lambda round: [Input("search", one, "search") for one in [round - fine_tuned] if one >= 1]
        )
    if fine_tuned:
        search = _reads(search, lambda round: [Input("sft", round, "sft")])
    behind_prm = stands_behind_prm(settings.search, settings.prm)
    if settings.search.prm == "run":
        search = _reads(search, lambda round: [Input("prm", one, "prm") for one in [round - (not behind_prm)] if one >= 1])
    names = list(others)
    at = names.index("prm" if behind_prm else "sft") + 1 if fine_tuned else names.index("traces")
    return {name: search if name == "search" else others[name] for name in [*names[:at], "search", *names[at:]]}


def _measured(name: str, stages: dict[str, Stage]) -> dict[str, Stage]:
    """The stages, of which those that measure and show read what this one makes."""
    evaluate = _reads(stages["evaluate"], lambda round: [Input(name, round, name)])
    report = _reads(stages["report"], lambda round: [Input(f"{name}-{r}", r, name) for r in range(1, round + 1)])
    return stages | {"evaluate": evaluate, "report": report}


def _without(name: str, stages: dict[str, Stage]) -> dict[str, Stage]:
    return {other: stage for other, stage in stages.items() if other != name}


def _reads(stage: Stage, more: Callable[[int], Sequence[Input]]) -> Stage:
    """The stage with inputs that not every run has."""
    inputs = stage.inputs
    return replace(stage, inputs=lambda round: (*inputs(round), *more(round)))


def trained_stage(settings: Settings) -> str:
    """The stage whose model a round ends with."""
    return "grpo" if settings.grpo.steps else "dpo" if settings.dpo.steps else "sft"
