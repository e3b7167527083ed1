"""Weights on their way from a learner to the engines, and the proof that an engine generates with them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.engines import MODELLESS, Engine, Request, Sampling

_PROBES = 16  # random prompts whose next token is compared
_PROBE_TOKENS = 3  # of each: the probe is most of what handing over a large model costs on CPUs


@dataclass(frozen=True)
class Probe:
    """What a model says of random prompts."""

    prompts: tuple[tuple[int, ...], ...]
    logprobs: npt.NDArray[np.float32]
    """[prompts, vocabulary] Of the next token, in fp32."""


@dataclass(frozen=True)
class Weights:
    """A model's weights as plain arrays, which Ray hands over without packing them, with a probe that tells them from others."""

    arrays: Mapping[str, npt.NDArray[Any]]
    """By the names of a checkpoint. bfloat16, which numpy lacks, as int16 of the same bits."""
    dtype: str
    probe: Probe

    @classmethod
    def of(cls, model: Any, dtype: str) -> Weights:
        """Those of a model; `dtype` is what the engine computes in."""
        parts = {name: values.detach().to("cpu", getattr(torch, dtype)) for name, values in unique(model.state_dict()).items()}
        return cls(as_arrays(parts), dtype, probe_of(model))

    def tensors(self) -> dict[str, Tensor]:
        """They share memory with the arrays: not to be written to."""
        return as_tensors(self.arrays, self.dtype)


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    """Tensors on a CPU as arrays of the same memory where they are contiguous; bfloat16 as int16."""
    parts = {name: part.contiguous() for name, part in tensors.items()}
    return {name: (part.view(torch.int16) if part.dtype == torch.bfloat16 else part).numpy() for name, part in parts.items()}


def as_tensors(arrays: Mapping[str, npt.NDArray[Any]], dtype: str) -> dict[str, Tensor]:
    """The inverse, in the same memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that what Ray hands over is read-only
        return {name: torch.from_numpy(array).view(getattr(torch, dtype)) for name, array in arrays.items()}


def unique(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once, by its first name: tied weights have two."""
    seen: dict[tuple[int, torch.Size], str] = {}
    return {name: part for name, part in weights.items() if seen.setdefault((part.data_ptr(), part.shape), name) == name}


def probe_of(model: Any) -> Probe:
    """A probe of this model, the same prompts for every model of its vocabulary."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts = torch.randint(0, vocabulary, (_PROBES, _PROBE_TOKENS), generator=generator)
    training = model.training
    model.eval()
    with torch.inference_mode():
        logits = model(input_ids=prompts.to(model.device), use_cache=False, logits_to_keep=1).logits[:, -1].float()
    model.train(training)
    return Probe(tuple(map(tuple, prompts.tolist())), torch.log_softmax(logits, -1).cpu().numpy())


def probe_of_folder(folder: Path) -> Probe:
    return probe_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def check_weights(engine: Engine, probe: Probe, dtype: str, what: str) -> None:
    """Compare the engine's log-probabilities with those of the model whose weights it should have.

    Args:
        what: the weights, for the error.

    Raises:
        RuntimeError: they differ by more than rounding, so the engine does not generate with these weights.
    """
    if engine.kind in MODELLESS:
        return
    # No stop id can end a completion of one token early.
    sampling = Sampling(temperature=0, top_p=1, max_tokens=1, stop_id=0, logprobs=True)
    found = engine.generate([Request(prompt, 0) for prompt in probe.prompts], sampling)
    allowed = 0.02 if dtype == "float32" else 0.3
    off = max(abs(one.logprobs[0] - float(row[one.token_ids[0]])) for one, row in zip(found, probe.logprobs, strict=True))
    if not off <= allowed:
        raise RuntimeError(f"the engine does not generate with the weights of {what}: log-probabilities are off by {off:.3f}")
