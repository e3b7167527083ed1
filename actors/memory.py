"""Running out of memory: how it is known from errors, and which settings to lower. Learners and their driver ask here."""

from __future__ import annotations

import errno

import ray
import torch

from pipeline.config import BaseTraining, TrainSettings

# torch's allocator for CPUs raises plain RuntimeErrors; so does CUDA's where a library wraps it.
_SAID = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was what was missing, at the bottom of this error or on its own."""
    cause: BaseException | None = error
    while cause is not None:
        said = str(cause).lower()
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return True
        if isinstance(cause, RuntimeError) and any(words in said for words in _SAID):
            return True
        cause = cause.__cause__
    return False


def killed(error: BaseException, how: str) -> str | None:
    """One line on an actor that was killed from outside, with `how` memory is saved; None if it died of something else.

    Ray knows of its own memory monitor. Of the system's it sees a connection that ended, like that of any killed process.
    """
    said = str(error)
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "running low on memory" in said or "memory monitor" in said:
        return f"Ray killed it because its node was running out of memory: {how}"
    if "OOM killer" in said or "SIGKILL" in said:
        return f"it was killed from outside, which the system does when memory runs out; if that was it, {how}"
    return None


def how_to_save(settings: TrainSettings) -> str:
    """What to change when a training does not fit, with the settings' keys and values."""
    key = "base.train" if isinstance(settings, BaseTraining) else "sft"
    ways = []
    if settings.accumulate < settings.rows:
        ways.append(f"raise {key}.accumulate (now {settings.accumulate}; {key}.rows is {settings.rows})")
    ways.append(f"lower {key}.rows or {key}.row_tokens (now {settings.rows} and {settings.row_tokens})")
    if not settings.gradient_checkpointing:
        ways.append(f"set {key}.gradient_checkpointing to true")
    return ", or ".join(ways)


def how_to_save_decoding(max_num_seqs: int) -> str:
    """The same for a learner that decodes or probes."""
    return f"lower engine.max_num_seqs (now {max_num_seqs})"
