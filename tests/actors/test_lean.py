"""The short way through a decoding step gives what the model itself gives, and is left alone where it would not."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from actors import lean
from actors.decode import HfDecoder
from pipeline.backtrack.cursor import DecodeRequest, Decoding
from tests.pipeline.tiny import VOCABULARY, rule, tiny_model


def with_biases() -> Any:
    """Biases everywhere, a head of its own, as many key heads as query heads, a scaled rotation."""
    torch.manual_seed(0)
    rotation = {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    more: dict[str, Any] = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "rope_parameters": rotation}
    model = LlamaForCausalLM(LlamaConfig(**size, **more, vocab_size=VOCABULARY, initializer_range=0.3, bos_token_id=None))
    for name, part in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(part)
    return model.eval()


MODELS = {
    "llama": lambda: tiny_model("llama", torch.float32),
    "qwen2": lambda: tiny_model("qwen2", torch.float32),
    "b": with_biases,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_decodes_alike_both_ways(name: str, temperature: float) -> None:
    decoder, decoding = HfDecoder(MODELS[name](), 5, 64), Decoding("rewind", temperature, 1.0, 24, 0, rule("token"), threshold=None)
    requests = [DecodeRequest(tuple(random.Random(row).choices(range(1, 6), k=1 + row)), row) for row in range(8)]
    assert decoder._lean
    short = decoder.decode(requests, decoding)
    decoder._lean = False
    for one, other in zip(short, decoder.decode(requests, decoding), strict=True):
        assert one.ids == other.ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_new_weights_count_at_once() -> None:
    model = MODELS["llama"]()
    decoder, decoding = HfDecoder(model, 1, 64), Decoding("forbidden", 0.0, 1.0, 8, 0, rule("token"))
    before = decoder.decode([DecodeRequest((1, 2), 0)], decoding)
    with torch.no_grad():
        for part in model.parameters():
            part.mul_(-0.5)
    after = decoder.decode([DecodeRequest((1, 2), 0)], decoding)
    assert after == HfDecoder(model, 1, 64).decode([DecodeRequest((1, 2), 0)], decoding)
    assert after[0].logprobs != before[0].logprobs


def test_what_it_does_not_know_keeps_its_own_forward() -> None:
    assert lean.is_lean(MODELS["llama"]())
    assert not lean.is_lean(tiny_model("gpt2", torch.float32))
    assert not lean.is_lean(tiny_model("llama", torch.bfloat16))
    adapted = get_peft_model(MODELS["llama"](), LoraConfig(target_modules=["q_proj"]))
    assert not lean.is_lean(adapted)
    assert not lean.is_lean(adapted.base_model.model)
    other: Any = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, hidden_act="gelu"))
    assert not lean.is_lean(other)
    hooked = MODELS["llama"]()
    hooked.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out * 2)
    assert not lean.is_lean(hooked)


def test_the_head_is_called_with_what_it_reads() -> None:
    """Verifier heads hook it."""
    model = MODELS["llama"]()
    seen: list[torch.Tensor] = []
    decoder, decoding = HfDecoder(model, 2, 64), Decoding("forbidden", 0.0, 1.0, 3, 0, rule("token"))
    model.get_output_embeddings().register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    for short in (True, False):
        decoder._lean = short
        decoder.decode([DecodeRequest((1,), 0), DecodeRequest((2,), 0)], decoding)
    half = len(seen) // 2
    assert half and [one.shape for one in seen[:half]] == [one.shape for one in seen[half:]]
    for one, other in zip(seen[:half], seen[half:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
