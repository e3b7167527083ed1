"""The learner of preferences: TRL's loss where nothing is undone, TDPO's state by state, what a step does, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference

import actors.dpo
from actors.dpo import HELD_OUT, Dpo, PairSet, Record, drawn, fit, losses
from actors.dpo_trl import PairCollator, examples_of, trainer_of
from actors.policy import Policy, Rows
from actors.policy_learner import LearningError
from pipeline.backtrack.preferences import Pair
from pipeline.backtrack.trace import Role
from pipeline.backtrack.tree import Rewinding, Walk
from pipeline.backtrack.undo import Unit
from pipeline.dpo_config import DpoSettings
from pipeline.grpo_config import LoraSettings
from tests.actors.test_grpo_loss import perturb
from tests.actors.trained import prepared, spoil_token, weights
from tests.pipeline.tiny import END, FORMS, U, decisions, rule

PLAIN = [
    Pair((40, 41), (42,), (43, 44, 45), (43, 46), "step"),
    Pair((40, 41), (), (47,), (48, 49, 50, 51), "step"),
    Pair((52,), (53, 54), (55, 56), (57, 58, 59), "step"),
]
"""Without undo, one with a beginning in common."""
UNDONE = [
    Pair((40, 41), (42, END), (43, 44, U, 45, 46), (43, 44, 47, END, 48), "undo", wrong=(True, False, False, False, False)),
    Pair((50,), (), (51, 52, 53, U, U, 54), (51, 52, 55), "undo", wrong=(False, True, False, False, False, False)),
    Pair((60, 61), (62,), (63, 64, 68, U, 65), (63, 66, 67), "undo", wrong=(False, False, True, False, False)),
    Pair((60, 61), (62,), (65,), (U, U, 67), "step"),
]
"""The third one's wrong decision stands where the sides differ."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    prepared(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for part in model.parameters():
            part.mul_(3 if part.dim() > 1 else 1)  # far from uniform
    model.save_pretrained(path)
    return path


def settings_of(**more: Any) -> DpoSettings:
    return DpoSettings(**{"steps": 4, "batch": 3, "row_tokens": 64, "warmup": 0, "lora": LoraSettings(rank=4), "beta": 0.3} | more)


def policy_of(unit: Unit = "step", rewinding: Rewinding = "immediate", form: str = "rewind") -> Policy:
    return Policy(rule(unit), rewinding, rewinds=form == "rewind")


def dpo(folder: Path, policy: Policy | None = None, **more: Any) -> Dpo:
    return Dpo(folder, settings_of(**more), policy or policy_of(), 0)


def loss_of(learner: Dpo, pairs: Sequence[Pair]) -> torch.Tensor:
    """With gradients left in the parameters."""
    learner.model.zero_grad()
    total = torch.zeros(())
    for rows, numbers in learner._parts(pairs, learner.settings.rows):
        loss = (losses(learner.compare(rows, numbers), learner.settings) * learner._weights(pairs)).sum()
        loss.backward()
        total += loss.detach()
    return total


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


# ---- TRL ----


@pytest.mark.parametrize("form", ["soft", "rewind"])
@pytest.mark.parametrize("given", ["what is shared belongs to the sides", "what is shared belongs to the prompt"])
def test_loss_and_gradients_are_those_of_trl(folder: Path, tmp_path: Path, form: str, given: str) -> None:
    ours, theirs = dpo(folder, policy_of(form=form), loss="dpo"), trainer_of(folder, PLAIN, [], settings_of(), U, 0, tmp_path)
    perturb([ours.model, theirs.model], 1, 0.05)  # the policy is not the reference
    if given.endswith("sides"):
        rows = [
            {"prompt_ids": [*one.prompt_ids, *one.prefix_ids], "chosen_ids": [*one.chosen_ids], "rejected_ids": [*one.rejected_ids]}
            for one in PLAIN
        ]
        batch = DataCollatorForPreference(pad_token_id=0)(rows)
    else:
        batch = PairCollator(pad_token_id=0)(list(examples_of(PLAIN)))
    expected = theirs._compute_loss(theirs.model, batch, False)
    expected.backward()
    assert float(loss_of(ours, PLAIN)) == pytest.approx(float(expected.detach()), abs=1e-5)
    assert abs(float(expected.detach()) - 0.6931) > 1e-2
    own, other = gradients(ours.model), gradients(theirs.model)
    assert own.keys() == other.keys()
    for name, part in own.items():
        assert float(other[name].abs().max()) > 1e-4, name
        torch.testing.assert_close(part, other[name], rtol=1e-5, atol=1e-5)
    report = ours.measure(PLAIN)
    for name, key in (("accuracy", "accuracies"), ("margin", "margins")):
        assert report[name] == pytest.approx(theirs._metrics["eval"][f"rewards/{key}"][0], abs=1e-5)


