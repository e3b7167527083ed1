"""First errors by the symbolic judge, by rollouts and by both, where the truth is known: on a run's own wrong rollouts.

    python benchmarks/localise.py [--run runs/tiny] [--quick]

The run must be of the synthetic task, where first errors are known: hindsight problems from their params, forward ones since
they are written in one way only. The generic judge and the searches are not told. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SAMPLES = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="folder of a finished run")
    parser.add_argument("--quick", action="store_true", help="fewer rollouts")
    args = parser.parse_args()
    if not (args.run / "1" / "judge").is_dir():
        print(f"{args.run} holds no judged rollouts of round 1; run.py makes them", file=sys.stderr)
        return 2
    return measure(args.run, 150 if args.quick else 600)


def first_other_line(gold: str, solution: str) -> int:
    """Forward families have one way of writing a solution, so the first line that gold does not have is the first wrong one."""
    pairs = zip(gold.split("\n"), solution.split("\n"), strict=False)
    return next((index for index, (right, own) in enumerate(pairs) if right != own), gold.count("\n"))


class Engine:
    """An engine where the localiser expects a pool."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def generate(self, requests: Sequence[Any], sampling: Any, batch: int) -> tuple[list[Any], str]:
        made: list[Any] = []
        for start in range(0, len(requests), batch):
            made += self._engine.generate(requests[start : start + batch], sampling)
        return made, ""


def measure(run: Path, most: int) -> int:
    from datasets import load_from_disk

    from actors.engines import Sampling, make_engine
    from actors.localise import Localiser
    from pipeline.config import EngineSettings, UndoSettings
    from pipeline.stages.io import Codec, read_problems
    from pipeline.stages.localised import case_of
    from verifiers.judge import judge
    from verifiers.localise import BinarySearch, PosteriorSearch, symbolic_prior
    from verifiers.task import TaskJudge

    codec = Codec(run / "0" / "base", UndoSettings(), "{question}\n")
    problems = {problem.id: problem for problem in read_problems(run / "0" / "problems", "train")}
    judged, rollouts = load_from_disk(run / "1" / "judge"), load_from_disk(run / "1" / "rollouts")
    wrong = [i for i, row in enumerate(judged) if not row["correct"] and row["error_kind"] not in ("", "answer", "step")]
    wrong = wrong[:: max(1, len(wrong) // most)][:most]
    solve_rate = sum(judged["correct"]) / len(judged)
    generic = TaskJudge()
    cases, verdicts, blind, truth, mine = [], [], [], [], []
    for i in wrong:
        problem = problems[judged[i]["problem"]]
        text = codec.decode(rollouts[i]["token_ids"])
        verdict = generic.judge(problem, text.text)
        cases.append(case_of(rollouts[i]["id"], rollouts[i]["prompt_ids"], text, verdict))
        verdicts.append(verdict)
        blind.append(judge(text.text, "", problem.answer))
        truth.append(judged[i]["error_step"] if problem.hindsight else first_other_line(problem.solution, text.text))
        mine.append(problem)
    engine = Engine(make_engine(run / "0" / "base", EngineSettings(), 416, 0))
    sampling = Sampling(1.0, 1.0, 160, codec.stop_id, (codec.rule.undo_id,))
    rows: list[tuple[str, list[int], int, float]] = []
    for name, given in (("symbolic", verdicts), ("symbolic, no gold", blind)):
        rows.append((name, [verdict.error.step if verdict.error else -1 for verdict in given], 0, 0.0))
    for name, given in (("rollouts", verdicts), ("combined", verdicts), ("combined, no gold", blind)):
        searches = [
            BinarySearch(len(case.prefixes)) if name == "rollouts" else PosteriorSearch(symbolic_prior(verdict), solve_rate)
            for case, verdict in zip(cases, given, strict=True)
        ]
        localiser = Localiser(
            engine,  # type: ignore[arg-type]
            sampling,
            SAMPLES,
            256,
            0,
            lambda case, ids: generic.correct(mine[case], codec.decode(ids).text),
        )
        begun = time.perf_counter()
        found = localiser.locate(cases, searches)
        rows.append((name, [one.step for one in found], localiser.completions, time.perf_counter() - begun))
    print(f"{len(wrong)} wrong rollouts of {run}, {solve_rate:.2f} of all rollouts right, {SAMPLES} completions a prefix")
    print(f"{'':20}{'exact':>8}{'within 1':>10}{'late':>8}{'early':>8}{'completions':>13}{'seconds':>9}")
    figures: dict[str, float] = {"n": len(wrong)}
    for kind, chosen in (
        ("forward", [i for i, p in enumerate(mine) if not p.hindsight]),
        ("hindsight", [i for i, p in enumerate(mine) if p.hindsight]),
    ):
        print(f"{kind}, n {len(chosen)}")
        for name, steps, completions, seconds in rows:
            apart = [steps[i] - truth[i] for i in chosen]
            total = max(1, len(apart))
            exact, late = sum(d == 0 for d in apart) / total, sum(d > 0 for d in apart) / total
            within, early = sum(abs(d) <= 1 for d in apart) / total, sum(d < 0 for d in apart) / total
            print(f"  {name:18}{exact:8.3f}{within:10.3f}{late:8.3f}{early:8.3f}{completions:13}{seconds:9.1f}")
            figures[f"{kind}_{name.replace(', ', '_').replace(' ', '_')}_exact"] = round(exact, 4)
    print(json.dumps({"benchmark": "localise", "figures": figures, "goals": {}, "ok": True}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
