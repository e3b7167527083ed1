"""All settings of retract: one home, one default, one bound and one sentence for each. Imports neither torch nor ray.

Those of the tasks stand in task_config.py. settings_file.py reads them from a yaml file and the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.backtrack.curriculum import parse_schedule
from pipeline.cluster_config import ClusterSettings
from pipeline.dpo_config import DpoSettings
from pipeline.engine_config import EngineSettings, check_handover, check_processes, check_sleep
from pipeline.evaluate_config import EvaluateSettings, SamplingSettings
from pipeline.experiment_config import ExperimentSettings, StudySettings
from pipeline.grpo_config import GrpoSettings, LoraSettings
from pipeline.monitor_config import MonitorSettings
from pipeline.prm_config import PrmSettings
from pipeline.search_config import SearchSettings, check_values
from pipeline.task_config import CountdownTask, Gsm8kTask, Section, SyntheticTask


class RunSettings(Section):
    name: str = Field("tiny", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Folder of the run below run.root.")
    root: str = Field(
        "runs", min_length=1, description="Folder that holds all runs, relative to the working folder; or a URL (docs/store.md)."
    )
    cache: str = Field("~/.cache/retract", min_length=1, description="Folder of working copies, where run.root is a URL.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything; each row gets its own from it.")
    rounds: int = Field(1, ge=1, le=100, description="Self-play rounds: rollouts .. evaluate on the newest accepted model.")
    patience: int = Field(2, ge=1, le=100, description="Rounds refused in a row after which no other begins.")
    enough: float = Field(1.0, gt=0, le=1, description="Dev accuracy of an accepted round after which no other begins.")


class UndoSettings(Section):
    token: str = Field("<|BACKTRACK|>", min_length=1, max_length=64, description="The undo token's text.")
    unit: Literal["token", "step", "all"] = Field("step", description="What one undo token deletes.")
    init: Literal["mean", "words", "description"] = Field(
        "words", description="Embedding: mean of all rows, or of the rows of the words or of the description."
    )
    words: list[str] = Field(["undo", "wrong", "back", "delete", "mistake"], min_length=1, description="Words for init: words.")
    description: str = Field(
        "take back the previous step because it is wrong", min_length=1, description="Sentence for init: description."
    )
    noise: float = Field(0.02, ge=0, le=0.5, description="Norm of the noise added, as a share of the row's own norm.")


class ScratchModel(Section):
    layers: int = Field(4, ge=1, le=64, description="Transformer layers.")
    width: int = Field(128, ge=16, le=8192, description="Hidden size.")
    heads: int = Field(4, ge=1, le=128, description="Attention heads; must divide the width.")
    vocab: int = Field(512, ge=300, le=200_000, description="Tokens of the BPE, trained on the training problems.")
    context: int = Field(512, ge=64, le=32_768, description="Longest row the model can see.")
    undo_added: Literal["first", "last"] = Field(
        "first",
        description="Before training, which teaches its row that it never comes; or behind it, as to a loaded model.",
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 x heads ({2 * self.heads}), is {self.width}")
        return self


class TrainSettings(Section):
    steps: int = Field(400, ge=1, le=10_000_000, description="Optimiser steps, at most.")
    rows: int = Field(16, ge=1, le=4096, description="Packed rows in one step.")
    row_tokens: int = Field(256, ge=32, le=131_072, description="Tokens of a packed row.")
    lr: float = Field(1e-3, gt=0, le=1, description="Peak learning rate (AdamW).")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of the steps that warm up; then cosine decay to 10 %.")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay.")
    log_every: int = Field(20, ge=1, description="Steps between two points of the loss curve.")
    checkpoint_every: int = Field(200, ge=1, description="Steps between checkpoints, from which a killed run goes on.")
    accumulate: int = Field(1, ge=1, le=4096, description="Parts into which the rows of a step are split, to save memory.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Numbers to compute in; weights stay float32.")
    gradient_checkpointing: bool = Field(False, description="Compute activations twice instead of keeping them: less memory.")
    compile: bool = Field(False, description="torch.compile for the layers; needs a C++ compiler on CPUs.")


class BaseTraining(TrainSettings):
    steps: int = Field(1600, ge=1, le=10_000_000, description="Optimiser steps, at most.")
    lr: float = Field(3e-3, gt=0, le=1, description="Peak learning rate (AdamW).")
    check_every: int = Field(200, ge=1, description="Steps between two measurements of greedy dev accuracy.")
    check_problems: int = Field(150, ge=4, description="Dev problems in such a measurement.")
    patience: int = Field(3, ge=1, description="Stop after this many measurements without a rise; the best model is kept.")


def prompt_template(value: str) -> str:
    """The value, if a question can be put into it."""
    try:
        once = value.format(question="") != value and value.count("{question}") == 1
    except (LookupError, ValueError):
        once = False
    if not once:
        raise ValueError("must hold {question} exactly once, and other braces doubled")
    return value


class BaseSettings(Section):
    model: str = Field("scratch", min_length=1, description="scratch, a hub id, or a local Hugging Face folder.")
    trust_remote_code: bool = Field(False, description="Run code that comes with a hub model.")
    prompt: str = Field("{question}\n", description="How a question becomes a prompt; holds {question} once.")
    scratch: ScratchModel = Field(ScratchModel(), description="The tiny model, for model: scratch.")
    train: BaseTraining = Field(BaseTraining(), description="Its training, for model: scratch.")

    @field_validator("prompt")
    @classmethod
    def _has_question(cls, value: str) -> str:
        return prompt_template(value)


class RolloutSettings(SamplingSettings):
    mode: Literal["forbidden", "rewind"] = Field(
        "forbidden", description="First tries, undo forbidden; or tries with undo as in decode, of which what survives is judged."
    )
    problems: int | None = Field(None, ge=1, description="Training problems to sample; null takes all.")
    samples: int = Field(2, ge=1, le=1024, description="Completions for each problem.")
    hot_samples: int = Field(0, ge=0, le=1024, description="More completions for each problem, for near misses.")
    hot_temperature: float = Field(1.4, gt=0, le=5, description="Temperature of these.")
    max_tokens: int = Field(256, ge=1, le=131_072, description="Longest completion.")
    batch: int = Field(256, ge=1, le=65_536, description="Requests handed to an actor at a time.")
    logprobs: bool = Field(True, description="Store the log-probability of every emitted token.")


class JudgeSettings(Section):
    batch: int = Field(1000, ge=1, le=1_000_000, description="Rollouts in one judge task.")
    method: Literal["auto", "symbolic", "rollouts", "combined"] = Field(
        "auto", description="First errors: auto is exact where the task can decide, else symbolic and rollouts combined."
    )
    samples: int = Field(4, ge=1, le=256, description="Completions of a prefix, for rollouts and combined.")
    sure: float = Field(0.9, gt=0, lt=1, description="Combined: posterior of a step at which its search ends.")
    budget: int | None = Field(None, ge=1, description="Combined: prefixes sampled for a solution, at most; null is no limit.")


Ratio = Annotated[float, Field(ge=0, le=100)]


class TraceMix(Section):
    """Traces of each source for each self trace that was found, as far as the source has them.

    Where `self` is 0 or finds none they count for each training problem instead.
    """

    self: Ratio = Field(1.0, description="Errors of rollouts.temperature, localised by the judge.")
    near_miss: Ratio = Field(0.0, description="Errors of rollouts.hot_samples that are close to a right step.")
    random: Ratio = Field(0.0, description="Random tokens put in at a random place.")
    aligned: Ratio = Field(0.0, description="Steps of a wrong solution put into a right one of the same problem.")
    search: Ratio = Field(0.0, description="Wrong branches of search trees, of the stage search or traces.search_trees.")


class LossFilter(Section):
    """After Toolformer (Schick et al. 2023): keeps a trace only if its undo makes the model's loss on what follows fall."""

    margin: float | None = Field(None, description="Least fall of the mean loss, in nats a token; null leaves the filter out.")
    window: int = Field(16, ge=1, le=4096, description="Tokens of the continuation over which losses are compared.")


