"""The GRPO learner: what a step does to a model, what is left out of it, and that it goes on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import actors.grpo
from actors.engines import HfEngine
from actors.grpo import Grpo, LearningError, Step, Sums, loss_weights
from actors.policy import Policy, Sampled
from actors.trainable import Trainable
from actors.weights import check_weights
from pipeline.backtrack.tree import Walk
from pipeline.backtrack.undo import UndoRule
from pipeline.grpo_config import GrpoSettings, LoraSettings
from tests.actors.trained import prepared, weights

TRAINABLE: tuple[Trainable, ...] = ("all", "lora", "undo_row")
GROUPS = [[0, 1, 2], [3, 4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A model and its undo token."""
    path = tmp_path_factory.mktemp("model")
    return path, prepared(path).undo_id


def grpo(folder: tuple[Path, int], **more: Any) -> Grpo:
    how = {"row_tokens": 32, "max_tokens": 12, "warmup": 0, "lora": LoraSettings(rank=4)} | more
    return Grpo(folder[0], GrpoSettings(**how), Policy(UndoRule(folder[1], "token"), "deferred", 0.5), 0)


def rollouts(undo: int) -> list[Sampled]:
    """Two groups; some undo, one of them in a run."""
    ids = ((40, 41, undo, 42), (40, 43), (44, 45, undo, undo, 46, 47), (50, 51, 52), (53, undo, 50))
    advantages = (1.0, -1.0, 0.5, 0.7, -0.7)
    prompts = [(30, 31)] * 3 + [(32,)] * 2
    return [
        Sampled(Walk(prompt, some, (-5.7,) * len(some)), (value,) * len(some))
        for prompt, some, value in zip(prompts, ids, advantages, strict=True)
    ]


def gradient(learner: Grpo, some: Sequence[Sampled], groups: Sequence[Sequence[int]] = GROUPS) -> torch.Tensor:
    learner.model.zero_grad()
    learner.accumulate(learner.begin(groups, some), Sums())
    return torch.cat([part.grad.flatten() for part in learner.model.parameters() if part.requires_grad])


def logprobs(learner: Grpo, some: Sequence[Sampled], groups: Sequence[Sequence[int]] = GROUPS) -> dict[int, list[float]]:
    """Of the actions of each rollout."""
    found: dict[int, list[float]] = {}
    for part in learner.begin(groups, some).parts:
        for number, value in zip(part.rollout.tolist(), learner._logprobs(learner.model, part).tolist(), strict=True):
            found.setdefault(number, []).append(value)
    return found


# ---- what an action counts ----


def test_weights_by_hand() -> None:
    some = [Sampled(Walk((5,), (1,) * n), (0.0,) * n, counts) for n, counts in ((2, True), (4, True), (6, False), (10, True))]
    by_loss = {
        name: loss_weights(some, GrpoSettings(loss=name, max_tokens=10, scale="none")) for name in ("grpo", "dr_grpo", "dapo")
    }
    assert by_loss["grpo"] == pytest.approx([1 / 8, 1 / 16, 0, 1 / 40])
    assert by_loss["dr_grpo"] == pytest.approx([1 / 40, 1 / 40, 0, 1 / 40])
    assert by_loss["dapo"] == pytest.approx([1 / 16, 1 / 16, 0, 1 / 16])
    empty = [replace(one, counts=False) for one in some]
    assert loss_weights(empty, GrpoSettings(loss="dapo")) == [0.0] * 4


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_what_does_not_count_is_left_out(folder: tuple[Path, int], loss: Any) -> None:
    """Rollouts cut at max_tokens: the gradient is that of the others, by the normaliser of the loss."""
    some = rollouts(folder[1])
    learner = grpo(folder, loss=loss, scale="none")
    found = gradient(learner, [replace(one, counts=number != 2) for number, one in enumerate(some)])
    without = gradient(learner, [*some[:2], *some[3:]], [[0, 1], [2, 3]])
    share = 1.0 if loss == "dapo" else 4 / 5  # only the mean over tokens does not know how many rollouts there are
    torch.testing.assert_close(found, without * share, rtol=1e-4, atol=1e-7)
    assert float((found - gradient(learner, some)).abs().max()) > 1e-4


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_forward_passes_do_not_change_the_gradient(folder: tuple[Path, int], trainable: Trainable) -> None:
    some = rollouts(folder[1])
    one_by_one, together = (grpo(folder, rows=rows, trainable=trainable, beta=0.1) for rows in (1, 8))
    for learner in (one_by_one, together):
        learner.settings = learner.settings.model_copy(update={"row_tokens": 12})  # below what a config may say: several rows
    assert len(one_by_one.begin(GROUPS, some).parts) > 1 == len(together.begin(GROUPS, some).parts)
    torch.testing.assert_close(gradient(one_by_one, some), gradient(together, some), rtol=1e-4, atol=1e-7)
    reports = [learner.learn(GROUPS, some) for learner in (one_by_one, together)]
    for name in ("loss", "kl", "grad_norm", "mismatch_undo", "mismatch_plain", "importance"):
        assert reports[0][name] == pytest.approx(reports[1][name], rel=1e-4, abs=1e-6), name


