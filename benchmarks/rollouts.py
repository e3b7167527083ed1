"""vLLM through our rollout actor against bare `LLM.generate`, same prompts, same sampling, in one run.

    python benchmarks/rollouts.py [--quick]

Both sides are measured in turns; a figure is the median. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROMPT_TOKENS, MAX_TOKENS, CONTEXT, GOAL = 40, 96, 256, 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer prompts and repeats")
    quick = parser.parse_args().quick
    prompts, repeats = (256, 3) if quick else (1024, 5)
    with tempfile.TemporaryDirectory() as scratch:
        bare, actor, kind = measure(Path(scratch), prompts, repeats)
    ratio = statistics.median(actor) / statistics.median(bare)
    print(f"{prompts} prompts x {PROMPT_TOKENS} tokens, {MAX_TOKENS} new tokens each, median of {repeats}")
    print(f"{'':24}{'tokens/s':>10}{'lowest':>10}{'highest':>10}")
    for name, rates in (("bare LLM.generate", bare), (f"rollout actor ({kind})", actor)):
        print(f"{name:24}{statistics.median(rates):10.0f}{min(rates):10.0f}{max(rates):10.0f}")
    print(f"{'ratio':24}{ratio:10.2f}   goal: at least {GOAL}")
    figures = {"bare_tokens_per_s": statistics.median(bare), "actor_tokens_per_s": statistics.median(actor), "ratio": ratio}
    line = {"benchmark": "rollouts", "figures": figures, "goals": {"ratio": GOAL}, "ok": ratio >= GOAL}
    print(json.dumps(line))
    return 0


def measure(scratch: Path, prompts: int, repeats: int) -> tuple[list[float], list[float], str]:
    """Tokens/s of both sides, one a repeat, measured alternately so that a busy moment hits both."""
    from actors.cluster import ray_session
    from actors.engines import Request, Sampling
    from actors.rollout import RolloutPool
    from pipeline.config import Settings

    model = save_model(scratch)
    rng = random.Random(0)
    asked = [Request(tuple(rng.randrange(5, 260) for _ in range(PROMPT_TOKENS)), i) for i in range(prompts)]
    # The stop id is one that greedy decoding cannot reach here, so that both sides emit the same number of tokens.
    sampling = Sampling(temperature=0, top_p=1, max_tokens=MAX_TOKENS, stop_id=0, forbidden_ids=(0,))
    settings = Settings()
    threads = str(os.cpu_count() or 1)
    os.environ["OMP_NUM_THREADS"] = threads
    with ray_session(settings.cluster):
        pool = RolloutPool(settings, model, "v0", CONTEXT, scratch)
        bare_generate = bare_engine(model, sampling.max_tokens)

        def timed(generate: Callable[[], int]) -> float:
            began = time.perf_counter()
            return generate() / (time.perf_counter() - began)

        def through_actor() -> int:
            completions, _ = pool.generate(asked, sampling, settings.rollouts.batch)
            return sum(len(completion.token_ids) for completion in completions)

        bare, actor = [], []
        for repeat in range(repeats + 1):
            rates = timed(lambda: bare_generate([one.prompt_ids for one in asked])), timed(through_actor)
            if repeat:  # the first round warms both up
                bare.append(rates[0])
                actor.append(rates[1])
        return bare, actor, pool.kind


def bare_engine(model: Path, max_tokens: int) -> Callable[[list[tuple[int, ...]]], int]:
    """vLLM as its documentation shows it, with the settings that our actor uses."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(model),
        dtype="float32",
        max_model_len=CONTEXT,
        max_num_seqs=256,
        enforce_eager=True,
        disable_log_stats=True,
        skip_tokenizer_init=True,
    )
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)

    def generate(prompts: list[tuple[int, ...]]) -> int:
        outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def save_model(scratch: Path) -> Path:
    """The default tiny architecture with random weights: speed does not depend on what they are."""
    from pipeline.config import ScratchModel
    from pipeline.stages.base import new_model, train_tokenizer

    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    folder = scratch / "model"
    new_model(ScratchModel(), tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
