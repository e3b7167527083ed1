"""Countdown: reach a target from numbers with + - * /, every number used exactly once.

Whether an operation was a good one shows only when few numbers are left, so taking it back can pay. A problem is made from
a random solution, so it has one; a hash of its numbers and target puts it into train, dev or test.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from pipeline.task_config import CountdownTask
from pipeline.tasks.families import equation
from pipeline.tasks.problem import Problem, TaskError, split_of
from pipeline.tasks.seen import Seen

FAMILY = "countdown"
_TRIES_PER_PROBLEM = 2000  # draws without a new problem after which there are taken to be no more


def load(task: CountdownTask, seed: int) -> Iterator[Problem]:
    """Yield all problems of all splits, the same ones for the same settings and seed.

    Raises:
        TaskError: there are fewer problems than asked for.
    """
    for split, size in {"train": task.train, "dev": task.dev, "test": task.test, "ood": task.ood}.items():
        yield from _sample(split, size, task, seed)


def _sample(split: str, size: int, task: CountdownTask, seed: int) -> Iterator[Problem]:
    rng = random.Random(f"{seed}/{FAMILY}/{split}")
    count = (task.ood_numbers or task.numbers + 1) if split == "ood" else task.numbers
    seen = Seen()
    for index in range(size):
        for _ in range(_TRIES_PER_PROBLEM):
            numbers, lines, target = _draw(rng, count, task)
            core = json.dumps([numbers, target])
            # Out-of-distribution problems have more numbers than all others, so they need no share of their own.
            if target <= task.largest_target and core not in seen and split in ("ood", split_of(core)):
                break
        else:
            raise TaskError(
                f"task.{split}: no more than {index} of {size} different problems were found with {count} numbers up to "
                f"{task.largest} and targets up to {task.largest_target}; lower task.{split} or raise task.largest"
            )
        seen.add(core)
        yield Problem(
            id=f"{FAMILY}/{split}/{index}",
            split=split,
            family=FAMILY,
            hindsight=True,
            question=f"Use each of {', '.join(map(str, numbers[:-1]))} and {numbers[-1]} once with + - * / to make {target}.",
            solution="\n".join([*lines, f"#### {target}"]),
            answer=str(target),
            params=json.dumps({"core": [numbers, target]}),
        )


def _draw(rng: random.Random, count: int, task: CountdownTask) -> tuple[list[int], list[str], int]:
    """Sorted numbers, the lines of a solution all of whose results are whole and positive, and the last result."""
    numbers = left = sorted(rng.randint(1, task.largest) for _ in range(count))
    lines = []
    while len(left) > 1:
        low, high = sorted(rng.sample(range(len(left)), 2))
        a, b = left[high], left[low]
        growing = {"+": a + b, "*": a * b}
        results = {sign: result for sign, result in growing.items() if result <= task.largest_target}
        # One of these is always there.
        results |= {"-": a - b} if a > b else {}
        results |= {"/": a // b} if a % b == 0 else {}
        sign = rng.choice(list(results))
        left = sorted([*(number for at, number in enumerate(left) if at not in (low, high)), results[sign]])
        lines.append(f"{equation(f'{a}{sign}{b}', results[sign])}, left {' '.join(map(str, left))}")
    return numbers, lines, left[0]
