"""Evaluation without Ray: each mode's rows are what its engine decodes, first tries are shared, spurious undos counted by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

from actors import learner
from actors.decode import HfDecoder
from actors.engines import Completion, HfEngine, Request, Sampling
from actors.probe import probe
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding, Signal
from pipeline.config import (
    DecodeSettings,
    EngineSettings,
    EvaluateSettings,
    RolloutSettings,
    Settings,
    SignalSettings,
)
from pipeline.config import UndoSettings as Undo
from pipeline.rollout_log import RolloutLog
from pipeline.stages import evaluate
from pipeline.stages.io import Codec
from pipeline.stages.measured import silent
from pipeline.stages.probes import spurious_undos
from pipeline.stages.rollouts import row_seed
from pipeline.stages.stage import Context
from pipeline.stages.votes import votes_needed
from pipeline.tasks.problem import Problem
from tests.pipeline.saved import CONTEXT, PROBLEMS, save_problems_and_models
from verifiers.tasks import judge_of
from verifiers.vote import majority

EVALUATED = [problem for split in ("test", "dev", "ood") for problem in PROBLEMS if problem.split == split]
MAX_TOKENS = 24
SHARED: dict[str, Any] = {"ban_tried": True, "max_undos": 6, "max_undos_per_state": 3, "rewinding": "deferred"}


def settings_of(**evaluate: Any) -> Settings:
    decode = {name: evaluate.pop(name) for name in list(evaluate) if name in DecodeSettings.model_fields}
    unit = evaluate.pop("unit", "token")
    return Settings(
        engine=EngineSettings(kind="hf", max_prompt=400, max_num_seqs=8),
        rollouts=RolloutSettings(max_tokens=MAX_TOKENS),
        decode=DecodeSettings(**{"threshold": 0.01, "max_undos": 6, "max_undos_per_state": 3} | decode),
        evaluate=EvaluateSettings(**{"max_tokens": MAX_TOKENS, "votes": 0, "planted": 0} | evaluate),
        undo=Undo(unit=unit),
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evaluate")
    return save_problems_and_models({name: folder / name for name in ("problems", "model", "sft")})


class _Progress:
    done = 0

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n

    def update(self, done: int, note: str = "") -> None: ...


class _Terminal:
    @contextmanager
    def stage(self, name: str, total: int | None, *_: Any) -> Iterator[_Progress]:
        yield (progress := _Progress())
        assert name != "evaluate" or progress.done == total

    def warn(self, text: str) -> None: ...
    def info(self, text: str) -> None: ...


@dataclass
class LocalWorkers:
    """The learner and an engine in this process."""

    learner: Any

    def decode(self, folder: Path, requests: Sequence[DecodeRequest], decoding: Decoding, row_tokens: int,
               on_rows: Callable[[int, int], None]) -> list[Decoded]:  # fmt: skip
        on_rows(len(requests), 0)
        found: list[Decoded] = self.learner.decode(str(folder), requests, decoding, 8, row_tokens)
        return found

    def pool(self, folder: Path, version: str, context: int) -> Any:
        engine = HfEngine(AutoModelForCausalLM.from_pretrained(folder), 8)

        def generate(
            requests: Sequence[Request], sampling: Sampling, batch: int, on_rows: Callable[[int, int], None] = silent
        ) -> tuple[list[Completion], str]:
            on_rows(len(requests), 0)
            return engine.generate(requests, sampling), version

        return SimpleNamespace(generate=generate)

    def probe(self, folder: Path, rows: Any) -> list[tuple[float, ...]]:
        return probe(folder, rows)


def evaluated(inputs: dict[str, Path], out: Path, settings: Settings, done: int = 0) -> list[dict[str, Any]]:
    """Rows of the stage, after checking that each model was loaded once for decoding, but those that a killed run was done with."""
    loaded: list[Path] = []
    load = HfDecoder.from_folder

    def watched(folder: Path, max_num_seqs: int, row_tokens: int) -> HfDecoder:
        loaded.append(folder)
        return load(folder, max_num_seqs, row_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "redirect_process_output", lambda file: None)
        patch.setattr(HfDecoder, "from_folder", staticmethod(watched))
        context = SimpleNamespace(
            settings=settings,
            round=1,
            out=out,
            resume=out.parent / f"{out.name}-resume",
            counts={},
            rollouts=RolloutLog(None),
            inputs=inputs,
            digests={"model": "a", "sft": "b"},
            terminal=_Terminal(),
            workers=LocalWorkers(learner._Learner("")),
        )
        evaluate.run(cast(Context, context))
    wanted = [inputs["model"], inputs["sft"]][done:] if {"rewind", "guided"} & set(settings.evaluate.modes) else []
    asked = settings.evaluate
    behind = [inputs["sft"]] * bool(asked.samples or asked.planted or asked.biases)
    assert loaded == (wanted + [inputs["model"], *behind] if asked.votes else wanted)
    return [dict(row) for row in load_from_disk(out)]


def decoded(folder: Path, codec: Codec, how: Decoding, problems: Sequence[Problem] = EVALUATED) -> list[tuple[int, ...]]:
    """Ids of all problems, by the decoder itself, every row alone; no id that the tokenizer does not know."""
    how = replace(how, vocabulary=codec.vocabulary)
    decoder = HfDecoder.from_folder(folder, 1, CONTEXT)
    requests = [DecodeRequest(codec.prompt_ids(problem), row_seed(0, f"evaluate/{problem.id}")) for problem in problems]
    return [decoder.decode([request], how)[0].ids for request in requests]


@pytest.mark.parametrize(
    ("temperature", "threshold"),
    [(0.0, 0.01), (0.9, 0.01), (0.0, None), (0.9, None)],
    ids=["greedy", "hot", "greedy-drawn", "drawn"],
)
def test_rewind_rows_are_those_of_the_decoder(
    inputs: dict[str, Path], tmp_path: Path, temperature: float, threshold: float | None
) -> None:
    more: dict[str, Any] = {"threshold": threshold, "undo_bias": 0.0 if threshold else 3.0}
    rows = evaluated(inputs, tmp_path, settings_of(temperature=temperature, modes=["rewind"], **more))
    codec = Codec(inputs["model"], Undo(unit="token"), "{question}\n")
    rewind = Decoding("rewind", temperature, 1.0, MAX_TOKENS, codec.stop_id, codec.rule, **SHARED, **more)
    for model, folder in (("base", inputs["model"]), ("sft", inputs["sft"])):
        mine = [row for row in rows if row["model"] == model]
        assert [row["problem"] for row in mine] == [problem.id for problem in EVALUATED]
        assert [tuple(row["token_ids"]) for row in mine] == decoded(folder, codec, rewind)
        assert [tuple(row["first_token_ids"]) for row in mine] == decoded(folder, codec, replace(rewind, mode="forbidden"))
        assert all(row["tokens"] == len(row["token_ids"]) and row["mode"] == "rewind" for row in mine)
        assert [row["undos"] for row in mine] == [row["token_ids"].count(codec.rule.undo_id) for row in mine]
        assert not any(row["noops"] for row in mine)
    assert sum(row["undos"] > 0 for row in rows) > 4 and any(row["undos"] == 0 for row in rows)
    assert all(max(row["token_ids"]) < codec.vocabulary for row in rows) and codec.spare_ids


def test_another_temperature_decodes_the_test_split_in_the_main_mode(inputs: dict[str, Path], tmp_path: Path) -> None:
    alone = evaluated(inputs, tmp_path / "alone", settings_of(modes=["rewind", "soft"]))
    rows = evaluated(inputs, tmp_path / "both", settings_of(modes=["rewind", "soft"], also_at=[0.9]))
    assert rows[: len(alone)] == alone
    codec = Codec(inputs["model"], Undo(unit="token"), "{question}\n")
    test = [problem for problem in EVALUATED if problem.split == "test"]
    how = Decoding("rewind", 0.9, 1.0, MAX_TOKENS, codec.stop_id, codec.rule, threshold=0.01, **SHARED)
    hot = [row for row in rows[len(alone) :] if row["model"] == "sft"]
    assert [tuple(row["token_ids"]) for row in hot] == decoded(inputs["sft"], codec, how, test)
    assert {(row["mode"], row["split"], row["temperature"]) for row in rows[len(alone) :]} == {("rewind", "test", 0.9)}


def test_a_killed_stage_decodes_again_only_models_that_it_was_not_done_with(inputs: dict[str, Path], tmp_path: Path) -> None:
    settings = settings_of(modes=["rewind"])
    whole = evaluated(inputs, tmp_path / "out", settings)
    kept = tmp_path / "out-resume" / "models.jsonl"
    first, _ = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(first)
    assert evaluated(inputs, tmp_path / "out", settings, done=1) == whole


def test_modes_share_the_first_tries_of_the_main_one(inputs: dict[str, Path], tmp_path: Path) -> None:
    asked = {"both": ["rewind", "soft"], "soft": ["soft"]}
    rows = {name: evaluated(inputs, tmp_path / name, settings_of(modes=modes)) for name, modes in asked.items()}
    kinds = [(row["model"], row["mode"]) for row in rows["both"]]
    test = [problem for problem in EVALUATED if problem.split == "test"]  # other modes are measured on it alone
    assert kinds == [(a, b) for a in ("base", "sft") for b, some in (("rewind", EVALUATED), ("soft", test)) for _ in some]
    first = {mode: [row["first_token_ids"] for row in rows["both"] if row["mode"] == mode] for mode in ("rewind", "soft")}
    assert first["rewind"] == [row["first_token_ids"] for row in rows["soft"]]  # greedy: any engine agrees
    assert first["soft"] == [row["first_token_ids"] for row in rows["soft"] if row["split"] == "test"]
    assert [row for row in rows["both"] if row["mode"] == "soft"] == [row for row in rows["soft"] if row["split"] == "test"]


def test_the_control_that_searches_in_its_context_is_decoded_so_and_not_otherwise(inputs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(inputs["sft"], tmp_path / "sft")
    shutil.copytree(inputs["model"], tmp_path / "sft" / "in_context")
    asked = settings_of(modes=["rewind", "soft"], also_at=[0.9])
    rows = evaluated(inputs | {"sft": tmp_path / "sft"}, tmp_path / "out", asked)
    mine = [row for row in rows if row["model"] == "in_context"]
    assert {(row["mode"], row["split"], row["temperature"]) for row in mine} == {("soft", "test", at) for at in (0.0, 0.9)}
    base = [row for row in rows if (row["model"], row["mode"]) == ("base", "soft")]  # which has the same weights here
    assert [row["token_ids"] for row in mine if not row["temperature"]] == [row["token_ids"] for row in base]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    compared = {(one["before"], one["temperature"]) for one in metrics["comparisons"]}
    assert {("in_context soft", 0.0), ("in_context soft", 0.9)} <= compared
    first = [one for one in metrics["evaluations"] if (one["model"], one["mode"]) == ("in_context", "forbidden") and one["n"]]
    assert {(one["split"], one["temperature"]) for one in first} == {("test", 0.0), ("test", 0.9)}
    assert {one["model"] for one in metrics["probes"]} == {"base", "sft"}


@pytest.mark.parametrize(("temperature", "modes"), [(0.0, ["guided"]), (0.9, ["rewind", "guided"])], ids=["main", "beside"])
def test_guided_rows_are_those_of_the_decoder(
    inputs: dict[str, Path], tmp_path: Path, temperature: float, modes: list[str]
) -> None:
    """A row without an undo is its own first try."""
    signal = SignalSettings(kind="probability", threshold=0.9)
    rows = evaluated(inputs, tmp_path, settings_of(temperature=temperature, modes=modes, signal=signal, unit="step"))
    codec = Codec(inputs["model"], Undo(unit="step"), "{question}\n")
    ends = (temperature, 1.0, MAX_TOKENS, codec.stop_id)
    guided = Decoding("guided", *ends, codec.rule, **SHARED, threshold=0.01, signal=Signal("probability", 0.9))
    some = [problem for problem in EVALUATED if problem.split == "test"]
    mine = [row for row in rows if (row["model"], row["mode"], row["split"]) == ("sft", "guided", "test")]
    assert [tuple(row["token_ids"]) for row in mine] == decoded(inputs["sft"], codec, guided, some)
    first = decoded(inputs["sft"], codec, replace(guided, mode="forbidden"), some)
    assert [tuple(row["first_token_ids"]) for row in mine] == first
    assert sum(row["undos"] > 0 for row in mine) > 0
    assert {row["split"] for row in rows if row["mode"] == "guided"} == (
        {"test", "dev", "ood"} if modes[0] == "guided" else {"test"}
    )


def spurious(unit: str, folder: Path, *pieces: str | int) -> int:
    """Spurious undos in a text; numbers are runs of undo tokens."""
    codec = Codec(folder, Undo(unit=cast(Any, unit)), "{question}\n")
    ids: list[int] = []
    for piece in pieces:
        ids += codec.encode(piece) if isinstance(piece, str) else [codec.rule.undo_id] * piece
    return spurious_undos(CHAIN, ids, codec)


CHAIN = next(problem for problem in EVALUATED if problem.family == "chain")
LINES = [f"{line}\n" for line in CHAIN.solution.split("\n")]
START, VALUE, _ = LINES[0].replace(">>", "=").split("=")
DIGIT = str((int(VALUE) + 1) % 10)
WRONG = LINES[0].replace(f"={VALUE}>>{VALUE}", f"={DIGIT}>>{DIGIT}")


def test_an_undo_is_spurious_where_nothing_wrong_stood(inputs: dict[str, Path]) -> None:
    folder = inputs["model"]
    assert spurious("step", folder, WRONG, 1, LINES[0], LINES[1]) == 0
    assert spurious("step", folder, LINES[0], 1, LINES[0], LINES[1], 1) == 2
    assert spurious("step", folder, WRONG, LINES[1], 1, 1) == 0  # the error still stands when the line behind it goes
    assert spurious("step", folder, WRONG, 2) == 0  # the second one deletes nothing
    assert spurious("all", folder, LINES[0], 1, WRONG, 1, LINES[0]) == 1
    assert spurious("all", folder, LINES[0], WRONG, 1, 1) == 0


def test_a_run_of_undos_is_spurious_from_where_it_has_gone_too_far(inputs: dict[str, Path]) -> None:
    """In a deferred run too, an inner undo is judged by what the ones before it have left."""
    folder = inputs["model"]
    assert spurious("token", folder, f"{START}=", DIGIT, 1, VALUE) == 0
    assert spurious("token", folder, f"{START}=", DIGIT, ">>", 2, VALUE) == 0
    assert spurious("token", folder, f"{START}=", DIGIT, 4) == 3
    assert spurious("token", folder, f"{START}=", VALUE, 2) == 2


def scored(folder: Path, codec: Codec, problem: Problem, ids: Sequence[int]) -> float:
    """log P(ids | prompt) where neither U nor a spare row of the embedding can come, by one forward pass."""
    prompt = codec.prompt_ids(problem)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits_LV = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    logits_LV[:, [codec.rule.undo_id, *range(codec.vocabulary, logits_LV.shape[1])]] = -torch.inf
    return float(logits_LV.log_softmax(-1)[range(len(ids)), list(ids)].sum())


def test_the_vote_and_the_likeliest_are_those_of_samples_decoded_alone(inputs: dict[str, Path], tmp_path: Path) -> None:
    rows = evaluated(inputs, tmp_path, settings_of(modes=["rewind"], votes=5, vote_temperature=0.5))
    votes, likely = ([row for row in rows if row["mode"] == mode] for mode in ("vote", "likeliest"))
    test = [problem for problem in EVALUATED if problem.split == "test"]
    for some in (votes, likely):
        assert [(row["model"], row["problem"]) for row in some] == [("base", problem.id) for problem in test]
    codec = Codec(inputs["model"], Undo(unit="token"), "{question}\n")
    how = Decoding("forbidden", 0.5, 1.0, MAX_TOKENS, codec.stop_id, codec.rule, vocabulary=codec.vocabulary)
    decoder = HfDecoder.from_folder(inputs["model"], 1, CONTEXT)
    own = {row["problem"]: row for row in rows if (row["model"], row["mode"]) == ("base", "rewind")}
    logprobs = {(row["problem"], row["number"]): row["logprob"] for row in load_from_disk(str(tmp_path / "samples"))}
    for row, best, problem in zip(votes, likely, test, strict=True):
        seeds = [row_seed(0, f"vote/{number}/{problem.id}") for number in range(5)]
        decoded = [decoder.decode([DecodeRequest(codec.prompt_ids(problem), seed)], how)[0] for seed in seeds]
        samples = [one.ids for one in decoded]
        texts = [codec.decode(ids).text for ids in samples]
        winner = majority(texts)
        assert tuple(row["token_ids"]) == samples[winner] and row["tokens"] == sum(map(len, samples))
        assert row["correct"] == judge_of(problem).correct(problem, texts[winner])
        assert row["first_correct"] == own[problem.id]["first_correct"] and row["undos"] == row["spurious"] == 0
        scores = [scored(inputs["model"], codec, problem, ids) for ids in samples]
        assert [logprobs[problem.id, number] for number in range(5)] == pytest.approx(scores, abs=1e-3)
        assert tuple(best["token_ids"]) == samples[scores.index(max(scores))] and best["tokens"] == row["tokens"]
        assert best["correct"] == judge_of(problem).correct(problem, codec.decode(best["token_ids"]).text)


@pytest.mark.parametrize(
    ("spent", "own", "wanted"),
    [
        ({True: [60], False: [50]}, {True: [60], False: [50]}, 3),
        ({True: [160, 180], False: [50]}, {True: [50, 50], False: [50]}, 4),
        ({True: [60], False: [350]}, {True: [60], False: [100]}, 4),
        ({False: [501]}, {False: [100]}, 6),
    ],
)
def test_votes_are_enough_to_spend_as_many_tokens_on_each_kind(
    spent: dict[bool, list[int]], own: dict[bool, list[int]], wanted: int
) -> None:
    def of(tokens: dict[bool, list[int]]) -> Any:
        return [SimpleNamespace(hindsight=kind, tokens=count) for kind, counts in tokens.items() for count in counts]

    assert votes_needed(of(spent), of(own)) == wanted
