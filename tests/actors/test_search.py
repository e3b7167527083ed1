"""Many searches side by side: one engine call a round, and engines, judges and workers that fail."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.cluster import ClusterError, Restarts
from actors.engines import Completion, Request, Sampling
from actors.mcts import Tree
from actors.parts import Quarantine, Quarantined
from actors.search import Case, Searcher, SearchError
from actors.search_workers import SearchWorkers
from actors.verifier_actor import StateValues
from pipeline.backtrack.searched import Searched
from pipeline.cluster_config import ActorResources
from pipeline.tasks.problem import Problem
from tests.actors.searched import LETTERS, PROMPT, WORDS, Language, grow, problem, settings

pytestmark = pytest.mark.ray


def right(one: Problem, ids: tuple[int, ...]) -> bool:
    return ids[0] == LETTERS[int(one.id) % 4]


CASES = [Case(problem(str(number)), PROMPT) for number in range(10)]


def searcher(pool: Any = None, is_right: Any = right, state_value: Any = None, **how: Any) -> Searcher:
    how = {"simulations": 12, "after_right": 2, "batch": 4} | how
    return Searcher(pool or Language(), settings(**how), WORDS, 7, 256, is_right, state_value)


def by_problem(trees: Sequence[Searched] | Iterator[Searched]) -> dict[str, Searched]:
    found = list(trees)
    assert len({tree.problem for tree in found}) == len(found)
    return {tree.problem: tree for tree in found}


@pytest.mark.parametrize("more", [{}, {"leaves": 3}, {"expand": "samples", "temperature": 1.0}, {"rollout": "step"}])
def test_a_problem_searched_among_many_is_as_if_searched_alone(more: dict[str, Any]) -> None:
    together = by_problem(searcher(**more).search(CASES))
    assert list(together) != [] and set(together) == {case.problem.id for case in CASES}
    for case in CASES:
        (alone,) = searcher(**more).search([case])
        assert together[case.problem.id] == alone


def test_all_leaves_of_all_open_trees_are_one_call() -> None:
    language = Language()
    one = searcher(language, is_right=lambda *_: False, batch=4)
    list(one.search(CASES))
    assert one.meter.rounds == len(language.calls) and max(language.calls) == 4
    assert sum(language.calls[:12]) == 48 and one.meter.simulations == 120  # three lots of trees of 12 simulations


def test_trees_come_as_soon_as_they_are_finished() -> None:
    language = Language()
    found = searcher(language, batch=100, after_right=0).search(CASES)
    next(found)
    assert len(language.calls) < 12


def test_no_problem_no_call() -> None:
    assert list(searcher().search([])) == []


def test_what_no_simulation_solves_is_labelled() -> None:
    found = by_problem(searcher(is_right=lambda *_: False).search(CASES))
    assert not any(tree.solved or 1 in tree.right for tree in found.values())
    assert all(tree.simulations == 12 and tree.first_tokens == -1 for tree in found.values())


class Fewer(Language):
    """Answers all but the last of what it is asked."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, batch: int = 0) -> tuple[list[Completion], str]:
        made, version = super().generate(requests, sampling, batch)
        return made[: max(1, len(made) - 1)], version


def test_completions_that_did_not_come_are_asked_for_again() -> None:
    one = searcher(Fewer(), batch=10)
    assert by_problem(one.search(CASES)) == by_problem(searcher(batch=10).search(CASES))
    assert one.meter.failed["missing"] > 0 and "were asked for" in one.meter.examples["missing"]


@pytest.mark.parametrize(("made", "why"), [(0, "answered 0 completions where 4"), (9, "answered 9 completions where 4")])
def test_an_engine_that_answers_nothing_or_too_much_ends_the_search(made: int, why: str) -> None:
    class Odd:
        def generate(self, *_: Any) -> tuple[list[Completion], str]:
            return [Completion((3, 1), (-1.0, 0.0), "stop")] * made, "v"

    with pytest.raises(SearchError, match=why):
        list(searcher(Odd()).search(CASES))