class TraceFilters(Section):
    duplicates: bool = Field(True, description="Leave out traces that are token for token like an earlier one.")
    max_tokens: int | None = Field(None, ge=8, description="Longest trace, prompt included; null takes sft.row_tokens.")
    most_undos: int | None = Field(None, ge=1, description="Most undo tokens in a trace; null is no limit.")
    kinds: list[str] | None = Field(
        None, min_length=1, description="Kinds of first error, as judged, that can be seen; null takes all."
    )
    late_evidence: bool = Field(False, description="Only errors that right inferences follow before the undo: seen in hindsight.")
    loss: LossFilter = Field(LossFilter(), description="Only undos that help the model.")


class TraceSettings(Section):
    mix: TraceMix = Field(TraceMix(), description="Traces by source.")
    filters: TraceFilters = Field(TraceFilters(), description="Which traces are left out.")
    max_errors: int = Field(3, ge=1, le=64, description="Different wrong tries of a problem in one trace, at most.")
    random_tokens: int = Field(3, ge=1, le=64, description="Random tokens of a random error, at most.")
    nearness: float = Field(0.5, ge=0, le=1, description="Least share of tokens that a near miss has in common with a right step.")
    search_trees: str | None = Field(None, description="Folder with a dataset of search trees, see docs/search.md.")
    clean_ratio: float = Field(1.0, ge=0, le=100, description="Clean rows for each trace.")
    replay: bool = Field(True, description="Keep the traces of earlier rounds.")

    @model_validator(mode="after")
    def _has_sources(self) -> Self:
        if not any(getattr(self.mix, source) for source in TraceMix.model_fields):
            raise ValueError("mix takes traces from no source: one of them must be above 0")
        return self


