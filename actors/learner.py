"""The learner: TRL's SFTTrainer on packed trees and rows, inside one Ray actor. It knows traces, not where they come from."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments
from trl import SFTConfig, SFTTrainer

from actors import metrics
from actors.checkpoints import KEPT, Checkpoints, Snapshot, claim
from actors.checks import CheckError, Checks, HeldOut, Measured
from actors.decode import HfDecoder
from actors.dynamic import DynamicMask
from actors.engines import HfEngine, Request, Sampling
from actors.memory import how_to_save, out_of_memory
from actors.packing import Example, TrainingSet, collate, examples_of, pack_by_phase
from actors.probe import ProbeRow, probe
from actors.ranks import from_first, is_first, processes
from actors.segments import attends_by_segment
from actors.trainable import prepare, save
from actors.verifier_actor import Verifying
from actors.verifier_head import JointHead
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.backtrack.trace import Role
from pipeline.config import BaseTraining, SftSettings, TrainSettings
from pipeline.telemetry import redirect_process_output

_FINISHED, _CURVE = "finished", "curve.json"  # in a folder for checkpoints: the model and its curve when training is done


class TrainingError(RuntimeError):
    """Training cannot go on; one line that says at which step and why."""


@dataclass(frozen=True)
class DevCheck:
    """Greedy accuracy on held-out prompts while training; training ends when it has stopped rising."""

    prompts: tuple[tuple[int, ...], ...]
    is_right: Callable[[int, str], bool]
    """(index of the prompt, completion text) -> right."""
    max_tokens: int


@dataclass
class Curve:
    """What a training run looked like; grows while it runs."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss per target token since the point before)."""
    checks: list[tuple[int, float]] = field(default_factory=list)
    """(step, greedy dev accuracy)."""
    probes: list[Measured] = field(default_factory=list)
    """What the checks found, see checks.py."""
    right_states: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    """(step, P(U) in each held-out right state)."""
    first_tries: list[tuple[int, tuple[bool, ...], tuple[int, ...]]] = field(default_factory=list)
    """(step, whether each held-out first try is right, the errors in it)."""
    step: int = 0
    steps: int = 0
    kept_step: int = 0
    """Step of the saved weights: the best by dev accuracy, or the last."""
    target_tokens: int = 0
    """Targets of all steps by their weight, repeated ones counted as often as they stand for a trace."""
    tokens: int = 0
    """Tokens in all rows of all steps, padding left out, what a tree shares counted once."""
    left_out: int = 0
    """Traces longer than a row."""
    seconds: float = 0.0


def fit(
    source: Path,
    target: Path,
    data: TrainingSet,
    settings: TrainSettings,
    seed: int,
    curve: Curve,
    check: DevCheck | None = None,
    resume: Path | None = None,
    held_out: HeldOut | None = None,
) -> Curve:
    """Train the model of folder `source` on the traces and save it as an ordinary folder `target`.

    Several processes that are joined by torch.distributed share the rows of each step; the first one writes the files.

    Args:
        resume: a folder for checkpoints of this very training. What a killed call has left there is gone on from.
        held_out: what the training is checked on while it runs.

    Raises:
        TrainingError: a loss that is no number, a check that failed, no memory left, no trace fits into a row, the model has no
            undo token or cannot be trained that way, or the checkpoints are of another training.
    """
    try:
        return _fit(source, target, data, settings, seed, curve, check, resume, held_out)
    except Exception as error:
        if not out_of_memory(error):
            raise
        when = f"at step {curve.step + 1}" if curve.steps else "before the first step"
        raise TrainingError(f"out of memory {when}: {how_to_save(settings)}") from error


