"""Gives a model its undo token: a spare row of the embedding matrix where there is one, and a sensible first value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from pipeline.backtrack.undo import UndoRule, Unit


class UndoTokenError(ValueError):
    """The undo token is missing or cannot be added. One line."""


def add_undo_token(
    model: Any,
    tokenizer: Any,
    token: str,
    init: Literal["mean", "words", "description"],
    words: Sequence[str],
    description: str,
    noise: float,
    seed: int,
) -> int:
    """Add `token` to tokenizer and model in place and initialise its input and output rows.

    A row beyond the tokenizer's length is used when the matrix has one; otherwise the matrix grows to a multiple of 64.
    `mean` averages the rows of the whole vocabulary, `words` those of all tokens of all words, each token once, and
    `description` those of the tokens of that sentence, each as often as it occurs. Noise has a random direction and the
    norm `noise` x the norm of that average, so that it cannot drown it; only rounding to the model's dtype comes on top.

    Returns:
        The id of the undo token.

    Raises:
        UndoTokenError: the tokenizer already knows the text, as a token or as several, or the words or the description
            give no token. Tokenizer and model are unchanged then.
    """
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        raise UndoTokenError(f"the tokenizer already has a token {token!r}; choose another undo.token")
    # Before the token is added: in a text that names it, its own untrained row would be part of the average.
    source = _source_ids(tokenizer, init, words, description)
    tokenizer.add_tokens([token], special_tokens=True)
    undo_id = int(tokenizer.convert_tokens_to_ids(token))
    if undo_id >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(undo_id + 1, pad_to_multiple_of=64, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:  # an untied head has a row of its own
        matrices.append(head.weight)
    with torch.no_grad():
        for weight in matrices:
            mean = weight[source].float().mean(0).cpu()
            drawn = torch.randn(mean.shape, generator=generator)
            weight[undo_id] = (mean + drawn * (noise * mean.norm() / drawn.norm())).to(weight)
    return undo_id


def _source_ids(tokenizer: Any, init: str, words: Sequence[str], description: str) -> list[int]:
    """Ids whose rows are averaged."""
    if init == "mean":
        return list(range(len(tokenizer)))
    # With a space before it a word is the token that stands within a text.
    texts = [" " + word.strip() for word in words if word.strip()] if init == "words" else [description.strip()]
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    if not ids:
        raise UndoTokenError(f"undo.{init} gives no token: {(list(words) if init == 'words' else description)!r}")
    return sorted(set(ids)) if init == "words" else ids


def undo_rule(tokenizer: Any, token: str, unit: Unit) -> UndoRule:
    """The rule of a tokenizer that has the undo token.

    Raises:
        UndoTokenError: it has not.
    """
    undo_id = tokenizer.convert_tokens_to_ids(token)
    if undo_id is None or undo_id == tokenizer.unk_token_id:
        raise UndoTokenError(f"the tokenizer lacks the undo token {token!r}")
    return UndoRule(int(undo_id), unit, step_end_ids(tokenizer))


def step_end_ids(tokenizer: Any) -> frozenset[int]:
    """Ids whose text holds a line break: the tokens that end a step."""
    return frozenset(i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i]))
