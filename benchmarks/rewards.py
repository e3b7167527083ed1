"""Rewards: rollouts judged and scored per second, and what the rewards teach policies whose habits are known.

    python benchmarks/rewards.py [--quick]

Rollouts are written by simulated policies on problems of the synthetic task: a policy errs with a known rate, takes errors back
with a known rate, and takes right lines back with a known rate. Prints three tables and one JSON line. One core.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.backtrack.undo import UndoRule, Unit  # noqa: E402
from pipeline.reward_config import Phases, RewardSettings  # noqa: E402
from pipeline.task_config import SyntheticTask  # noqa: E402
from pipeline.tasks import synthetic  # noqa: E402
from pipeline.tasks.problem import Problem  # noqa: E402
from rewards.combine import Rewards, Scored, members_of, normalised  # noqa: E402
from rewards.rollout import JudgedRollout, judged, state_is_wrong, verdict_of  # noqa: E402
from verifiers.synthetic import attempt_text  # noqa: E402

STOP, UNDO, END = 0, 1, 2
GOAL = 1000.0
MOST_UNDOS = 12


class Words:
    """A tokenizer that learns as it reads: words, digits and signs."""

    def __init__(self) -> None:
        self._texts = ["", "<UNDO>", "\n"]
        self._ids = {text: index for index, text in enumerate(self._texts)}

    def encode(self, text: str) -> list[int]:
        pieces = re.findall(r"[^\W\d_]+|\s|.", text)
        for piece in pieces:
            if piece not in self._ids:
                self._ids[piece] = len(self._texts)
                self._texts.append(piece)
        return [self._ids[piece] for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._texts[token] for token in ids)


WORDS = Words()


def rule(unit: Unit = "step") -> UndoRule:
    return UndoRule(UNDO, unit, frozenset({END}))


@dataclass(frozen=True)
class Policy:
    """Habits of a simulated model."""

    name: str
    detect: float
    """P(undo | the line just written is wrong)."""
    alarm: float
    """P(undo | it is right), when it is written for the first time."""
    error: float = 0.4
    """P(a decisive line comes out wrong), each time it is written."""
    plants: bool = False
    """Writes a wrong line on purpose, once, and takes it back."""


@dataclass(frozen=True)
class Written:
    """A simulated completion with the decisions that the policy made."""

    ids: tuple[int, ...]
    at_wrong: tuple[bool, ...]
    """For each wrong line whether it was taken back."""
    at_right: tuple[bool, ...]
    """For each line that came out right at its first writing, the same."""


def write(problem: Problem, policy: Policy, draw: random.Random) -> Written:
    """A solution line by line. A hindsight problem's choice is decisive, in the others any line is, one of them on average."""
    *lines, answer = problem.solution.split("\n")
    ids: list[int] = []
    at_wrong: list[bool] = []
    at_right: list[bool] = []
    plant, spoilt = policy.plants, False
    for index, line in enumerate(lines):
        rate = policy.error * (index == 0) if problem.hindsight else policy.error / len(lines)
        first = True
        while True:
            wrong = plant or draw.random() < rate
            ids += WORDS.encode((wrong_line(problem, line, draw) if wrong else line) + "\n")
            undo = plant
            if not plant and len(at_wrong) + sum(at_right) < MOST_UNDOS:
                if wrong:
                    undo = draw.random() < policy.detect
                    at_wrong.append(undo)
                elif first:
                    undo = draw.random() < policy.alarm
                    at_right.append(undo)
            first = first and wrong
            plant = False
            if not undo:
                break
            first = False
            ids.append(UNDO)
        spoilt = spoilt or wrong
    ids += WORDS.encode(f"#### {int(answer[5:]) + 1}" if spoilt else answer)
    return Written((*ids, STOP), tuple(at_wrong), tuple(at_right))


def wrong_line(problem: Problem, line: str, draw: random.Random) -> str:
    """A choice that does not fit with a false equation that hides it, or a false result."""
    if choice := re.match(r"Try (\d+) ", line):
        other = draw.choice([one for one in range(1, 10) if one != int(choice[1])])
        text = attempt_text(problem, other)
        return text + ("7>>7 of them." if text.endswith("=") else " legs left.")
    found = re.search(r"=(\d+)>>(\d+)", line)
    assert found, line
    false = int(found[1]) + draw.randint(1, 9)
    return f"{line[: found.start()]}={false}>>{false}{line[found.end() :]}"