# ---- a step ----


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_a_step_moves_probability_to_what_paid(folder: tuple[Path, int], trainable: Trainable) -> None:
    """Undos are there in rollouts that paid and in one that did not; the row of the undo token alone can move only those."""
    undo = folder[1]
    paid, not_paid = Walk((30, 31), (40, undo, 42), (-5.7,) * 3), Walk((30, 31), (45, 46), (-5.7,) * 2)
    some = [Sampled(paid, (0.0, 1.0, 1.0)), Sampled(not_paid, (-1.0, -1.0))]
    learner = grpo(folder, trainable=trainable, lr=1e-2, max_grad_norm=1e6)
    before = logprobs(learner, some, [[0, 1]])
    for _ in range(3):
        learner.learn([[0, 1]], some)
    after = logprobs(learner, some, [[0, 1]])
    assert learner.step == 3
    assert after[0][1] > before[0][1] + 1e-3  # the undo
    if trainable != "undo_row":
        assert after[0][-1] > before[0][-1] + 1e-3 and sum(after[1]) < sum(before[1]) - 1e-3


def test_no_advantage_no_step(folder: tuple[Path, int]) -> None:
    learner = grpo(folder)
    before = weights(folder[0])
    report = learner.learn(GROUPS, [replace(one, advantages=(0.0,) * len(one.walk.ids)) for one in rollouts(folder[1])])
    assert report["loss"] == report["grad_norm"] == 0 and report["tokens"] == 18
    after = learner.weights("float32").tensors()
    assert all(torch.equal(after[name], part) for name, part in before.items())


def test_updates_are_steps_on_the_same_rollouts(folder: tuple[Path, int]) -> None:
    """The first update has ratios of 1; later ones move on until the ratio leaves its bounds."""
    some = rollouts(folder[1])
    once, thrice, bound = (
        grpo(folder, updates=updates, lr=3e-3, clip_low=0.0 if low else 0.9, clip_high=0.0 if low else 100.0)
        for updates, low in ((1, True), (3, False), (3, True))
    )
    reports = [learner.learn(GROUPS, some) for learner in (once, thrice, bound)]
    assert reports[0]["clipped"] == 0 == reports[1]["clipped"] and reports[2]["clipped"] > 0.3
    steps = [next(iter(learner._optimiser.state.values()))["step"].item() for learner in (once, thrice, bound)]
    assert steps == [1, 3, 3]
    moved = [logprobs(learner, some)[0][0] - logprobs(grpo(folder), some)[0][0] for learner in (once, thrice, bound)]
    assert 0 < moved[0] < moved[1] and moved[2] < moved[1]


def test_the_learning_rate_warms_up(folder: tuple[Path, int]) -> None:
    learner = grpo(folder, warmup=3, lr=0.01, updates=2)
    first = learner._optimiser.param_groups[0]["lr"]
    rates = [first] + [learner.learn(GROUPS, rollouts(folder[1]))["lr"] for _ in range(3)]
    assert rates == pytest.approx([0.0025, 0.0075, 0.01, 0.01])  # two optimiser steps each


def test_the_learning_rate_falls_to_nothing_at_the_end(folder: tuple[Path, int]) -> None:
    learner = grpo(folder, steps=4, warmup=0, lr=0.01)
    rates = [learner.learn(GROUPS, rollouts(folder[1]))["lr"] for _ in range(4)]
    assert rates == pytest.approx([0.0075, 0.005, 0.0025, 0.0])  # of the step to come


# ---- rollouts of another policy ----


def behaved(
    learner: Grpo, some: Sequence[Sampled], off: Sequence[float], groups: Sequence[Sequence[int]] = GROUPS
) -> list[Sampled]:
    """The rollouts as a policy emitted them that made each of their ids less likely by `off`, ends of runs left unsaid."""
    now, found = logprobs(learner, some, groups), []
    for number, one in enumerate(some):
        ids, values = one.walk.ids, iter(now[number])
        said = []
        for at, token in enumerate(ids):
            if at and ids[at - 1] == learner.policy.rule.undo_id != token:
                next(values)
            said.append(next(values) - off[number])
        found.append(replace(one, walk=replace(one.walk, logprobs=tuple(said))))
    return found


