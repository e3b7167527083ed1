"""Learned verifiers in the learner's process: what the actor does, and the driver's side of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors import prm, verifier_head
from actors.labelled import Labelled
from actors.memory import out_of_memory
from actors.prm import ProcessRewardModel, State, VerifierCurve, VerifierTrainingError
from actors.search import Ids, SearchError
from pipeline.prm_config import HeadSettings, PrmSettings
from pipeline.tasks.problem import Problem

_POLL_SECONDS = 1.0
_SAVE = "lower prm.rows or prm.row_tokens"
Show = Callable[[VerifierCurve], None]


class Verifying:
    """Part of an actor: trains verifiers and asks them. The process reward model asked last stays loaded."""

    _prm: tuple[str, ProcessRewardModel] | None = None
    _verifier_curve = VerifierCurve()

    def fit_prm(
        self, source: str, target: str, rows: Sequence[Labelled], held_out: Sequence[Labelled], settings: PrmSettings,
        step_end_ids: frozenset[int], stop_id: int, seed: int, resume: str,
    ) -> VerifierCurve:  # fmt: skip
        self._prm, self._verifier_curve = None, VerifierCurve()
        try:
            how = (settings, step_end_ids, stop_id, seed, self._verifier_curve, Path(resume))
            return prm.fit(Path(source), Path(target), rows, held_out, *how)
        except Exception as error:
            if out_of_memory(error):
                raise VerifierTrainingError(f"out of memory at step {self._verifier_curve.step + 1}: {_SAVE}") from error
            raise

    def fit_head(
        self, policy: str, target: str, rows: Sequence[Labelled], held_out: Sequence[Labelled], settings: HeadSettings, seed: int
    ) -> VerifierCurve:
        self._verifier_curve = VerifierCurve()
        return verifier_head.fit(Path(policy), Path(target), rows, held_out, settings, seed, self._verifier_curve)

    def verifier_progress(self) -> VerifierCurve:
        return self._verifier_curve

    def step_values(self, folder: str, solutions: Sequence[State]) -> list[tuple[float, ...]]:
        return self._loaded(folder).step_values(solutions)

    def values(self, folder: str, rows: Sequence[Labelled]) -> list[tuple[float, ...]]:
        return self._loaded(folder).values(rows)

    def value_of(self, folder: str, states: Sequence[State]) -> list[float]:
        return self._loaded(folder).value_of(states)

    def p_should_undo(self, policy: str, folder: str, rows: Sequence[Labelled]) -> list[tuple[float, ...]]:
        return verifier_head.p_should_undo(Path(policy), Path(folder), rows)

    def _loaded(self, folder: str) -> ProcessRewardModel:
        if self._prm is None or self._prm[0] != folder:
            self._prm = None  # never two at a time
            self._prm = folder, ProcessRewardModel.load(Path(folder))
        return self._prm[1]


@dataclass(frozen=True)
class StateValues:
    """Values of the states of a search by the process reward model, which one actor holds for all search workers: it values the
    states of one round of a worker together, while the engines decode those of the others. Travels to them.

    Raises:
        SearchError: that actor died, or the model failed.
    """

    actor: Any
    folder: str

    def __call__(self, states: Sequence[tuple[Problem, Ids, Ids]]) -> list[float]:
        asked = [(prompt, ids) for _, prompt, ids in states]
        try:
            found: list[float] = ray.get(self.actor.value_of.remote(self.folder, asked))
        except RayActorError as error:  # as it stands it would be taken for the death of the worker that asks
            raise SearchError(f"the actor with the process reward model died: {' '.join(str(error).split())[:300]}") from None
        except RayTaskError as error:
            raise SearchError(f"the process reward model failed: {' '.join(str(error.cause).split())[:300]}") from None
        return found


class Verifiers:
    """The driver's side.

    Example:
        values = workers.verifiers().step_values(folder, [(prompt_ids, surviving_ids)])
    """

    def __init__(
        self,
        learner: Callable[[], Any],
        get: Callable[..., Any],
        persisting: Callable[[Callable[[], Any]], Any],
        leave_gpus: Callable[[], None],
    ) -> None:
        """
        Args:
            learner: the one of now.
            get: what it answers.
            persisting: calls once more what has failed because it died.
            leave_gpus: called before a training.
        """
        self._learner, self._get, self._persisting, self._leave_gpus = learner, get, persisting, leave_gpus

    def fit_prm(
        self, source: Path, target: Path, rows: Sequence[Labelled], held_out: Sequence[Labelled], settings: PrmSettings,
        step_end_ids: frozenset[int], stop_id: int, seed: int, resume: Path, show: Show,
    ) -> VerifierCurve:  # fmt: skip
        """Train a process reward model, see actors/prm.py."""
        some = (str(source.resolve()), str(target.resolve()), rows, held_out, settings, step_end_ids, stop_id, seed)
        return self._watched(lambda: self._learner().fit_prm.remote(*some, str(resume.resolve())), show)

    def fit_head(
        self, policy: Path, target: Path, rows: Sequence[Labelled], held_out: Sequence[Labelled], settings: HeadSettings,
        seed: int, show: Show,
    ) -> VerifierCurve:  # fmt: skip
        """Train a verifier head, see actors/verifier_head.py."""
        some = (str(policy.resolve()), str(target.resolve()), rows, held_out, settings, seed)
        return self._watched(lambda: self._learner().fit_head.remote(*some), show)

    def step_values(self, folder: Path, solutions: Sequence[State]) -> list[tuple[float, ...]]:
        """For each (prompt, surviving ids) the process reward model's values of its steps."""
        found: list[tuple[float, ...]] = self._asked(lambda: self._learner().step_values.remote(str(folder.resolve()), solutions))
        return found

    def values(self, folder: Path, rows: Sequence[Labelled]) -> list[tuple[float, ...]]:
        """Its values at the places of rows."""
        found: list[tuple[float, ...]] = self._asked(lambda: self._learner().values.remote(str(folder.resolve()), rows))
        return found

    def state_values(self, folder: Path) -> StateValues:
        """For search workers, with the process reward model loaded.

        Raises:
            HeadError: none in the folder, or one that does not fit together.
        """
        place = str(folder.resolve())
        self._asked(lambda: self._learner().value_of.remote(place, []))
        return StateValues(self._learner(), place)

    def p_should_undo(self, policy: Path, folder: Path, rows: Sequence[Labelled]) -> list[tuple[float, ...]]:
        """The verifier head's probabilities at the places of rows, on the states of a policy."""
        paths = (str(policy.resolve()), str(folder.resolve()))
        found: list[tuple[float, ...]] = self._asked(lambda: self._learner().p_should_undo.remote(*paths, rows))
        return found

    def _asked(self, start: Callable[[], Any]) -> Any:
        return self._persisting(lambda: self._get(start()))

    def _watched(self, start: Callable[[], Any], show: Show) -> VerifierCurve:
        def once() -> VerifierCurve:
            self._leave_gpus()
            result = start()
            while not ray.wait([result], timeout=_POLL_SECONDS)[0]:
                answer = self._learner().verifier_progress.remote()
                if ray.wait([answer, result], timeout=_POLL_SECONDS)[0] == [answer]:
                    show(self._get(answer, _SAVE))
            curve: VerifierCurve = self._get(result, _SAVE)
            show(curve)
            return curve

        found: VerifierCurve = self._persisting(once)
        return found
