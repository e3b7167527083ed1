"""How far one driver goes: the stage rollouts on real Ray, with simulated engines that sleep as long as real ones would compute.

    python benchmarks/scale.py [--quick] [--engines 1 8 64] [--rows 1000000] [--stored 1000000] [--judged 5000 40000]

Everything but the engines is real: actors, queue, log of rollouts, rows kept for a resume, dataset, store. Four measurements:

- Scheduling, at 1, 8, 64 and 256 engines with the same number of batches each. Efficiency is the share of the time, from the first
  request to the moment at which no request is left, in which engines were at work; then that to the last result. Above PROCESSES
  engines several of them share an actor process, as threads of it: memory has no room for as many processes.
- Many rows: one rollout each of as many problems, and engines that take no time, so that the driver is what limits.
- Storing: the same with completions that are there before they are asked for, eight of a problem. Rows a second are those of what
  stores them: rows kept, dataset written, store sealed.
- Judging, where asked for: the stages problems and judge with so many problems and a rollout of each, judged in this process.

CPU time is that of the driver's process, all its threads included. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
AT_LEAST, AT_MOST = {"efficiency_64": 0.95, "stored_rows_per_s": 20_000}, {"driver_cores_64": 0.5, "driver_mib": 1024}
BATCH, BATCHES, PROCESSES = 256, 8, 64
QUESTION = (
    "Box {0} holds {1} pens and {2} caps. Ana takes {3} of each, then Ben brings {1} more pens. How many pens are left in box {0}?"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 and 8 engines, 20,000 rows, 50,000 stored")
    parser.add_argument("--engines", type=int, nargs="*", help="these numbers of engines")
    parser.add_argument("--rows", type=int, help="so many rows through Ray; 0 leaves it out")
    parser.add_argument("--stored", type=int, help="so many rows stored; 0 leaves it out")
    parser.add_argument("--judged", type=int, nargs="*", default=[], help="these numbers of problems made and rollouts judged")
    asked = parser.parse_args()
    engines = asked.engines if asked.engines is not None else [1, 8] if asked.quick else [1, 8, 64, 256]
    rows = asked.rows if asked.rows is not None else 20_000 if asked.quick else 1_000_000
    stored = asked.stored if asked.stored is not None else 50_000 if asked.quick else 1_000_000
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = save_model(Path(scratch))
        for count in engines:
            found = scheduled(Path(scratch), model, count)
            if count == engines[0]:
                print(f"{BATCHES} batches of {BATCH} rows an engine; 100 ids a row, 20 ms an id")
                print(f"{'engines':>8}" + "".join(f"{name:>18}" for name in found))
            print(f"{count:8}" + "".join(f"{value:18.3f}" for value in found.values()), flush=True)
            figures |= {f"{name}_{count}": value for name, value in found.items()}
        for count, samples, ready in ((rows, 1, False), (stored, 8, True)):
            if count:
                found = many(Path(scratch), model, count, samples, ready)
                how = "without Ray, completions are there before they are asked for" if ready else "2 engines that take no time"
                print(f"{count} rows of {count // samples} problems; {how}; CPU time of the driver's main thread, us a row")
                for name, value in found.items():
                    print(f"{name:24}{value:12.2f}")
                figures |= found if ready else {f"through_ray_{name}": value for name, value in found.items()}
        for count in asked.judged:
            found = judged(Path(scratch), model, count)
            if count == asked.judged[0]:
                print("problems made and rollouts judged, without Ray; most MiB of the driver's own, before and in each stage")
                print(f"{'rows':>8}" + "".join(f"{name:>22}" for name in found))
            print(f"{count:8}" + "".join(f"{value:22.1f}" for value in found.values()), flush=True)
            figures |= {f"{name}_{count}": value for name, value in found.items()}
    goals = {name: goal for name, goal in (AT_LEAST | AT_MOST).items() if name in figures}
    ok = all(figures[name] >= goal if name in AT_LEAST else figures[name] <= goal for name, goal in goals.items())
    figures = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({"benchmark": "scale", "figures": figures, "goals": goals, "ok": ok}))
    return 0


@dataclass
class Meter:
    """What one run of the stage has cost; times of `time.monotonic`."""

    clock: float = 0.0
    cpu: float = 0.0
    began: float = 0.0
    """First request."""
    dry: float = 0.0
    """No request is left."""
    ended: float = 0.0
    """Last result."""
    tokens: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds on the clock by what the driver did."""
    cpus: dict[str, float] = field(default_factory=dict)
    """CPU time of its main thread likewise."""
    own: float = 0.0
    """Most MiB of the driver: its own, and what it has mapped of Ray's store."""
    resident: float = 0.0
    """Most MiB with files mapped into memory and libraries, which the system may take back."""

    def times(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **more: Any) -> Any:
            began, spent = time.monotonic(), time.thread_time()
            try:
                return call(*args, **more)
            finally:
                self.parts[what] = self.parts.get(what, 0.0) + time.monotonic() - began
                self.cpus[what] = self.cpus.get(what, 0.0) + time.thread_time() - spent

        return timed

    def each(self, what: str, call: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """The same for a generator: what its steps take."""

        def timed(*args: Any) -> Iterator[Any]:
            step = self.times(what, next)
            items = call(*args)
            while (item := step(items, self)) is not self:
                yield item

        return timed

    def streams(self, call: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """The pool's stream, its times noted."""

        def watched(requests: Iterable[Any]) -> Iterator[Any]:
            self.began = time.monotonic()
            yield from requests
            self.dry = time.monotonic()

        def stream(pool: Any, method: str, requests: Iterable[Any], how: Any, batch: int) -> Iterator[Any]:
            for start, made in call(pool, method, watched(requests), how, batch):
                self.ended = time.monotonic()
                self.tokens += sum(len(one.token_ids) for one in made.done)
                yield start, made

        return stream

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Clock, CPU time and memory of what is done meanwhile."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(0.25):
                lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
                anonymous, shared, files = (int(lines[f"Rss{one}"].split()[0]) / 1024 for one in ("Anon", "Shmem", "File"))
                self.own, self.resident = max(self.own, anonymous + shared), max(self.resident, anonymous + shared + files)

        thread = threading.Thread(target=look)
        thread.start()
        began, spent = time.monotonic(), time.process_time()
        yield
        self.clock, self.cpu = time.monotonic() - began, time.process_time() - spent
        done.set()
        thread.join()


def scheduled(scratch: Path, model: Path, engines: int) -> dict[str, float]:
    """Figures of the stage with so many engines."""
    processes = min(engines, PROCESSES)
    problems = save_problems(scratch / f"problems-{engines}", engines * BATCHES * BATCH // 4)
    began = time.monotonic()
    with rollouts(scratch, model, problems, engines, engines // processes, samples=4) as (run, pool):
        start = time.monotonic() - began
        meter = run()
        spans, pids = asked_actors(pool)
        pss = [float(Path(f"/proc/{pid}/smaps_rollup").read_text().split("Pss:")[1].split()[0]) / 1024 for pid in pids]
    busy = {end: sum(max(0.0, min(since + took, end) - since) for since, took in spans) for end in (meter.dry, meter.ended)}
    span, rows = meter.ended - meter.began, engines * BATCHES * BATCH
    return {
        "efficiency": busy[meter.dry] / engines / (meter.dry - meter.began),
        "to_the_end": busy[meter.ended] / engines / span,
        "driver_cores": meter.cpu / meter.clock,
        "driver_us_per_row": meter.cpu / rows * 1e6,
        "rows_per_s": rows / span,
        "tokens_per_s": meter.tokens / span,
        "scheduled_mib": meter.own,
        "start_s": start,
        "processes": processes,
        "actor_mib": sum(pss) / max(1, len(pss)),
    }


def many(scratch: Path, model: Path, rows: int, samples: int, ready: bool) -> dict[str, float]:
    """Figures of the stage with so many rows. `ready`: without Ray, completions are there before they are asked for."""
    meter = Meter()
    with meter.watching():
        problems = save_problems(scratch / f"problems-{rows}-{samples}", rows // samples)
    figures = {"problems_per_s": rows / samples / meter.clock}
    if ready:
        settings = settings_of(1, samples)
        meter = staged(
            settings, model, problems, Path(tempfile.mkdtemp(dir=scratch)), SimpleNamespace(pool=lambda *_: Ready()), Ready
        )
    else:
        with rollouts(scratch, model, problems, 2, 1, samples, token_ms=0.0, prompt_ms=0.0) as (run, _):
            meter = run()
    storing = ("keep", "dataset", "seal")
    figures |= {f"{name}_us": value / rows * 1e6 for name, value in meter.cpus.items()}
    return figures | {
        "clock_s": meter.clock,
        "rows_per_s": rows / meter.clock,
        "cpu_us_per_row": meter.cpu / rows * 1e6,
        "tokens_per_row": meter.tokens / rows,
        "stored_rows_per_s": rows / sum(meter.parts[name] for name in storing),
        "stored_rows_per_cpu_s": rows / sum(meter.cpus[name] for name in storing),
        "driver_mib": meter.own,
        "driver_resident_mib": meter.resident,
    }


def judged(scratch: Path, model: Path, rows: int) -> dict[str, float]:
    """Memory and CPU time of the stages problems and judge with so many problems and rollouts, every second one of them wrong."""
    from actors.judge import judge_rows
    from pipeline.config import Settings
    from pipeline.stages import judge, problems
    from pipeline.stages.io import Codec, read_problems, write_rows
    from pipeline.stages.rollouts import FEATURES
    from pipeline.stages.stage import Context
    from pipeline.telemetry import Terminal

    folder = Path(tempfile.mkdtemp(dir=scratch))
    task = {"name": "synthetic", "train": rows, "families": ["chain"], "hindsight_share": 0.0, "steps": [4, 6], "ood_steps": [7, 8]}
    settings = Settings.model_validate({"run": {"name": "scale"}, "task": task})
    inputs = {name: folder / name for name in ("problems", "rollouts")} | {"model": model}
    codec, terminal = Codec(model, settings.undo, settings.base.prompt), Terminal(None, out=open(os.devnull, "w"))  # noqa: SIM115
    workers: Any = SimpleNamespace(start=lambda: None, quarantine=lambda: SimpleNamespace(rows=0))

    def staged(stage: Any, out: Path) -> Meter:
        with (meter := Meter()).watching():
            stage.run(Context(settings, 1, out, folder, folder / f"resume-{out.name}", {}, inputs, {}, terminal, workers))
        return meter

    def written() -> Iterator[dict[str, Any]]:
        for at, (problem, prompt) in enumerate(codec.prompts(read_problems(inputs["problems"], "train"))):
            text = problem.solution if at % 2 else problem.solution.replace("1", "2")
            row = {"id": f"{problem.id}#1.0", "problem": problem.id, "prompt_ids": prompt, "token_ids": codec.solution_ids(text)}
            yield row | {"logprobs": [], "finish": "stop", "hot": False, "version": "v"}

    def judge_all(pairs: Iterable[Any], count: int, batch: int, *_: Any) -> Iterator[Any]:
        source = iter(pairs)
        while some := list(itertools.islice(source, batch)):
            yield judge_rows(some)

    with (before := Meter()).watching():
        time.sleep(0.5)
    made = staged(problems, inputs["problems"])
    write_rows(written(), FEATURES, inputs["rollouts"])
    with mock.patch.object(judge, "judge_all", judge_all):
        done = staged(judge, folder / "judge")
    return {
        "before_mib": before.own,
        "problems_mib": made.own,
        "judge_mib": done.own,
        "problems_us_per_row": made.cpu / rows * 1e6,
        "judge_us_per_row": done.cpu / rows * 1e6,
    }


class Ready:
    """A pool without engines: it answers whatever is asked with the same few thousand completions."""

    version = "v"

    def __init__(self) -> None:
        from actors.engines import Request, Sampling
        from actors.simulated import SimulatedEngine
        from pipeline.engine_config import SimulatedSettings

        engine, how = SimulatedEngine(SimulatedSettings(), BATCH), Sampling(1.0, 1.0, 320, 0, (1,), logprobs=True)
        asked = [Request(tuple(range(20, 90)), seed) for seed in range(16 * BATCH)]
        made = engine.rows(asked, how)
        self._made = [made[at : at + BATCH] for at in range(0, len(made), BATCH)]

    def stream(self, method: str, requests: Iterable[Any], how: Any, batch: int) -> Iterator[tuple[int, Any]]:
        from actors.parts import Parts
        from actors.rollout_actor import Batch

        parts = Parts(requests, batch, 3)
        for made in itertools.cycle(self._made):
            part = parts.next()
            if part is None:
                return
            yield part.start, Batch(made[: len(part.rows)], self.version)


def settings_of(engines: int, samples: int, **simulated: float) -> Any:
    from pipeline.config import Settings

    return Settings.model_validate(
        {
            "run": {"name": "scale"},
            "engine": {"kind": "simulated", "max_num_seqs": BATCH, "simulated": simulated},
            "rollouts": {"samples": samples, "batch": BATCH, "max_tokens": 320},
            "cluster": {"rollout_actors": engines, "rollout": {"cpus": 0, "threads": 1}, "start_timeout": 1800},
        }
    )


@contextmanager
def rollouts(
    scratch: Path, model: Path, problems: Path, engines: int, shared: int, samples: int, **simulated: float
) -> Iterator[tuple[Callable[[], Meter], Any]]:
    """The stage with so many engines, `shared` of them in one process, ready to be run; and the pool."""
    from actors import metrics, rollout, workers

    settings, folder = settings_of(engines, samples, **simulated), Path(tempfile.mkdtemp(dir=scratch))
    kind = seats(shared) if shared > 1 else rollout.RolloutPool
    options = rollout.actor_options
    more = {"max_concurrency": shared} if shared > 1 else {}
    with (
        mock.patch.object(workers, "RolloutPool", kind),
        mock.patch.object(rollout, "actor_options", lambda *how: options(*how) | more),
        workers.Workers(settings, folder / "logs", lambda line: None) as running,
    ):
        pool = running.pool(model, "v", 1024)
        metrics.begin(metrics.Labels("scale", "rollouts", 1))
        yield lambda: staged(settings, model, problems, folder, running, kind), pool


def staged(settings: Any, model: Path, problems: Path, folder: Path, workers: Any, kind: Any) -> Meter:
    """Run the stage as the runner does, into a store; `kind` is the class of its pool."""
    from actors import metrics
    from pipeline.rollout_log import RolloutLog
    from pipeline.stages import rollouts as stage
    from pipeline.stages.kept import KeptRows
    from pipeline.stages.stage import Context
    from pipeline.store import Store
    from pipeline.telemetry import Terminal

    meter, store = Meter(), Store(folder / "run")
    terminal = Terminal(None, out=open(os.devnull, "w"))  # noqa: SIM115
    terminal.on_progress = metrics.progressed
    inputs = {"problems": problems, "model": model}
    with (
        mock.patch.object(KeptRows, "add", meter.times("keep", KeptRows.add)),
        mock.patch.object(RolloutLog, "write", meter.times("log", RolloutLog.write)),
        mock.patch.object(stage, "write_tables", meter.times("dataset", stage.write_tables)),
        mock.patch.object(stage.Codec, "prompts", meter.each("prompts", stage.Codec.prompts)),
        mock.patch.object(kind, "stream", meter.streams(kind.stream)),
        closing(RolloutLog(folder / "logs" / "rollouts", "rollouts", 1, on_rows=metrics.rolled)) as log,
        meter.watching(),
        ExitStack() as sealing,
    ):
        draft = sealing.enter_context(store.write(1, "rollouts", key="k", settings={}, inputs={}, seed=0))
        digests, counts = {"model": "v"}, draft.counts
        stage.run(Context(settings, 1, draft.path, folder, folder / "resume", counts, inputs, digests, terminal, workers, log))
        meter.times("seal", sealing.close)()
    return meter


def seats(shared: int) -> Any:
    """A pool in which so many engines share an actor process: each is one of its threads, asked like an actor of its own."""
    import ray

    from actors.rollout import RolloutPool

    class Seat:
        def __init__(self, actor: Any) -> None:
            self.actor = actor

        def __getattr__(self, name: str) -> Any:
            return getattr(self.actor, name)

    class Seats(RolloutPool):
        def _start(self) -> Any:
            actors: list[Any] = self.__dict__.setdefault("_real", [])
            places = self.__dict__.setdefault("_places", [])
            if not places:
                actors.append(super()._start())
                places += [Seat(actors[-1]) for _ in range(shared)]
            return places.pop()

        def close(self) -> None:
            for actor in self.__dict__["_real"]:
                ray.kill(actor)

    return Seats


def asked_actors(pool: Any) -> tuple[list[tuple[float, float]], list[int]]:
    """What the engines of all processes did when, and the processes."""
    import ray

    real = list({getattr(actor, "actor", actor) for actor in pool._actors})
    found = ray.get([actor.__ray_call__.remote(lambda self: (self._engine.spans, os.getpid())) for actor in real])
    return [span for spans, _ in found for span in spans], [pid for _, pid in found]


def save_problems(folder: Path, count: int) -> Path:
    """So many questions, no two of them alike, as the stage problems leaves them."""
    from dataclasses import asdict

    from pipeline.stages.io import write_rows
    from pipeline.stages.problems import FEATURES
    from pipeline.tasks.problem import Problem

    def problem(number: int) -> Problem:
        pens, caps, taken = number % 89 + 10, number // 89 % 83 + 10, number % 7 + 2
        question = QUESTION.format(number, pens, caps, taken)
        return Problem(f"made/{number}", "train", "made", False, question, f"{2 * pens}-{taken}={2 * pens - taken}\n#### 1", "1")

    write_rows((asdict(problem(number)) for number in range(count)), FEATURES, folder)
    return folder


def save_model(scratch: Path) -> Path:
    """A tiny model with the undo token; its weights are never used."""
    from pipeline.backtrack.embedding import add_undo_token
    from pipeline.config import ScratchModel, UndoSettings
    from pipeline.stages.base import new_model, train_tokenizer

    texts = [QUESTION.format(number, number % 89, number % 83, 7) for number in range(500)]
    tokenizer = train_tokenizer(texts, 400)
    model: Any = new_model(ScratchModel(layers=1, width=32, heads=2, vocab=420, context=1024), tokenizer, 0)
    undo = UndoSettings()
    add_undo_token(model, tokenizer, undo.token, undo.init, undo.words, undo.description, undo.noise, 0)
    model.save_pretrained(scratch / "model")
    tokenizer.save_pretrained(scratch / "model")
    return scratch / "model"


if __name__ == "__main__":
    sys.exit(main())
