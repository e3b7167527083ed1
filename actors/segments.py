"""Attention within each tree or row of a packed batch, instead of over whole packed rows under a mask that hides most of them.

Linear layers go over packed rows, which hold next to no padding. Attention gathers what may see each other: segments of similar
length side by side, padded at their ends. Work and memory grow with the sum of squares of segments, not of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.backtrack.layout import Segment

NAME = "by_segment"
_PADDED = 1.25  # the longest of a group over its shortest


def attends_by_segment(model: Any) -> bool:
    """Make the model attend within segments where it can: a class of transformers that leaves attention to its interface.

    Without segments it attends as before, by sdpa and its masks.
    """
    if not (type(model).__module__.startswith("transformers.") and getattr(model, "_supports_attention_backend", False)):
        return False
    model.set_attn_implementation(NAME)
    return True


def blocks(rows: Sequence[Sequence[Segment]], tokens: int) -> dict[str, Any]:
    """What `attend` needs of rows of `tokens` tokens, as tensors.

    places: for each group of similar segments [segments, longest], where their tokens stand in the flattened rows.
    masks: for each group [segments, 1, longest, longest], or None where every token sees all that stand before it.
    back: [rows x tokens] where a token stands in the flattened groups; 0 for padding of rows, which nothing sees.
    """
    placed = ((number * tokens + start, segment) for number, row in enumerate(rows) for start, segment in _starts(row))
    found = sorted(((len(segment.ids), at, segment) for at, segment in placed), key=lambda one: one[:2])
    groups: list[list[tuple[int, int, Segment]]] = []
    for one in found:
        if not groups or one[0] > _PADDED * groups[-1][0][0]:
            groups.append([])
        groups[-1].append(one)
    places: list[Tensor] = []
    masks: list[Tensor | None] = []
    back = torch.zeros(len(rows) * tokens, dtype=torch.long)
    before = 0
    for group in groups:
        longest = group[-1][0]
        at = torch.arange(longest)
        starts = torch.tensor([start for _, start, _ in group]).unsqueeze(1)
        lengths = torch.tensor([length for length, _, _ in group]).unsqueeze(1)
        place = starts + at.minimum(lengths - 1)  # padding repeats the last token
        slots = before + torch.arange(place.numel()).view(place.shape)
        real = at < lengths
        back[place[real]] = slots[real]
        before += place.numel()
        places.append(place)
        masks.append(_mask([segment for _, _, segment in group], longest))
    return {"places": places, "masks": masks, "back": back}


def _starts(row: Sequence[Segment]) -> list[tuple[int, Segment]]:
    start, found = 0, []
    for segment in row:
        found.append((start, segment))
        start += len(segment.ids)
    return found


def _mask(segments: Sequence[Segment], longest: int) -> Tensor | None:
    """Padding comes behind all tokens, so those see none of it under a causal mask; under others it sees itself alone."""
    if all(_is_row(segment) for segment in segments):
        return None
    enter = torch.stack([_padded(segment.enter, range(longest)) for segment in segments])
    leave = torch.stack([_padded(segment.leave, range(1, longest + 1)) for segment in segments])
    seen = (enter.unsqueeze(1) <= enter.unsqueeze(2)) & (enter.unsqueeze(2) < leave.unsqueeze(1))
    return seen.unsqueeze(1)


def _padded(values: Sequence[int], padding: range) -> Tensor:
    return torch.tensor([*values, *padding[len(values) :]])


def _is_row(segment: Segment) -> bool:
    count = len(segment.ids)
    return list(segment.enter) == list(range(count)) and all(at == count for at in segment.leave)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, segments: Any = None, **more: Any
) -> tuple[Tensor, None]:
    """transformers' interface: query, key, value [rows, heads, tokens, width] -> [rows, tokens, heads, width]."""
    if segments is None:  # generation
        if attention_mask is NO_MASK or attention_mask is not None and attention_mask.shape[-1] < key.shape[2]:
            raise ValueError(f"{type(module).__name__} was not handed the segments of its batch")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    rows, heads, tokens, _ = query.shape
    flat = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]  # [rows x tokens, heads, width]
    found = []
    for place, mask in zip(segments["places"], segments["masks"], strict=True):
        near = [part.index_select(0, place.flatten()).unflatten(0, place.shape).transpose(1, 2) for part in flat]
        out, _ = sdpa_attention_forward(module, near[0], near[1], near[2], mask, **more | {"is_causal": mask is None})
        found.append(out.flatten(0, 1))
    together = torch.cat(found)
    return together.index_select(0, segments["back"]).view(rows, tokens, heads, -1), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""Given as attention_mask beside segments: transformers hands a 4-D mask on as it is and builds none of its own."""