class RoleWeights(Section):
    prefix: float = Field(1.0, ge=0, le=100, description="Right tokens before the error.")
    error: float = Field(1.0, ge=0, le=100, description="Wrong decisions; counts with mask none alone.")
    consequence: float = Field(1.0, ge=0, le=100, description="Right inferences from a wrong decision.")
    undo: float = Field(1.0, ge=0, le=100, description="Undo tokens.")
    correction: float = Field(1.0, ge=0, le=100, description="The right way after the undo, and clean rows.")


class CheckSettings(Section):
    """Checks while training, see actors/checks.py."""

    every: int | None = Field(300, ge=1, description="Steps between two checks, the start and the end included; null is none.")
    problems: int = Field(200, ge=1, le=100_000, description="Dev problems on which the start model's own errors are sampled.")
    first_tries: int = Field(
        100, ge=0, le=100_000, description="Dev problems decoded with undo forbidden: whether first tries get worse. 0: none."
    )


class RewardWeightSettings(Section):
    """Reward-weighted regression, see rewards/regression.py."""

    beta: float | None = Field(None, gt=0, le=100, description="Of the weights exp((reward - mean) / beta) of traces; null is off.")
    most: float = Field(20.0, ge=1, le=1000, description="Largest of these weights, before their mean is set to 1.")


class FsdpSettings(Section):
    """What transformers' fsdp_config may be set to; null leaves transformers' own default. What is saved is one whole model."""

    reshard_after_forward: bool | None = Field(None, description="Gather the weights a second time for the backward pass.")
    cpu_offload: bool | None = Field(None, description="Keep the shards in main memory.")
    activation_checkpointing: bool | None = Field(None, description="Compute activations twice instead of keeping them.")
    transformer_layer_cls_to_wrap: str | None = Field(None, min_length=1, description="Class of the layers that are sharded.")


