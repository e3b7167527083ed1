"""What engines without a model have in common: there are no weights, and decoding with undo is generating without any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from actors.engines import Completion, Request, Sampling
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding

if TYPE_CHECKING:
    from torch import Tensor


class Modelless:
    """Who derives from it answers `generate` by the prompt and the seed of each row alone."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See Engine."""
        raise NotImplementedError

    def decode(self, requests: Sequence[DecodeRequest], decoding: Decoding) -> list[Decoded]:
        """Without any undo."""
        sampling = Sampling(decoding.temperature, decoding.top_p, decoding.max_tokens, decoding.stop_id, logprobs=True)
        found = []
        for one in self.generate([Request(one.prompt_ids, one.seed) for one in requests], sampling):
            surviving = tuple(token for token in one.token_ids if token != decoding.stop_id)
            nothing = (frozenset[int](),) * len(one.token_ids)
            found.append(Decoded(one.token_ids, surviving, one.logprobs, nothing, 0, 0, one.finish))
        return found

    def load_weights(self, folder: Path) -> None:
        """It has none."""

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """It has none."""
