"""Tiny random models and obvious slow versions, for the tests of the token tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pipeline.backtrack.layout import IGNORE, Layout, Segment, action_logprobs, lay_out
from pipeline.backtrack.targets import Targets, trace_walk
from pipeline.backtrack.trace import Detour, Trace, WrongTry, build_trace
from pipeline.backtrack.tree import Rewinding, Walk
from pipeline.backtrack.undo import UndoRule, Unit, apply_undo

U, END, VOCABULARY = 7, 3, 8
PLACES = 128
FORMS: list[tuple[Unit, Rewinding]] = [("token", "immediate"), ("token", "deferred"), ("step", "immediate"), ("all", "immediate")]


def rule(unit: Unit) -> UndoRule:
    return UndoRule(U, unit, frozenset({END}))


def trace_at(
    prompt: Sequence[int], prefix: Sequence[int], tries: Sequence[WrongTry], correction: Sequence[int], rule: UndoRule
) -> Trace:
    """A trace whose tries all leave the right way at the same place."""
    return build_trace(prompt, [*prefix, *correction], [Detour(len(prefix), one) for one in tries], rule)


def labels_of(trace: Trace, rule: UndoRule, targets: Targets) -> list[int]:
    """A target for each token of a trace, IGNORE where none is taught."""
    walk = trace_walk(trace, rule, targets)
    assert walk.targets is not None and walk.weights is not None
    wanted = [token if weight else IGNORE for token, weight in zip(walk.targets, walk.weights, strict=True)]
    return [IGNORE] * trace.prompt_length + wanted


def tiny_model(name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> Any:
    """2 layers, width 32, weights far from zero so that every difference in the context shows."""
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": PLACES,
    }  # fmt: skip
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "initializer_range": 0.3,
        "attn_implementation": attention,
        "bos_token_id": None,
    }
    shared |= {"eos_token_id": None}
    model: Any
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**size, **shared))
    elif name == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**size, **shared))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=PLACES, **shared))
    if dtype == torch.float64:
        exact_norms(model)
    return model.to(dtype).eval()


def exact_norms(module: torch.nn.Module) -> None:
    """transformers' RMS norms compute in fp32 whatever they are given; torch's keep fp64."""
    for name, child in module.named_children():
        if type(child).__name__.endswith("RMSNorm"):
            norm: Any = child
            exact = torch.nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon)
            exact.weight = norm.weight
            setattr(module, name, exact)
        else:
            exact_norms(child)


def forward(model: Any, layout: Layout, **more: Any) -> Any:
    mask = layout.attention_mask()
    if model.config._attn_implementation == "eager":  # adds its mask
        mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    ids = {} if "inputs_embeds" in more else {"input_ids": layout.input_ids}
    return model(**ids, position_ids=layout.position_ids, attention_mask=mask, use_cache=False, **more)


def score(model: Any, *segments: Segment) -> torch.Tensor:
    """Log-probabilities of all actions of segments that share a row."""
    layout = lay_out([segments])
    with torch.no_grad():
        return action_logprobs(forward(model, layout).logits, layout)


def plain(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """[tokens, vocabulary] of an ordinary forward."""
    logprobs: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return logprobs


def decisions(walk: Walk, unit: Unit, rewinding: Rewinding) -> list[tuple[tuple[int, ...], int, bool]]:
    """(visible context, token, whether it is the end of a run) of every action of a walk, each found from the start again."""
    found = []
    ids = walk.ids
    for step, token in enumerate(ids):
        run = 0
        while rewinding == "deferred" and run < step and ids[step - 1 - run] == U:
            run += 1
        clean = walk.prompt + apply_undo(ids[:step], rule(unit)).surviving
        in_run = walk.prompt + apply_undo(ids[: step - run], rule(unit)).surviving + (U,) * run
        if run and token != U:
            found.append((in_run, U, True))
        found.append((in_run if token == U else clean, token, False))
    return found


def slow_logprobs(model: Any, walks: list[Walk], unit: Unit, rewinding: Rewinding) -> torch.Tensor:
    """A forward of its own for every action."""
    out = []
    with torch.no_grad():
        for walk in walks:
            for context, token, ends_run in decisions(walk, unit, rewinding):
                logprob = plain(model, context)[-1, token]
                out.append((1 - logprob.exp()).log() if ends_run else logprob)
    return torch.stack(out) if out else torch.zeros(0, dtype=model.dtype)