class SftSettings(TrainSettings):
    init: Literal["previous", "base"] = Field(
        "previous", description="Each round trains the newest accepted model, or the base model again on all that replay kept."
    )
    form: Literal["soft", "hard", "rewind"] = Field("rewind", description="What the model sees of deleted tokens.")
    rewinding: Literal["deferred", "immediate"] = Field("deferred", description="Unit token, rewind: undos act as a run, or each.")
    hide_undos: bool = Field(False, description="Form hard: nothing sees an undo token but itself.")
    positions: Literal["kept", "depth"] = Field("kept", description="Form hard: positions as emitted, or restarting.")
    mask: Literal["none", "decision", "span"] = Field(
        "decision", description="Not taught: nothing (the bad example), wrong decisions, or all that is deleted."
    )
    detect_at: Literal["first", "step_end", "evidence"] = Field(
        "evidence", description="Undo is the target behind the wrong decision, at the end of its step, or at the evidence."
    )
    train_prompt: bool = Field(False, description="Whether prompts are targets too.")
    weights: RoleWeights = Field(RoleWeights(), description="What a target counts, by role.")
    dynamic: bool = Field(False, description="Mask none: a target counts by what a network, trained along, takes for right.")
    head_weight: float = Field(0.0, ge=0, le=100, description="Weight of a verifier head's loss, trained along; 0 trains none.")
    reward_weight: RewardWeightSettings = Field(RewardWeightSettings(), description="What a trace counts, by its reward.")
    together: bool = Field(True, description="Form rewind: traces of a problem share one tree.")
    most_undos: list[list[int]] | None = Field(None, description="[[step, undos], ..]: most undos of a trace from a step on.")
    trainable: Literal["all", "undo_row", "lora"] = Field("all", description="Which weights are trained.")
    lora: LoraSettings = Field(LoraSettings(), description="For trainable: lora.")
    control: bool = Field(True, description="Also train the clean control: same steps, clean rows only.")
    in_context: bool = Field(
        False, description="Also train the control that searches in its context: same steps, same traces, failed tries stay there."
    )
    fsdp: FsdpSettings | None = Field(None, description="Shard the model by FSDP; {} for its defaults, null does not.")
    deepspeed: str | None = Field(None, min_length=1, description="Train by DeepSpeed, which has to be installed: its JSON file.")
    checks: CheckSettings = Field(CheckSettings(), description="What is measured while it trains.")

    @field_validator("most_undos")
    @classmethod
    def _is_schedule(cls, value: list[list[int]] | None) -> list[list[int]] | None:
        if value is not None:
            parse_schedule("sft.most_undos", value, least=0)
        return value

    @model_validator(mode="after")
    def _dynamic_sees_errors(self) -> Self:
        if self.dynamic and self.mask != "none":
            raise ValueError(f"dynamic needs mask: none, is {self.mask}: it learns from the errors what to leave out")
        return self

    @model_validator(mode="after")
    def _sharded_one_way(self) -> Self:
        if self.fsdp is not None and self.deepspeed is not None:
            raise ValueError("fsdp and deepspeed cannot both be set")
        return self


class SignalSettings(Section):
    kind: Literal["probability", "margin", "entropy", "repeat", "score"] = Field(
        "probability",
        description="Asks for undo: a token's own probability, best two too close, entropy (nats), repeated text, or a learned "
        "verifier's score.",
    )
    threshold: float = Field(0.3, ge=0, le=20, description="Undo where entropy is above this, or the others below.")
    ngram: int = Field(8, ge=1, le=1024, description="Kind repeat: tokens that stand there twice.")
    by: Literal["head", "prm"] = Field("head", description="Kind score: by the verifier head or the process reward model.")
    folder: str | None = Field(
        None,
        min_length=1,
        description="Kind score: where that stands; null is the run's stage prm, or else the model's own folder.",
    )

    @model_validator(mode="after")
    def _within_bounds(self) -> Self:
        if self.kind in ("probability", "margin", "score") and self.threshold > 1:
            raise ValueError(f"threshold must lie in 0 .. 1 for kind {self.kind}, is {self.threshold}")
        return self


