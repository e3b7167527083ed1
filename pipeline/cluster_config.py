"""Settings of the cluster and its actors; a part of pipeline/config.py."""

from __future__ import annotations

from pydantic import Field

from pipeline.task_config import Section


class ActorResources(Section):
    cpus: float = Field(1, ge=0, le=1024, description="CPUs that Ray reserves for one actor.")
    gpus: float = Field(0, ge=0, le=64, description="GPUs that Ray reserves for one actor.")
    threads: int = Field(0, ge=0, le=1024, description="Threads of one actor; 0 shares the node's cores among the actors.")


class SmallActorResources(ActorResources):
    """A learner or judge beside a rollout actor: both fit on the two cores of the smallest machine."""

    cpus: float = Field(0.5, ge=0, le=1024, description="CPUs that Ray reserves for one actor.")


class ClusterSettings(Section):
    address: str | None = Field(None, description="Ray address; null joins RAY_ADDRESS or starts Ray on this machine.")
    rollout_actors: int = Field(1, ge=1, le=4096, description="Rollout actors, each with an engine.")
    rollout: ActorResources = Field(ActorResources(), description="Resources of one rollout actor.")
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="Processes of one rollout actor's engine (vLLM), on one node, each with cluster.rollout."
    )
    learner: SmallActorResources = Field(SmallActorResources(), description="Resources of the learner, or of each of its workers.")
    learner_workers: int = Field(1, ge=1, le=4096, description="Processes that share each training step, by Ray Train.")
    judge: SmallActorResources = Field(SmallActorResources(), description="Resources of one judge task.")
    place_timeout: int = Field(
        20, ge=1, le=604_800, description="Seconds in which a cluster that is joined has to have room: nodes join, other jobs end."
    )
    start_timeout: int = Field(300, ge=5, le=86_400, description="Seconds to wait for an actor to be placed and ready.")
    batch_timeout: int = Field(
        3600, ge=1, le=604_800, description="Seconds a rollout actor may take for a batch before it is killed."
    )
    restarts: int = Field(
        20, ge=0, le=100_000, description="Rollout actors, search workers and learners started again after they died, in one run."
    )
    row_tries: int = Field(
        3, ge=1, le=100, description="Tries of a row alone that fails, or kills its process, before it is left out."
    )
    quarantine: int = Field(10, ge=0, le=1_000_000, description="Rows left out in one stage, at most; more of them stop it.")
