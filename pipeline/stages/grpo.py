"""Stage `grpo`: reinforcement learning of when to undo, from the fine-tuned model, with its own rollouts (docs/grpo.md).

Each step: groups of rollouts of some training problems, judged and rewarded; an advantage for each emitted id; a step of the
learner; its weights into the engines. Everything that a step needs comes from its number and the seed, so that a killed run goes on
from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from actors.checkpoints import newest_step, save_step
from actors.cluster import LearnerDied
from actors.engines import EngineKind, parameters
from actors.parts import all_there
from actors.policy import Policy, Sampled
from actors.rollout import RolloutPool
from actors.workers import GrpoLearner
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding, Mode
from pipeline.backtrack.tree import Walk
from pipeline.rollout_log import Rolled
from pipeline.stages.io import Codec, decoding_of, read_problems, write_json
from pipeline.stages.prm import MODEL as PRM
from pipeline.stages.probes import errors_in, spread
from pipeline.stages.rollouts import context_length, row_seed, within_context
from pipeline.stages.sft import CONTROL
from pipeline.stages.stage import Context, StageError
from pipeline.tasks.problem import Problem
from rewards.combine import FLAT, Rewards, Scored
from rewards.credit import EPSILON, Episode, advantages
from rewards.credit import spread as deviation
from rewards.rollout import JudgedRollout, judged, wrong_ids
from verifiers.tasks import judge_of

HISTORY = "history.json"
"""What each step and check has measured; beside the model."""
_SMALL = 20_000_000  # parameters below which transformers generates faster than vLLM on CPUs
_STATE = "state.json"

Record = dict[str, Any]


def run(context: Context) -> None:
    settings = context.settings
    start = "dpo" if "dpo" in context.inputs else "sft"
    history = _train(context, "grpo", context.inputs[start], context.out, "rewind")
    if settings.grpo.control:
        _train(context, "grpo/control", context.inputs["sft"] / CONTROL, context.out / CONTROL, "forbidden")
    steps = [record for record in history if "reward" in record]
    context.counts.update(rows=sum(record["rollouts"] for record in steps), steps=len(steps))
    context.counts["tokens"] = sum(record["tokens"] for record in steps)


def _train(context: Context, name: str, source: Path, target: Path, mode: Mode) -> list[Record]:
    """Train the model of `source` and save it as `target`; every record of the way."""
    asked, seed = context.settings.grpo, context.settings.run.seed
    codec = Codec(source, context.settings.undo, context.settings.base.prompt)
    policy = Policy(codec.rule, context.settings.decode.rewinding, _bias(context, mode), codec.vocabulary)
    target.mkdir(parents=True, exist_ok=True)
    loop = _Loop(context, name, source, codec, mode, lambda: context.workers.grpo(source, asked, policy, seed))
    try:
        loop.run(target)
    finally:
        loop.close()
    write_json(loop.history, target / HISTORY)
    return loop.history


def _bias(context: Context, mode: Mode) -> float:
    asked = context.settings.grpo
    return asked.undo_bias if mode == "rewind" and asked.undo == "sampled" else 0.0


def policy_decoding(context: Context, codec: Codec, mode: Mode) -> Decoding:
    """How rollouts are drawn: from the very distribution that is trained, so at temperature 1 without a nucleus."""
    asked, how = context.settings.grpo, context.settings.decode
    more: dict[str, Any] = {"threshold": None, "undo_bias": _bias(context, mode)}
    if mode == "rewind" and asked.undo == "epsilon":
        more = {"undo_epsilon": asked.undo_epsilon}
    return decoding_of(codec, how, mode, 1.0, 1.0, asked.max_tokens, **more)


@dataclass
class Batch:
    """Rollouts of one step, `group` of them for each problem one after the other."""

    problems: list[str]
    decoded: list[Decoded]
    seconds: float
    version: str = ""
    """Of the weights that made them."""

    def to_json(self) -> Any:
        rows = [asdict(one) | {"banned": [sorted(ids) for ids in one.banned], "closed": sorted(one.closed)} for one in self.decoded]
        return {"problems": self.problems, "decoded": rows, "seconds": self.seconds, "version": self.version}

    @classmethod
    def from_json(cls, value: Any) -> Batch:
        rows = [
            Decoded(**row | {
                "ids": tuple(row["ids"]), "surviving": tuple(row["surviving"]), "logprobs": tuple(row["logprobs"]),
                "banned": tuple(frozenset(ids) for ids in row["banned"]), "closed": frozenset(row["closed"]),
            })
            for row in value["decoded"]
        ]  # fmt: skip
        return cls(value["problems"], rows, value["seconds"], value.get("version", ""))


def _right(check: Record) -> float:
    share: float = check["greedy_accuracy" if "greedy_accuracy" in check else "first_try_accuracy"]
    return share


class _Loop:
    def __init__(
        self, context: Context, name: str, source: Path, codec: Codec, mode: Mode, learner: Callable[[], GrpoLearner]
    ) -> None:
        self._context, self._name, self._source, self._codec, self._mode = context, name, source, codec, mode
        self._new_learner, self._learner = learner, learner()
        self._asked, self._seed = context.settings.grpo, context.settings.run.seed
        problems = read_problems(context.inputs["problems"])
        train, dev = [one for one in problems if one.split == "train"], spread(problems, "dev", self._asked.check_problems)
        self._problems = {one.id: one for one in self._that_fit(train)}
        self._dev = self._that_fit(dev)
        self._decoding = policy_decoding(context, codec, mode)
        self._rewards = Rewards(self._asked.reward, self._step_values if self._asked.reward.process_model else None)
        self._kept = context.resume / name.replace("/", "-")
        self._begin()

    def _begin(self) -> None:
        self._pool = self._start_pool(self._source)
        self._drawn = 0  # problems so far
        self._empty = 0  # steps in a row without any spread
        self._step = 0
        self._waiting: list[Batch] = []  # rollouts that are older than the model, as `staleness` allows
        self.history: list[Record] = []

    def run(self, target: Path) -> None:
        """Train and save the model as `target`. A learner that dies is started again and goes on from the last checkpoint."""
        while True:
            try:
                self._run()
                return self._write(target)
            except LearnerDied as error:
                if not self._context.workers.restarts.take("the GRPO learner", error):
                    raise
                self._learner.close()
                self._learner = self._new_learner()
                self._begin()

    def close(self) -> None:
        self._learner.close()

    def _run(self) -> None:
        self._restore()
        with ExitStack() as stack:
            self._watch = stack.enter_context(self._context.workers.watch(self._name, self._step + 1))
            progress = stack.enter_context(self._context.terminal.stage(self._name, self._asked.steps, "steps"))
            beside = stack.enter_context(ThreadPoolExecutor(1))
            progress.update(self._step)
            if not self.history:
                self._note(self._check())
                self._set_aside()
            while self._step < self._asked.steps:
                while len(self._waiting) < max(1, self._asked.staleness):
                    self._waiting.append(self._roll())
                ahead = beside.submit(self._roll) if self._asked.staleness else None
                record = self._learn(self._waiting.pop(0))
                if ahead:
                    self._waiting.append(ahead.result())
                self._step += 1
                self._note(record)
                self._learner.publish(self._pool, f"{self._name}@{self._step}")
                if self._step % self._asked.check_every == 0 or self._step == self._asked.steps:
                    self._measure()
                if self._step % self._asked.checkpoint_every == 0 and self._step < self._asked.steps:
                    self._save()
                accuracy, undone = record["accuracy"], record["undo_rate"]
                progress.update(self._step, f"reward {record['reward']:.3f}, right {accuracy:.2f}, with undo {undone:.2f}")

    def _note(self, record: Record) -> None:
        self.history.append(record)
        self._watch.write(record)

    def _that_fit(self, problems: Sequence[Problem]) -> list[Problem]:
        fits, _ = within_context(self._context, problems, [self._codec.prompt_ids(problem) for problem in problems])
        return [problems[i] for i in fits]

    def _start_pool(self, source: Path) -> RolloutPool:
        kind: EngineKind | None = None if self._asked.engine == "auto" else self._asked.engine
        settings = self._context.settings
        on_gpus = settings.cluster.rollout.gpus > 0
        if kind is None and settings.engine.kind == "auto" and not on_gpus and parameters(source) < _SMALL:
            kind = "hf"
        context = self._context
        start = "/".join(context.digests[name] for name in ("sft", "dpo") if name in context.digests)
        return context.workers.pool(source, f"{start}/{self._name}", context_length(context), kind)

    # Rollouts

    def _next_problems(self, count: int) -> list[Problem]:
        """The next training problems, all of them once in an order of chance, then again in another one."""
        found = []
        for number in range(self._drawn, self._drawn + count):
            epoch, at = divmod(number, len(self._problems))
            order = list(self._problems)
            random.Random(f"{self._seed}/grpo/{epoch}").shuffle(order)
            found.append(self._problems[order[at]])
        self._drawn += count
        return found

    def _roll(self, count: int | None = None) -> Batch:
        """Rollouts of the next problems, as many as a step has unless told otherwise."""
        begun, group = time.monotonic(), self._asked.group
        first = self._drawn
        problems = self._next_problems(count or self._asked.problems)
        requests = [
            DecodeRequest(self._codec.prompt_ids(problem), row_seed(self._seed, f"grpo/{first + number}/{sample}"))
            for number, problem in enumerate(problems)
            for sample in range(group)
        ]
        found, version = self._pool.decode(requests, self._decoding, self._context.settings.rollouts.batch)
        names, decoded = [], []
        for number, problem in enumerate(problems):
            rows = [one for one in found[number * group : number * group + group] if isinstance(one, Decoded)]
            if len(rows) == group:
                names.append(problem.id)
                decoded += rows
        batch = Batch(names, decoded, time.monotonic() - begun, version)
        if len(names) == len(problems):
            return batch
        # A group without one of its rollouts has other advantages: another problem takes its place.
        self._context.counts["quarantined"] = self._pool.quarantine.rows
        other = self._roll(len(problems) - len(names))
        return Batch(names + other.problems, decoded + other.decoded, batch.seconds + other.seconds, version)

    # Learning

    def _learn(self, batch: Batch) -> Record:
        begun = time.monotonic()
        progress = self._step / self._asked.steps
        rollouts, scored = self._reward(batch, progress)
        for _ in range(self._asked.refill):
            flat = self._flat(scored, len(batch.problems))
            if not flat:
                break
            self._log(batch, rollouts, scored, flat)
            batch = self._refilled(batch, flat)
            rollouts, scored = self._reward(batch, progress)
        judge_seconds = time.monotonic() - begun
        self._log(batch, rollouts, scored, range(len(batch.problems)))
        size = self._asked.group
        flat = self._flat(scored, len(batch.problems))
        groups = [range(at * size, at * size + size) for at in range(len(batch.problems))]
        if not self._asked.beta:  # nothing but the distance from the reference could be learned from them
            groups = [group for at, group in enumerate(groups) if at not in flat]
        dropped = len(batch.problems) - len(groups)
        record = self._figures(batch, rollouts, scored) | {"groups_dropped": dropped, "judge_seconds": judge_seconds}
        if not groups:
            self._nothing_to_learn()
            return record
        self._empty = 0
        sampled, numbers = self._sampled(batch, rollouts, scored, groups)
        return record | self._learner.learn(numbers, sampled)

    def _reward(self, batch: Batch, progress: float) -> tuple[list[JudgedRollout], Scored]:
        size, most = self._asked.group, self._asked.reward.backtrack.max_undos

        def text(ids: Sequence[int]) -> str:
            return self._codec.decode(ids).text

        rollouts = [
            judged(self._problems[batch.problems[row // size]], one.ids, one.finish, self._codec.rule, text, most)
            for row, one in enumerate(batch.decoded)
        ]
        groups = [row // size for row in range(len(rollouts))]
        return rollouts, self._rewards.score(rollouts, groups, progress)

    def _log(self, batch: Batch, rollouts: Sequence[JudgedRollout], scored: Scored, groups: Sequence[int]) -> None:
        """Write the rollouts of some groups to the log."""
        lines = []
        for row in (row for group in groups for row in range(group * self._asked.group, (group + 1) * self._asked.group)):
            one, judged_one = batch.decoded[row], rollouts[row]
            name = judged_one.problem.id
            components = {key: values[row] for key, values in scored.components.items()}
            lines.append(
                Rolled(
                    f"{name}#{self._name}.{self._step + 1}.{row}", name, one.ids, one.finish, batch.version, self._mode, 1.0,
                    judged_one.undos, one.logprobs, self._step + 1, correct=judged_one.correct, reward=scored.rewards[row],
                    components=components,
                )
            )  # fmt: skip
        self._context.rollouts.write(lines)

    def _wrong(self, rollout: JudgedRollout) -> tuple[int, ...]:
        """What of it is blamed beside its reward."""
        if not self._asked.error_credit:
            return ()
        return wrong_ids(rollout, self._codec.decode(rollout.surviving).offsets, self._codec.rule)

    def _step_values(self, rollouts: Sequence[JudgedRollout]) -> Sequence[Sequence[float]]:
        """Values of surviving steps by the process reward model, which sees nothing of what was deleted."""
        states = [(self._codec.prompt_ids(one.problem), one.surviving) for one in rollouts]
        return self._context.workers.verifiers().step_values(self._context.inputs["prm"] / PRM, states)

    def _flat(self, scored: Scored, groups: int) -> list[int]:
        """Groups whose rollouts have all earned the same."""
        size = self._asked.group
        some = [scored.rewards[at * size : at * size + size] for at in range(groups)]
        return [at for at, rewards in enumerate(some) if max(rewards) - min(rewards) <= FLAT]

    def _refilled(self, batch: Batch, flat: Sequence[int]) -> Batch:
        """The batch with other problems in the place of groups that teach nothing."""
        size, fresh = self._asked.group, self._roll(len(flat))
        problems, decoded = list(batch.problems), list(batch.decoded)
        for place, at in enumerate(flat):
            problems[at] = fresh.problems[place]
            decoded[at * size : at * size + size] = fresh.decoded[place * size : place * size + size]
        return Batch(problems, decoded, batch.seconds + fresh.seconds, fresh.version)

    def _nothing_to_learn(self) -> None:
        self._empty += 1
        self._context.terminal.warn(
            f"{self._name}: step {self._step + 1} is skipped: in every group all rollouts have earned the same"
        )
        if self._empty >= self._asked.empty_steps:
            raise StageError(
                f"{self._name}: no group had any spread in {self._empty} steps in a row (grpo.empty_steps): the problems are too "
                "easy or too hard, or the rewards do not tell rollouts apart"
            )

    def _sampled(
        self,
        batch: Batch,
        rollouts: Sequence[JudgedRollout],
        scored: Scored,
        groups: Sequence[range],
    ) -> tuple[list[Sampled], list[list[int]]]:
        """What the learner gets: the rollouts of some groups, and their numbers in it."""
        asked, scale = self._asked, None
        if asked.scale != "group":
            rewards = [scored.rewards[row] for group in groups for row in group]
            scale = deviation(rewards) + EPSILON if asked.scale == "batch" else 1.0
        found: list[Sampled] = []
        numbers = []
        for group in groups:
            prompt = self._codec.prompt_ids(self._problems[batch.problems[group.start // asked.group]])
            episodes = []
            for row in group:
                one, seen = batch.decoded[row], rollouts[row]
                walk = Walk(prompt, one.ids, one.logprobs, one.banned, closed=one.closed)
                episodes.append(Episode(walk, scored.rewards[row], seen.correct, seen.undo_runs, self._wrong(seen)))
            earned = advantages(
                episodes, self._codec.rule, asked.credit, scale, asked.undo_credit, self._decoding.rewinding, asked.blame_deleted,
                asked.error_credit,
            )  # fmt: skip
            numbers.append(list(range(len(found), len(found) + len(group))))
            for row, episode, values in zip(group, episodes, earned, strict=True):
                counts = not (asked.mask_overlong and batch.decoded[row].finish == "length")
                found.append(Sampled(episode.walk, values, counts))
        return found, numbers

    # Measuring

    def _figures(self, batch: Batch, rollouts: Sequence[JudgedRollout], scored: Scored) -> Record:
        undone = [one.undos > 0 for one in rollouts]
        components = {name: asdict(some) for name, some in scored.statistics.items()}
        return {
            "step": self._step + 1,
            "reward": fmean(scored.rewards),
            "components": components,
            "weights": scored.weights,
            "accuracy": fmean(one.correct for one in rollouts),
            "undo_rate": fmean(undone),
            "undos": fmean(one.undos for one in rollouts),
            "spurious_rate": fmean(one.unnecessary > 0 for one in rollouts),
            "length": fmean(len(one.ids) for one in batch.decoded),
            "cut": fmean(one.finish == "length" for one in batch.decoded),
            "rollouts": len(rollouts),
            "tokens": sum(len(one.ids) for one in batch.decoded),
            "roll_seconds": batch.seconds,
        }

    def _measure(self) -> None:
        record = self._check()
        self._note(record)
        self._set_aside()
        first = self._checks()[0]
        before, now, n = first["first_try_accuracy"], record["first_try_accuracy"], record["n"]
        # Two standard errors of a difference between two shares of n.
        slack = 2 * (2 * max(before * (1 - before), 0.01) / n) ** 0.5
        if now < before - slack:
            self._context.terminal.warn(
                f"{self._name}: step {self._step}: first tries are right in {now:.3f} of the {n} dev problems, at the start in "
                f"{before:.3f}: the model may be planting errors"
            )

    def _check(self) -> Record:
        """Dev problems, greedy, as evaluation decodes them: with undo, and with undo forbidden."""
        settings = self._context.settings
        requests = [DecodeRequest(self._codec.prompt_ids(one), row_seed(self._seed, f"evaluate/{one.id}")) for one in self._dev]
        found: Record = {"step": self._step, "n": len(self._dev)}
        modes: tuple[Mode, ...] = ("rewind", "forbidden") if self._mode == "rewind" else ("forbidden",)
        for mode in modes:
            decoding = decoding_of(self._codec, settings.decode, mode, 0.0, 1.0, self._asked.max_tokens)
            decoded, _ = self._pool.decode(requests, decoding, settings.rollouts.batch)
            texts = [self._codec.decode(one.surviving).text for one in all_there(decoded)]
            right = [judge_of(problem).correct(problem, text) for problem, text in zip(self._dev, texts, strict=True)]
            if mode == "forbidden":
                errors = [errors_in(problem, text) for problem, text in zip(self._dev, texts, strict=True)]
                found["first_try_accuracy"] = fmean(right)
                found["first_tries"] = {"problems": [one.id for one in self._dev], "correct": right, "errors": errors}
            else:
                found |= {"greedy_accuracy": fmean(right), "greedy_undo_rate": fmean(one.undos > 0 for one in all_there(decoded))}
        return found

    # Checkpoints

    def _checks(self) -> list[Record]:
        return [one for one in self.history if "first_try_accuracy" in one]

    def _best(self) -> Record:
        """The check with the most dev problems right, with undo where the model has it; the newest of equals."""
        return max(self._checks(), key=lambda one: (_right(one), one["step"]))

    def _aside(self, step: int) -> Path:
        return self._kept.with_name(f"{self._kept.name}-best") / str(step)

    def _set_aside(self) -> None:
        """Save the model where no check was better. Older ones stay until the next checkpoint, which a killed run goes back to."""
        if self._asked.keep == "best" and self._best()["step"] == self._step:
            self._learner.save(self._aside(self._step))

    def _write(self, target: Path) -> None:
        """The model that the stage ends with."""
        if self._asked.keep == "last":
            return self._learner.save(target)
        best, last = self._best(), self._checks()[-1]
        shutil.copytree(self._aside(best["step"]), target, dirs_exist_ok=True)
        if _right(last) < _right(best):
            self._context.terminal.warn(
                f"{self._name}: kept is the model of step {best['step']}, right on {_right(best):.3f} of the {best['n']} dev "
                f"problems; at step {last['step']} it is {_right(last):.3f} (grpo.keep)"
            )

    def _save(self) -> None:
        state = {
            "step": self._step,
            "drawn": self._drawn,
            "empty": self._empty,
            "history": self.history,
            "waiting": [batch.to_json() for batch in self._waiting],
        }

        def write(folder: Path) -> None:
            self._learner.checkpoint(folder)
            (folder / _STATE).write_text(json.dumps(state))

        save_step(self._kept, self._step, write)
        aside = self._aside(self._best()["step"])
        for older in aside.parent.glob("*"):
            if older != aside:
                shutil.rmtree(older)

    def _restore(self) -> None:
        newest = newest_step(self._kept)
        if newest is None:
            return
        state = json.loads((newest / _STATE).read_text())
        self._learner.restore(newest)
        self._step, self._drawn, self._empty, self.history = (state[key] for key in ("step", "drawn", "empty", "history"))
        self._waiting = [Batch.from_json(value) for value in state["waiting"]]
        self._learner.publish(self._pool, f"{self._name}@{self._step}")
