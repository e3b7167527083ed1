"""The actors of one run, started when a stage first needs them and stopped together: engines stay warm between stages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

from actors import metrics
from actors.checks import HeldOut
from actors.cluster import ClusterError, LearnerDied, Restarts, actor_options, on_this_node, one_line, ray_session
from actors.dpo import DpoActor, PairSet, Record
from actors.engines import EngineKind, engine_kind
from actors.grpo import GrpoActor, Report
from actors.learner import Curve, DevCheck, LearnerActor, TrainingError
from actors.learner_group import LearnerGroupActor
from actors.memory import how_to_save, how_to_save_decoding, killed, out_of_memory
from actors.packing import TrainingSet
from actors.parts import Quarantine
from actors.policy import Policy, Sampled
from actors.probe import ProbeRow
from actors.rollout import QUARANTINE, RolloutPool
from actors.search import Searcher
from actors.search_workers import SearchWorkers
from actors.verifier_actor import Verifiers
from actors.watch import Watch
from actors.weights import Probe
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.config import Settings, TrainSettings
from pipeline.dpo_config import DpoSettings
from pipeline.engine_config import EngineSettings
from pipeline.grpo_config import GrpoSettings
from pipeline.store.synced import is_url

T = TypeVar("T")

_NUMBERS = itertools.count()  # a name stays taken for a while after its actor is dead
_POLL_SECONDS = 1.0
_DECODE_ROWS = 512  # handed over at a time: enough to keep the decoder's slots full, and progress shows


class Workers:
    """Starts Ray on first use. A context manager: on the way out, by whatever way, all actors are gone."""

    def __init__(self, settings: Settings, log_dir: Path, say: Callable[[str], None]) -> None:
        self._settings, self._log_dir, self._say = settings, log_dir.resolve(), say
        metrics.begin(metrics.Labels(settings.run.name))
        self.restarts = Restarts(settings.cluster.restarts, say)
        self._ray: ExitStack | None = None
        self._apart = False  # see Session
        self._pool: RolloutPool | None = None
        self._learner: Any = None
        self._group: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._ray is not None:
            self._ray.close()

    def start(self) -> None:
        if self._ray is None:
            stack = ExitStack()
            settings = self._settings
            found = stack.enter_context(ray_session(settings.cluster, self._log_dir, self._say, is_url(settings.run.root)))
            self._ray, self._apart = stack, found.apart
            dashboard = f", dashboard http://{found.dashboard}" if found.dashboard else ""
            self._say(f"Ray is up: {ray.cluster_resources().get('CPU', 0):g} CPUs{dashboard}")

    def pool(self, folder: Path, version: str, context: int, kind: EngineKind | None = None) -> RolloutPool:
        """The rollout pool with the weights of `folder` in every engine.

        Args:
            kind: of the engines; None is that of the settings. Where another kind runs, it makes room.

        Raises:
            ClusterError: Ray, its nodes or the actors cannot do what is asked for.
        """
        processes, wanted = self._settings.cluster.tensor_parallel, kind
        kind = engine_kind(wanted or self._settings.engine.kind)
        if processes > 1 and kind != "vllm" and wanted is None:
            raise ClusterError(f"cluster.tensor_parallel is {processes}, which needs vLLM, and vllm is not installed")
        self.start()
        if self._pool is not None and self._pool.kind != kind:
            self._pool.close()
            self._pool = None
        if self._pool is None:
            settings = self._settings
            changed: dict[str, Any] = {"engine": settings.engine.model_copy(update={"kind": kind})}
            if kind != "vllm":
                changed["cluster"] = settings.cluster.model_copy(update={"tensor_parallel": 1})
            settings = settings.model_copy(update=changed)
            self._pool = RolloutPool(
                settings, folder.resolve(), version, context, self._log_dir, self._say, self.restarts, self._apart
            )
            missing = kind == "hf" and self._settings.engine.kind == "auto" and engine_kind("auto") == "hf"
            self._say(f"engine: {self._pool.kind}" + (" (vLLM is not installed)" if missing else ""))
        self._pool.use(folder.resolve(), version)
        self._pool.new_stage()
        return self._pool

    def quarantine(self) -> Quarantine:
        """Where a stage leaves rows that cannot be done."""
        return Quarantine(self._settings.cluster.quarantine, self._log_dir / QUARANTINE)

    def fit(
        self,
        source: Path,
        target: Path,
        data: TrainingSet,
        settings: TrainSettings,
        seed: int,
        on_progress: Callable[[Curve], None],
        check: DevCheck | None = None,
        resume: Path | None = None,
        held_out: HeldOut | None = None,
    ) -> Curve:
        """Train the model of `source` in the learner, or its workers, and save it as `target`; `resume` is for checkpoints,
        `held_out` what it is checked on.

        A learner that dies is started again and goes on from its last checkpoint, with the same weights in the end.

        Raises:
            ClusterError: the learner died more often than cluster.restarts allow, or could not be placed.
        """
        group = self._settings.cluster.learner_workers > 1
        how, kept = how_to_save(settings), str(resume.resolve()) if resume else None

        def once() -> Curve:
            self._leave_gpus()
            learner = self._ready_group() if group else self._ready_learner()
            result = learner.fit.remote(str(source.resolve()), str(target.resolve()), data, settings, seed, check, kept, held_out)
            while not ray.wait([result], timeout=_POLL_SECONDS)[0]:
                answer = learner.progress.remote()
                if ray.wait([answer, result], timeout=_POLL_SECONDS)[0] == [answer]:  # a busy learner answers at the next poll
                    on_progress(self._get(answer, how))
            curve: Curve = self._get(result, how)
            return curve

        return self._persisting(once)

    def dpo(
        self,
        source: Path,
        target: Path,
        data: PairSet,
        settings: DpoSettings,
        policy: Policy,
        seed: int,
        resume: Path,
        on_records: Callable[[Sequence[Record]], None],
    ) -> None:
        """Train the model of `source` on pairs in an actor of its own, in the place of the learner, and save it as `target`.

        Args:
            resume: for checkpoints.
            on_records: called with the figures of steps and checks as they come, each once.

        Raises:
            ClusterError: the actor died or could not be placed.
        """
        self.start()
        self._stop_learner()
        how, told = "lower dpo.rows or dpo.row_tokens", 0
        folders = (str(source.resolve()), str(target.resolve()))

        def once() -> None:
            nonlocal told
            self._leave_gpus()
            options = self._learner_options("dpo")
            actor = DpoActor.options(**options).remote(str(self._log_dir / "dpo.log"))
            result = actor.fit.remote(*folders, data, settings, policy, seed, str(resume.resolve()))
            try:
                while not ray.wait([result], timeout=_POLL_SECONDS)[0]:
                    answer = actor.records.remote(told)
                    if ray.wait([answer, result], timeout=_POLL_SECONDS)[0] == [answer]:  # a busy learner answers at the next poll
                        records: list[Record] = self._get(answer, how)
                        on_records(records)
                        told += len(records)
                every: list[Record] = self._get(result, how)
                on_records(every[told:])
            finally:
                ray.kill(actor)

        self._persisting(once)

    def grpo(self, folder: Path, settings: GrpoSettings, policy: Policy, seed: int) -> GrpoLearner:
        """A GRPO learner that starts from the model of `folder`, in the place of the learner; its user closes it."""
        self.start()
        self._stop_learner()
        cluster = self._settings.cluster
        options = self._learner_options("grpo")
        actor = GrpoActor.options(**options).remote(str(folder.resolve()), settings, policy, seed, str(self._log_dir / "grpo.log"))
        return GrpoLearner(actor, cluster.start_timeout, self._settings.engine, self._leave_gpus)

    def search(self, searcher: Searcher, pool: RolloutPool) -> SearchWorkers:
        """Search workers that ask the pool of `searcher`, which is `pool` shared; their user closes them."""
        self.start()
        cluster = self._settings.cluster
        return SearchWorkers(
            searcher, searcher.how.workers, cluster.judge, self._log_dir, self._say, pool, self.restarts, cluster.row_tries,
            self.quarantine(),
        )  # fmt: skip

    def watch(self, name: str, first_step: int) -> Watch:
        """Where a training's figures go while it runs, NAME-ROUND of these, see actors/watch.py."""
        return Watch(self._log_dir, f"{name}-{metrics.labels().round}", first_step, self._settings.monitor.report_to)

    def probe(self, folder: Path, rows: Sequence[ProbeRow]) -> list[tuple[float, ...]]:
        """Log-probabilities of the asked tokens under the model of `folder`, see actors/probe.py."""
        found: list[tuple[float, ...]] = self.ask_learner("probe", str(folder.resolve()), rows)
        return found

    def verifiers(self) -> Verifiers:
        """Learned verifiers, trained and asked in the learner."""
        return Verifiers(self._ready_learner, self._get, self._persisting, self._leave_gpus)

    def decode(
        self,
        folder: Path,
        requests: Sequence[DecodeRequest],
        decoding: Decoding,
        row_tokens: int,
        on_rows: Callable[[int, int], None] = lambda rows, tokens: None,
    ) -> list[Decoded]:
        """Decodes of the model of `folder` in the order of the requests, see actors/decode.py.

        Args:
            row_tokens: longest row, prompt and emitted ids together.
            on_rows: called with the rows and tokens of each batch that comes back.

        Raises:
            ClusterError: the learner died or could not be placed.
        """
        slots = self._settings.engine.max_num_seqs
        found: list[Decoded] = []
        for start in range(0, len(requests), _DECODE_ROWS):
            batch = requests[start : start + _DECODE_ROWS]
            done: list[Decoded] = self.ask_learner("decode", str(folder.resolve()), batch, decoding, slots, row_tokens)
            tokens = sum(len(one.ids) for one in done)
            metrics.count("tokens", tokens, method="decode")
            on_rows(len(done), tokens)
            found += done
        return found

    def _learner_options(self, name: str) -> dict[str, Any]:
        """Ray options of an actor that reads and writes folders of the run."""
        options = actor_options(self._settings.cluster.learner, f"{name}-{next(_NUMBERS)}", 1)
        return on_this_node(options) if self._apart else options

    def _leave_gpus(self) -> None:
        if self._pool is not None:
            self._pool.sleep()

    def ask_learner(self, method: str, *args: Any) -> Any:
        """What the learner answers, asked again after it has died."""
        return self._persisting(lambda: self._get(getattr(self._ready_learner(), method).remote(*args)))

    def _persisting(self, once: Callable[[], T]) -> T:
        while True:
            try:
                return once()
            except LearnerDied as error:
                if not self.restarts.take("the learner", error):
                    raise

    def _ready_learner(self) -> Any:
        self.start()
        if self._learner is None:
            options = self._learner_options("learner")
            self._learner = LearnerActor.options(**options).remote(str(self._log_dir / "learner.log"))
            try:
                ray.get(self._learner.progress.remote(), timeout=self._settings.cluster.start_timeout)
            except GetTimeoutError:
                raise ClusterError(
                    f"the learner was not ready within cluster.start_timeout={self._settings.cluster.start_timeout} s; "
                    f"its log is {self._log_dir / 'learner.log'}"
                ) from None
            except RayActorError as error:
                self._learner = None
                raise LearnerDied(f"the learner died before it was ready: {one_line(error)}") from error
        return self._learner

    def _ready_group(self) -> Any:
        """The workers take the learner's place: it is started anew when it is asked for something."""
        self.start()
        self._stop_learner()
        if self._group is None:
            cluster = self._settings.cluster
            group = LearnerGroupActor.options(name=metrics.named("learners"))
            self._group = group.remote(cluster.learner_workers, cluster.learner, str(self._log_dir))
        return self._group

    def _stop_learner(self) -> None:
        if self._learner is not None:
            ray.kill(self._learner)
            self._learner = None

    def _get(self, ref: Any, how: str = "") -> Any:
        """A result of the learner; `how` says which settings save memory in what it was asked for."""
        how = how or how_to_save_decoding(self._settings.engine.max_num_seqs)
        try:
            return ray.get(ref)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if not isinstance(cause, TrainingError) and out_of_memory(cause):  # a training says so itself
                raise ClusterError(f"the learner is out of memory: {how}") from error
            raise cause from error
        except (RayActorError, OutOfMemoryError) as error:
            metrics.count("failures", what="learner")
            self._learner = self._group = None  # whoever asks again gets new ones
            raise LearnerDied(f"the learner died: {killed(error, how) or one_line(error)}") from error


