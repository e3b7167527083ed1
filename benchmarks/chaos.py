"""What a run is worth whose processes are killed at random: the same datasets, and how much longer it took.

    python benchmarks/chaos.py [--quick]

A small run of two rounds with a search, undisturbed; then the same run while rollout, search, judge and learner processes are
killed (SIGKILL), 20 times and more; then the same run whose driver is killed at 10 moments, each time followed by the same command.
The engine is the scripted one, whose answers depend on nothing but a row's prompt and seed, so every dataset and every model has to
have the same digest in the end. With real vLLM, where batches differ in rounding, ids and counts have to be the same; there the
kills are fewer. Which kinds are hit in which stage is drawn from a seed; a kill waits until the process it is meant for is there.
--quick leaves out the drivers' kills but two, and vLLM. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from datasets import load_from_disk  # noqa: E402

from pipeline.store import Store  # noqa: E402

NAME, ROUNDS = "smoke", 2
SMALL = (
    "run.rounds=2", "run.patience=9", "task.train=32", "task.test=8", "task.dev=8", "task.ood=8", "base.train.steps=20",
    "base.train.check_every=10", "base.train.check_problems=4", "base.train.checkpoint_every=5", "rollouts.batch=8",
    "judge.batch=16", "sft.steps=10", "sft.checkpoint_every=3", "sft.control=false", "evaluate.probes=4", "evaluate.votes=0",
    "search.problems=6", "search.simulations=8", "search.workers=1", "search.max_tokens=64", "traces.mix.search=1",
    "report.rollouts=4", "cluster.restarts=100", "cluster.row_tries=9",
)  # fmt: skip
TITLES = {
    "rollout": "ray::_Rollout",
    "search": "ray::_SearchWorker.search",
    "judge": "ray::judge",
    "learner": "ray::_Learner.",  # with a method behind it: one that works
}
KILLS = {
    "base": ("learner",),
    "rollouts": ("rollout", "rollout"),
    "judge": ("judge", "rollout"),
    "sft": ("learner", "rollout"),
    "search": ("search", "rollout", "search"),
    "evaluate": ("learner", "rollout", "learner"),
}
"""What is killed while a stage is built, in each round: 23 kills in two of them."""
_LOOK_SECONDS = 0.05


@dataclass
class Killer(threading.Thread):
    """Kills processes of a run as planned for its stages, each when it is there, some looks later by chance."""

    driver: int
    root: Path
    chance: random.Random
    plan: dict[str, tuple[str, ...]]
    killed: list[str] = field(default_factory=list)
    """`stage/kind` of each kill."""

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._hit: set[int] = set()

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        try:
            driver = psutil.Process(self.driver)
            while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE:
                for stage in stages_under_way(self.root):
                    self._disturb(driver, stage)
                time.sleep(_LOOK_SECONDS)
        except psutil.NoSuchProcess:
            return

    def _disturb(self, driver: psutil.Process, draft: str) -> None:
        kinds = list(self.plan.get(draft.partition("-")[0], ()))
        self.chance.shuffle(kinds)
        while kinds and draft in stages_under_way(self.root) and driver.is_running():
            for kind in kinds:
                found = [one for one in processes(driver, kind) if one.pid not in self._hit]
                if found:
                    victim = self.chance.choice(sorted(found, key=lambda one: one.pid))
                    time.sleep(self.chance.random() * 0.3)  # somewhere within what it does
                    try:
                        victim.kill()
                    except psutil.NoSuchProcess:
                        break
                    self._hit.add(victim.pid)
                    self.killed.append(f"{draft.partition('-')[0]}/{kind}")
                    kinds.remove(kind)
                    break
            time.sleep(_LOOK_SECONDS)


def stages_under_way(root: Path) -> list[str]:
    """Names of drafts, one for each stage that is being built."""
    return [one.name for one in (root / NAME / ".tmp").glob("*-*-*")] if (root / NAME / ".tmp").is_dir() else []


def processes(driver: psutil.Process, kind: str) -> list[psutil.Process]:
    found = []
    for one in driver.children(recursive=True):
        try:
            title = " ".join(one.cmdline())
        except psutil.Error:
            continue
        if title.startswith(TITLES[kind]):
            found.append(one)
    return found


def start(root: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "run.py"), "--config", "smoke", f"run.root={root}", *SMALL, *more]
    log = (root / "output.log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=root)


def finished(run: subprocess.Popen[str], root: Path) -> None:
    if run.wait(timeout=3000):
        raise RuntimeError((root / "output.log").read_text()[-4000:])


def scripted(root: Path) -> tuple[str, ...]:
    """The settings of the scripted engine, and the problems that it knows, in a folder of their own."""
    script = root / "script"
    script.mkdir()
    finished(start(script, "--until", "problems"), script)
    return "engine.kind=scripted", f"engine.script={script / NAME / '0' / 'problems'}"


def undisturbed(root: Path, *more: str) -> float:
    """Seconds."""
    began = time.monotonic()
    finished(start(root, *more), root)
    return time.monotonic() - began


def disturbed(root: Path, seed: int, plan: dict[str, tuple[str, ...]], *more: str) -> tuple[float, list[str]]:
    """Seconds, and what was killed."""
    began = time.monotonic()
    run = start(root, *more)
    killer = Killer(run.pid, root, random.Random(seed), plan)
    killer.start()
    try:
        finished(run, root)
    finally:
        if run.poll() is None:
            run.kill()
    killer.join()
    return time.monotonic() - began, killer.killed


def driver_killed(root: Path, seed: int, times: int, *more: str) -> list[str]:
    """Kill the driver while it builds stages drawn by chance, start it again each time, and let it end; where it was killed."""
    chance, where = random.Random(seed), []
    for stage in sorted(chance.choices(list(KILLS), k=times), key=list(KILLS).index):
        run = start(root, *more)
        while run.poll() is None and not any(draft.startswith(f"{stage}-") for draft in stages_under_way(root)):
            time.sleep(_LOOK_SECONDS)
        time.sleep(chance.random() * 2)
        if run.poll() is None:
            where += [draft.partition("-")[0] for draft in stages_under_way(root)][:1] or ["between stages"]
            run.kill()
            run.wait()
    finished(start(root, *more), root)
    return where


def digests(root: Path) -> dict[str, str]:
    """Of every output but the page, which tells times."""
    store = Store(root / NAME)
    places = [(0, "problems"), (0, "base"), *((round, stage) for round in range(1, ROUNDS + 1) for stage in list(KILLS)[1:])]
    found = {}
    for round, stage in [*places, *((round, "traces") for round in range(1, ROUNDS + 1))]:
        manifest = store.manifest(round, stage)
        if manifest is None:
            raise RuntimeError(f"{stage} of round {round} is not there")
        found[f"{round}/{stage}"] = manifest.digest
    return found


def ids_and_counts(root: Path) -> dict[str, object]:
    """What does not depend on how an engine rounds."""
    store, found = Store(root / NAME), dict[str, object]()
    for round in range(1, ROUNDS + 1):
        for stage in ("rollouts", "judge"):
            found[f"{round}/{stage}"] = list(load_from_disk(str(store.path(round, stage)))["id"])
        rows = load_from_disk(str(store.path(round, "evaluate")))
        found[f"{round}/evaluate"] = sorted(zip(rows["model"], rows["mode"], rows["problem"], strict=True))
        manifest = store.manifest(round, "rollouts")
        found[f"{round}/quarantined"] = manifest.counts.get("quarantined", 0) if manifest else None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        roots = {name: Path(folder) / name for name in ("calm", "killed", "driver", "vllm", "vllm-killed")}
        for root in roots.values():
            root.mkdir()
        more = scripted(Path(folder))
        calm = undisturbed(roots["calm"], *more)
        print(f"undisturbed: {calm:.0f} s", flush=True)
        seconds, killed = disturbed(roots["killed"], options.seed, KILLS, *more)
        expected = digests(roots["calm"])
        same = digests(roots["killed"]) == expected
        print(f"{len(killed)} kills: {seconds:.0f} s, {seconds / calm:.2f} x, datasets {'equal' if same else 'DIFFER'}", flush=True)
        print("  " + ", ".join(killed), flush=True)
        where = driver_killed(roots["driver"], options.seed, 2 if options.quick else 10, *more)
        same_driver = digests(roots["driver"]) == expected
        print(f"driver killed in {', '.join(where)}: datasets {'equal' if same_driver else 'DIFFER'}", flush=True)
        figures = {
            "kills": len(killed),
            "equal": same,
            "times": seconds / calm,
            "driver_kills": len(where),
            "driver_equal": same_driver,
        }
        if not options.quick:
            undisturbed(roots["vllm"], "engine.kind=vllm")
            _, some = disturbed(
                roots["vllm-killed"], options.seed, {"rollouts": ("rollout",), "search": ("search",)}, "engine.kind=vllm"
            )
            alike = ids_and_counts(roots["vllm"]) == ids_and_counts(roots["vllm-killed"])
            print(f"vLLM, {len(some)} kills: ids and counts {'equal' if alike else 'DIFFER'}", flush=True)
            figures |= {"vllm_kills": len(some), "vllm_equal": alike}
    goals = {"kills": 20, "equal": True, "driver_equal": True} | ({} if options.quick else {"driver_kills": 10, "vllm_equal": True})
    ok = all(figures[name] >= goal for name, goal in goals.items())
    print(json.dumps({"benchmark": "chaos", "figures": figures, "goals": goals, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
