"""A step of the GRPO learner against one of TRL's GRPOTrainer, and how long a 0.5B model takes from a learner into an engine.

    python benchmarks/grpo.py [--quick] [--large]

Both sides start from one folder with random weights (the default model; with --large one of 30M parameters too) and take the
same prompts, group size and longest completion. Lengths are uneven by chance and alike: both sample at temperature 1 without a
nucleus from the same policy, in which the stop id has a probability of about 1/64 everywhere, set before the start by its
embedding row, and a learning rate that changes nothing; the mean length of both sides is printed. TRL generates with
transformers, its default. A step of ours is decoding (undos allowed), rewards and credit, learning, and the weights into the
decoder's own model, with their check. Sides take turns; a figure is the median of steps, the first of each turn left out. The
ratio of processor seconds is there too: other processes on the machine change it little.

The second part hands weights through Ray's object store to an engine in another process, in fp32 and bf16, by its parts: `of`
makes the arrays and their probe, of which `probe` is what the probe takes; `put` and `get` are Ray's; `set` writes them into the
engine; `check` compares log-probabilities with the probe and is not part of the goal. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from datasets import Dataset  # noqa: E402
from sft import Clock  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from actors.cluster import ray_session  # noqa: E402
from actors.engines import HfEngine  # noqa: E402
from actors.grpo import Grpo  # noqa: E402
from actors.policy import Policy, Sampled  # noqa: E402
from actors.weights import Weights, check_weights, probe_of  # noqa: E402
from pipeline.backtrack.cursor import DecodeRequest, Decoding  # noqa: E402
from pipeline.backtrack.tree import Walk  # noqa: E402
from pipeline.backtrack.undo import UndoRule  # noqa: E402
from pipeline.cluster_config import ClusterSettings  # noqa: E402
from pipeline.config import ScratchModel  # noqa: E402
from pipeline.grpo_config import GrpoSettings  # noqa: E402
from pipeline.stages.base import new_model, train_tokenizer  # noqa: E402
from rewards.credit import Episode, advantages  # noqa: E402

SIZES = {"default": ScratchModel(), "30M": ScratchModel(layers=9, width=512, heads=8, vocab=4096)}
GROUP, MAX_TOKENS, STOP_SHARE, LR = 8, 128, 1 / 64, 1e-7
GOALS = {"step_over_trl": 0.6, "handover": 1.0}
HALF_BILLION = Qwen2Config(
    vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=1024,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer prompts, steps and turns")
    parser.add_argument("--large", action="store_true", help="the model of 30M parameters too")
    asked = parser.parse_args()
    figures: dict[str, float] = {}
    for name in SIZES if asked.large else ("default",):
        found = steps_of(name, asked.quick)
        figures |= {f"{figure}_{name}": value for figure, value in found.items()}
        print(
            f"{name}: {found['million_parameters']:.2f}M parameters, {found['rollouts']:.0f} rollouts a step in groups of {GROUP}"
        )
        for figure, value in found.items():
            print(f"  {figure:28}{value:10.3f}" + (f"   goal: at most {GOALS[figure]}" if figure in GOALS else ""))
    print("weights of a 0.5B model into an engine, seconds")
    for dtype in ("float32", "bfloat16"):
        found = handed_over(dtype, 2 if asked.quick else 5)
        figures |= {f"{figure}_{dtype}": value for figure, value in found.items()}
        print(f"  {dtype:12}" + ", ".join(f"{figure} {value:.2f}" for figure, value in found.items()))
    print(f"  goal: at most {GOALS['handover']} of handover, which is of + put + get + set")
    goals = {figure: most for figure in figures for goal, most in GOALS.items() if figure.startswith(goal)}
    ok = all(figures[figure] <= most for figure, most in goals.items())
    print(json.dumps({"benchmark": "grpo", "figures": figures, "goals": goals, "ok": ok}))
    return 0


def between(parts: Sequence[str], times: Sequence[float]) -> dict[str, float]:
    return {part: after - before for part, before, after in zip(parts, times, times[1:], strict=False)}


# ---- a step ----


class CpuClock(Clock):
    """The processor's seconds as well."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu: list[float] = []
        self._cpu_began = 0.0

    def on_step_begin(self, *given: Any, **more: Any) -> None:
        super().on_step_begin(*given, **more)
        self._cpu_began = time.process_time()

    def on_step_end(self, *given: Any, **more: Any) -> None:
        super().on_step_end(*given, **more)
        self.cpu.append(time.process_time() - self._cpu_began)