def test_completions_without_ids() -> None:
    class Mute:
        def generate(self, requests: Sequence[Request], *_: Any) -> tuple[list[Completion], str]:
            return [Completion((), (), "length") for _ in requests], "v"

    one = searcher(Mute())
    found = by_problem(one.search(CASES))
    assert all(tree.parent == (-1,) and not tree.solved for tree in found.values()) and one.meter.failed["empty"] == 10


def test_a_verifier_that_raises_leaves_the_end_unjudged() -> None:
    def broken(one: Problem, ids: tuple[int, ...]) -> bool:
        if one.id == "3":
            raise RecursionError("too deep\nreally")
        return right(one, ids)

    one = searcher(is_right=broken)
    found, plain = by_problem(one.search(CASES)), by_problem(searcher().search(CASES))
    assert {name: tree for name, tree in found.items() if name != "3"} == {n: t for n, t in plain.items() if n != "3"}
    assert set(found["3"].right) == {-1} and not found["3"].solved
    assert one.meter.failed["unjudged"] == 12 and one.meter.examples["unjudged"] == "3: RecursionError: too deep really"


def test_values_of_states_lead_where_verdicts_do_not() -> None:
    asked: list[int] = []

    def value(states: Sequence[tuple[Problem, tuple[int, ...], tuple[int, ...]]]) -> list[float]:
        asked.append(len(states))
        return [float(not ids or right(one, ids)) for one, _, ids in states]

    more: dict[str, Any] = {"rollout": "step", "simulations": 30, "after_right": 0, "c_puct": 0.3, "state_weight": 0.9}
    guided = by_problem(searcher(state_value=value, **more).search(CASES))
    blind = by_problem(searcher(**more).search(CASES))
    assert sum(tree.solved for tree in guided.values()) > sum(tree.solved for tree in blind.values())
    assert asked[0] == 4


def test_values_that_are_no_number_or_missing() -> None:
    one = searcher(state_value=lambda states: [math.nan] * len(states))
    assert by_problem(one.search(CASES)) == by_problem(searcher().search(CASES))
    assert one.meter.failed["not_a_number"] > 0
    with pytest.raises(SearchError, match="gave 1 values for"):
        list(searcher(state_value=lambda states: [0.5]).search(CASES))


def test_a_search_is_what_its_tree_says() -> None:
    how = settings(simulations=12, after_right=2)
    (found,) = searcher().search(CASES[:1])
    tree = Tree(PROMPT, how, WORDS, 0)
    grow(tree, how, Language(), lambda ids: right(CASES[0].problem, ids))
    assert found == tree.result("0")


# ---- on real Ray ----


@dataclass
class Mortal:
    """A pool in whose presence one worker dies: the first that finds the file missing."""

    mark: str

    def generate(self, requests: Sequence[Request], sampling: Sampling, batch: int = 0) -> tuple[list[Completion], str]:
        if any(request.seed % 5 == 0 for request in requests):
            try:
                Path(self.mark).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os._exit(1)
        return Language().generate(requests, sampling, batch)


def deadly(one: Problem, ids: tuple[int, ...]) -> bool:
    """A judge that kills whoever asks it about one problem."""
    if one.id == "1":
        os._exit(1)
    return right(one, ids)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    root = str(Path(__file__).resolve().parents[2])
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    yield
    ray.shutdown()


def test_the_problems_of_a_dead_worker_go_to_others_until_none_is_left(cluster: None, tmp_path: Path) -> None:
    """What is found is what one process finds, however many workers there were and whoever died."""
    said: list[str] = []
    started = SearchWorkers(searcher(Mortal(str(tmp_path / "dead"))), 2, ActorResources(cpus=0.5), tmp_path, said.append)
    found = by_problem(started.search(CASES))
    assert found == by_problem(searcher().search(CASES))
    assert len(said) == 1 and said[0].startswith("a search worker died, 1 go on with its problems")
    assert started.meter.simulations >= sum(tree.simulations for tree in found.values())
    started.close()
    with pytest.raises(ClusterError, match="every search worker died"):
        list(started.search(CASES))