class DecodeSettings(Section):
    """Decoding that takes deleted text out of the model's context, see pipeline/backtrack/cursor.py."""

    threshold: float | None = Field(
        0.7, ge=0, le=1, description="Undo exactly where P(undo) is above this; null samples undo like any token."
    )
    undo_bias: float = Field(0.0, ge=-100, le=100, description="Added to the logit of undo; needs threshold: null.")
    ban_tried: bool = Field(True, description="Forbid what was taken back where it was tried.")
    max_undos: int = Field(32, ge=1, le=131_072, description="Undo tokens of a sample, at most.")
    max_undos_per_state: int = Field(12, ge=1, le=131_072, description="Returns to the same text, at most.")
    rewinding: Literal["deferred", "immediate"] = Field("deferred", description="Unit token: undos act as a run, or each.")
    signal: SignalSettings = Field(SignalSettings(), description="What asks for undo in mode guided, in place of the model.")

    @model_validator(mode="after")
    def _one_decides(self) -> Self:
        if self.undo_bias and self.threshold is not None:
            raise ValueError(
                f"undo_bias has no effect beside a threshold: set undo_bias to 0, is {self.undo_bias}, "
                f"or threshold to null, is {self.threshold}"
            )
        return self


class ReportSettings(Section):
    rollouts: int = Field(50, ge=0, le=10_000, description="Rollouts shown, deleted tokens struck through.")
    judged: int = Field(30, ge=0, le=10_000, description="Wrong training rollouts shown, their first error marked.")


Task = Annotated[SyntheticTask | Gsm8kTask | CountdownTask, Field(discriminator="name")]


