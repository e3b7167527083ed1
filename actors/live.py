"""What a server and a streaming command need of an engine: requests that join and leave while others are being decoded.

HfLive (decode.py) and VllmLive (decode_vllm.py) do it; nothing here knows which. Token ids only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pipeline.backtrack.cursor import Cursor, Decoded, DecodeRequest, Decoding


@dataclass(frozen=True)
class Step:
    """What one step has brought to one request."""

    key: int
    ids: tuple[int, ...]
    """Emitted since the request's last step, undo tokens included; empty where a run of undos has just ended."""
    decoded: Decoded | None
    """The whole outcome; None while the request goes on."""


class Live(ABC):
    """A running batch. Not thread-safe: one thread calls it.

    Example:
        live.add(0, request, decoding)
        while live.running:
            for step in live.step():
                ...
    """

    @property
    @abstractmethod
    def running(self) -> int:
        """Requests that have been added and have not ended."""

    @abstractmethod
    def add(self, key: int, request: DecodeRequest, decoding: Decoding) -> None:
        """Let a request join at the next step; `key` is the caller's name for it and no other running request's.

        Raises:
            ValueError: a request that `Cursor` refuses, or that has no room.
        """

    @abstractmethod
    def abort(self, key: int) -> None:
        """Forget a request: no step of it comes any more. Nothing happens where it has ended."""

    @abstractmethod
    def step(self) -> list[Step]:
        """Decode one token of every request that has a slot; one Step for each that was part of it."""


def check_room(cursor: Cursor, decoding: Decoding, row_tokens: int) -> None:
    """
    Raises:
        ValueError: a prompt and what may be emitted are longer than a row.
    """
    longest = cursor.length + decoding.max_tokens
    if longest > row_tokens:
        raise ValueError(f"prompt and max_tokens need {longest} tokens, rows have room for {row_tokens}")
