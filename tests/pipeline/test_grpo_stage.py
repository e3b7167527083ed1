"""The stage grpo with the real learner and decoder in one process: what it draws, drops, saves, and how it goes on when killed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors.cluster import LearnerDied, Restarts
from actors.engines import HfEngine, parameters
from actors.grpo import Grpo, Report
from actors.policy import Policy, Sampled
from actors.watch import Watch
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.backtrack.undo import apply_undo
from pipeline.config import DecodeSettings, EngineSettings, EvaluateSettings, RolloutSettings, Settings, UndoSettings
from pipeline.grpo_config import GrpoSettings
from pipeline.rollout_log import RolloutLog
from pipeline.stages import grpo
from pipeline.stages.io import Codec
from pipeline.stages.stage import Context, StageError
from rewards.combine import RewardError
from rewards.rollout import JudgedRollout, judged
from tests.pipeline.saved import save_problems_and_models

MAX_TOKENS = 20
HERE = "tests.pipeline.test_grpo_stage"


def variety(rollouts: Sequence[JudgedRollout], progress: float) -> list[float]:
    """A reward in which groups of a random model differ."""
    return [len(set(one.token_ids)) / 10 for one in rollouts]


def nothing(rollouts: Sequence[JudgedRollout], progress: float) -> list[float]:
    return [0.0 for _ in rollouts]


def broken(rollouts: Sequence[JudgedRollout], progress: float) -> list[float]:
    return [float("nan") for _ in rollouts]


def settings_of(reward: str = "variety", **asked: Any) -> Settings:
    weights = dict.fromkeys(("outcome", "process", "backtrack", "format", "budget"), 0.0)
    given: dict[str, Any] = {
        "steps": 4, "problems": 3, "group": 4, "max_tokens": MAX_TOKENS, "check_every": 2, "check_problems": 4,
        "checkpoint_every": 1, "undo_bias": 3.5, "lr": 1e-3,
    }  # fmt: skip
    custom = {"own": {"function": f"{HERE}:{reward}", "weight": 1.0}}
    learned = GrpoSettings.model_validate(given | {"reward": {"weights": weights, "custom": custom}} | asked)
    return Settings(
        engine=EngineSettings(kind="hf", max_prompt=400, max_num_seqs=8),
        rollouts=RolloutSettings(max_tokens=MAX_TOKENS),
        evaluate=EvaluateSettings(max_tokens=MAX_TOKENS),
        decode=DecodeSettings(threshold=0.01, max_undos=6, max_undos_per_state=3, rewinding="immediate"),
        undo=UndoSettings(unit="token"),
        grpo=learned,
    )


class Killed(BaseException):
    """As good as -9: nothing behind it runs on."""


class Learner:
    """A GrpoLearner without an actor."""

    def __init__(self, model: Grpo, killed_at: int | None, dies_at: int | None = None) -> None:
        self.model, self.killed_at, self.dies_at, self.rollouts = model, killed_at, dies_at, list[list[Sampled]]()

    def learn(self, groups: Sequence[Sequence[int]], rollouts: Sequence[Sampled]) -> Report:
        if self.model.step == self.killed_at:
            raise Killed
        if self.model.step == self.dies_at:
            raise LearnerDied("the GRPO learner died: killed")
        self.rollouts.append(list(rollouts))
        return self.model.learn(groups, rollouts)

    def publish(self, pool: Any, version: str) -> None:
        pool.engine.set_weights(self.model.weights("float32").tensors())
        pool.versions.append(version)

    def save(self, folder: Path) -> None:
        self.model.save(folder)

    def checkpoint(self, folder: Path) -> None:
        self.model.checkpoint(folder)

    def restore(self, folder: Path) -> None:
        self.model.restore(folder)

    def close(self) -> None: ...


class Pool:
    def __init__(self, folder: Path, context: int) -> None:
        self.engine, self.versions = HfEngine.from_folder(folder, EngineSettings(max_num_seqs=8), context), list[str]()
        self.asked: list[tuple[Sequence[DecodeRequest], Decoding]] = []

    def decode(self, requests: Sequence[DecodeRequest], decoding: Decoding, batch: int) -> tuple[list[Decoded], str]:
        self.asked.append((requests, decoding))
        return self.engine.decode(requests, decoding), ""


class Terminal:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    @contextmanager
    def stage(self, *_: Any) -> Iterator[Any]:
        yield SimpleNamespace(update=lambda *_: None)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class Run:
    """The stage in a folder, as often as it is started."""

    def __init__(self, inputs: dict[str, Path], folder: Path, settings: Settings) -> None:
        self.inputs, self.folder, self.settings, self.terminal = inputs, folder, settings, Terminal()
        self.learners: list[Learner] = []
        self.dies_at: list[int] = []
        """Step at which a learner dies, one learner after the other."""
        self.pools: list[Pool] = []

    def start(self, killed_at: int | None = None) -> list[dict[str, Any]]:
        context = SimpleNamespace(
            settings=self.settings, round=1, out=self.folder / "out", resume=self.folder / "resume", counts={},
            inputs=self.inputs, digests={"sft": "s"}, terminal=self.terminal,
            rollouts=RolloutLog(self.folder / "logs", "grpo", 1),
            workers=SimpleNamespace(
                grpo=lambda *given: self._learner(killed_at, *given), pool=self._pool, watch=partial(Watch, self.folder / "logs"),
                restarts=Restarts(2, self.terminal.warn),
            ),
        )  # fmt: skip
        grpo.run(cast(Context, context))
        self.counts = context.counts
        found: list[dict[str, Any]] = json.loads((self.folder / "out" / grpo.HISTORY).read_text())
        return found

    def _learner(self, killed_at: int | None, folder: Path, settings: GrpoSettings, policy: Policy, seed: int) -> Learner:
        dies_at = self.dies_at[len(self.learners)] if len(self.learners) < len(self.dies_at) else None
        self.learners.append(Learner(Grpo(folder, settings, policy, seed), killed_at, dies_at))
        return self.learners[-1]

    def _pool(self, folder: Path, version: str, context: int, kind: Any) -> Pool:
        self.pools.append(Pool(folder, context))
        return self.pools[-1]

    def weights(self, part: str = ".") -> dict[str, torch.Tensor]:
        return load_file(self.folder / "out" / part / "model.safetensors")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("grpo")
    found = save_problems_and_models({name: folder / name for name in ("problems", "sft", "control")})
    found["control"].rename(found["sft"] / grpo.CONTROL)
    return {"problems": found["problems"], "sft": found["sft"], "model": found["sft"]}


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


def without_times(history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if not key.endswith("seconds")} for record in history]


@pytest.mark.parametrize("more", [{}, {"staleness": 1}, {"staleness": 2, "updates": 2}, {"refill": 1}, {"trainable": "lora"}])
def test_a_killed_run_ends_with_the_same_weights(inputs: dict[str, Path], tmp_path: Path, more: dict[str, Any]) -> None:
    whole = Run(inputs, tmp_path / "whole", settings_of(**more))
    history = whole.start()
    killed = Run(inputs, tmp_path / "killed", settings_of(**more))
    for step in (1, 3):
        with pytest.raises(Killed):
            killed.start(killed_at=step)
    assert without_times(killed.start()) == without_times(history)
    assert not differ(killed.weights(), whole.weights())
    assert differ(whole.weights(), load_file(inputs["sft"] / "model.safetensors"))
    assert killed.counts == whole.counts == {"rows": 48, "steps": 4, "tokens": sum(one.get("tokens", 0) for one in history)}
    assert len(killed.learners[-1].rollouts) == 1  # only what was left is done again


@pytest.mark.parametrize("more", [{}, {"staleness": 2}])
def test_a_learner_that_dies_is_started_again_from_its_checkpoint(
    inputs: dict[str, Path], tmp_path: Path, more: dict[str, Any]
) -> None:
    """Before its first checkpoint, and behind it."""
    whole, mortal = Run(inputs, tmp_path / "whole", settings_of(**more)), Run(inputs, tmp_path / "mortal", settings_of(**more))
    mortal.dies_at = [0, 3]
    assert without_times(mortal.start()) == without_times(whole.start())
    assert not differ(mortal.weights(), whole.weights()) and mortal.counts == whole.counts
    assert [len(one.rollouts) for one in mortal.learners] == [0, 3, 1]
    assert [line.partition(",")[0] for line in mortal.terminal.warnings] == ["the GRPO learner died and is started again"] * 2
    mortal.dies_at, mortal.learners = [3, 3, 3], []
    with pytest.raises(LearnerDied):
        mortal.start()


def test_figures_are_watched_while_it_runs(inputs: dict[str, Path], tmp_path: Path) -> None:
    run = Run(inputs, tmp_path, settings_of(steps=3))
    with pytest.raises(Killed):
        run.start(killed_at=2)
    lines = [json.loads(line) for line in (tmp_path / "logs" / "grpo.jsonl").read_text().splitlines()]
    assert [(one["step"], "reward" in one) for one in lines] == [(0, False), (1, True), (2, True), (2, False)]
    history = run.start()
    assert without_times(map(json.loads, (tmp_path / "logs" / "grpo.jsonl").read_text().splitlines())) == without_times(history)
    logged = [json.loads(line) for line in (tmp_path / "logs" / "grpo-1.jsonl").read_text().splitlines()]
    last = {one["id"]: one for one in logged}  # of what is written again
    for record in (one for one in history if "reward" in one):
        some = [one for one in last.values() if one["step"] == record["step"]]
        assert len(some) == record["rollouts"]
        assert fmean(one["reward"] for one in some) == pytest.approx(record["reward"])
        assert fmean(one["correct"] for one in some) == record["accuracy"]
        assert fmean(one["undos"] > 0 for one in some) == record["undo_rate"]
        assert fmean(one["components"]["own"] for one in some) == pytest.approx(record["components"]["own"]["mean"])
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard" / "grpo"))
    events.Reload()
    steps = [one for one in history if "reward" in one]
    assert [one.step for one in events.Scalars("reward")] == [1, 2, 3]
    assert [one.value for one in events.Scalars("reward")] == pytest.approx([one["reward"] for one in steps])
    spread = [one["components"]["own"]["sd"] for one in steps]
    assert [one.value for one in events.Scalars("components.own.sd")] == pytest.approx(spread)


def test_rollouts_are_as_stale_as_asked_for(inputs: dict[str, Path], tmp_path: Path) -> None:
    """With staleness k the rollouts of step t are of the weights behind step t - k; their probabilities say so."""
    for stale in (0, 2):
        run = Run(inputs, tmp_path / str(stale), settings_of(staleness=stale, lr=1e-2))
        steps = [one for one in run.start() if "reward" in one]
        gaps = [max(one.get(f"mismatch_{kind}", 0.0) for kind in ("undo", "plain")) for one in steps]
        assert gaps[0] < 1e-5
        assert all(gap < 1e-5 for gap in gaps) if stale == 0 else all(gap > 1e-3 for gap in gaps[1:])


def test_every_problem_comes_once_before_any_comes_again(inputs: dict[str, Path], tmp_path: Path) -> None:
    run = Run(inputs, tmp_path, settings_of(steps=5, problems=2, check_every=100))
    run.start()
    drawn = [tuple(requests) for requests, decoding in run.pools[0].asked if decoding.temperature == 1]
    prompts = [request.prompt_ids for requests in drawn for request in requests[::4]]
    assert len(drawn) == 5 and len(set(prompts[:8])) == 8  # the split has 8
    seeds = [request.seed for requests in drawn for request in requests]
    assert len(set(seeds)) == len(seeds) == 40


def test_what_is_drawn_is_what_is_trained(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Sampled undos, undo by an epsilon, and the control: the decoder's probabilities are the learner's."""
    codec = Codec(inputs["sft"], UndoSettings(unit="token"), "{question}\n")
    for more, how in (
        ({}, {"threshold": None, "undo_bias": 3.5, "undo_epsilon": 0.0}),
        ({"undo": "epsilon", "undo_epsilon": 0.2}, {"threshold": 0.01, "undo_bias": 0.0, "undo_epsilon": 0.2}),
    ):
        run = Run(inputs, tmp_path / str(len(more)), settings_of(steps=1, control=True, **more))
        records = [one for one in run.start() if "reward" in one]
        decodings = [decoding for pool in run.pools for _, decoding in pool.asked if decoding.temperature == 1]
        assert [decoding.mode for decoding in decodings] == ["rewind", "forbidden"]
        assert {name: getattr(decodings[0], name) for name in how} == how
        assert decodings[0].vocabulary == codec.vocabulary and (decodings[0].top_p, decodings[0].max_tokens) == (1, MAX_TOKENS)
        undone = records[0]["mismatch_undo"]
        assert undone > 0.1 if more else undone < 1e-5
        taken = [codec.rule.undo_id in one.walk.ids for one in run.learners[0].rollouts[0]]
        assert any(taken) and (more or not all(taken))
        assert not any(codec.rule.undo_id in one.walk.ids for one in run.learners[1].rollouts[0])
        assert differ(run.weights("control"), load_file(inputs["sft"] / grpo.CONTROL / "model.safetensors"))
        assert differ(run.weights(), run.weights("control"))


