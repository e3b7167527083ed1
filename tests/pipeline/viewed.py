"""A made-up run on disk, as the stages leave one: tries, verdicts, an evaluation of three models, search trees, hostile text."""

from __future__ import annotations

import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.backtrack.undo import apply_undo
from pipeline.config import Settings
from pipeline.stages import evaluate, judge, rollouts, search
from pipeline.stages.io import Codec, write_rows
from pipeline.stages.problems import FEATURES
from pipeline.store import Store
from tests.pipeline.saved import PROBLEMS, save_problems_and_models

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>\u202e"
SETTINGS = Settings.model_validate({"undo": {"unit": "step"}})
QUERY: dict[str, Any] = {
    "undo": {"token": SETTINGS.undo.token, "unit": "step"},
    "prompt": SETTINGS.base.prompt,
    "decode": SETTINGS.decode.model_dump(),
}
MODELS = ("base", "clean_control", "sft")


def make_run(root: Path, loaded: Path) -> Store:
    """`loaded`: where models are made, to be copied. The evaluation has 3 models x 2 modes x (test and dev problems)."""
    folders = save_problems_and_models({name: loaded / name for name in ("problems", "base", "sft", "control")})
    store = Store(root)
    asked: dict[str, Any] = {"key": "k", "settings": {}, "seed": 0}
    with store.write(0, "problems", **asked, inputs={}) as draft:
        hostile = [replace(one, question=f"{one.question} {HOSTILE}") if one.id == PROBLEMS[0].id else one for one in PROBLEMS]
        write_rows([asdict(one) for one in hostile], FEATURES, draft.path)
        draft.counts["rows"] = len(PROBLEMS)
    with store.write(0, "base", **asked, inputs={}) as draft:
        shutil.copytree(folders["base"], draft.path, dirs_exist_ok=True)
    codec = Codec(store.path(0, "base"), SETTINGS.undo, SETTINGS.base.prompt)
    inputs = {"problems": _digest(store, 0, "problems"), "model": _digest(store, 0, "base")}
    made = {"settings": {**QUERY, "token": SETTINGS.undo.token, "rollouts": SETTINGS.rollouts.model_dump()}}
    train = [one for one in PROBLEMS if one.split == "train"]
    tries = [(one, sample) for one in train for sample in range(2)]
    with store.write(1, "rollouts", **(asked | made), inputs=inputs) as draft:
        write_rows([_try(codec, one, sample) for one, sample in tries], rollouts.FEATURES, draft.path)
        draft.counts["rows"] = len(tries)
    with store.write(1, "judge", **asked, inputs={**inputs, "rollouts": _digest(store, 1, "rollouts")}) as draft:
        write_rows([_verdict(one, sample) for one, sample in tries], judge.FEATURES, draft.path)
        draft.counts["rows"] = len(tries)
    with store.write(1, "sft", **asked, inputs=inputs) as draft:
        shutil.copytree(folders["sft"], draft.path, dirs_exist_ok=True)
        shutil.copytree(folders["control"], draft.path / "control")
    rows = evaluated_rows(codec)
    with store.write(1, "evaluate", **(asked | {"settings": QUERY}), inputs={**inputs, "sft": _digest(store, 1, "sft")}) as draft:
        write_rows(rows, evaluate.ROWS, draft.path)
        draft.counts["rows"] = len(rows)
    with store.write(1, "search", **(asked | {"settings": QUERY}), inputs=inputs) as draft:
        tree = _tree(codec, train[0])
        write_rows([tree], search.TREE_FEATURES, draft.path / search.TREES)
        steps = [{"problem": train[0].id, "prompt_ids": [], "ids": tree["ids"][2], "value": 1.0, "q": 0.9, "samples": 3}]
        write_rows(steps, search.STEP_FEATURES, draft.path / search.STEPS)
        draft.counts["rows"] = 1
    return store


def evaluated_rows(codec: Codec) -> list[dict[str, Any]]:
    rng, found = random.Random(0), []
    for model in MODELS:
        for mode in ("rewind", "soft"):
            for problem in (one for one in PROBLEMS if one.split in ("test", "dev")):
                undos = rng.choice([0, 0, 1, 2]) if model == "sft" else 0
                gone = codec.encode(f"no way {HOSTILE}\n" if undos == 2 else "that is wrong\n")
                gold = codec.solution_ids(problem.solution)
                ids = (*(*gone, codec.rule.undo_id) * undos, *gold)
                undone = apply_undo(ids, codec.rule)
                found.append(
                    {
                        "model": model, "mode": mode, "problem": problem.id, "split": problem.split, "family": problem.family,
                        "hindsight": problem.hindsight, "temperature": 0.0 if mode == "rewind" else 0.7,
                        "correct": rng.random() < 0.6, "first_correct": rng.random() < 0.5, "tokens": len(ids),
                        "undos": undone.undos, "noops": undone.noops, "spurious": 0, "finish": "stop",
                        "token_ids": ids, "first_token_ids": gold, "steps": 1, "undo_lengths": (), "first_errors": 0,
                    }
                )  # fmt: skip
    return found


def _digest(store: Store, round: int, stage: str) -> str:
    manifest = store.manifest(round, stage)
    assert manifest
    return manifest.digest


def _try(codec: Codec, problem: Any, sample: int) -> dict[str, Any]:
    ids = codec.solution_ids(problem.solution if sample else f"12 + 3 = 99\n{HOSTILE}\n#### 99")
    return {
        "id": f"{problem.id}#1.{sample}", "problem": problem.id, "prompt_ids": codec.prompt_ids(problem), "token_ids": ids,
        "logprobs": [], "finish": "stop", "hot": False, "version": "v",
    }  # fmt: skip


def _verdict(problem: Any, sample: int) -> dict[str, Any]:
    nothing: dict[str, Any] = {"steps": [], "later_errors": [], "try_start": -1, "try_text": "", "try_wrong": [], "try_own": False}
    error = {
        "error_step": -1 if sample else 0, "error_chars": [-1, -1] if sample else [9, 11], "error_tokens": [-1, -1],
        "error_kind": "" if sample else "sum", "evidence": "" if sample else "12 + 3 is 15", "method": "exact",
    }  # fmt: skip
    about = {"id": f"{problem.id}#1.{sample}", "problem": problem.id, "correct": bool(sample), "answer": "", "continuation": []}
    return nothing | error | about


def _tree(codec: Codec, problem: Any) -> dict[str, Any]:
    steps = [(), codec.encode("1 + 1 = 3\n"), codec.encode("1 + 1 = 2\n"), codec.encode(f"#### {HOSTILE}")]
    return {
        "problem": problem.id, "prompt_ids": codec.prompt_ids(problem), "parent": [-1, 0, 0, 2], "ids": steps,
        "value": [0.5, 0.0, 1.0, 1.0], "visits": [9, 2, 6, 4], "prior": [1.0, 0.6, 0.4, 0.9], "right": [-1, 0, -1, 1],
        "undone": [0, 1, 0, 0], "solved": True, "simulations": 9, "tokens": 80,
    }  # fmt: skip