def test_soft_rows_with_undo_are_those_of_trl_too(folder: Path, tmp_path: Path) -> None:
    """Wrong decisions are left out of both."""
    ours, theirs = dpo(folder, policy_of(form="soft"), loss="dpo"), trainer_of(folder, UNDONE, [], settings_of(), U, 0, tmp_path)
    perturb([ours.model, theirs.model], 1, 0.05)
    expected = theirs._compute_loss(theirs.model, PairCollator(pad_token_id=0)(list(examples_of(UNDONE))), False)
    expected.backward()
    assert float(loss_of(ours, UNDONE)) == pytest.approx(float(expected.detach()), abs=1e-5)
    other = gradients(theirs.model)
    for name, part in gradients(ours.model).items():
        torch.testing.assert_close(part, other[name], rtol=1e-5, atol=1e-5)
    ours.policy = policy_of()  # a rewound context is another one
    assert abs(float(loss_of(ours, UNDONE)) - float(expected.detach())) > 1e-3


# ---- state by state ----


def slow_side(
    model: Any, reference: Any, walk: Walk, counted: Sequence[bool], form: tuple[Unit, Rewinding] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-ratio, KL, log-probability) summed over the side's states, a forward of each model for every one; form None is soft."""
    if form is None:
        found = [(walk.prompt + walk.ids[:at], token, False) for at, token in enumerate(walk.ids)]
    else:
        found = decisions(walk, *form)
    ratio, divergence, logprob, step = torch.zeros(()), torch.zeros(()), torch.zeros(()), 0
    for context, token, ends_run in found:
        counts = counted[step - 1 if ends_run else step]
        step += not ends_run
        if not counts:
            continue
        ids = torch.tensor([context])
        now, then = (one(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1) for one in (model, reference))
        in_run = form == ("token", "deferred") and context[-1] == U
        if in_run:  # go on with the run or end it
            now, then = (torch.stack([(1 - one[U].exp()).log(), one[U]]) for one in (now, then))
            token = 0 if ends_run else 1
        then = then.detach()
        ratio = ratio + now[token] - then[token]
        logprob = logprob + now[token]
        divergence = divergence + (then.exp() * (then - now)).sum()
    return ratio, divergence, logprob


def slow_losses(model: Any, reference: Any, pair: Pair, asked: DpoSettings, form: tuple[Unit, Rewinding] | None) -> torch.Tensor:
    shared = 0
    while pair.chosen_ids[shared] == pair.rejected_ids[shared]:
        shared += 1
    sides = []
    for ids, wrong in ((pair.chosen_ids, pair.wrong), (pair.rejected_ids, ())):
        counted = [at >= shared and not (wrong and wrong[at]) for at in range(len(ids))]
        walk = Walk(pair.prompt_ids, pair.prefix_ids + ids)
        sides.append(slow_side(model, reference, walk, [False] * len(pair.prefix_ids) + counted, form))
    (chosen, kl_chosen, logprob), (rejected, kl_rejected, _) = sides
    if asked.loss == "sft":
        return -logprob
    u = asked.beta * (chosen - rejected)
    apart = {
        "dpo": torch.zeros(()),
        "tdpo1": asked.beta * (kl_rejected - kl_chosen),
        "tdpo2": asked.alpha * asked.beta * (kl_rejected - kl_chosen.item()),  # a number lets no gradient through
    }
    return -logsigmoid(u - apart[asked.loss])


@pytest.mark.parametrize("loss", ["dpo", "tdpo1", "tdpo2", "sft"])
@pytest.mark.parametrize("form", [*FORMS, None], ids=lambda form: "soft" if form is None else "-".join(form))
def test_losses_equal_a_slow_twin(folder: Path, form: tuple[Unit, Rewinding] | None, loss: Any) -> None:
    policy = policy_of(*form) if form else policy_of(form="soft")
    learner = dpo(folder, policy, loss=loss, alpha=0.7)
    perturb([learner.model], 1, 0.05)
    pairs = [*UNDONE, *PLAIN]
    loss_of(learner, pairs)
    plain, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    plain.load_state_dict(learner.model.state_dict())
    slow = torch.stack([slow_losses(plain, reference, pair, learner.settings, form) for pair in pairs])
    ((rows, numbers),) = learner._parts(pairs, 8)
    torch.testing.assert_close(losses(learner.compare(rows, numbers), learner.settings), slow, rtol=1e-4, atol=1e-5)
    (slow.sum() * learner._weights(pairs)).backward()
    expected = gradients(plain)
    for name, part in gradients(learner.model).items():
        torch.testing.assert_close(part, expected[name], rtol=1e-3, atol=1e-5)