def test_groups_without_spread_are_left_out_and_at_last_end_the_stage(inputs: dict[str, Path], tmp_path: Path) -> None:
    run = Run(inputs, tmp_path, settings_of("nothing", steps=9, empty_steps=3))
    with pytest.raises(StageError, match=r"no group had any spread in 3 steps in a row \(grpo.empty_steps\)"):
        run.start()
    assert run.terminal.warnings == [
        f"grpo: step {step} is skipped: in every group all rollouts have earned the same" for step in (1, 2, 3)
    ]
    assert run.learners[0].rollouts == []


def test_what_the_judge_localizes_is_blamed_where_others_end_right(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fourth rollout of a group of four is called right here, since a random model solves nothing."""
    seen: list[JudgedRollout] = []

    def called_right(*given: Any) -> JudgedRollout:
        seen.append(replace(judged(*given), correct=len(seen) % 4 == 0))
        return seen[-1]

    monkeypatch.setattr(grpo, "judged", called_right)
    with_credit, without = (Run(inputs, tmp_path / str(credit), settings_of(steps=1, error_credit=credit)) for credit in (0.5, 0.0))
    for run in (with_credit, without):
        run.start()
    codec = Codec(inputs["sft"], UndoSettings(unit="token"), "{question}\n")
    taken = []
    for one, same in zip(with_credit.learners[0].rollouts[0], without.learners[0].rollouts[0], strict=True):
        assert one.walk.ids == same.walk.ids
        deleted_by = apply_undo(one.walk.ids, codec.rule).deleted_by
        lost = [after - before for before, after in zip(same.advantages, one.advantages, strict=True)]
        assert not any(value for by, value in zip(deleted_by, lost, strict=True) if by >= 0)
        taken += [value for value in lost if value]
    assert taken == pytest.approx([-0.5 / 4] * len(taken)) and taken


def test_a_reward_that_is_no_number_stops_the_stage(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"reward own, row 0 .*must be a finite number, is nan"):
        Run(inputs, tmp_path, settings_of("broken")).start()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_rollouts_that_were_cut_can_be_left_out(inputs: dict[str, Path], tmp_path: Path) -> None:
    run = Run(inputs, tmp_path, settings_of(steps=1, mask_overlong=True))
    run.start()
    counted = {(one.counts, len(one.walk.ids) == MAX_TOKENS) for one in run.learners[0].rollouts[0]}
    assert (False, True) in counted and (False, False) not in counted


def test_falling_first_tries_are_warned_of(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([0.9, 0.85, 0.2])
    monkeypatch.setattr(
        grpo._Loop, "_check", lambda self: {"step": self._step, "n": 100, "first_try_accuracy": next(measured)}, raising=True
    )
    run = Run(inputs, tmp_path, settings_of(keep="last"))
    run.start()
    said = "first tries are right in 0.200 of the 100 dev problems, at the start in 0.900: the model may be planting errors"
    assert run.terminal.warnings == [f"grpo: step 4: {said}"]


@pytest.mark.parametrize(
    ("measured", "step"),
    [((0.5, 0.9, 0.1), 2), ((0.5, 0.1, 0.5), 4), ((0.9, 0.5, 0.6), 0)],
    ids=["in between", "the newest of equals", "the start"],
)
@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_the_model_that_did_best_on_dev_problems_is_kept(
    measured: tuple[float, ...], step: int, trainable: str, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle or not, and trained as if nothing had been set aside."""

    def check(self: Any) -> dict[str, Any]:
        share = measured[self._step // 2]
        return {"step": self._step, "n": 100, "greedy_accuracy": share, "first_try_accuracy": 0.5}

    monkeypatch.setattr(grpo._Loop, "_check", check)
    best, last = (Run(inputs, tmp_path / keep, settings_of(keep=keep, trainable=trainable)) for keep in ("best", "last"))
    with pytest.raises(Killed):
        best.start(killed_at=3)
    assert without_times(best.start()) == without_times(last.start())
    assert not differ(best.weights(), load_file(best.folder / "resume" / "grpo-best" / str(step) / "model.safetensors"))
    assert differ(best.weights(), last.weights()) == (step < 4)
    if step == 0 and trainable == "all":
        assert not differ(best.weights(), load_file(inputs["sft"] / "model.safetensors"))
    told = f"grpo: kept is the model of step {step}, right on {max(measured):.3f} of the 100 dev problems"
    whole = f"{told}; at step 4 it is {measured[2]:.3f} (grpo.keep)"
    assert best.terminal.warnings == ([whole] if step < 4 else []) and not last.terminal.warnings


def test_parameters_are_counted_without_loading(inputs: dict[str, Path]) -> None:
    model = HfEngine.from_folder(inputs["sft"], EngineSettings()).model
    assert parameters(inputs["sft"]) == sum(part.numel() for part in model.parameters())