def steps_of(name: str, quick: bool) -> dict[str, float]:
    problems, steps, turns = (8, 3, 2) if quick else (32, 4, 3)
    if quick and name != "default":
        problems, steps, turns = 4, 2, 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model, undo_id = start_model(SIZES[name], folder)
        size = sum(part.numel() for part in model.parameters()) / 1e6
        texts = prompt_texts(problems * steps)
        taken: dict[str, list[float]] = defaultdict(list)
        lengths: dict[str, list[int]] = {"ours": [], "trl": []}
        for turn in range(turns):
            clock = trl_steps(folder, texts, problems, steps, lengths["trl"], scratch)
            taken["trl"] += clock.steps[1:]
            taken["trl_cpu"] += clock.cpu[1:]
            for seconds in our_steps(folder, texts, problems, steps, undo_id, lengths["ours"], turn):
                taken["ours_cpu"].append(seconds.pop("cpu"))
                taken["ours"].append(sum(seconds.values()))
                for part, value in seconds.items():
                    taken[part].append(value)
            gc.collect()
    medians = {part: statistics.median(values) for part, values in taken.items()}
    means = {side: statistics.mean(some) for side, some in lengths.items()}
    per_token = {side: medians[side] / means[side] for side in means}
    return {
        "million_parameters": size,
        "rollouts": problems * GROUP,
        "step_over_trl": medians["ours"] / medians["trl"],
        "cpu_over_trl": medians["ours_cpu"] / medians["trl_cpu"],
        "token_over_trl": per_token["ours"] / per_token["trl"],
        **{f"{part}_seconds": value for part, value in medians.items()},
        **{f"{side}_mean_length": value for side, value in means.items()},
        **{f"{side}_cut_share": statistics.mean(one == MAX_TOKENS for one in some) for side, some in lengths.items()},
    }


