"""What generates: one small interface, vLLM and transformers behind it. Token ids in, token ids out; no text passes here.

Engines run inside rollout actors (and, for dev accuracy, inside the learner); they know no problems and no judges. Torch is
imported by those that compute with it: a rollout actor whose engine has no model is a small process.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding
from pipeline.config import EngineSettings

if TYPE_CHECKING:
    from torch import Tensor

    from actors.decode import HfDecoder
    from actors.decode_vllm import VllmDecoder
    from actors.live import Live

_UNDO_PROCESSOR = "actors.decode_vllm:UndoProcessor"  # by name: its module needs vLLM to be imported
_PREFILL_TOKENS = 8192  # prompts of one vLLM step; without chunked prefill it must hold the longest one


@dataclass(frozen=True)
class Request:
    """One completion asked for."""

    prompt_ids: tuple[int, ...]
    seed: int
    """Seed of this row alone, so that a row does not depend on the batch it is in."""
    max_tokens: int | None = None
    """Ids of this row, at most, where it has room for fewer than the batch's."""


@dataclass(frozen=True)
class Sampling:
    """How a batch is decoded."""

    temperature: float
    top_p: float
    max_tokens: int
    stop_id: int
    """Generation ends with this id, which is part of the completion."""
    forbidden_ids: tuple[int, ...] = ()
    """Ids that must not be emitted; the undo token, for first-try accuracy."""
    logprobs: bool = False
    top: int = 0
    """Most probable ids that are named at each place, whatever was chosen there."""
    also_stop: tuple[int, ...] = ()
    """Ids that end a completion beside `stop_id`; they are part of it too."""


@dataclass(frozen=True)
class Completion:
    """What an engine made of a request."""

    token_ids: tuple[int, ...]
    """Emitted ids as they came, undo tokens and the stop id included."""
    logprobs: tuple[float, ...]
    """Log-probability of each emitted id at temperature 1 before any ban; empty when not asked for."""
    finish: Literal["stop", "length"]
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    """[emitted] the most probable ids of each place with their log-probabilities, as above; empty when not asked for."""


class Engine(Protocol):
    """Generates with one model; weights can be replaced in place."""

    kind: str

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion a request, in the order of the requests."""

    def decode(self, requests: Sequence[DecodeRequest], decoding: Decoding) -> list[Decoded]:
        """Decode with undo; one result a request, in the order of the requests."""

    def load_weights(self, folder: Path) -> None:
        """Replace the weights by those of another model folder of the same shape."""

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the weights by these, which have the names of a checkpoint; tied ones may be there once."""


EngineKind = Literal["vllm", "hf", "scripted", "simulated"]
MODELLESS = ("scripted", "simulated")
"""Kinds without a model: there are no weights to be checked."""


def engine_kind(asked: Literal["auto"] | EngineKind) -> EngineKind:
    """Which engine `auto` means here.

    Raises:
        RuntimeError: vllm is asked for by name and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if asked == "vllm" and not installed:
        raise RuntimeError("engine.kind is vllm, but vllm is not installed: install extra cpu or gpu, or set engine.kind=hf")
    if asked == "auto":
        return "vllm" if installed else "hf"
    return asked


def parameters(folder: Path) -> int:
    """How many parameters the model of a folder has, without loading it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return int(model.num_parameters())


def make_engine(folder: Path, settings: EngineSettings, context: int, seed: int) -> Engine:
    """Load a model folder into an engine. `context` is the longest row, prompt and completion together, in tokens."""
    if settings.kind == "scripted":
        from actors.scripted import ScriptedEngine

        return ScriptedEngine(folder, Path(str(settings.script)))  # the settings see to it that there is one
    if settings.kind == "simulated":
        from actors.simulated import SimulatedEngine

        return SimulatedEngine(settings.simulated, settings.max_num_seqs)
    if engine_kind(settings.kind) == "vllm":
        return VllmEngine(folder, settings, context, seed)
    return HfEngine.from_folder(folder, settings, context)


