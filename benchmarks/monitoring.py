"""What watching a run costs: the same rollouts through a rollout actor with all monitoring and with none, in turns within one run.

    python benchmarks/monitoring.py [--quick]

Watched are: Ray's metrics of the pool, of the stage's progress and of the rollouts; a line of JSON for each rollout with its
log-probabilities; a record of a training as large as GRPO's to JSON, TensorBoard and Ray. The actor's own part, always on, is
measured alone. Agents that Ray starts with or without metrics of ours are not counted. The figure is the CPU time of driver
and actor, which a busy machine does not change; the time on the clock stands beside it. Prints a table and one JSON line.
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
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROMPT_TOKENS, MAX_TOKENS, CONTEXT, GOAL = 40, 96, 256, 1.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer prompts and repeats")
    quick = parser.parse_args().quick
    prompts, repeats = (256, 6) if quick else (512, 15)
    with tempfile.TemporaryDirectory() as scratch:
        cpu, clock, tokens = measure(Path(scratch), prompts, repeats)
    figures: dict[str, Any] = {"tokens_a_turn": tokens, "busy_us_per_batch": busy_cost()}
    print(f"{prompts} rollouts a turn, {repeats} pairs of turns; watched / not watched")
    print(f"{'':20}{'median':>9}{'lowest':>9}{'highest':>9}")
    for name, ratios in (("cpu", cpu), ("clock", clock)):
        figures |= {f"{name}_ratio": statistics.median(ratios), f"{name}_ratios": [round(one, 4) for one in sorted(ratios)]}
        print(f"{name:20}{statistics.median(ratios):9.4f}{min(ratios):9.4f}{max(ratios):9.4f}")
    print(f"{'busy share, a batch':20}{figures['busy_us_per_batch']:9.1f} us")
    ok = figures["cpu_ratio"] <= GOAL
    print(json.dumps({"benchmark": "monitoring", "figures": figures, "goals": {"cpu_ratio": GOAL}, "ok": ok}))
    return 0


def measure(scratch: Path, prompts: int, repeats: int) -> tuple[list[float], list[float], int]:
    """Ratios watched / not watched, of CPU time and of time on the clock, one a pair of turns; and the tokens of a turn."""
    import psutil

    from actors import metrics
    from actors.engines import Request, Sampling
    from actors.watch import Watch
    from actors.workers import Workers
    from benchmarks.rollouts import save_model
    from pipeline.config import Settings
    from pipeline.rollout_log import RolloutLog
    from pipeline.stages.rollouts import rolled
    from pipeline.telemetry import Terminal

    rng = random.Random(0)
    asked = [Request(tuple(rng.randrange(5, 260) for _ in range(PROMPT_TOKENS)), i) for i in range(prompts)]
    sampling = Sampling(1.0, 1.0, MAX_TOKENS, 0, (0,), logprobs=True)
    record = {f"figure_{i}": i / 7 for i in range(40)} | {"components": {name: {"mean": 0.5, "sd": 0.1} for name in "abcde"}}
    engine = {"kind": "hf", "max_num_seqs": 64}
    one_thread = {"rollout": {"threads": 1}}  # threads that wait for each other spin, now more and now less
    settings = Settings.model_validate({"engine": engine, "cluster": one_thread, "run": {"name": "measured"}})
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    tokens = 0
    with Workers(settings, scratch / "logs", lambda line: None) as workers:
        pool = workers.pool(save_model(scratch), "v0", CONTEXT)
        processes = [psutil.Process(), *(psutil.Process(one.pid) for one in actors())]
        metrics.begin(metrics.Labels("measured", "rollouts", 1))
        log = RolloutLog(scratch / "logs" / "rollouts", "rollouts", 1, on_rows=metrics.rolled)
        watch = Watch(scratch / "logs", "measured")
        for turn in range(2 * (repeats + 1)):
            watched = turn % 2 == (turn // 2) % 2  # on off, off on, ..
            began, spent = time.perf_counter(), sum(sum(one.cpu_times()[:2]) for one in processes)
            terminal = Terminal(None, out=open(os.devnull, "w"))  # noqa: SIM115
            with mock.patch.object(metrics, "_record", metrics._record if watched else lambda *_: None):
                terminal.on_progress = metrics.progressed if watched else None
                with terminal.stage("rollouts", prompts) as progress:
                    done, version = pool.generate(asked, sampling, 32, lambda rows, new, told=progress: told.advance(rows))
                if watched:
                    log.write(rolled([(f"p{i}#1.0", f"p{i}") for i in range(prompts)], done, version, "forbidden", 1.0))
                    watch.write(record | {"step": turn})
            tokens = sum(len(one.token_ids) for one in done)
            if turn > 1:  # the first pair warms both up
                end = time.perf_counter(), sum(sum(one.cpu_times()[:2]) for one in processes)
                found[watched].append((end[1] - spent, end[0] - began))
        watch.__exit__()
    cpu, clock = ([on[k] / off[k] for on, off in zip(found[True], found[False], strict=True)] for k in (0, 1))
    return cpu, clock, tokens


def actors() -> list[Any]:
    import ray
    from ray.util.state import list_actors

    own = ray.get_runtime_context().gcs_address  # another Ray may live on this machine
    return list_actors(own, filters=[("state", "=", "ALIVE")], detail=True)


def busy_cost() -> float:
    """Microseconds that an actor spends on its busy share, a batch."""
    from actors.metrics import Busy

    busy, count = Busy(), 20_000
    began = time.process_time()
    for _ in range(count):
        with busy.work():
            pass
    return (time.process_time() - began) / count * 1e6


if __name__ == "__main__":
    sys.exit(main())
