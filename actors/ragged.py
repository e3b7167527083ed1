"""A KV cache whose rows have lengths of their own: decoding with undo shortens one row while the others grow.

decode.py says where a forward writes; transformers' models use it as any other cache. It knows no tokens and no undos.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _Layer(CacheLayerMixin):
    """Keys and values [slots, kv_heads, row_tokens, head_dim], made when the first ones arrive and show their shape."""

    def __init__(self, cache: RaggedCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots, tokens = self._cache.slots, self._cache.row_tokens
        # Zeros, not whatever memory holds: a hidden column has weight 0, but 0 times NaN is NaN.
        self.keys, self.values = (
            states.new_zeros(slots, states.shape[1], tokens, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        rows, width = key_states.shape[0], key_states.shape[2]
        start, columns = self._cache.start, self._cache.columns
        if columns is None:  # new rows, which see nothing but themselves
            self.keys[start : start + rows, :, :width] = key_states
            self.values[start : start + rows, :, :width] = value_states
            return key_states, value_states
        self.keys[self._cache.rows, :, columns] = key_states[:, :, 0]
        self.values[self._cache.rows, :, columns] = value_states[:, :, 0]
        longest = self._cache.longest
        return self.keys[:rows, :, :longest], self.values[:rows, :, :longest]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.longest, 0

    def get_seq_length(self) -> int:
        return self._cache.longest

    def get_max_length(self) -> int:
        return self._cache.row_tokens


class RaggedCache(Cache):
    """Rewinding a row costs nothing: the next token is written over what was taken back, and the mask hides the rest.

    Every forward needs its own 4-D mask and position ids, since no length holds for all rows.
    """

    def __init__(self, layers: int, slots: int, row_tokens: int) -> None:
        self.slots, self.row_tokens = slots, row_tokens
        self.start = 0
        """First slot that the next prompts are written to."""
        self.columns: Tensor | None = None
        """[rows] Where the next token of each of the first rows is written; None: prompts come."""
        self.rows: Tensor | None = None
        """[rows] 0, 1, ..., beside `columns`."""
        self.longest = 0
        """Columns that the longest row fills, the next token included."""
        self._rows = [_Layer(self) for _ in range(layers)]
        super().__init__(layers=[*self._rows])

    def expect_prompts(self, start: int) -> None:
        """The next forward writes rows `start`, `start + 1`, ... from column 0 on."""
        self.start, self.columns = start, None

    def expect_tokens(self, columns: Tensor, longest: int) -> None:
        """The next forward writes one token of each of rows 0, 1, ... at its column, below `longest`."""
        self.columns, self.longest = columns, longest
        self.rows = torch.arange(len(columns), device=columns.device)

    def move(self, source: list[int], target: list[int]) -> None:
        """Copy rows into the slots of others."""
        for layer in self._rows:
            for store in (layer.keys, layer.values):
                if store is not None:
                    store[target, :, : self.longest] = store[source, :, : self.longest]