def _fit(source: Path, target: Path, data: TrainingSet, settings: TrainSettings, seed: int, curve: Curve,
         check: DevCheck | None, resume: Path | None, held_out: HeldOut | None) -> Curve:  # fmt: skip
    if resume:
        asked = settings.model_dump(mode="json", exclude={"checkpoint_every"}) | {"seed": seed, "traces": len(data.traces)}
        try:
            claim(resume, asked)
        except ValueError as error:
            raise TrainingError(str(error)) from error
    if resume and (resume / _FINISHED).is_dir():
        if is_first():
            shutil.copytree(resume / _FINISHED, target, dirs_exist_ok=True)
        _read_curve(curve, json.loads((resume / _CURVE).read_text()))
        return curve
    begun = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(source)
    if data.rule.undo_id not in tokenizer.get_vocab().values():
        raise TrainingError(f"the tokenizer of {source} has no token {data.rule.undo_id}, which traces have as the undo token")
    sft = settings if isinstance(settings, SftSettings) else SftSettings()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    by_segment = not settings.compile and attends_by_segment(model)
    torch.manual_seed(seed)  # adapters begin at random
    try:
        model = prepare(model, data.rule.undo_id, sft.trainable, sft.lora.rank, sft.lora.alpha)
    except ValueError as error:
        raise TrainingError(f"the model of {source} cannot be trained: {error}") from error
    if settings.compile:
        _decoder_of(model).compile()  # the head stays outside: which places it sees differs from batch to batch
    examples, curve.left_out = examples_of(data, settings.row_tokens)
    try:
        rows = pack_by_phase(examples, data.most_undos, settings.row_tokens, settings.steps, settings.rows, seed)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    curve.steps = settings.steps
    callbacks: list[TrainerCallback] = [_Watch(curve)]
    best = _KeepBest(curve, check, settings, tokenizer, model) if check and isinstance(settings, BaseTraining) else None
    if best:
        callbacks.append(best)
    with ExitStack() as stack:
        folder = resume or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trainer = TreeTrainer(
            model=model,
            args=_arguments(settings, seed, str(folder), saves=resume is not None),
            # The rows are packed already: the dataset only says which of them a batch is made of.
            train_dataset=Dataset.from_dict({"row": list(range(len(rows)))}),
            data_collator=lambda batch: collate(
                [[examples[index] for index in rows[item["row"]]] for item in batch],
                data,
                tokenizer.pad_token_id,
                settings.row_tokens if settings.compile else None,  # one width, so that one graph serves all batches
                by_segment,
            ),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        if sft.dynamic:
            trainer.dynamic = DynamicMask(model, seed)
        if sft.head_weight:
            trainer.joint, trainer.joint_weight = JointHead(model, data.rule.undo_id, seed), sft.head_weight
        if held_out and sft.fsdp is None and sft.deepspeed is None:  # one process alone sees no whole model of a sharded one
            row = [examples[index] for index in _with_errors(rows, examples)]
            trainer.add_callback(Checks(held_out, curve, trainer, data, row, tokenizer.pad_token_id, settings.row_tokens))
        checkpoints = Checkpoints(folder, _Progress(curve, trainer, best))
        trainer.add_callback(checkpoints)
        newest = checkpoints.resume()
        try:
            trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        except CheckError as error:
            raise TrainingError(f"a check failed: {error}") from error
        curve.target_tokens = round(trainer.targets_seen)
        model = _unsharded(trainer, model, source, data, sft)
    if best:
        best.restore()
    else:
        curve.kept_step = curve.step
    curve.tokens = sum(examples[index].tokens for row in rows[: curve.step * settings.rows] for index in row)
    if is_first():
        save(model.eval(), tokenizer, target, sft.trainable)
        if trainer.joint:
            trainer.joint.save(target)
    curve.seconds = time.monotonic() - begun
    if resume and is_first():
        (resume / _CURVE).write_text(json.dumps(asdict(curve)))
        part = resume / f"{_FINISHED}.part"
        shutil.copytree(target, part, dirs_exist_ok=True)
        part.rename(resume / _FINISHED)
    return curve


def _with_errors(rows: Sequence[Sequence[int]], examples: Sequence[Example]) -> Sequence[int]:
    """The first row that holds a wrong decision; the first one where none does."""
    wrong = {index for index, one in enumerate(examples) if any(Role.ERROR in trace.roles for trace in one.traces)}
    return next((row for row in rows if wrong.intersection(row)), rows[0])


class _Progress:
    """What a checkpoint has to hold beside the trainer's own state."""

    def __init__(self, curve: Curve, trainer: TreeTrainer, best: _KeepBest | None) -> None:
        self._curve, self._trainer, self._best = curve, trainer, best

    def snapshot(self) -> Snapshot:
        self._trainer.last_saved = self._curve.step
        values = {"curve": asdict(self._curve), "targets_seen": self._trainer.targets_seen}
        if self._best is None:
            found: dict[str, torch.Tensor] = {}
            for name, part in self._parts():
                found |= {f"{name}{key}": one for key, one in part.tensors().items()}
            return Snapshot(values, found)
        return Snapshot(values | {"best": [self._best.accuracy, self._best.without_rise]}, self._best.weights)

    def _parts(self) -> list[tuple[str, DynamicMask | JointHead]]:
        """Networks that are trained along, and what the names of their tensors begin with."""
        beside = (("dynamic/", self._trainer.dynamic), ("joint/", self._trainer.joint))
        return [(name, part) for name, part in beside if part]

    def restore(self, snapshot: Snapshot) -> None:
        _read_curve(self._curve, snapshot.values["curve"])
        self._trainer.targets_seen = snapshot.values["targets_seen"]
        self._trainer.last_saved = self._curve.step
        for name, part in self._parts():
            part.restore({key.removeprefix(name): one for key, one in snapshot.tensors.items() if key.startswith(name)})
        if self._best is not None:
            self._best.accuracy, self._best.without_rise = snapshot.values["best"]
            self._best.weights = dict(snapshot.tensors)


def _read_curve(curve: Curve, values: dict[str, Any]) -> None:
    for name, value in values.items():
        point = Measured._make if name == "probes" else tuple
        setattr(curve, name, [point(one) for one in value] if isinstance(value, list) else value)


def _arguments(settings: TrainSettings, seed: int, folder: str, saves: bool = False) -> SFTConfig:
    return SFTConfig(
        output_dir=folder,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rows // (settings.accumulate * processes()),
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=math.ceil(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if saves else "no",
        # At whole points of the loss curve, since what has come in since the last point is not saved.
        save_steps=math.ceil(settings.checkpoint_every / settings.log_every) * settings.log_every,
        save_total_limit=KEPT,
        train_sampling_strategy="sequential",  # rows are packed in the order of the steps
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        bf16=settings.dtype == "bfloat16",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,  # every batch goes through the whole model
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        **_sharding(settings),
    )


def _sharding(settings: TrainSettings) -> dict[str, Any]:
    if isinstance(settings, SftSettings) and settings.deepspeed is not None:
        return {"deepspeed": settings.deepspeed}
    if isinstance(settings, SftSettings) and settings.fsdp is not None:
        return {"fsdp": True, "fsdp_config": settings.fsdp.model_dump(exclude_none=True)}
    return {}


def _unsharded(trainer: TreeTrainer, model: Any, source: Path, data: TrainingSet, sft: SftSettings) -> Any:
    """The trained model in one piece, to be saved by the first process: shards are put together in a model like the first."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return model
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # every process gives its part
    if not is_first():
        return model
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    whole = prepare(whole, data.rule.undo_id, sft.trainable, sft.lora.rank, sft.lora.alpha)
    missing = {name for name, _ in whole.named_parameters()} - weights.keys()
    if missing:
        raise RuntimeError(f"the sharded model gave no weights for {sorted(missing)[:3]}")
    whole.load_state_dict(weights, strict=False)  # tied weights have two names
    return whole


class TreeTrainer(SFTTrainer):
    """SFTTrainer on batches of `collate`: weighted cross entropy at the places that carry a target, and logits nowhere else."""

    targets_seen = 0.0
    last_saved = 0
    """Step of the newest checkpoint."""
    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # TRL declares the default's type
    """The loss of a part of a step is divided by the targets of the whole step."""
    dynamic: DynamicMask | None = None
    """What weighs targets along the way."""
    joint: JointHead | None = None
    """A verifier head that is trained along, and what its loss counts."""
    joint_weight = 0.0

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """This process's batches of one step, and its share of what the targets of all processes weigh together.

        Gradients are averaged over the processes, so dividing by an equal share gives the mean over all targets of the step.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = torch.tensor(sum(float(batch["weight"].sum()) for batch in batches), dtype=torch.float64, device=device)
        weight = float(self.accelerator.reduce(own, "sum"))
        self.targets_seen += weight
        return batches, weight / self.accelerator.num_processes

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> torch.Tensor:
        row, column, target, weight, ends_run = (inputs[name] for name in ("row", "column", "target", "weight", "ends_run"))
        bare = self.accelerator.unwrap_model(model)
        with logits_only_at(bare, row, column) as picked:
            names = ("input_ids", "position_ids", "attention_mask", "segments")
            seen = {name: inputs[name] for name in names if name in inputs}
            logits_NV = model(**seen, use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(logits_NV, target, reduction="none")
        if ends_run.any():  # what is taught is not to emit the target: -log(1 - p)
            ended = logits_NV[ends_run]
            others = ended.scatter(1, target[ends_run].unsqueeze(1), -torch.inf)
            losses = losses.masked_scatter(ends_run, ended.logsumexp(1) - others.logsumexp(1))
        if self.dynamic:
            embedding = bare.get_input_embeddings()(target)
            weight = weight * self.dynamic.weights(picked[0], embedding, inputs["wrong"], learn=bare.training)
        loss = (losses * weight).sum() / max(num_items_in_batch, 1e-9)
        if self.joint:
            last = inputs["input_ids"][row, column]
            beside = self.joint.loss(picked[0], last, target, ends_run, inputs["weight"], learn=bare.training)
            loss = loss + self.joint_weight * beside / max(num_items_in_batch, 1e-9)
        if not loss.isfinite():
            traces = ", ".join(map(str, inputs["numbers"][:12].tolist())) + (", .." if len(inputs["numbers"]) > 12 else "")
            kept = f"; the last checkpoint is of step {self.last_saved}" if self.last_saved else ""
            where = f"at step {self.state.global_step + 1}, on traces {traces}"
            raise TrainingError(f"the loss is {loss.item()} {where}: lower the learning rate (lr){kept}")
        return loss


@contextmanager
def logits_only_at(model: Any, row: torch.Tensor, column: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Within this, the model's logits are [places, vocabulary] instead of [rows, tokens, vocabulary].

    The head sees the picked hidden states alone, so prompts, masked targets and padding cost nothing there. They come into the
    list that this gives, [places, width].
    """
    picked: list[torch.Tensor] = []

    def pick(module: Any, given: Any) -> tuple[torch.Tensor]:
        picked.append(given[0][row, column])
        return (picked[-1],)

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield picked
    finally:
        hook.remove()


def _decoder_of(model: Any) -> Any:
    """The layers without the head."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return plain.base_model


class _Watch(TrainerCallback):
    """Keeps the curve."""

    def __init__(self, curve: Curve) -> None:
        self._curve = curve

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._curve.step = state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = kwargs["logs"].get("loss")
        if loss is not None:
            self._curve.losses.append((state.global_step, float(loss)))


class _KeepBest(TrainerCallback):
    """Measures greedy dev accuracy, keeps the best weights, ends training after `patience` measurements without a rise."""

    def __init__(self, curve: Curve, check: DevCheck, settings: BaseTraining, tokenizer: Any, model: Any) -> None:
        self._curve, self._check, self._settings, self._tokenizer, self._model = (
            curve,
            check,
            settings,
            tokenizer,
            model,
        )
        self.weights: dict[str, torch.Tensor] = {}
        self.accuracy = -1.0
        self.without_rise = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self._settings.check_every and state.global_step < self._settings.steps:
            return
        accuracy = from_first(self._accuracy)
        self._curve.checks.append((state.global_step, accuracy))
        if accuracy > self.accuracy:
            self.accuracy, self.without_rise = accuracy, 0
            # Tied weights have two names and are kept once.
            self.weights = {name: part.detach().clone() for name, part in self._model.named_parameters()}
            self._curve.kept_step = state.global_step
        else:
            self.without_rise += 1
            control.should_training_stop = self.without_rise >= self._settings.patience

    def restore(self) -> None:
        self._model.load_state_dict(self.weights, strict=False)

    def _accuracy(self) -> float:
        self._model.eval()
        engine = HfEngine(self._model, max_num_seqs=128)
        stop_id = self._tokenizer.eos_token_id
        sampling = Sampling(temperature=0, top_p=1, max_tokens=self._check.max_tokens, stop_id=stop_id)
        with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
            completions = engine.generate([Request(prompt, 0) for prompt in self._check.prompts], sampling)
        self._model.train()
        texts = [self._tokenizer.decode(completion.token_ids, skip_special_tokens=True) for completion in completions]
        right = sum(self._check.is_right(index, text) for index, text in enumerate(texts))
        return right / len(texts)


class _Learner(Verifying):
    """Trains one model after another; the driver polls `progress` meanwhile. Between trainings it probes and decodes with undo."""

    def __init__(self, log_file: str) -> None:
        redirect_process_output(Path(log_file))
        self._curve, self._busy = Curve(), metrics.busy_actor(metrics.own_name())
        self._decoder: tuple[tuple[str, int, int], HfDecoder] | None = None  # what it was made from, and the decoder

    def fit(self, source: str, target: str, data: TrainingSet, settings: TrainSettings, seed: int,
            check: DevCheck | None = None, resume: str | None = None, held_out: HeldOut | None = None) -> Curve:  # fmt: skip
        self._curve, self._decoder = Curve(), None  # its memory is the training's
        kept = Path(resume) if resume else None
        with self._busy.work():
            return fit(Path(source), Path(target), data, settings, seed, self._curve, check, kept, held_out)

    def probe(self, folder: str, rows: Sequence[ProbeRow]) -> list[tuple[float, ...]]:
        return probe(Path(folder), rows)

    def decode(
        self, folder: str, requests: Sequence[DecodeRequest], decoding: Decoding, max_num_seqs: int, row_tokens: int
    ) -> list[Decoded]:
        """The model stays loaded until another one is asked for: many batches come from the same folder."""
        wanted = (folder, max_num_seqs, row_tokens)
        if self._decoder is None or self._decoder[0] != wanted:
            self._decoder = None  # never two models at a time
            self._decoder = wanted, HfDecoder.from_folder(Path(folder), max_num_seqs, row_tokens)
        with self._busy.work():
            return self._decoder[1].decode(requests, decoding)

    def progress(self) -> Curve:
        return self._curve


LearnerActor: Any = ray.remote(max_concurrency=2)(_Learner)  # type: ignore[call-overload]  # one thread trains, the other answers