def test_importance_of_rollouts_leaves_out_those_too_far_away(folder: tuple[Path, int]) -> None:
    """log 2 = .69: rollouts of 4, 2, 6, 3 and 3 ids that are off by .2 an id differ by .8, .4, 1.2, .6 and .6."""
    learner, plain = grpo(folder, importance="sequence", importance_cap=2.0), grpo(folder, importance="none")
    some = rollouts(folder[1])
    for off in (0.2, -0.2):
        away = behaved(learner, some, (off,) * 5)
        kept = [number in (1, 3, 4) for number in range(5)]
        assert learner.begin(GROUPS, away).kept is not None
        assert learner.begin(GROUPS, away).kept.tolist() == kept  # type: ignore[union-attr]
        zeroed = [
            one if keep else replace(one, advantages=(0.0,) * len(one.walk.ids)) for one, keep in zip(some, kept, strict=True)
        ]
        torch.testing.assert_close(gradient(learner, away), gradient(plain, zeroed), rtol=1e-5, atol=1e-7)


def test_importance_of_tokens_is_cut_at_its_cap(folder: tuple[Path, int]) -> None:
    """Each id counts by how much likelier the policy makes it than the one that emitted it, at most `cap` times; where that is
    not known, at the end of a run of undos, it counts once."""
    learner, plain = grpo(folder, importance="token", importance_cap=2.0), grpo(folder, importance="none")
    some = [one for one in rollouts(folder[1]) if folder[1] not in one.walk.ids]
    groups = [[0], [1]]
    once = [gradient(plain, some[number : number + 1], [[0]]) for number in range(2)]
    shares = [len(one.walk.ids) / sum(len(other.walk.ids) for other in some) for one in some]
    for off, factors in (((0.5, -0.3), (1.6487, 0.7408)), ((3.0, 0.0), (2.0, 1.0))):
        away = behaved(learner, some, off, groups)
        expected = sum(part * factor * share for part, factor, share in zip(once, factors, shares, strict=True))
        torch.testing.assert_close(gradient(learner, away, groups), expected, rtol=1e-3, atol=1e-6)
    report = learner.learn(GROUPS, behaved(learner, rollouts(folder[1]), (0.0, 0.0, 0.0, 0.25, 0.0)))
    assert report["mismatch_plain"] == pytest.approx(0.25 * 3 / 5, abs=1e-4)
    assert report["mismatch_undo"] == pytest.approx(0, abs=1e-4)
    # 21 actions: 18 ids, and the ends of three runs of undos.
    assert report["importance"] == pytest.approx((18 + 3 * 1.2840) / 21, abs=1e-3)


# ---- parts of the weights, and the reference ----


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_only_what_is_trained_changes(folder: tuple[Path, int], trainable: Trainable) -> None:
    before, learner = weights(folder[0]), grpo(folder, trainable=trainable, lr=1e-2)
    frozen = {name: part.detach().clone() for name, part in learner.model.named_parameters() if not part.requires_grad}
    assert bool(frozen) == (trainable != "all")
    for _ in range(2):
        learner.learn(GROUPS, rollouts(folder[1]))
        learner.weights("float32")  # leaves the model as it is
    assert all(torch.equal(dict(learner.model.named_parameters())[name], part) for name, part in frozen.items())
    after = learner.weights("float32").tensors()
    assert after.keys() == before.keys()
    changed = {
        name: (after[name] != part).flatten(1).any(1) if part.dim() > 1 else after[name] != part for name, part in before.items()
    }
    embedding = changed.pop("model.embed_tokens.weight")
    if trainable == "all":
        assert embedding.all() and all(part.any() for part in changed.values())
        return
    assert embedding.nonzero().flatten().tolist() == [folder[1]]
    linear = {name for name, part in changed.items() if part.any()}
    assert linear == ({name for name in changed if "proj" in name} if trainable == "lora" else set())


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_reference_stays_what_the_model_was(folder: tuple[Path, int], trainable: Trainable) -> None:
    some = rollouts(folder[1])
    learner, frozen = grpo(folder, trainable=trainable, beta=0.5, lr=1e-2), grpo(folder)
    first = learner.learn(GROUPS, some)
    second = learner.learn(GROUPS, some)
    assert abs(first["kl"]) < 1e-9 < 1e-6 < second["kl"]
    step, plain = learner.begin(GROUPS, some), frozen.begin(GROUPS, some)
    for reference, part in zip(step.references, plain.parts, strict=True):
        assert reference is not None
        torch.testing.assert_close(reference, frozen._logprobs(frozen.model, part), rtol=0, atol=1e-6)
    assert learner.model.training and all(not part.requires_grad for part in step.references if part is not None)
    assert frozen.begin(GROUPS, some).references == [None] * len(plain.parts)


