"""An engine without a model that takes as long as one: for measuring what the actors, queues and stores around engines cost.

It sleeps instead of computing, so that hundreds of them fit on two cores. Lengths, times and ids are drawn from the seeds of
the rows, never from the clock or the batch; only how fast a batch goes is drawn from the seed of its first row.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from actors.engines import Completion, Request, Sampling
from actors.modelless import Modelless
from pipeline.engine_config import SimulatedSettings

_LENGTH, _SPEED, _IDS, _LOGPROBS = 1, 3, 5, 7  # what a row's seed is drawn for; the first two take two draws each


class SimulatedEngine(Modelless):
    """`slots` rows at a time: a row takes its prompt's time and then the same time for each of its ids; the next row takes the slot
    of the first one to end. A batch is done when its last row is."""

    kind = "simulated"

    def __init__(self, settings: SimulatedSettings, slots: int) -> None:
        self._settings, self._slots = settings, slots
        self.spans: list[tuple[float, float]] = []
        """When each batch began, in seconds of `time.monotonic`, and how long it should take: for whoever measures what is lost."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        made = self.rows(requests, sampling)
        seconds = self.seconds(requests, [len(one.token_ids) for one in made])
        self.spans.append((time.monotonic(), seconds))
        time.sleep(seconds)
        return made

    def rows(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """What it writes: ids of the prompt in any order, then the stop id where max_tokens has room for it."""
        seeds = np.array([one.seed for one in requests], np.uint64)
        lengths = np.maximum(1, np.rint(_lognormal(seeds, _LENGTH, self._settings.tokens, self._settings.tokens_sd))).astype(int)
        most = np.array([min(sampling.max_tokens, one.max_tokens or sampling.max_tokens) for one in requests])
        sizes, stopped = np.minimum(lengths, most), lengths <= most
        ends = np.cumsum(sizes)
        places = (np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)).astype(np.uint64)  # of all rows, one behind the other
        stops = {sampling.stop_id, *sampling.also_stop, *sampling.forbidden_ids}
        plain = [[token for token in one.prompt_ids if token not in stops] or one.prompt_ids for one in requests]
        kinds = np.array([len(some) for some in plain])
        chosen = (_uniform(np.repeat(_spread(seeds, _IDS), sizes) + places) * np.repeat(kinds, sizes)).astype(int)
        flat = np.array([token for some in plain for token in some])[chosen + np.repeat(np.cumsum(kinds) - kinds, sizes)]
        flat[ends[stopped] - 1] = sampling.stop_id
        ids = flat.tolist()
        logprobs: list[float] = []
        if sampling.logprobs or sampling.top:
            logprobs = np.log(1 - _uniform(np.repeat(_spread(seeds, _LOGPROBS), sizes) + places)).tolist()
        made = []
        for start, end, stop in zip((ends - sizes).tolist(), ends.tolist(), stopped.tolist(), strict=True):
            some, logs = tuple(ids[start:end]), tuple(logprobs[start:end])
            top = tuple(((token, logprob),) for token, logprob in zip(some, logs, strict=True)) if sampling.top else ()
            made.append(Completion(some, logs if sampling.logprobs else (), "stop" if stop else "length", top))
        return made

    def seconds(self, requests: Sequence[Request], lengths: Sequence[int]) -> float:
        """How long a batch takes, given the ids of its rows."""
        how = self._settings
        first = np.array([requests[0].seed], np.uint64)
        token_ms = float(_lognormal(first, _SPEED, how.token_ms, how.token_ms_sd)[0])
        slots = [0.0] * min(self._slots, len(lengths))
        for length in lengths:
            heapq.heapreplace(slots, slots[0] + how.prompt_ms + token_ms * length)
        return max(slots) / 1000


def _spread(seeds: npt.NDArray[np.uint64], what: int) -> npt.NDArray[np.uint64]:
    """Where the draws of each seed for something begin: far from those of other seeds."""
    return _mixed(seeds * np.uint64(8) + np.uint64(what))


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Bits that look random, the same ones for the same value: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _uniform(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """In [0, 1)."""
    return (_mixed(values) >> np.uint64(11)).astype(np.float64) / 2.0**53


def _lognormal(seeds: npt.NDArray[np.uint64], what: int, mean: float, sd: float) -> npt.NDArray[np.float64]:
    """One draw a seed with this mean; `sd` is that of the logarithm. Normal draws by Box and Muller (1958)."""
    radius, angle = (_uniform(_spread(seeds, what + more)) for more in (0, 1))
    normal = np.sqrt(-2 * np.log(1 - radius)) * np.cos(2 * math.pi * angle)
    return mean * np.exp(sd * normal - sd * sd / 2)
