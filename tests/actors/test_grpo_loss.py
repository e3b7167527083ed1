"""The loss of the learner is TRL's where nothing was undone: the same value, and the same gradient of every parameter."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from actors.grpo import Grpo, Sums
from actors.policy import Policy, Sampled
from pipeline.backtrack.tree import Walk
from pipeline.grpo_config import GrpoSettings
from tests.actors.trained import prepared

MOST, GROUP, PROMPTS = 12, 3, ((5, 6, 7), (8, 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Policy]:
    path = tmp_path_factory.mktemp("model")
    rule = prepared(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for part in model.parameters():
            part.mul_(3 if part.dim() > 1 else 1)  # far from uniform
    model.save_pretrained(path)
    return path, Policy(rule, "immediate")


@dataclass(frozen=True)
class Given:
    """Rollouts without undo, some with a beginning in common, as both sides take them."""

    rollouts: list[Sampled]
    inputs: dict[str, torch.Tensor]
    """What TRL reads: prompts padded on the left, completions on the right."""

    @property
    def mask(self) -> torch.Tensor:
        return self.inputs["completion_mask"].bool()


def given(left_out: frozenset[int] = frozenset()) -> Given:
    draw = random.Random(0)
    rollouts = []
    for number in range(GROUP * len(PROMPTS)):
        ids = (40, 41, *draw.choices(range(30, 50), k=draw.randint(1, MOST - 2)))[number % 2 :]
        advantages = (draw.gauss(0, 1),) * len(ids)
        walk = Walk(PROMPTS[number // GROUP], ids, (0.0,) * len(ids))
        rollouts.append(Sampled(walk, advantages, number not in left_out))
    longest = max(len(one.walk.ids) for one in rollouts)
    widest = max(map(len, PROMPTS))
    prompts = [[0] * (widest - len(one.walk.prompt)) + list(one.walk.prompt) for one in rollouts]
    completions = [[*one.walk.ids, *[0] * (longest - len(one.walk.ids))] for one in rollouts]
    shown = [[0] * (widest - len(one.walk.prompt)) + [1] * len(one.walk.prompt) for one in rollouts]
    counted = [[int(one.counts and at < len(one.walk.ids)) for at in range(longest)] for one in rollouts]
    inputs = {
        "prompt_ids": torch.tensor(prompts),
        "prompt_mask": torch.tensor(shown),
        "completion_ids": torch.tensor(completions),
        "completion_mask": torch.tensor(counted),
        "advantages": torch.tensor([one.advantages[0] for one in rollouts]),
    }
    return Given(rollouts, inputs | {"num_items_in_batch": inputs["completion_mask"].sum().float()})


def perturb(models: list[Any], seed: int, size: float) -> None:
    """The same step away for all of them."""
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for part in model.parameters():
                part.add_(torch.randn(part.shape, generator=generator) * size)


def trl_trainer(path: Path, tmp_path: Path, settings: GrpoSettings) -> Any:
    args = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=6, num_generations=GROUP, num_iterations=settings.updates,
        max_completion_length=settings.max_tokens, loss_type=settings.loss, beta=settings.beta, scale_rewards="none",
        epsilon=settings.clip_low, epsilon_high=settings.clip_high, vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=settings.importance_cap, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer: Any = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["Ana"] * 6}),
        processing_class=AutoTokenizer.from_pretrained(path),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl_logprobs(trainer: Any, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    # What is left out of the loss is there all the same.
    mask = torch.cat([inputs["prompt_mask"], torch.ones_like(inputs["completion_ids"])], 1)
    with torch.no_grad():
        length = inputs["completion_ids"].shape[1]
        logprobs: torch.Tensor = trainer._get_per_token_logps_and_entropies(model, ids, mask, length)[0]
    return logprobs


CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss": "grpo"},
    "dr_grpo": {"loss": "dr_grpo", "scale": "none"},
    "dapo": {"loss": "dapo"},
    "grpo, several updates": {"loss": "grpo", "updates": 2, "clip_high": 0.2},
    "dr_grpo, several updates": {"loss": "dr_grpo", "scale": "none", "updates": 2},
    "dapo, several updates, clip_high": {"loss": "dapo", "updates": 2, "clip_low": 0.1, "clip_high": 0.4},
    "grpo, kl": {"loss": "grpo", "beta": 0.3},
    "dapo, kl, several updates": {"loss": "dapo", "beta": 0.3, "updates": 2},
    "dapo, importance": {"loss": "dapo", "importance": "token", "importance_cap": 1.3},
    "dr_grpo, all of it": {
        "loss": "dr_grpo", "scale": "none", "updates": 3, "beta": 0.1, "clip_high": 0.5, "importance": "token",
        "importance_cap": 1.5,
    },
}  # fmt: skip


@pytest.fixture(params=CASES)
def settings_of_case(request: pytest.FixtureRequest) -> Iterator[GrpoSettings]:
    yield GrpoSettings(max_tokens=MOST, row_tokens=32, rows=1, **{"importance": "none"} | CASES[request.param])


@pytest.mark.parametrize("left_out", [frozenset(), frozenset({1, 4})], ids=["all", "overlong ones left out"])
def test_loss_and_gradient_are_those_of_trl(
    folder: tuple[Path, Policy], tmp_path: Path, settings_of_case: GrpoSettings, left_out: frozenset[int]
) -> None:
    (path, policy), settings, data = folder, settings_of_case, given(left_out)
    ours, theirs = Grpo(path, settings, policy, 0), trl_trainer(path, tmp_path, settings)
    models, inputs = [ours.model, theirs.model], dict(data.inputs)
    perturb(models, 1, 0.02)  # the policy before the first update is not the reference
    before = trl_logprobs(theirs, theirs.model, inputs)
    emitted = before + 0.4 * torch.randn(before.shape, generator=torch.Generator().manual_seed(2))
    lengths = [len(one.walk.ids) for one in data.rollouts]
    rollouts = [
        replace(one, walk=replace(one.walk, logprobs=tuple(emitted[row, : lengths[row]].tolist())))
        for row, one in enumerate(data.rollouts)
    ]
    step = ours.begin([list(range(GROUP)), list(range(GROUP, 2 * GROUP))], rollouts)
    assert len(step.parts) > 1
    if settings.updates > 1:
        inputs["old_per_token_logps"] = before
        perturb(models, 3, 0.02)  # what an update does
    if settings.beta:
        inputs["ref_per_token_logps"] = trl_logprobs(theirs, theirs.ref_model, inputs)
    if settings.importance == "token":
        theirs.use_vllm = True  # only there TRL's rollouts come from another policy
        inputs["importance_sampling_ratio"] = (before - emitted).exp().clamp(max=settings.importance_cap)
    sums = Sums()
    loss = ours.accumulate(step, sums)
    expected = theirs._compute_loss(theirs.model, inputs)
    expected.backward()
    assert abs(float(expected.detach())) > 1e-3
    assert float(loss) == pytest.approx(float(expected.detach()), abs=1e-5)
    own, other = (dict(model.named_parameters()) for model in models)
    assert own.keys() == other.keys()
    for name, part in own.items():
        assert part.grad is not None and float(other[name].grad.abs().max()) > 1e-4, name
        torch.testing.assert_close(part.grad, other[name].grad, rtol=1e-5, atol=1e-5)
    if not left_out:
        found, metrics = sums.report(1), theirs._metrics["train"]
        assert found["clipped"] == pytest.approx(metrics["clip_ratio/region_mean"][0], abs=1e-6)
        assert (found["clipped"] > 0.05) == (settings.updates > 1)
        if settings.beta:
            assert found["kl"] == pytest.approx(metrics["kl"][0], abs=1e-5) and found["kl"] > 1e-3
        if settings.importance == "token":
            assert found["importance"] == pytest.approx(float(inputs["importance_sampling_ratio"][data.mask].mean()), abs=1e-5)


def test_a_difference_would_be_seen(folder: tuple[Path, Policy], tmp_path: Path) -> None:
    """Advantages of other rollouts, or another bound of the ratio, give another gradient."""
    path, policy = folder
    data, gradients = given(), []
    turned = [replace(one, advantages=(-one.advantages[0],) * len(one.walk.ids)) for one in data.rollouts]
    for rollouts, clip_high in ((data.rollouts, 0.28), (turned, 0.28), (data.rollouts, 0.0)):
        settings = GrpoSettings(max_tokens=MOST, row_tokens=64, updates=2, importance="none", clip_low=0.0, clip_high=clip_high)
        ours = Grpo(path, settings, policy, 0)
        step = ours.begin([list(range(GROUP)), list(range(GROUP, 2 * GROUP))], rollouts)
        perturb([ours.model], 3, 0.02)
        ours.accumulate(step, Sums())
        gradients.append(torch.cat([part.grad.flatten() for part in ours.model.parameters()]))
    assert all(float((gradients[0] - other).abs().max()) > 1e-3 for other in gradients[1:])
