"""Stage `dpo`: learning from preferences, from the fine-tuned model (docs/dpo.md).

Pairs are made of the round's judged rollouts, or come from search. What cannot be learned from is counted and left out.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.dpo import HELD_OUT, PairSet
from actors.policy import Policy
from pipeline.backtrack.preferences import Pair, flaw, walks
from pipeline.stages.graph import longest_pair
from pipeline.stages.grpo import HISTORY
from pipeline.stages.io import Codec, read_problems, read_rows, write_json, write_rows
from pipeline.stages.pairs import FEATURES, PAIRS, Found, own_pairs, pair_rows, searched_pairs
from pipeline.stages.probes import Case, dev_cases
from pipeline.stages.sources import sort_rollouts
from pipeline.stages.stage import Context, StageError
from pipeline.statistics import mean

_SHARE = 5  # one part in so many is held out, at most
_RISE = 0.02  # of P(undo) in right states, from which on it is warned of

Record = dict[str, Any]


def run(context: Context) -> None:
    settings, asked = context.settings, context.settings.dpo
    source = context.inputs["sft"]
    codec = Codec(source, settings.undo, settings.base.prompt)
    policy = Policy(codec.rule, settings.decode.rewinding, vocabulary=codec.vocabulary, rewinds=asked.form == "rewind")
    with context.terminal.stage("dpo/pairs", None) as progress:
        pairs = _pairs(context, codec, policy)
        progress.update(len(pairs))
    data = _split(pairs, asked.check_pairs, settings.run.seed)
    write_rows(list(pair_rows(pairs)), FEATURES, context.out / PAIRS)
    history: list[Record] = []
    with context.terminal.stage("dpo", asked.steps, "steps") as progress, context.workers.watch("dpo", 0) as watch:

        def show(records: Sequence[Record]) -> None:
            for record in records:
                history.append(record)
                watch.write(record)
                if "loss" in record:
                    said = f"loss {record['loss']:.3f}, chosen preferred {record['accuracy']:.2f}"
                    progress.update(int(record["step"]), said)

        context.workers.dpo(source, context.out, data, asked, policy, settings.run.seed, context.resume / "dpo", show)
    write_json(history, context.out / HISTORY)
    write_json(_held_out_errors(context, codec, source), context.out / "errors.json")
    kinds = Counter(pair.kind for _, pair in pairs)
    context.counts.update(rows=len(pairs), held_out=len(data.held_out), steps=asked.steps)
    context.counts.update({f"kind_{kind}": count for kind, count in sorted(kinds.items())})
    _warn_of_no_gain(context, history)


def _pairs(context: Context, codec: Codec, policy: Policy) -> list[tuple[str, Pair]]:
    """Every different pair that can be learned from, with its problem."""
    settings, asked, found = context.settings, context.settings.dpo, Found()
    problems = {one.id: one for one in read_problems(context.inputs["problems"], "train")}
    if asked.pairs != "search":
        rollouts = read_rows(context.inputs["rollouts"])
        judged = sort_rollouts(read_rows(context.inputs["judge"]), rollouts, problems, codec)
        whole = {row["id"]: tuple(row["token_ids"]) for row in rollouts}
        own_pairs(judged, whole, settings.traces, asked, codec, settings.run.seed, found)
    if asked.pairs != "own":
        searched_pairs(context.inputs["search"], problems, asked, found)
    most, kept = longest_pair(settings), dict[tuple[str, Pair], None]()
    for problem, pair in found.pairs:
        why = flaw(pair, codec.rule, codec.vocabulary)
        if why is None and pair.margin < asked.margin:
            why = "small_margin"
        if why is None and len(policy.grown(walks(pair)).ids) > most:
            why = "longer_than_a_row"
        if why is None and (problem, pair) in kept:
            why = "duplicate"
        if why is None:
            kept[problem, pair] = None
        else:
            found.left_out[why] += 1
    context.counts.update({f"left_out_{name}": count for name, count in sorted(found.left_out.items())})
    if not kept:
        why = ", ".join(f"{count} {name}" for name, count in sorted(found.left_out.items()))
        raise StageError(f"dpo: no pair to learn from ({why or 'no wrong rollout'}): raise rollouts.problems, or change dpo.pairs")
    if found.left_out["longer_than_a_row"]:
        context.terminal.warn(f"dpo: {found.left_out['longer_than_a_row']} pairs are longer than {most} tokens and were left out")
    return list(kept)


def _split(pairs: Sequence[tuple[str, Pair]], most: int, seed: int) -> PairSet:
    """Whole problems are held out until there are enough pairs, in an order of chance."""
    by_problem: dict[str, list[Pair]] = {}
    for problem, pair in pairs:
        by_problem.setdefault(problem, []).append(pair)
    names = sorted(by_problem)
    random.Random(f"{seed}/dpo/held-out").shuffle(names)
    most, held = min(most, len(pairs) // _SHARE), set[str]()
    count = 0
    for name in names:
        if count + len(by_problem[name]) <= most:
            held.add(name)
            count += len(by_problem[name])
    return PairSet([pair for problem, pair in pairs if problem not in held], [pair for problem, pair in pairs if problem in held])


def _held_out_errors(context: Context, codec: Codec, source: Path) -> Record:
    """Own errors on dev problems before and after: P(U) at their evidence and beside them, and log p(error | prefix). Neither
    that nor P(U) in right states must rise: warns where one does."""
    asked = context.settings.dpo
    cases = dev_cases(context, codec, asked.probes) if asked.probes else []
    if not cases:
        return {"n": 0}
    before, after = (_asked(context, folder, cases) for folder in (source, context.out))
    changes = {
        name: mean([now[name] - was[name] for was, now in zip(before, after, strict=True)], -math.inf, math.inf)
        for name in ("logp_error", "p_undo_right")
    }
    change, undone = changes["logp_error"], changes["p_undo_right"]
    assert change is not None and undone is not None
    if change.low is not None and change.low > 0:
        context.terminal.warn(
            f"dpo: log p(error | prefix) of {len(cases)} own errors on dev problems has risen by {change.value:.3f} nats "
            f"(95 %: {change.low:.3f} to {change.high:.3f}): the model may be planting errors"
        )
    if undone.low is not None and undone.low > 0 and undone.value >= _RISE:
        context.terminal.warn(
            f"dpo: mean P(undo) in {len(cases)} right states of dev problems has risen by {undone.value:.3f} "
            f"(95 %: {undone.low:.3f} to {undone.high:.3f}): spurious undos may follow; lower dpo.lr"
        )
    means = {
        name: {key: math.fsum(row[key] for row in rows) / len(rows) for key in rows[0]}
        for name, rows in (("before", before), ("after", after))
    }
    return {"n": len(cases), "logp_error_change": change.value, "ci95": [change.low, change.high], **means}


def _asked(context: Context, folder: Path, cases: Sequence[Case]) -> list[dict[str, float]]:
    answers = context.workers.probe(folder, [row for case in cases for row in (case.error, case.right)])
    return [
        {"p_undo_error": math.exp(error[0]), "p_undo_right": math.exp(right[0]), "logp_error": math.fsum(error[1:])}
        for error, right in zip(answers[::2], answers[1::2], strict=True)
    ]


def _warn_of_no_gain(context: Context, history: Sequence[Record]) -> None:
    """Held-out pairs say whether preferences were learned or learned by heart."""
    name = f"{HELD_OUT}accuracy"
    checks = [record[name] for record in history if name in record]
    if len(checks) > 1 and checks[-1] <= 0.5:
        context.terminal.warn(f"dpo: the chosen side is preferred in {checks[-1]:.2f} of the held-out pairs: nothing was learned")
