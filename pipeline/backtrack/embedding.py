"""Gives a model its undo token: a spare row of the embedding matrix where there is one, and a sensible first value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch


class UndoTokenError(ValueError):
    """The undo token cannot be added. One line."""


def add_undo_token(
    model: Any,
    tokenizer: Any,
    token: str,
    init: Literal["mean", "words"],
    words: Sequence[str],
    noise: float,
    seed: int,
) -> int:
    """Add `token` to tokenizer and model in place and initialise its input and output rows.

    A row beyond the tokenizer's length is used when the matrix has one; otherwise the matrix grows to a multiple of 64.
    `words` averages the rows of all tokens of all words, `mean` those of the whole vocabulary. Noise is Gaussian with
    expected norm `noise` x the norm of that average, so that it cannot drown it.

    Returns:
        The id of the undo token.

    Raises:
        UndoTokenError: the tokenizer already knows the text, as a token or as several.
    """
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        raise UndoTokenError(f"the tokenizer already has a token {token!r}; choose another undo.token")
    known = len(tokenizer)
    tokenizer.add_tokens([token], special_tokens=True)
    undo_id = int(tokenizer.convert_tokens_to_ids(token))
    if undo_id >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(undo_id + 1, pad_to_multiple_of=64, mean_resizing=False)
    source = sorted(set(range(known)) if init == "mean" else _word_ids(tokenizer, words))
    generator = torch.Generator().manual_seed(seed)
    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:  # an untied head has a row of its own
        matrices.append(head.weight)
    with torch.no_grad():
        for weight in matrices:
            mean = weight[source].float().mean(0).cpu()
            drawn = torch.randn(mean.shape, generator=generator)
            weight[undo_id] = (mean + drawn * (noise * mean.norm() / mean.numel() ** 0.5)).to(weight)
    return undo_id


def _word_ids(tokenizer: Any, words: Sequence[str]) -> set[int]:
    return {token for word in words for token in tokenizer(" " + word, add_special_tokens=False).input_ids}


def step_end_ids(tokenizer: Any) -> frozenset[int]:
    """Ids whose text holds a line break: the tokens that end a step."""
    return frozenset(i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i]))
