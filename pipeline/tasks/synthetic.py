"""GSM8K-format word problems made from templates; split, family and step count are part of every problem.

Two kinds of families. In *forward* families each step follows from what is known. In *hindsight* families a choice comes
before its evidence: the solution tries a value, computes, and sees whether it fits, so taking it back can pay.
Problems are put into train, dev or test by a hash of their numbers, so that no numbers occur in two splits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from types import SimpleNamespace

from pipeline.task_config import SyntheticTask
from pipeline.tasks.families import FAMILIES, Family
from pipeline.tasks.problem import Problem, TaskError, split_of
from pipeline.tasks.seen import Seen

_TRIES_PER_PROBLEM = 400


def load(task: SyntheticTask, seed: int) -> Iterator[Problem]:
    """Yield all problems of all splits, the same ones for the same settings and seed.

    Raises:
        TaskError: a family's number space is too small for the problems asked for.
    """
    wanted = {"train": task.train, "dev": task.dev, "test": task.test, "ood": task.ood}
    for split, count in wanted.items():
        forward = round(count * (1 - task.hindsight_share))
        for hindsight, share in ((False, forward), (True, count - forward)):
            families = [family for family in FAMILIES if family.hindsight == hindsight and family.name in task.families]
            if share and not families:
                kind = "hindsight" if hindsight else "forward"
                raise TaskError(f"task.families names no {kind} family, but task.hindsight_share is {task.hindsight_share}")
            for index, family in enumerate(families):
                size = share // len(families) + (index < share % len(families))
                yield from _sample(family, split, size, task, seed)


def _sample(family: Family, split: str, size: int, task: SyntheticTask, seed: int) -> Iterator[Problem]:
    rng = random.Random(f"{seed}/{family.name}/{split}")
    fewest, most = task.ood_steps if split == "ood" else task.steps
    seen = Seen()
    for _ in range(size * _TRIES_PER_PROBLEM):
        if len(seen) == size:
            return
        params = family.sample(rng, rng.randint(fewest, most))
        core = json.dumps(params["core"])
        numbers = core + json.dumps(params.get("extra", []))
        # Out-of-distribution problems may share a core with others: they differ from all of them by their steps.
        if numbers in seen or (split != "ood" and split_of(core) != split):
            continue
        if split == "ood" and family.hindsight and not params["extra"]:
            continue  # so few steps are asked for that it would be no longer than a training problem
        question, lines, answer = family.render(SimpleNamespace(**params))
        yield Problem(
            id=f"synthetic/{split}/{family.name}/{len(seen)}",
            split=split,
            family=family.name,
            hindsight=family.hindsight,
            question=question,
            solution="\n".join([*lines, f"#### {answer}"]),
            answer=str(answer),
            params=json.dumps(params, sort_keys=True),
        )
        seen.add(numbers)
    if len(seen) < size:
        raise TaskError(
            f"task.{split}: family {family.name} has fewer than {size} different problems of {fewest}-{most} steps; "
            f"lower task.{split} or widen task.{'ood_steps' if split == 'ood' else 'steps'}"
        )
