"""The actors of one run, started when a stage first needs them and stopped together: engines stay warm between stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.cluster import ClusterError, actor_options, dashboard_url, ray_session
from actors.learner import Curve, DevCheck, LearnerActor
from actors.packing import Example
from actors.rollout import RolloutPool
from pipeline.config import Settings, TrainSettings

_POLL_SECONDS = 1.0


class Workers:
    """Starts Ray on first use. A context manager: on the way out, by whatever way, all actors are gone."""

    def __init__(self, settings: Settings, log_dir: Path, say: Callable[[str], None]) -> None:
        self._settings, self._log_dir, self._say = settings, log_dir.resolve(), say
        self._ray: ExitStack | None = None
        self._pool: RolloutPool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._ray is not None:
            self._ray.close()

    def start(self) -> None:
        if self._ray is None:
            stack = ExitStack()
            stack.enter_context(ray_session(self._settings.cluster))
            self._ray = stack
            url = dashboard_url()
            self._say(f"Ray is up: {ray.cluster_resources().get('CPU', 0):g} CPUs" + (f", dashboard http://{url}" if url else ""))

    def pool(self, folder: Path, version: str, context: int) -> RolloutPool:
        """The rollout pool with the weights of `folder` in every engine."""
        self.start()
        if self._pool is None:
            self._pool = RolloutPool(self._settings, folder.resolve(), version, context, self._log_dir)
            word = " (vLLM is not installed)" if self._pool.kind == "hf" and self._settings.engine.kind == "auto" else ""
            self._say(f"engine: {self._pool.kind}{word}")
        self._pool.use(folder.resolve(), version)
        return self._pool

    def fit(
        self,
        source: Path,
        target: Path,
        examples: Sequence[Example],
        settings: TrainSettings,
        seed: int,
        on_progress: Callable[[Curve], None],
        check: DevCheck | None = None,
    ) -> Curve:
        """Train in a learner actor of its own, which ends with the training and gives its memory back.

        Raises:
            ClusterError: the learner died or could not be placed.
        """
        return self._learner("fit", on_progress, str(source.resolve()), str(target.resolve()), examples, settings, seed, check)

    def call_learner(self, method: str, *args: Any) -> Any:
        """Any other method of the learner, such as `probe`."""
        return self._learner(method, lambda curve: None, *args)

    def _learner(self, method: str, on_progress: Callable[[Curve], None], *args: Any) -> Any:
        self.start()
        options = actor_options(self._settings.cluster.learner, "learner", 1)
        learner: Any = LearnerActor.options(**options).remote(str(self._log_dir / "learner.log"))
        try:
            result = getattr(learner, method).remote(*args)
            while not ray.wait([result], timeout=_POLL_SECONDS)[0]:
                answer = learner.progress.remote()
                if ray.wait([answer], timeout=_POLL_SECONDS)[0]:  # a busy learner answers at the next poll
                    on_progress(ray.get(answer))
            return ray.get(result)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from error
        except RayActorError as error:
            raise ClusterError(f"the learner died: {' '.join(str(error).split())[:400]}") from error
        finally:
            ray.kill(learner)


def curve_json(curve: Curve) -> dict[str, Any]:
    """A curve for a model folder: its content does not depend on how fast the machine was."""
    return {key: value for key, value in asdict(curve).items() if key != "seconds"}