class VllmEngine:
    """vLLM in this process: no second process to lose, and weights go in without a restart."""

    kind = "vllm"

    def __init__(
        self, folder: Path, settings: EngineSettings, context: int, seed: int, more: Mapping[str, Any] | None = None
    ) -> None:
        """`more`: what vLLM's `LLM` is told besides, see actors/tensor_parallel.py."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # Ray actors share cores; OMP_NUM_THREADS rules
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        import torch
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        from actors.handover import BACKEND

        self._llm = LLM(
            model=str(folder),
            dtype=settings.dtype,
            max_model_len=context,
            max_num_seqs=settings.max_num_seqs,
            gpu_memory_utilization=settings.gpu_memory,
            enforce_eager=not torch.cuda.is_available(),
            enable_prefix_caching=True,
            # A prompt split over two steps rewinds its row's generator, which CPU generators cannot do.
            enable_chunked_prefill=torch.cuda.is_available(),
            max_num_batched_tokens=max(context, _PREFILL_TOKENS),
            disable_log_stats=True,
            # Decoding with undo looks at each row's ids before the next step, so steps cannot be scheduled ahead.
            logits_processors=[_UNDO_PROCESSOR],
            async_scheduling=False,
            seed=seed,
            skip_tokenizer_init=True,
            enable_sleep_mode=settings.sleep and torch.cuda.is_available(),  # vLLM refuses it on CPUs, where it has no effect
            weight_transfer_config=WeightTransferConfig(BACKEND) if settings.handover == "nccl" else None,
            **more or {},
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        from vllm import SamplingParams

        greedy = sampling.temperature == 0
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=1.0 if greedy else sampling.top_p,
                max_tokens=min(sampling.max_tokens, request.max_tokens or sampling.max_tokens),
                stop_token_ids=[sampling.stop_id, *sampling.also_stop],
                ignore_eos=True,  # the stop id is named above; a model folder may name others
                seed=None if greedy else request.seed,
                logit_bias=dict.fromkeys(sampling.forbidden_ids, -100.0) or None,
                logprobs=sampling.top if sampling.logprobs or sampling.top else None,
                detokenize=False,
            )
            for request in requests
        ]
        prompts: Any = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [_from_vllm(output.outputs[0], sampling) for output in outputs]

    def decode(self, requests: Sequence[DecodeRequest], decoding: Decoding) -> list[Decoded]:
        return self.decoder.decode(requests, decoding)

    @cached_property
    def decoder(self) -> VllmDecoder:
        """What decodes with undo; it counts how much of what it rewinds is found in the prefix cache."""
        from actors.decode_vllm import VllmDecoder

        return VllmDecoder(self._llm, self._llm.llm_engine.model_config.get_vocab_size())

    def live(self) -> Live:
        """The same engine for requests that come and go."""
        from actors.decode_vllm import VllmLive

        config = self._llm.llm_engine.model_config
        return VllmLive(self._llm.llm_engine, config.get_vocab_size(), config.max_model_len)

    def load_weights(self, folder: Path) -> None:
        self._reload(weights_path=str(folder))

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        self._reload(weights_iterator=iter(weights.items()), is_checkpoint_format=True)

    def sleep(self) -> None:
        """Give up the GPU: weights go to main memory, cached keys and values are forgotten. Nothing may be asked until `wake`."""
        self._llm.sleep(level=1)

    def wake(self) -> None:
        self._llm.wake_up()

    def transfer(self, call: str, *given: dict[str, Any]) -> None:
        """One of vLLM's calls of a weight transfer, see actors/handover.py."""
        getattr(self._llm, call)(*given)
        if call == "finish_weight_update":
            self._renew()

    def _reload(self, **how: Any) -> None:
        self._llm.collective_rpc("reload_weights", kwargs=how)
        self._renew()

    def _renew(self) -> None:
        self._llm.apply_model(_repack_tied_head)
        self._llm.reset_prefix_cache()


def _repack_tied_head(model: Any) -> None:
    """On CPUs vLLM multiplies by a packed copy of each weight; a reload renews it for every layer but a tied head."""
    head = getattr(model, "lm_head", None)
    if head is not None and getattr(head, "cpu_linear", None) is not None:
        head.quant_method.process_weights_after_loading(head)


def _from_vllm(output: Any, sampling: Sampling) -> Completion:
    ids = tuple(output.token_ids)
    logprobs = tuple(step[token].logprob for token, step in zip(ids, output.logprobs or (), strict=False))
    top = tuple(
        tuple((token, one.logprob) for token, one in sorted(step.items(), key=lambda item: item[1].rank)[: sampling.top])
        for step in (output.logprobs or ())
        if sampling.top
    )
    stopped = ids and ids[-1] in (sampling.stop_id, *sampling.also_stop)
    return Completion(ids, logprobs if sampling.logprobs else (), "stop" if stopped else "length", top)


class HfEngine:
    """Transformers: needs nothing but transformers, and is the faster one for very small models."""

    kind = "hf"

    def __init__(self, model: Any, max_num_seqs: int, context: int | None = None) -> None:
        """`context`: longest row, for `decode` alone."""
        self.model = model
        self._max_num_seqs, self._context = max_num_seqs, context

    @classmethod
    def from_folder(cls, folder: Path, settings: EngineSettings, context: int | None = None) -> HfEngine:
        import torch
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings.dtype), use_safetensors=True)
        return cls(model.to(device).eval(), settings.max_num_seqs, context)

    @cached_property
    def _decoder(self) -> HfDecoder:
        from actors.decode import HfDecoder

        assert self._context is not None
        return HfDecoder(self.model, self._max_num_seqs, self._context)

    def decode(self, requests: Sequence[DecodeRequest], decoding: Decoding) -> list[Decoded]:
        return self._decoder.decode(requests, decoding)

    def load_weights(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(fresh.state_dict())

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        import torch

        own = self.model.state_dict()
        with torch.no_grad():
            for name, values in weights.items():
                own[name].copy_(values)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        from actors.completions import complete

        rows = complete(self.model, requests, sampling, self._max_num_seqs)
        return [Completion(tuple(row.ids), tuple(row.logprobs), row.finish or "length", tuple(row.top)) for row in rows]
