"""Tokenizers that split characters over several tokens, and small saved models, for the tests of what users call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

UNDO, STOP = "<|BACKTRACK|>", "<|end|>"
CONTEXT = 512


def byte_level(undo: str = UNDO) -> PreTrainedTokenizerFast:
    """As GPT-2's: each byte is a token, some words are too, and one token ends within a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "a"), ("a", "Ã"), ("Ċ", "a")]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return _finished(bpe, undo)


def byte_fallback(undo: str = UNDO) -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with a mark that becomes a space, which the start of a text loses; other bytes are tokens."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "▁▁", "é", "."]
    vocabulary = {token: number for number, token in enumerate(words)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "ab"), ("▁", "▁")]
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(bpe, undo)


def _finished(bpe: Tokenizer, undo: str) -> PreTrainedTokenizerFast:
    bpe.add_special_tokens([AddedToken(STOP, special=True), AddedToken(undo, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=STOP, pad_token=STOP)


def save_model(folder: Path, tokenizer: Any = None, seed: int = 0, context: int = CONTEXT) -> Any:
    """A Llama with random weights far from zero, saved with its tokenizer; the model."""
    tokenizer = tokenizer or byte_level()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.2, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