def test_kl_holds_the_model_back(folder: tuple[Path, int]) -> None:
    some, far = rollouts(folder[1]), []
    for beta in (0.0, 20.0):
        learner = grpo(folder, beta=beta, lr=3e-3)
        start = logprobs(learner, some)
        for _ in range(8):
            learner.learn(GROUPS, some)
        far.append(sum(abs(now - then) for n in start for now, then in zip(logprobs(learner, some)[n], start[n], strict=True)))
    assert far[1] < far[0] / 2


# ---- weights, checkpoints, errors ----


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_engines_get_what_is_saved(folder: tuple[Path, int], tmp_path: Path, trainable: Trainable) -> None:
    learner = grpo(folder, trainable=trainable, lr=0.1)
    for _ in range(3):
        learner.learn(GROUPS, rollouts(folder[1]))
    handed = learner.weights("float32")
    learner.save(tmp_path)
    saved = weights(tmp_path)
    found = handed.tensors()
    assert found.keys() == saved.keys() and all(torch.equal(found[name], part) for name, part in saved.items())
    engine = HfEngine(AutoModelForCausalLM.from_pretrained(folder[0], dtype=torch.float32).eval(), 4, 64)
    with pytest.raises(RuntimeError, match="the engine does not generate with the weights of step 3"):
        check_weights(engine, handed.probe, "float32", "step 3")
    engine.set_weights(found)
    check_weights(engine, handed.probe, "float32", "step 3")


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_going_on_from_a_checkpoint_is_going_on(folder: tuple[Path, int], tmp_path: Path, trainable: Trainable) -> None:
    """Bit for bit: weights, and everything that is reported."""
    some, how = rollouts(folder[1]), {"trainable": trainable, "updates": 2, "beta": 0.1, "warmup": 5, "lr": 1e-2}
    whole, cut, resumed = (grpo(folder, **how) for _ in range(3))
    for learner in (whole, cut):
        learner.learn(GROUPS, some)
    cut.checkpoint(tmp_path)
    torch.manual_seed(99)
    resumed.restore(tmp_path)
    assert resumed.step == 1
    reports = [learner.learn(GROUPS, some) for learner in (whole, resumed)]
    assert {**reports[0], "learn_seconds": 0} == {**reports[1], "learn_seconds": 0}
    first, second = (learner.weights("float32").tensors() for learner in (whole, resumed))
    assert all(torch.equal(part, second[name]) for name, part in first.items())
    assert any(not torch.equal(part, dict(cut.weights("float32").tensors())[name]) for name, part in first.items())


def test_a_loss_that_is_no_number(folder: tuple[Path, int]) -> None:
    learner = grpo(folder)
    before = {name: part.detach().clone() for name, part in learner.model.named_parameters()}
    some = rollouts(folder[1])
    some[0] = replace(some[0], advantages=(float("nan"),) * 4)
    with pytest.raises(LearningError, match=r"^the loss is nan at step 1: lower grpo\.lr$"):
        learner.learn(GROUPS, some)
    assert learner.step == 0 and all(torch.equal(part, before[name]) for name, part in learner.model.named_parameters())


def test_a_gradient_that_is_no_number(folder: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss may have one; the weights must not get it."""
    learner = grpo(folder)

    def spoilt(step: Step, sums: Sums) -> torch.Tensor:
        for part in learner.model.parameters():
            part.grad = torch.full_like(part, float("nan"))
        return torch.zeros(())

    monkeypatch.setattr(learner, "accumulate", spoilt)
    with pytest.raises(LearningError, match=r"^the gradient is nan at step 1: lower grpo\.lr$"):
        learner.learn(GROUPS, rollouts(folder[1]))
    assert all(bool(part.isfinite().all()) for part in learner.model.parameters())


def test_no_memory_left(folder: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(actors.grpo, "score", full)
    with pytest.raises(LearningError, match=r"out of memory at step 1: lower grpo\.rows or grpo\.row_tokens"):
        grpo(folder).learn(GROUPS, rollouts(folder[1]))