def test_the_chosen_sides_kl_is_a_constant_in_tdpo2_alone(folder: Path) -> None:
    found = []
    for loss in ("tdpo1", "tdpo2"):
        learner = dpo(folder, loss=loss, alpha=1.0)
        perturb([learner.model], 1, 0.05)
        value = float(loss_of(learner, UNDONE))
        found.append((value, torch.cat([part.flatten() for part in gradients(learner.model).values()])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert float((found[0][1] - found[1][1]).abs().max()) > 1e-3


# ---- never teach to err ----


@pytest.mark.parametrize("loss", ["dpo", "tdpo1", "tdpo2", "sft"])
@pytest.mark.parametrize("form", ["soft", "rewind"])
def test_nothing_makes_a_wrong_decision_likelier(folder: Path, monkeypatch: pytest.MonkeyPatch, form: str, loss: str) -> None:
    learner, leaves = dpo(folder, policy_of(form=form), loss=loss), list[torch.Tensor]()
    plain = actors.dpo.logits_of

    def leaf(model: Any, rows: Rows, policy: Policy) -> torch.Tensor:
        found = plain(model, rows, policy).detach()
        if model is learner.model:
            leaves.append(found.requires_grad_())
        return found

    monkeypatch.setattr(actors.dpo, "logits_of", leaf)
    pairs = UNDONE[:3]
    ((rows, numbers),) = learner._parts(pairs, 8)
    losses(learner.compare(rows, numbers), learner.settings).sum().backward()
    (gradient,) = (one.grad for one in leaves)
    assert gradient is not None and float(gradient.abs().max()) > 1e-2
    errors = (rows.role == Role.ERROR).nonzero().flatten().tolist()
    assert len(errors) == 3 and not rows.weight[errors].any()
    for at in errors:
        assert float(gradient[rows.place[at], rows.token[at]]) >= 0  # a step down leaves it, or makes it less likely
    undo = [at for at in range(len(rows.token)) if rows.token[at] == U and rows.rollout[at] % 2 == 0]
    assert all(float(gradient[rows.place[at], U]) < 0 for at in undo)


def test_the_change_of_wrong_decisions_is_told(folder: Path) -> None:
    learner = dpo(folder)
    assert learner.measure(UNDONE)["error_change"] == pytest.approx(0, abs=1e-6)
    assert "error_change" not in learner.measure(PLAIN)
    perturb([learner.model], 1, 0.05)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    changes = []
    for pair in UNDONE[:3]:
        at = pair.wrong.index(True)
        ids = torch.tensor([pair.prompt_ids + pair.prefix_ids + pair.chosen_ids[:at]])
        now, then = (one(input_ids=ids).logits[0, -1].log_softmax(-1) for one in (learner.model, reference))
        changes.append(float((now - then)[pair.chosen_ids[at]]))
    assert learner.measure(UNDONE)["error_change"] == pytest.approx(sum(changes) / 3, abs=1e-4)


# ---- steps ----


@pytest.mark.parametrize("trainable", ["all", "lora", "undo_row"])
def test_a_step_prefers_what_was_chosen(folder: Path, trainable: str) -> None:
    learner = dpo(folder, trainable=trainable, lr=1e-2, steps=0, loss="dpo")
    before = learner.measure(UNDONE)
    assert before["loss"] == pytest.approx(0.6931, abs=1e-4) and before["kl_chosen"] == pytest.approx(0, abs=1e-6)
    first = learner.learn(UNDONE)
    assert first["loss"] == pytest.approx(before["loss"], abs=1e-6)
    after = learner.measure(UNDONE)
    assert after["loss"] < before["loss"] and after["margin"] > 0.001 and after["kl_chosen"] > 0
    assert learner.step == 1


def test_parts_of_a_step_do_not_change_it(folder: Path) -> None:
    pairs = [*UNDONE, *PLAIN]
    for loss in ("tdpo2", "sft"):
        found = []
        for rows in (1, 8):
            learner = dpo(folder, rows=rows, loss=loss)
            learner.settings = learner.settings.model_copy(update={"row_tokens": 20})  # below what a config may say
            perturb([learner.model], 1, 0.05)
            found.append((len(learner._parts(pairs, rows)), loss_of(learner, pairs), gradients(learner.model)))
        assert found[0][0] > 2 > found[1][0]
        torch.testing.assert_close(found[0][1], found[1][1])
        for name, part in found[0][2].items():
            torch.testing.assert_close(part, found[1][2][name], rtol=1e-4, atol=1e-6)


def test_every_pair_comes_once_before_any_comes_again() -> None:
    found = [number for step in range(7) for number in drawn(5, 3, step, 1)]
    assert [sorted(found[at : at + 5]) for at in (0, 5, 10, 15)] == [list(range(5))] * 4
    assert found[:5] != found[5:10] and len(drawn(2, 5, 1, 0)) == 5


@pytest.mark.parametrize("form", ["soft", "rewind"])
def test_a_model_without_numbers_ends_in_one_line(folder: Path, tmp_path: Path, form: str) -> None:
    spoil_token(folder, tmp_path / "spoilt", 43)
    pairs = PairSet([PLAIN[0]], [])
    asked = settings_of(loss="dpo", form=form)
    with pytest.raises(LearningError, match=r"the loss is nan at step 1: lower dpo\.lr"):
        fit(tmp_path / "spoilt", tmp_path / "out", pairs, asked, policy_of(form=form), 0, tmp_path / "kept", [].append)
    assert not (tmp_path / "out").exists()


def test_no_memory_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    learner = dpo(folder)
    monkeypatch.setattr(actors.dpo, "logits_of", full)
    with pytest.raises(LearningError, match=r"out of memory at step 1: lower dpo\.rows or dpo\.row_tokens"):
        learner.learn(PLAIN)


# ---- whole trainings ----


class Killed(BaseException):
    """As good as -9: nothing behind it runs on."""


WAYS = {"tree": {}, "tree, lora": {"trainable": "lora"}, "rows by TRL": {"form": "soft", "loss": "dpo"}}


def train(folder: Path, at: Path, killed_at: int | None = None, **more: Any) -> list[Record]:
    asked, found = settings_of(check_every=2, checkpoint_every=1, lr=1e-2, **more), list[Record]()

    def note(record: Record) -> None:
        found.append(record)
        if "loss" in record and record["step"] == killed_at:
            raise Killed

    pairs = PairSet([*UNDONE, *PLAIN[1:]], PLAIN[:1])
    fit(folder, at / "out", pairs, asked, policy_of(form=asked.form), 0, at / "kept", note)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_training_ends_with_the_same_weights(folder: Path, tmp_path: Path, way: str) -> None:
    whole = train(folder, tmp_path / "whole", **WAYS[way])
    steps = [one for one in whole if "loss" in one]
    checks = [one for one in whole if f"{HELD_OUT}accuracy" in one]
    assert [one["step"] for one in steps] == [1, 2, 3, 4] and [one["step"] for one in checks] == [0, 2, 4]
    assert {"accuracy", "margin", "grad_norm", "lr"} <= steps[0].keys() and steps[-1]["margin"] > steps[0]["margin"]
    for step in (2, 4):
        with pytest.raises(Killed):
            train(folder, tmp_path / "killed", step, **WAYS[way])
    again = train(folder, tmp_path / "killed", **WAYS[way])
    one, other = (weights(tmp_path / name / "out") for name in ("whole", "killed"))
    assert all(torch.equal(part, other[name]) for name, part in one.items())
    assert any(not torch.equal(part, weights(folder)[name]) for name, part in one.items())
    assert [one["loss"] for one in again if "loss" in one] == [one["loss"] for one in steps]


@pytest.mark.parametrize("trainable", ["lora", "undo_row"])
def test_trl_trains_parts_of_a_model(folder: Path, tmp_path: Path, trainable: str) -> None:
    found = train(folder, tmp_path, form="soft", loss="dpo", trainable=trainable)
    assert [one["step"] for one in found if "loss" in one] == [1, 2, 3, 4]
    changed = {name for name, part in weights(tmp_path / "out").items() if not torch.equal(part, weights(folder)[name])}
    assert changed and (trainable == "lora" or changed == {"model.embed_tokens.weight"})


def test_form_and_loss_say_who_trains(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(actors.dpo, "fit_by_trl", lambda *_: asked.append(True))
    train(folder, tmp_path / "1", form="soft", loss="dpo")
    assert asked == [True]
    train(folder, tmp_path / "2", form="soft", loss="tdpo2")
    train(folder, tmp_path / "3", form="rewind", loss="dpo")
    assert asked == [True]
