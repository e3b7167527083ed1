"""One decoding step of a Llama or Qwen2 without the modules around its tensors: the same numbers with fewer calls.

Calls are much of a step of a small model. decode.py asks for it; any other model, and one with adapters or hooks, takes its own
forward. Weights are read from the model at each step, so those that are set or trained later count at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Qwen2ForCausalLM
from transformers.activations import SiLUActivation

from actors.ragged import RaggedCache

_CLASSES = (LlamaForCausalLM, Qwen2ForCausalLM)


def is_lean(model: Any) -> bool:
    """Whether `forward` computes what the model does: a plain one in fp32, of a class that it knows."""
    if type(model) not in _CLASSES or model.dtype != torch.float32:
        return False
    leaves = [part for part in model.model.layers.modules() if not list(part.children())]
    plain = all(type(part) in (nn.Linear, nn.SiLU, SiLUActivation) or hasattr(part, "variance_epsilon") for part in leaves)
    return plain and not any(part._forward_hooks or part._forward_pre_hooks for part in model.model.modules())


def forward(model: Any, ids_B: Tensor, columns_B: Tensor, mask: Tensor, cache: RaggedCache) -> Tensor:
    """[rows, vocabulary] Logits behind one token of each row.

    Args:
        columns_B: position of each, which is its column in the cache.
        mask: [rows, 1, 1, columns] bool, what each sees.
    """
    rows, decoder = len(ids_B), model.model
    hidden = decoder.embed_tokens(ids_B)
    cos, sin = decoder.rotary_emb(hidden.unsqueeze(1), columns_B.unsqueeze(1))  # [rows, 1, width of a head]
    half = sin.shape[-1] // 2
    # x cos + rotate_half(x) sin, where rotate_half swaps the halves and negates the first.
    sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    for number, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        normed = _norm(hidden, layer.input_layernorm)
        query, key, value = (
            F.linear(normed, part.weight, part.bias).view(rows, -1, attention.head_dim)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = (torch.addcmul(part * cos, part.roll(half, -1), sin).unsqueeze(2) for part in (query, key))
        keys, values = cache.update(key, value.unsqueeze(2), number)
        seen = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=attention.scaling, enable_gqa=keys.shape[1] != query.shape[1]
        )
        hidden = hidden + F.linear(seen.reshape(rows, -1), attention.o_proj.weight, attention.o_proj.bias)
        normed = _norm(hidden, layer.post_attention_layernorm)
        gate, up = (F.linear(normed, part.weight, part.bias) for part in (mlp.gate_proj, mlp.up_proj))
        hidden = hidden + F.linear(F.silu(gate) * up, mlp.down_proj.weight, mlp.down_proj.bias)
    # The head as a module: its hooks are asked for by verifier heads.
    logits: Tensor = model.get_output_embeddings()(_norm(hidden, decoder.norm).unsqueeze(1))
    return logits[:, 0]


def _norm(hidden: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