@ray.remote
class Valued:
    """An actor with a process reward model that says how many ids a state has, and fails when the prompt is odd."""

    def value_of(self, folder: str, states: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[float]:
        if any(prompt != PROMPT for prompt, _ in states):
            raise ValueError("its weights\nare damaged")
        assert folder == "prm"
        return [len(ids) / 10 for _, ids in states]


def test_workers_ask_one_actor_what_states_are_worth(cluster: None, tmp_path: Path) -> None:
    """What they find is what one process finds; a model that fails or is gone is not taken for a dead worker."""
    valued = Valued.options(num_cpus=0.25).remote()  # type: ignore[attr-defined]
    more: dict[str, Any] = {"rollout": "step", "simulations": 6}
    here = by_problem(searcher(state_value=lambda states: [len(ids) / 10 for _, _, ids in states], **more).search(CASES))
    started = SearchWorkers(searcher(state_value=StateValues(valued, "prm"), **more), 2, ActorResources(cpus=0.5), tmp_path)
    try:
        assert by_problem(started.search(CASES)) == here
        with pytest.raises(ClusterError, match="SearchError: the process reward model failed: its weights are damaged"):
            list(started.search([Case(problem("odd"), (8, 8))]))
        ray.kill(valued)
        with pytest.raises(ClusterError, match="SearchError: the actor with the process reward model died"):
            list(started.search(CASES))
    finally:
        started.close()


def test_a_dead_worker_is_started_again(cluster: None, tmp_path: Path) -> None:
    said: list[str] = []
    restarts = Restarts(1, said.append)
    mortal = searcher(Mortal(str(tmp_path / "dead")))
    started = SearchWorkers(mortal, 1, ActorResources(cpus=0.5), tmp_path, said.append, restarts=restarts)
    assert by_problem(started.search(CASES)) == by_problem(searcher().search(CASES))
    assert len(said) == 1 and said[0].startswith("a search worker died and is started again, 0 times more at most")
    started.close()


def test_a_problem_that_its_worker_dies_of_is_left_out(cluster: None, tmp_path: Path) -> None:
    said: list[str] = []
    kept = Quarantine(1, tmp_path / "quarantine.jsonl")
    started = SearchWorkers(
        searcher(is_right=deadly), 1, ActorResources(cpus=0.5), tmp_path, said.append, restarts=Restarts(99, said.append),
        row_tries=2, quarantine=kept,
    )  # fmt: skip
    found = by_problem(started.search(CASES))
    expected = by_problem(searcher().search(CASES))
    del expected[CASES[1].problem.id]
    assert found == expected and started.meter.failed["quarantined"] == kept.rows == 1
    started.close()


def test_a_tree_whose_completion_cannot_be_made_is_left_out() -> None:
    class Lossy(Language):
        def generate(self, requests: Sequence[Request], sampling: Sampling, batch: int = 0) -> Any:
            made, version = super().generate(requests, sampling, batch)
            return [Quarantined(3, "no"), *made[1:]] if len(self.calls) == 1 else made, version

    one, expected = searcher(Lossy()), by_problem(searcher().search(CASES))
    del expected["0"]
    assert by_problem(one.search(CASES)) == expected
    assert one.meter.failed["quarantined"] == 1 and one.meter.examples["quarantined"] == "0: no"


def test_a_worker_that_fails_says_why(cluster: None, tmp_path: Path) -> None:
    started = SearchWorkers(searcher(state_value=lambda states: []), 1, ActorResources(cpus=0.5), tmp_path)
    with pytest.raises(ClusterError, match="a search worker failed: SearchError: a value function gave 0 values"):
        list(started.search(CASES))
    started.close()
