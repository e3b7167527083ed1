"""The processes that train one model together; one process alone is rank 0 of 1. Thin words for torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def together() -> bool:
    return dist.is_available() and dist.is_initialized()


def processes() -> int:
    return dist.get_world_size() if together() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return not together() or dist.get_rank() == 0


def wait_for_all() -> None:
    if together():
        dist.barrier()


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, in all of them: a decision that must be the same everywhere."""
    if not together():
        return make()
    box: list[T | None] = [make() if is_first() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]