class Settings(Section):
    """The whole configuration."""

    run: RunSettings = Field(RunSettings(), description="Where, how often, which seed.")
    task: Task = Field(SyntheticTask(), description="Where problems come from.")
    undo: UndoSettings = Field(UndoSettings(), description="The undo token.")
    base: BaseSettings = Field(BaseSettings(), description="The model to start from.")
    engine: EngineSettings = Field(EngineSettings(), description="What generates.")
    cluster: ClusterSettings = Field(ClusterSettings(), description="What runs where.")
    monitor: MonitorSettings = Field(MonitorSettings(), description="What is watched while it runs.")
    rollouts: RolloutSettings = Field(RolloutSettings(), description="Sampling the model's own tries.")
    judge: JudgeSettings = Field(JudgeSettings(), description="Right or wrong, and where it went wrong.")
    traces: TraceSettings = Field(TraceSettings(), description="Backtrack traces from judged rollouts.")
    sft: SftSettings = Field(SftSettings(), description="Masked fine-tuning.")
    search: SearchSettings = Field(SearchSettings(), description="Tree search for undo strategies.")
    prm: PrmSettings = Field(PrmSettings(), description="Learned verifiers: process reward model and verifier head.")
    dpo: DpoSettings = Field(DpoSettings(), description="Learning from preferences.")
    grpo: GrpoSettings = Field(GrpoSettings(), description="Reinforcement learning of when to undo.")
    decode: DecodeSettings = Field(DecodeSettings(), description="Decoding that rewinds.")
    evaluate: EvaluateSettings = Field(EvaluateSettings(), description="Measuring.")
    experiment: ExperimentSettings = Field(ExperimentSettings(), description="Ways to fine-tune, compared.")
    study: StudySettings = Field(StudySettings(), description="Whole runs, compared.")
    report: ReportSettings = Field(ReportSettings(), description="The page.")

    @model_validator(mode="before")
    @classmethod
    def _default_task(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("task"), dict):
            return value | {"task": {"name": "synthetic"} | value["task"]}
        return value

    @model_validator(mode="after")
    def _rows_divide(self) -> Self:
        workers = self.cluster.learner_workers
        for key, train in (("base.train", self.base.train), ("sft", self.sft)):
            unused = train is self.base.train and self.base.model != "scratch"
            if not unused and train.rows % (workers * train.accumulate):
                raise ValueError(
                    f"{key}.rows must be a multiple of cluster.learner_workers x {key}.accumulate = {workers} x "
                    f"{train.accumulate}, is {train.rows}"
                )
        if self.grpo.reward.process_model and self.grpo.steps and not self.prm.steps:
            raise ValueError("grpo.reward.process_model needs the stage prm: set prm.steps")
        if self.sft.dynamic and workers > 1:
            raise ValueError(f"sft.dynamic trains in one process: set cluster.learner_workers to 1, is {workers}")
        if self.sft.head_weight and workers > 1:
            raise ValueError(f"sft.head_weight trains in one process: set cluster.learner_workers to 1, is {workers}")
        sharded = "fsdp" if self.sft.fsdp is not None else "deepspeed" if self.sft.deepspeed is not None else None
        if sharded and workers < 2:
            raise ValueError(f"sft.{sharded} needs cluster.learner_workers of 2 or more, is {workers}")
        return self

    @model_validator(mode="after")
    def _search_has_trees(self) -> Self:
        if self.traces.mix.search and self.traces.search_trees is None and not self.search.problems:
            raise ValueError("traces.mix.search needs search.problems, or traces.search_trees, a folder with search trees")
        if self.search.problems:
            check_values(self.search, self.prm, self.run.rounds)
        for key, asked in (("prm.labels", self.prm.steps and self.prm.labels), ("dpo.pairs", self.dpo.steps and self.dpo.pairs)):
            if asked in ("search", "both") and not self.search.problems:
                raise ValueError(f"{key} is {asked}, which needs the stage search: set search.problems")
        return self

    @model_validator(mode="after")
    def _engine_fits_the_rest(self) -> Self:
        check_processes(self.engine, self.cluster)
        check_sleep(self.engine, self.grpo)
        return self

    @model_validator(mode="after")
    def _rollouts_can_be_learned(self) -> Self:
        grpo, longest = self.grpo, self.engine.max_prompt + self.grpo.max_tokens
        if grpo.steps == 0:
            return self
        check_handover(self.engine, self.cluster, grpo)
        if longest > grpo.row_tokens:
            raise ValueError(f"grpo.row_tokens must hold engine.max_prompt + grpo.max_tokens = {longest}, is {grpo.row_tokens}")
        if grpo.undo == "epsilon" and self.decode.threshold is None:
            raise ValueError("grpo.undo: epsilon needs decode.threshold, is null")
        deferred = self.undo.unit == "token" and self.decode.rewinding == "deferred"
        if grpo.undo == "epsilon" and deferred:
            raise ValueError("grpo.undo: epsilon needs undo.unit step or all, or decode.rewinding: immediate")
        if grpo.control and not self.sft.control:
            raise ValueError("grpo.control starts from the clean control: set sft.control")
        return self

    @model_validator(mode="after")
    def _variants_fit(self) -> Self:
        for name in self.experiment.variants:
            try:
                variant(self, name)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                key = ".".join(["sft", *map(str, first["loc"])])
                raise ValueError(f"experiment.variants.{name}: {key}: {first['msg'].removeprefix('Value error, ')}") from None
        return self


def variant(settings: Settings, name: str) -> SftSettings:
    """The section sft as a variant of the experiment changes it; checks are at `sft.checks.every`, or at the end alone."""
    return SftSettings.model_validate(merged(settings.sft.model_dump(), settings.experiment.variants[name]))


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with changes put over them."""
    return dict(values) | {
        key: merged(values[key], value) if isinstance(value, dict) and isinstance(values.get(key), dict) else value
        for key, value in changes.items()
    }


def of_one_task(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values, without those of a task in whose place the changes put another."""
    before, after = values.get("task"), changes.get("task")
    if isinstance(before, dict) and isinstance(after, dict):
        name = before.get("name", "synthetic")
        if after.get("name", name) != name:
            return {key: value for key, value in values.items() if key != "task"}
    return dict(values)
