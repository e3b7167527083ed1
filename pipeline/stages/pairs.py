"""Where pairs of preferences come from: judged rollouts of the round, and the dataset that the stage search leaves. Called by the
stage dpo.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from datasets import Features, List, Value

from pipeline.backtrack.preferences import Kind, Pair, keep_pair, step_pair, undo_pair
from pipeline.backtrack.undo import apply_undo
from pipeline.config import DpoSettings, TraceSettings
from pipeline.stages.io import Codec, read_rows
from pipeline.stages.sources import Ids, Judged, Made, own_errors
from pipeline.stages.stage import StageError

PAIRS = "pairs"
"""Folder of a dataset of pairs below a stage's own folder."""
FEATURES = Features(
    {
        "problem": Value("string"),
        "prompt_ids": List(Value("int32")),
        "prefix_ids": List(Value("int32")),
        "chosen_ids": List(Value("int32")),
        "rejected_ids": List(Value("int32")),
        "kind": Value("string"),
        "margin": Value("float64"),
    }
)


@dataclass
class Found:
    """Pairs by the problem they belong to, and why others were left out."""

    pairs: list[tuple[str, Pair]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def own_pairs(judged: Judged, rollouts: Mapping[str, Ids], traces: TraceSettings, asked: DpoSettings, codec: Codec, seed: int,
              found: Found, made: Sequence[Made] = ("self", "near_miss")) -> None:  # fmt: skip
    """A pair of each kind for every different error of rollouts that the stage traces could make a trace of.

    Args:
        rollouts: whole completions by the name of the rollout.
        made: how those rollouts were made that are asked for.
    """
    one_error = traces.model_copy(update={"max_errors": 1})
    for how in made:
        for one in own_errors(judged, how, one_error, codec, seed):
            emitted = rollouts[one.rollouts[0]]
            right = len(apply_undo(one.trace.ids[one.trace.prompt_length :], codec.rule).surviving)
            place = random.Random(f"{seed}/keep/{one.rollouts[0]}").randrange(1, max(2, right))
            makers: dict[str, Pair | None] = {
                "undo": undo_pair(one.trace, emitted, codec.rule, asked.horizon),
                "step": step_pair(one.trace, emitted, codec.rule),
                "keep": keep_pair(one.trace, codec.rule, place),
            }
            for kind in asked.kinds:
                pair = makers[kind]
                if pair is None:
                    found.left_out["other_prefix"] += 1
                else:
                    found.pairs.append((one.problem.id, pair))
    found.left_out += judged.dropped


def searched_pairs(folder: Path, problems: Collection[str], asked: DpoSettings, found: Found) -> None:
    """The pairs of the stage search.

    Raises:
        StageError: no such dataset, a column is missing, or a pair is of no training problem.
    """
    folder /= PAIRS
    try:
        rows = read_rows(folder)
    except (OSError, ValueError, IndexError) as error:  # without rows it is an IndexError
        raise StageError(f"dpo.pairs: no dataset in {folder}: {' '.join(str(error).split())[:200]}") from error
    if missing := set(FEATURES) - set(rows.column_names):
        raise StageError(f"dpo.pairs: {folder} lacks the columns {', '.join(sorted(missing))}")
    for number, row in enumerate(rows):
        if row["problem"] not in problems:
            raise StageError(f"dpo.pairs: row {number} of {folder}: {row['problem']!r} is no training problem")
        pair = _pair(row)
        if pair is None:
            found.left_out["null"] += 1
        elif pair.kind in asked.kinds or pair.kind not in get_args(Kind):  # a kind that nothing knows is counted as such
            found.pairs.append((row["problem"], pair))


def _pair(row: Mapping[str, Any]) -> Pair | None:
    """None where something is missing."""
    lists = [row[name] for name in ("prompt_ids", "prefix_ids", "chosen_ids", "rejected_ids")]
    if row["margin"] is None or row["kind"] is None or any(ids is None or None in ids for ids in lists):
        return None
    prompt, prefix, chosen, rejected = map(tuple, lists)
    return Pair(prompt, prefix, chosen, rejected, row["kind"], row["margin"])


def pair_rows(pairs: list[tuple[str, Pair]]) -> Iterator[dict[str, Any]]:
    """As FEATURES has them."""
    for problem, pair in pairs:
        yield {"problem": problem} | {name: getattr(pair, name) for name in FEATURES if name != "problem"}