def judge_ids(problem: Problem, ids: Sequence[int], unit: Unit = "step") -> JudgedRollout:
    return judged(problem, ids, "stop" if ids and ids[-1] == STOP else "length", rule(unit), WORDS.decode, 20)


def problems(count: int) -> list[Problem]:
    """A mixed batch: forward and hindsight problems in turn."""
    made = [one for one in synthetic.load(SyntheticTask(train=max(8, count), dev=8, test=8, ood=8), 5) if one.split == "train"]
    random.Random(0).shuffle(made)
    return made[:count]


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(count: int, group: int, repeats: int) -> tuple[float, float]:
    """Rollouts per second of one core's time, judged and scored, with so many rollouts to a problem; and their undos on average."""
    draw = random.Random(1)
    policy = Policy("", detect=0.8, alarm=0.1, error=0.6)
    written = []
    for problem in problems(count // group):
        while (
            len(own := [one for one in (write(problem, policy, draw) for _ in range(4 * group)) if one.ids.count(UNDO) < 5]) < group
        ):
            pass
        written += [(problem, one.ids) for one in own[:group]]
    rewards, seconds, undos = Rewards(RewardSettings()), [], 0
    groups = [row // group for row in range(len(written))]
    for _ in range(repeats):
        for cache in (state_is_wrong, verdict_of):
            cache.cache_clear()
        began = time.process_time()
        rollouts = [judge_ids(problem, ids) for problem, ids in written]
        rewards.score(rollouts, groups, 0.5)
        seconds.append(time.process_time() - began)
        undos = sum(one.undos for one in rollouts)
    return len(written) / statistics.median(seconds), undos / len(written)


# --- what is taught ---------------------------------------------------------------------------------------------------

MIXED = [
    Policy("never undoes", 0.0, 0.0),
    Policy("undoes wrong lines, half of them", 0.5, 0.0),
    Policy("undoes wrong lines, nine of ten", 0.9, 0.0),
    Policy("the same, false alarms .1", 0.9, 0.1),
    Policy("undoes every line once", 1.0, 1.0),
    Policy("plants an error, undoes it", 0.9, 0.0, plants=True),
    Policy("plants, never undoes else", 0.0, 0.0, plants=True),
]
CORNERS = [
    Policy("never undoes", 0.05, 0.05),
    Policy("always undoes", 0.95, 0.95),
    Policy("undoes what is right", 0.05, 0.95),
    Policy("tosses a coin", 0.5, 0.5),
    Policy("undoes what is wrong", 0.95, 0.05),
]
SETTINGS = {
    "sum": (RewardSettings(), 0.5),
    "gdpo": (RewardSettings(combine="gdpo"), 0.5),
    "early": (RewardSettings(phases=Phases()), 0.1),
    "late": (RewardSettings(phases=Phases()), 0.9),
}


def advantages(scored: Scored, groups: Sequence[int]) -> list[float]:
    """(reward - mean) / sd of each rollout within its group."""
    return list(normalised(scored.rewards, members_of(groups)))


@dataclass(frozen=True)
class Taught:
    """A policy's means in groups that hold all policies."""

    right: float
    undos: float
    components: dict[str, float]
    rewards: dict[str, float]
    advantages: dict[str, float]


def mixed_batch(count: int, each: int) -> dict[str, Taught]:
    """All policies of `MIXED` on the same problems, `each` rollouts of every one in a group."""
    draw = random.Random(2)
    rollouts, groups, owners = [], [], []
    for group, problem in enumerate(problems(count)):
        for policy in MIXED:
            for _ in range(each):
                rollouts.append(judge_ids(problem, write(problem, policy, draw).ids))
                groups.append(group)
                owners.append(policy.name)
    scored = {name: Rewards(settings).score(rollouts, groups, at) for name, (settings, at) in SETTINGS.items()}
    pushed = {name: advantages(one, groups) for name, one in scored.items()}
    taught = {}
    for policy in MIXED:
        rows = [row for row, owner in enumerate(owners) if owner == policy.name]
        taught[policy.name] = Taught(
            right=statistics.fmean(rollouts[row].correct for row in rows),
            undos=statistics.fmean(rollouts[row].undos for row in rows),
            components={n: statistics.fmean(v[row] for row in rows) for n, v in scored["sum"].components.items()},
            rewards={n: statistics.fmean(one.rewards[row] for row in rows) for n, one in scored.items()},
            advantages={n: statistics.fmean(one[row] for row in rows) for n, one in pushed.items()},
        )
    return taught


def pushes(policy: Policy, count: int, group: int, error: float = 0.4) -> dict[str, tuple[float, float]]:
    """By way of combining: what a policy-gradient step on groups of this policy's own rollouts does to its two habits.

    The mean of advantage x (undone - P(undo)) over decisions at wrong lines and at right ones: the gradient with respect to
    the logit of `detect` and of `alarm`. Positive: more undos there.
    """
    draw = random.Random(3)
    policy = Policy(policy.name, policy.detect, policy.alarm, error)
    written, rollouts, groups = [], [], []
    for number, problem in enumerate(problems(count)):
        for _ in range(group):
            written.append(write(problem, policy, draw))
            rollouts.append(judge_ids(problem, written[-1].ids))
            groups.append(number)
    found = {}
    for name, (settings, at) in SETTINGS.items():
        gains = advantages(Rewards(settings).score(rollouts, groups, at), groups)
        detect = statistics.fmean(
            gain * sum(u - policy.detect for u in one.at_wrong) for gain, one in zip(gains, written, strict=True)
        )
        alarm = statistics.fmean(
            gain * sum(u - policy.alarm for u in one.at_right) for gain, one in zip(gains, written, strict=True)
        )
        found[name] = detect, alarm
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rollouts")
    quick = parser.parse_args().quick
    figures = {}
    print("judged and scored, 0 to 4 undos, by the second of one core's time (median of 3)")
    for name, group in (("groups_of_8", 8), ("all_different", 1)):
        figures[name], undos = speed(400 if quick else 1600, group, 3)
        print(f"  {name:16}{figures[name]:8,.0f} rollouts/s   {undos:.2f} undos a rollout")
    print(f"  goal: {GOAL:,.0f} in groups of 8\n")

    taught = mixed_batch(40 if quick else 300, 2)
    names = list(next(iter(taught.values())).components)
    print("policies in one batch; components, reward (sum), and mean advantage within the group")
    print(
        f"{'':34}{'right':>6}{'undos':>7}"
        + "".join(f"{n:>10}" for n in names)
        + f"{'reward':>8}"
        + "".join(f"{n:>7}" for n in SETTINGS)
    )
    for policy, one in taught.items():
        parts = "".join(f"{value:10.3f}" for value in one.components.values())
        print(
            f"{policy:34}{one.right:6.2f}{one.undos:7.2f}{parts}{one.rewards['sum']:8.3f}"
            + "".join(f"{value:+7.2f}" for value in one.advantages.values())
        )
    print("\nwhat a step on the policy's own groups of 16 does: to P(undo | wrong) / to P(undo | right)")
    print(f"{'':34}" + "".join(f"{n:>18}" for n in SETTINGS))
    corners = {policy.name: pushes(policy, 20 if quick else 150, 16) for policy in CORNERS}
    for name, found in corners.items():
        print(f"{name:34}" + "".join(f"{detect:+9.3f} /{alarm:+7.3f}" for detect, alarm in found.values()))
    for name, one in taught.items():
        figures[f"reward: {name}"] = round(one.rewards["sum"], 3)
    leaves_never = all(detect > 0 for detect, _ in corners["never undoes"].values())
    leaves_always = all(alarm < 0 for _, alarm in corners["always undoes"].values())
    ok = figures["groups_of_8"] >= GOAL and leaves_never and leaves_always
    print(json.dumps({"benchmark": "rewards", "figures": figures, "goals": {"groups_of_8": GOAL}, "ok": ok}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