class GrpoLearner:
    """The driver's side of a GrpoActor. All calls but `learn` wait for `timeout` seconds at most."""

    def __init__(self, actor: Any, timeout: float, engine: EngineSettings, leave_gpus: Callable[[], None]) -> None:
        self._actor, self._timeout, self._engine, self._leave_gpus = actor, timeout, engine, leave_gpus

    def learn(self, groups: Sequence[Sequence[int]], rollouts: Sequence[Sampled]) -> Report:
        self._leave_gpus()
        report: Report = self._get(self._actor.learn.remote(groups, rollouts), "learn", None)
        return report

    def publish(self, pool: RolloutPool, version: str) -> None:
        """Put its weights into every engine of the pool.

        Raises:
            ClusterError: either side was too slow or died, or an engine does not generate with them.
        """
        what = f"hand over weights {version} to the rollout actors"
        if self._engine.handover == "nccl":

            def send(actors: list[Any]) -> Probe:
                probe: Probe = self._get(self._actor.send.remote(actors, self._engine.dtype, self._timeout), what, self._timeout)
                return probe

            pool.transfer(send, lambda: self._weights()[1], version)
            return
        # The step comes back beside the weights, so that what goes wrong here is not taken for a fault of those who read them.
        step, weights = self._weights()
        self._get(step, what, self._timeout)
        pool.publish(weights, version)

    def _weights(self) -> tuple[Any, Any]:
        """Its step and its weights, as they come to Ray's object store."""
        step, weights = self._actor.weights.options(num_returns=2).remote(self._engine.dtype)
        return step, weights

    def save(self, folder: Path) -> None:
        self._get(self._actor.save.remote(str(folder.resolve())), "save", self._timeout)

    def checkpoint(self, folder: Path) -> None:
        self._get(self._actor.checkpoint.remote(str(folder.resolve())), "write a checkpoint", self._timeout)

    def restore(self, folder: Path) -> None:
        self._get(self._actor.restore.remote(str(folder.resolve())), "read a checkpoint", self._timeout)

    def close(self) -> None:
        ray.kill(self._actor)

    def _get(self, ref: Any, what: str, timeout: float | None) -> Any:
        try:
            return ray.get(ref, timeout=timeout)
        except GetTimeoutError:
            raise ClusterError(f"the GRPO learner did not {what} within cluster.start_timeout={timeout} s") from None
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from error
        except (RayActorError, OutOfMemoryError) as error:
            metrics.count("failures", what="GRPO learner")
            how = "lower grpo.rows or grpo.row_tokens"
            raise LearnerDied(f"the GRPO learner died: {killed(error, how) or one_line(error)}") from error


def curve_json(curve: Curve) -> dict[str, Any]:
    """A curve for a model folder: its content does not depend on how fast the machine was."""
    return {key: value for key, value in asdict(curve).items() if key != "seconds"}
