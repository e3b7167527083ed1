"""The simulated engine: rows that depend on prompt and seed alone, times that follow from the settings; real actors around it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import simulated
from actors.engines import Request, Sampling, make_engine
from actors.simulated import SimulatedEngine
from pipeline.backtrack.cursor import DecodeRequest, Decoding
from pipeline.backtrack.undo import UndoRule
from pipeline.config import Settings
from pipeline.engine_config import EngineSettings, SimulatedSettings
from pipeline.stages.graph import STAGES

STOP, UNDO = 0, 1
HOW = Sampling(1.0, 1.0, 300, STOP, (UNDO,), logprobs=True)
REQUESTS = [Request(tuple(range(10 + at % 7, 40)), at * 7919) for at in range(600)]


def test_rows_do_not_depend_on_the_batch_and_are_made_of_their_prompt() -> None:
    engine = SimulatedEngine(SimulatedSettings(), 64)
    made = engine.rows(REQUESTS, HOW)
    assert [engine.rows([one], HOW)[0] for one in REQUESTS[::20]] == made[::20]
    assert len({one.token_ids for one in made}) == len(made)
    for request, one in zip(REQUESTS, made, strict=True):
        written = one.token_ids[:-1] if one.finish == "stop" else one.token_ids
        assert set(written) <= set(request.prompt_ids) and (one.finish == "stop") == (one.token_ids[-1] == STOP)
        assert len(one.logprobs) == len(one.token_ids) <= 300 and max(one.logprobs) <= 0
    assert {one.finish for one in made} == {"stop", "length"}


def test_lengths_have_the_mean_that_was_asked_for() -> None:
    for sd in (0.0, 0.5, 1.0):
        made = SimulatedEngine(SimulatedSettings(tokens=100, tokens_sd=sd), 64).rows(
            [Request((5, 6), at) for at in range(4000)], Sampling(1.0, 1.0, 100_000, STOP)
        )
        assert fmean(len(one.token_ids) for one in made) == pytest.approx(100, rel=0.08) and not made[0].logprobs


def test_a_row_may_have_less_room_than_its_batch_and_top_names_what_was_chosen() -> None:
    engine = SimulatedEngine(SimulatedSettings(tokens=50, tokens_sd=0), 4)
    short, whole = engine.rows([Request((7, 8), 1, max_tokens=9), Request((7, 8), 1)], Sampling(1.0, 1.0, 60, STOP, top=3))
    assert (len(short.token_ids), short.finish, len(whole.token_ids), whole.finish) == (9, "length", 50, "stop")
    assert whole.token_ids[:9] == short.token_ids and [one[0][0] for one in short.top] == list(short.token_ids)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 8))
def test_a_batch_takes_as_long_as_its_slots(lengths: list[int], slots: int) -> None:
    """Against a walk in steps of a millisecond: each takes an id of every row that has a slot."""
    engine = SimulatedEngine(SimulatedSettings(token_ms=1, token_ms_sd=0, prompt_ms=3), slots)
    waiting, running, steps = [3 + length for length in lengths], list[int](), 0
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(waiting.pop(0))
        running = [left - 1 for left in running if left > 1]
        steps += 1
    assert engine.seconds([Request((1,), 5)] * len(lengths), lengths) == pytest.approx(steps / 1000)


def test_it_sleeps_as_long_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(simulated.time, "sleep", slept.append)
    engine = SimulatedEngine(SimulatedSettings(), 8)
    made = engine.generate(REQUESTS[:20], HOW)
    assert (
        slept == [seconds for _, seconds in engine.spans] == [engine.seconds(REQUESTS[:20], [len(one.token_ids) for one in made])]
    )
    other = SimulatedEngine(SimulatedSettings(token_ms=40), 8)
    assert other.seconds(REQUESTS[:20], [100] * 20) > 1.5 * engine.seconds(REQUESTS[:20], [100] * 20)


def test_decoding_with_undo_is_without_any() -> None:
    engine = SimulatedEngine(SimulatedSettings(token_ms=0, prompt_ms=0), 8)
    how = Decoding("rewind", 1.0, 1.0, 50, STOP, UndoRule(UNDO, "all"))
    found = engine.decode([DecodeRequest(one.prompt_ids, one.seed) for one in REQUESTS[:9]], how)
    assert all(one.undos == 0 and STOP not in one.surviving and len(one.logprobs) == len(one.ids) for one in found)


def test_rows_made_with_other_lengths_are_other_rows() -> None:
    """And other engines' rows do not depend on how this one is set up."""
    rollouts = next(stage for stage in STAGES if stage.name == "rollouts")

    def key(kind: str, tokens: float) -> dict[str, Any]:
        return rollouts.settings(Settings.model_validate({"engine": {"kind": kind, "simulated": {"tokens": tokens}}}))

    assert key("simulated", 50) != key("simulated", 60)
    assert key("hf", 50) == key("hf", 60)


def test_an_actor_with_it_is_a_small_process() -> None:
    """A hundred rollout actors fit on one machine because torch is imported by the engines that compute with it alone."""
    code = (
        "import sys, actors.rollout_actor; from actors.engines import make_engine; "
        "from pipeline.engine_config import EngineSettings; make_engine('nowhere', EngineSettings(kind='simulated'), 9, 0); "
        "print(*{'torch', 'transformers'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


@pytest.mark.ray
def test_real_actors_make_every_row_once(tmp_path: Path) -> None:
    from actors.workers import Workers

    engine: dict[str, Any] = {"kind": "simulated", "max_num_seqs": 16, "simulated": {"token_ms": 0.2, "prompt_ms": 1.0}}
    cluster = {"rollout_actors": 3, "rollout": {"cpus": 0.1, "threads": 1}}
    settings = Settings.model_validate({"engine": engine, "cluster": cluster})
    with Workers(settings, tmp_path, lambda line: None) as workers:
        pool = workers.pool(tmp_path, "v", 512)  # no model is there, and none is looked for
        assert pool.kind == "simulated"
        found, version = pool.generate(REQUESTS, HOW, 32)
        pool.use(tmp_path / "other", "w")
        assert pool.generate(REQUESTS[:5], HOW, 32) == (found[:5], "w")
    assert version == "v" and found == make_engine(tmp_path, EngineSettings.model_validate(engine), 512, 0).generate(REQUESTS, HOW)