def start_model(size: ScratchModel, folder: Path) -> tuple[Any, int]:
    """Save a random model in which the stop id has a probability of about STOP_SHARE everywhere; its undo token, a spare row.

    What the head reads gets a direction that is the same for all contexts, from a part that all embedding rows share, and the
    stop id's row grows along it.
    """
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    undo_id = len(tokenizer)
    model = new_model(size, tokenizer, 0)
    model.resize_token_embeddings(size.vocab, mean_resizing=False)
    generator = torch.Generator().manual_seed(0)
    rows, stop = model.get_input_embeddings().weight, tokenizer.eos_token_id
    contexts = torch.randint(0, size.vocab, (32, 32), generator=generator)
    with torch.no_grad():
        rows += 0.05 * torch.randn(rows.shape[1], generator=generator)
        hidden = model.model(input_ids=contexts).last_hidden_state.flatten(0, 1)
        towards = hidden.mean(0) / hidden.mean(0).square().sum()
        plain, low, high = rows[stop].clone(), -20.0, 20.0
        for _ in range(30):
            rows[stop] = plain + (low + high) / 2 * towards
            share = float((hidden @ rows.T).softmax(-1)[:, stop].mean())
            low, high = ((low + high) / 2, high) if share < STOP_SHARE else (low, (low + high) / 2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, undo_id


def prompt_texts(count: int) -> list[str]:
    draw = random.Random(0)
    return [f"Ana has {draw.randint(100, 999)} apples. Ana has {draw.randint(100, 999)} apples.\n" for _ in range(count)]


def reward_of(ids: list[int]) -> float:
    return sum(token % 2 for token in ids) / max(1, len(ids))


def trl_steps(folder: Path, texts: list[str], problems: int, steps: int, lengths: list[int], scratch: str) -> CpuClock:
    """Seconds of each step of TRL's trainer by its own loop."""

    def rewarded(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [reward_of(ids) for ids in completion_ids]

    args = GRPOConfig(
        output_dir=scratch, per_device_train_batch_size=problems * GROUP, num_generations=GROUP, max_completion_length=MAX_TOKENS,
        max_steps=steps, learning_rate=LR, loss_type="dapo", beta=0.0, epsilon_high=0.28, temperature=1.0, top_p=1.0, top_k=0,
        use_cpu=not torch.cuda.is_available(), bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
        disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    clock = CpuClock()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=rewarded,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[clock],
    )
    trainer.train()
    return clock


def our_steps(
    folder: Path, texts: list[str], problems: int, steps: int, undo_id: int, lengths: list[int], turn: int
) -> list[dict[str, float]]:
    """Seconds of the parts of each step, the first left out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rule = UndoRule(undo_id, "token")
    settings = GrpoSettings(lr=LR, warmup=0, max_tokens=MAX_TOKENS, group=GROUP)
    learner = Grpo(folder, settings, Policy(rule, "deferred"), 0)
    prompts = [tuple(ids) for ids in tokenizer(texts)["input_ids"]]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(learner.model.device).eval()
    engine = HfEngine(model, 256, max(map(len, prompts)) + MAX_TOKENS)
    decoding = Decoding("rewind", 1.0, 1.0, MAX_TOKENS, tokenizer.eos_token_id, rule, threshold=None)
    found = []
    for step in range(steps):
        times, cpu = [time.perf_counter()], time.process_time()
        asked = [prompt for prompt in prompts[step * problems : (step + 1) * problems] for _ in range(GROUP)]
        first = (turn * steps + step) * len(asked)
        decoded = engine.decode([DecodeRequest(prompt, first + row) for row, prompt in enumerate(asked)], decoding)
        times.append(time.perf_counter())
        sampled: list[Sampled] = []
        for start in range(0, len(asked), GROUP):
            group = [
                Episode(Walk(prompt, one.ids, one.logprobs, one.banned, closed=one.closed), reward_of(list(one.ids)), False)
                for prompt, one in zip(asked[start : start + GROUP], decoded[start : start + GROUP], strict=True)
            ]
            earned = advantages(group, rule, "sequence")
            sampled += [Sampled(one.walk, values) for one, values in zip(group, earned, strict=True)]
        times.append(time.perf_counter())
        learner.learn([list(range(start, start + GROUP)) for start in range(0, len(asked), GROUP)], sampled)
        times.append(time.perf_counter())
        weights = learner.weights("float32")
        engine.set_weights(weights.tensors())
        check_weights(engine, weights.probe, "float32", f"step {step}")
        times.append(time.perf_counter())
        lengths.extend(len(one.ids) for one in decoded)
        found.append(between(("decode", "rewards", "learn", "weights"), times) | {"cpu": time.process_time() - cpu})
    return found[1:]


# ---- weights through Ray ----


def half_billion(dtype: str) -> Any:
    return AutoModelForCausalLM.from_config(HALF_BILLION, dtype=getattr(torch, dtype)).eval()


@ray.remote
class Receiver:
    """Where an engine lives."""

    def __init__(self, dtype: str) -> None:
        self._engine, self._dtype = HfEngine(half_billion(dtype), 16), dtype

    def ready(self) -> None: ...

    def take(self, references: list[Any]) -> dict[str, float]:
        """The reference comes in a list, or Ray would fetch it before this begins."""
        times = [time.perf_counter()]
        weights: Weights = ray.get(references[0])
        times.append(time.perf_counter())
        self._engine.set_weights(weights.tensors())
        times.append(time.perf_counter())
        check_weights(self._engine, weights.probe, self._dtype, "the benchmark")
        times.append(time.perf_counter())
        return between(("get", "set", "check"), times)


def handed_over(dtype: str, repeats: int) -> dict[str, float]:
    """Median seconds of each part on the way from a learner in fp32 to an engine that computes in `dtype`."""
    model, taken = half_billion("float32"), defaultdict(list)
    with ray_session(ClusterSettings()):
        receiver = Receiver.remote(dtype)  # type: ignore[attr-defined]
        ray.get(receiver.ready.remote())
        for repeat in range(repeats + 1):
            times = [time.perf_counter()]
            probe_of(model)
            times.append(time.perf_counter())
            weights = Weights.of(model, dtype)
            times.append(time.perf_counter())
            reference = ray.put(weights)
            times.append(time.perf_counter())
            seconds = between(("probe", "of", "put"), times) | ray.get(receiver.take.remote([reference]))
            seconds["handover"] = sum(seconds[part] for part in ("of", "put", "get", "set"))
            del weights, reference
            if repeat:  # the first round warms everything up
                for part, value in seconds.items():
                    taken[part].append(value)
    return {part: statistics.median(values) for part, values in taken.items()}


if __name__ == "__main__":
    sys.exit(main())
