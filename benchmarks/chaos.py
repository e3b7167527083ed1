"""Self-play rounds whose processes are killed at random moments, set beside the same rounds undisturbed.

    python benchmarks/chaos.py [--quick] [--part actors driver store vllm] [--keep FOLDER] [--seed N]

Part `actors`: SIGKILL of rollout actors, search workers, judge tasks and learners. Part `driver`: SIGKILL of the driver; the same
command goes on. Both with the scripted engine: outputs are compared hash for hash. Part `vllm`: a shorter run of the first
kind with real vLLM, whose rounding depends on the batch: ids and counts are compared. Times are set beside the undisturbed run of
the same machine. Prints a table and one JSON line. tests/test_chaos.py runs the same at a smaller size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.store.url import UrlStore

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LOOK_SECONDS = 0.05
TIMES = 1.5  # of the undisturbed time that a disturbed run may take, beside restarts
KINDS = {
    "rollout": (r"ray::(_Rollout\b|\S+/\S+\.(generate|decode)\b)", "", 8.0),
    "search": (r"ray::(_SearchWorker\b|\S+/search\.search\b)", r".*/search\.search\b", 0.4),
    "judge": (r"ray::\S+/judge\.judge\b", "", 0.1),
    "learner": (r"ray::_Learner\b", r".*\.(fit|decode)\b", 1.0),
}
"""Kind of process -> what Ray calls it in the process table, by its class or its task; how that goes on where only those at work
are killed; and how many seconds one lives like that until it is, on average."""
WAITED_FOR = ("search", "learner")
"""Nothing goes on until these are started again."""
QUOTAS = {"rollout": 8, "search": 5, "judge": 6, "learner": 6}
DRIVER_KILLS, WORKERS, BATCH = 10, 2, 16
SETTINGS = (
    *("run.rounds=2", "cluster.restarts=100", "cluster.learner.threads=1", "cluster.rollout.cpus=0.5", "cluster.judge.cpus=0.25"),
    *(f"cluster.rollout_actors={WORKERS}", f"rollouts.batch={BATCH}", "rollouts.samples=8", "judge.batch=64"),
    *("search.problems=8", "search.workers=1", "search.batch=2", "search.expand=samples", "search.temperature=1.0"),
    *("search.simulations=6", "base.train.steps=20", "base.train.checkpoint_every=5", "sft.checkpoint_every=2"),
    *("sft.control=false", "evaluate.modes=[rewind]", "evaluate.votes=0", "evaluate.test=8", "evaluate.dev=4", "evaluate.ood=2"),
    *("evaluate.probes=4", "report.rollouts=2", "cluster.row_tries=20"),
)
"""On top of the configuration `smoke`. A learner of one thread adds in the same order wherever it is started; a row is not to blame
for what kills its process here."""
VLLM = ("engine.kind=vllm", "run.rounds=1", "rollouts.samples=2")


@dataclass
class Ended:
    """A run that has come to its end."""

    seconds: float
    restarting: float = 0.0
    """Seconds of these in which something waited for a process that was being started again."""
    killed: Counter[str] = field(default_factory=Counter)
    again: list[int] = field(default_factory=list)
    """Rollouts made a second time by each life of the driver."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a third of the kills")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to kill")
    parser.add_argument(
        "--keep", type=Path, help="folder for the runs, which stay there; an undisturbed one that stands is not repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for part in asked.part:
            found = PARTS[part](asked.keep or Path(scratch), random.Random(f"{asked.seed}/{part}"), asked.quick)
            figures |= {f"{part}_{name}": value for name, value in found.items()}
    for name, value in figures.items():
        print(f"{name:32}{value if isinstance(value, int) else f'{value:.2f}':>10}")
    most = {"actors_times": TIMES, "driver_batches_again": 1.0}
    goals = {name: most.get(name, True) for name in figures if name in most or name.endswith("_equal")}
    ok = all(figures[name] <= goal if name in most else figures[name] for name, goal in goals.items())
    print(json.dumps({"benchmark": "chaos", "figures": figures, "goals": goals, "ok": ok}))
    return 0


def kill_actors(folder: Path, chance: random.Random, quick: bool) -> dict[str, Any]:
    calm = undisturbed(folder / "calm", at_length(folder))
    quotas = {kind: max(1, count // 3) for kind, count in QUOTAS.items()} if quick else QUOTAS
    torn = among_kills(folder / "actors", at_length(folder), quotas, chance)
    return _figures(calm, torn) | {"equal": outputs(run_in(folder / "actors")) == outputs(run_in(folder / "calm"))}


def kill_driver(folder: Path, chance: random.Random, quick: bool) -> dict[str, Any]:
    calm = undisturbed(folder / "calm", at_length(folder))
    dying = moments(folder / "calm", DRIVER_KILLS // (3 if quick else 1), chance)
    torn = among_deaths(folder / "driver", at_length(folder), dying, rollout_seeds(folder / "calm"))
    equal = outputs(run_in(folder / "driver")) == outputs(run_in(folder / "calm"))
    return _figures(calm, torn) | {"equal": equal, "batches_again": max(torn.again) / (WORKERS * BATCH)}


def kill_and_move(folder: Path, chance: random.Random, quick: bool) -> dict[str, Any]:
    """Of a run at a URL; what goes on with it has another cache, which is empty."""
    undisturbed(folder / "calm", at_length(folder))
    (dying,) = moments(folder / "calm", 1, chance)
    there = moved(folder / "store", at_length(folder), dying)
    return {"equal": outputs(there) == outputs(run_in(folder / "calm"))}


def kill_vllm(folder: Path, chance: random.Random, quick: bool) -> dict[str, Any]:
    calm = undisturbed(folder / "vllm-calm", VLLM)
    torn = among_kills(folder / "vllm", VLLM, dict.fromkeys(KINDS, 1), chance)
    return _figures(calm, torn) | {"equal": rows(folder / "vllm") == rows(folder / "vllm-calm")}


PARTS: dict[str, Callable[[Path, random.Random, bool], dict[str, Any]]] = {
    "actors": kill_actors,
    "driver": kill_driver,
    "store": kill_and_move,
    "vllm": kill_vllm,
}


def _figures(calm: Ended, torn: Ended) -> dict[str, Any]:
    figures = {"calm_s": calm.seconds, "torn_s": torn.seconds, "ratio": torn.seconds / calm.seconds}
    if torn.restarting:
        figures |= {"restarting_s": torn.restarting, "times": (torn.seconds - torn.restarting) / calm.seconds}
    return figures | {"kills": torn.killed.total()} | {f"kills_{kind}": count for kind, count in sorted(torn.killed.items())}


def scripted(folder: Path) -> tuple[str, ...]:
    """The engine writes the solutions of the undisturbed run's problems, which are those of all runs."""
    return ("engine.kind=scripted", f"engine.script={folder}/calm/smoke/0/problems")


def at_length(folder: Path) -> tuple[str, ...]:
    """With as much search that its workers can be met at work."""
    return (*scripted(folder), "search.problems=64")


def undisturbed(folder: Path, settings: Sequence[str]) -> Ended:
    mark = folder / "seconds"
    if not mark.is_file():
        began = time.monotonic()
        with started(folder, settings) as driver:
            _finish(driver, folder)
        mark.write_text(f"{time.monotonic() - began}")
    return Ended(float(mark.read_text()))


def among_kills(folder: Path, settings: Sequence[str], quotas: Mapping[str, int], chance: random.Random) -> Ended:
    """A run of which so many processes of each kind are killed, each at a random moment of its life; fewer, where it ends first."""
    ended, began = Ended(0.0), time.monotonic()
    with started(folder, settings) as driver:
        coming: dict[str, set[int]] = {}  # what was killed -> who lived then
        while driver.poll() is None:
            looked = time.monotonic()
            time.sleep(LOOK_SECONDS)
            alive = processes_of(driver.pid)
            coming = {kind: seen for kind, seen in coming.items() if not alive[kind].keys() - seen}
            ended.restarting += time.monotonic() - looked if coming else 0.0
            for kind, pid in [(kind, pid) for kind, found in alive.items() for pid, works in found.items() if works]:
                hit = chance.random() < 1 - math.exp(-LOOK_SECONDS / KINDS[kind][2])
                if hit and ended.killed[kind] < quotas.get(kind, 0):
                    os.kill(pid, signal.SIGKILL)
                    ended.killed[kind] += 1
                    if kind in WAITED_FOR:
                        coming[kind] = set(alive[kind])
        _finish(driver, folder)
    ended.seconds = time.monotonic() - began
    return ended


def among_deaths(folder: Path, settings: Sequence[str], dying: Sequence[tuple[int, str, float]], seeds: set[int]) -> Ended:
    """A run whose driver is killed again and again, each time the same command goes on.

    Args:
        dying: round, stage and how many seconds after it has begun, or was gone on with; in the order of the run.
        seeds: of all rows of the stage rollouts.
    """
    ended, began = Ended(0.0), time.monotonic()
    for round, stage, seconds in dying:
        with started(folder, settings) as driver:
            _await_moment(driver, folder / "smoke", round, stage, seconds)
            ended.killed["driver"] += driver.poll() is None
            driver.kill()
        ended.again.append(made_again(folder, seeds) - sum(ended.again))
    with started(folder, settings) as driver:
        _finish(driver, folder)
    ended.again.append(made_again(folder, seeds) - sum(ended.again))
    ended.seconds = time.monotonic() - began
    return ended


def moved(folder: Path, settings: Sequence[str], dying: tuple[int, str, float]) -> UrlStore:
    """A run at a URL whose driver is killed, and gone on with from an empty cache; what stands at the URL then."""
    from pipeline.store.lease import NAME
    from pipeline.store.remote import Remote
    from pipeline.store.url import UrlStore

    url, (_, stage, seconds) = f"file://{folder}/there", dying
    with started(folder, (*settings, f"run.root={url}", f"run.cache={folder}/one")) as driver:
        _wait_for(driver, lambda: any(folder.glob(f"one/*/.tmp/{stage}-{driver.pid}-*")))
        time.sleep(seconds)
    there = UrlStore(Remote(f"{url}/smoke"))
    there.remote.remove(NAME)  # or the next one watches it for a minute to see whether its holder lives
    with started(folder, (*settings, f"run.root={url}", f"run.cache={folder}/two")) as driver:
        _finish(driver, folder)
    return there


def _await_moment(driver: subprocess.Popen[str], run: Path, round: int, stage: str, seconds: float) -> None:
    """So many seconds into a stage, or its end."""
    stands = run / str(round) / stage
    _wait_for(driver, lambda: stands.is_dir() or any((run / ".tmp").glob(f"{stage}-{driver.pid}-*")))
    until = time.monotonic() + seconds
    _wait_for(driver, lambda: stands.is_dir() or time.monotonic() >= until)


def _wait_for(driver: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    while driver.poll() is None and not happened():
        time.sleep(LOOK_SECONDS)


def rollout_seeds(calm: Path) -> set[int]:
    from pipeline.stages.io import read_rows
    from pipeline.stages.rollouts import row_seed

    return {row_seed(0, row) for round in ("1", "2") for row in read_rows(calm / "smoke" / round / "rollouts")["id"]}


def moments(calm: Path, count: int, chance: random.Random) -> list[tuple[int, str, float]]:
    """So many, each of a random stage and anywhere in the time that it took undisturbed."""
    store, found = run_in(calm), []
    for _ in range(count):
        round, stage = chance.choice([place for place in store.places() if place[1] not in ("problems", "report")])
        manifest = store.manifest(round, stage)
        assert manifest
        found.append((manifest.created, round, stage, chance.uniform(0, manifest.seconds)))
    return [(round, stage, seconds) for _, round, stage, seconds in sorted(found)]


def made_again(folder: Path, seeds: set[int]) -> int:
    """Rows of these seeds beyond one each, among those that the scripted engines have noted in their logs."""
    noted: Counter[int] = Counter()
    for log in (folder / "smoke" / "logs").glob("rollout-*.log"):
        for line in re.findall(r"^made (\[.*\])$", log.read_text(), re.MULTILINE):
            noted.update(seed for seed in json.loads(line) if seed in seeds)
    return noted.total() - len(noted)


@contextmanager
def started(folder: Path, settings: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A driver under way; what it says is in `said.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "run.py"), "--config", "smoke", f"run.root={folder}", *SETTINGS, *settings]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (folder / "said.log").open("a") as said:
        driver = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True, cwd=folder, env=env)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def _finish(driver: subprocess.Popen[str], folder: Path) -> None:
    """Wait for its end.

    Raises:
        RuntimeError: it has failed.
    """
    if driver.wait() != 0:
        raise RuntimeError(f"the run in {folder} failed: {(folder / 'said.log').read_text()[-2000:]}")


def processes_of(driver: int) -> dict[str, dict[int, bool]]:
    """Of each kind the processes that Ray has started for one driver: process id -> whether it is at work."""
    found: dict[str, dict[int, bool]] = {kind: {} for kind in KINDS}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            title = (entry / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
            kind = next((kind for kind, (name, _, _) in KINDS.items() if re.match(name, title)), None)
            if kind and _descends(int(entry.name), driver):
                found[kind][int(entry.name)] = bool(re.match(KINDS[kind][1], title))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return found


def _descends(pid: int, ancestor: int) -> bool:
    while pid not in (0, 1, ancestor):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid == ancestor


def run_in(folder: Path) -> Store:
    from pipeline.store import Store

    return Store(folder / "smoke")


def outputs(store: Store | UrlStore) -> dict[tuple[int, str], str]:
    """Digest of the content of every output but the report, which tells how long things took."""
    manifests = {place: store.manifest(*place) for place in store.places()}
    return {place: manifest.digest for place, manifest in manifests.items() if manifest and place[1] != "report"}


def rows(folder: Path) -> dict[str, Any]:
    """Ids of what was made of the first round, and its counts."""
    from pipeline.stages.io import read_rows

    stages = {"rollouts": "id", "judge": "id", "search/trees": "problem", "evaluate": "problem"}
    return {stage: sorted(read_rows(folder / "smoke" / "1" / stage)[column]) for stage, column in stages.items()}


if __name__ == "__main__":
    sys.exit(main())
