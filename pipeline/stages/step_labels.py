"""Step labels for the process reward model, from judged rollouts and from search, and states with and without a reason to undo
for the verifier head, from traces.

Judge: a step is labelled 1 as long as nothing wrong stands in the solution, and 0 from the step of the first error on, whatever
follows: "right so far". What follows rightly from an error is 0 as well, since nothing that keeps the error comes out right.
Search: the share of right ends below a state, as the stage search measured it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.labelled import Labelled, linear, step_ends
from pipeline.backtrack.layout import Segment
from pipeline.backtrack.targets import Form, Targets, segments
from pipeline.backtrack.trace import Trace
from pipeline.backtrack.undo import UndoRule
from pipeline.stages.io import read_rows, with_rollouts
from pipeline.stages.stage import StageError


@dataclass(frozen=True)
class Solution:
    """A judged solution with a label for each of its steps."""

    problem: str
    correct: bool
    row: Labelled
    """Read at the ends of its steps."""
    prompt: int
    """Tokens of the prompt."""
    wrong_from: int
    """Index into the row of the first token that is wrong; its length where none is."""

    @property
    def every_token(self) -> Labelled:
        """The same row labelled at every token: 1 as long as nothing wrong stands there."""
        places = range(self.prompt, self.row.at[-1] + 1)
        return Labelled(self.row.segment, tuple(places), tuple(float(place < self.wrong_from) for place in places))


def is_held_out(problem: str, share: float, seed: int) -> bool:
    """Whether a problem, with all its solutions, belongs to the held-out part."""
    return zlib.crc32(f"{seed}/held out/{problem}".encode()) < share * 2**32


def right_so_far(ends: Sequence[int], correct: bool, error: int) -> tuple[float, ...]:
    """[steps] Labels by the judge.

    Args:
        ends: [steps] index of the last token of each step.
        correct: whether the solution ends right.
        error: index of the token at which the first error begins, -1 where none was found. A wrong solution without one, or with
            one behind its last step, breaks off: its last step is the wrong one.
    """
    labels = [float(error < 0 or end < error) for end in ends]
    if labels and not correct and all(labels):
        labels[-1] = 0.0
    return tuple(labels)


def judged_solution(
    problem: str, prompt: Sequence[int], ids: Sequence[int], correct: bool, error: int, rule: UndoRule, stop_id: int
) -> Solution | None:
    """A solution of surviving ids as a labelled row; None where it has no step."""
    ends = step_ends(ids, rule.step_end_ids, stop_id)
    if not ends:
        return None
    labels = right_so_far(ends, correct, error)
    wrong_from = len(ids)
    if not all(labels):
        first = labels.index(0.0)
        begins = ends[first - 1] + 1 if first else 0
        wrong_from = error if begins <= error <= ends[first] else begins  # a step without a place in it is wrong as a whole
    places = tuple(len(prompt) + end for end in ends)
    row = Labelled(linear((*prompt, *ids)), places, labels)
    return Solution(problem, correct, row, len(prompt), len(prompt) + wrong_from)


def judged_solutions(rollouts: Iterable[Mapping[str, Any]], judged: Iterable[Mapping[str, Any]], rule: UndoRule,
                     stop_id: int) -> tuple[list[Solution], int]:  # fmt: skip
    """Solutions of the stages rollouts and judge, row by row, and how many have no step."""
    found = [
        judged_solution(
            rollout["problem"], rollout["prompt_ids"], rollout["token_ids"], verdict["correct"], verdict["error_tokens"][0], rule,
            stop_id,
        )
        for verdict, rollout in with_rollouts(judged, rollouts)
    ]  # fmt: skip
    kept = [one for one in found if one is not None]
    return kept, len(found) - len(kept)


def searched_rows(folder: Path) -> list[tuple[str, Labelled]]:
    """(problem, row) of the dataset `steps` in the output of the stage search: states that begin alike share a row.

    Raises:
        StageError: no such dataset, or a value that is missing or no share.
    """
    if not (folder / "steps").is_dir():
        raise StageError(f"prm.labels: {folder} has no dataset steps: set prm.labels to judge, or let the stage search write it")
    by_problem: dict[tuple[str, tuple[int, ...]], dict[tuple[int, ...], list[tuple[float, int]]]] = {}
    for number, one in enumerate(read_rows(folder / "steps")):
        value = one["value"]
        if value is None or not 0 <= value <= 1 or not one["ids"]:
            raise StageError(f"prm.labels: {folder / 'steps'}, row {number}: needs ids and a value of 0 to 1, has {value!r:.40}")
        states = by_problem.setdefault((one["problem"], tuple(one["prompt_ids"])), {})
        states.setdefault(tuple(one["ids"]), []).append((value, max(1, one["samples"])))
    found = []
    for (problem, prompt), states in by_problem.items():
        means = {ids: sum(v * n for v, n in some) / sum(n for _, n in some) for ids, some in states.items()}
        for ids in sorted(means, key=len, reverse=True):
            if ids not in means:
                continue
            places = [end for end in range(1, len(ids) + 1) if ids[:end] in means]
            labels = [means.pop(ids[:end]) for end in places]
            at = tuple(len(prompt) + end - 1 for end in places)
            found.append((problem, Labelled(linear((*prompt, *ids)), at, tuple(labels))))
    return found


def undo_states(trace: Trace, rule: UndoRule, targets: Targets, form: Form) -> Labelled | None:
    """The states of a trace that carry targets, labelled 1 where the target is U and 0 elsewhere, by the targets' weight where a
    state has several. In the form that the model was trained in, so that it reads them as it does when it decodes. None where a
    trace teaches nothing; states within a run of U's are left out."""
    found = segments((trace,), rule, targets, form)
    if not found:
        return None
    segment = found[0]
    weights: dict[int, list[float]] = {}
    for action in segment.actions:
        if action.weight > 0 and action.step >= 0 and not action.ends_run and segment.ids[action.node] != rule.undo_id:
            total = weights.setdefault(action.node, [0.0, 0.0])
            total[0] += action.weight * (action.token == rule.undo_id)
            total[1] += action.weight
    if not weights:
        return None
    at = tuple(sorted(weights))
    bare = Segment(segment.ids, segment.positions, segment.enter, segment.leave, ())
    return Labelled(bare, at, tuple(weights[node][0] / weights[node][1] for node in at))


def some_of(rows: Sequence[Labelled], states: int, seed: int) -> list[Labelled]:
    """Rows in an order of chance, as many as have that many states."""
    order = random.Random(f"{seed}/states").sample(range(len(rows)), len(rows))
    found: list[Labelled] = []
    count = 0
    for index in order:
        if found and count + len(rows[index].at) > states:
            break
        found.append(rows[index])
        count += len(rows[index].at)
    return found
