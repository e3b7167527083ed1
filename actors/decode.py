"""Decoding with undo on transformers: exact, batched, and ended after `max_tokens` ids whatever the model does.

Rows rewind on their own in one ragged KV cache; pipeline/backtrack/cursor.py says what each of them sees and may emit. Rollouts
and evaluation call it with token ids and get token ids; it knows no problems and no judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.live import Live, Step, check_room
from actors.ragged import RaggedCache
from actors.scorers import scorer_of
from actors.segments import NAME as BY_SEGMENT
from actors.signals import Detector, Scorer, ask_chosen, ask_read, detector_of
from pipeline.backtrack.cursor import Cursor, Decoded, DecodeRequest, Decoding

_PREFILL_TOKENS = 8192  # of one forward over prompts, padding included
_REFILL = 8  # prompts are admitted when this part of the slots is free: a forward for each of them would cost more than it gives


@dataclass(frozen=True)
class Choices:
    """What one step of a batch has chosen."""

    ids: Tensor
    """[rows]"""
    logprobs: Tensor
    """[rows] Of those ids at temperature 1, bans renormalised."""
    alternatives: Tensor
    """[rows] Of the best ids other than those and U; -inf where not asked for."""
    logits_BV: Tensor
    """What they were chosen from, -inf where banned."""


@dataclass
class _Row:
    index: int  # of its request
    cursor: Cursor
    uniforms: list[list[float]]  # for each id emitted: for the id itself, and for whether a run before it ends
    detector: Detector | None


class HfDecoder:
    """Decodes with one transformers model.

    Example:
        decoded = HfDecoder(model, max_num_seqs=256, row_tokens=512).decode(requests, decoding)
    """

    def __init__(self, model: Any, max_num_seqs: int, row_tokens: int, folder: Path | None = None) -> None:
        """`max_num_seqs` rows at a time, each with room for `row_tokens` tokens, prompt and emitted ones together.

        Args:
            folder: the model's own, in which a verifier head may stand.

        Raises:
            ValueError: a model whose attention would read the masks otherwise than they are meant.
        """
        config = check_model(model, row_tokens)
        self.model = model
        self._max_num_seqs, self._row_tokens = max_num_seqs, row_tokens
        self._folder = folder
        self._scorers: dict[tuple[str, str | None], Scorer] = {}
        self._layers, self._vocab_size = config.num_hidden_layers, model.get_output_embeddings().weight.shape[0]

    @classmethod
    def from_folder(cls, folder: Path, max_num_seqs: int, row_tokens: int) -> HfDecoder:
        """The model of a folder in fp32, on a GPU if there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True
        )
        return cls(model.to(device).eval(), max_num_seqs, row_tokens, folder)

    @torch.inference_mode()
    def decode(self, requests: Sequence[DecodeRequest], decoding: Decoding, scorer: Scorer | None = None) -> list[Decoded]:
        """One result a request, in the order of the requests; no row's result depends on the others.

        Args:
            scorer: for mode `guided` with a signal of kind `score`; None takes the learned verifier that the signal names.

        Raises:
            ValueError: a request that `Cursor` refuses, or that has no room in a row; a verifier that is not there.
        """
        detector = self.detector(decoding, scorer)
        cursors = [self.cursor(request, decoding) for request in requests]
        for cursor in cursors:
            check_room(cursor, decoding, self._row_tokens)
        longest = max((cursor.length for cursor in cursors), default=0) + decoding.max_tokens
        # Rows of like length at a time: fewer padding columns.
        waiting = sorted(range(len(requests)), key=lambda index: cursors[index].length, reverse=True)
        slots = min(self._max_num_seqs, len(requests))
        cache = RaggedCache(self._layers, slots, longest)
        rows: list[_Row] = []
        done: dict[int, Decoded] = {}
        while waiting or rows:
            if refillable(slots, len(rows), len(waiting)):
                new = [waiting.pop() for _ in range(min(slots - len(rows), len(waiting)))]
                prefill(self.model, cache, len(rows), [cursors[index].visible for index in new])
                rows += [_Row(index, cursors[index], _uniforms(requests[index].seed, decoding), detector) for index in new]
            self._step(cache, rows)
            done.update((row.index, row.cursor.result()) for row in rows if row.cursor.finish)
            rows = _leave(cache, rows)
        return [done[index] for index in range(len(requests))]

    def cursor(self, request: DecodeRequest, decoding: Decoding) -> Cursor:
        """A request at its beginning.

        Raises:
            ValueError: as `Cursor`.
        """
        return Cursor(request, decoding, self._vocab_size)

    def detector(self, decoding: Decoding, scorer: Scorer | None = None) -> Detector | None:
        """What asks for U, with the learned verifier that it needs; each is loaded once."""
        signal = decoding.signal
        if scorer is None and decoding.mode == "guided" and signal is not None and signal.kind == "score":
            key = (signal.by, signal.folder)
            if key not in self._scorers:
                self._scorers[key] = scorer_of(signal, self.model, self._folder)
            scorer = self._scorers[key]
        return detector_of(decoding, scorer)

    def _step(self, cache: RaggedCache, rows: list[_Row]) -> None:
        """One forward over each row's last visible id."""
        cursors = [row.cursor for row in rows]
        hidden_wanted = any(row.detector is not None and row.detector.reads_hidden for row in rows)
        with _head_inputs(self.model, hidden_wanted) as hidden:
            logits_BV = forward(self.model, cache, [cursor.last for cursor in cursors], [cursor.length for cursor in cursors])
        for places in alike(cursors):
            some, asked = [rows[place] for place in places], [cursors[place] for place in places]
            decoding, detector = asked[0].decoding, some[0].detector
            if detector is not None and hidden:
                ask_read(detector, asked, hidden[0][places, -1])
            # As a rule all rows decode alike; a copy of their logits would cost something with large vocabularies.
            choices = choose(logits_BV if len(places) == len(rows) else logits_BV[places], some, decoding)
            columns = (choices.ids.tolist(), choices.logprobs.tolist(), choices.alternatives.tolist())
            for cursor, token, logprob, alternative in zip(asked, *columns, strict=True):
                cursor.take(token, logprob, alternative)
            if detector is not None:
                ask_chosen(detector, asked, choices.ids, choices.logits_BV, decoding.rule.undo_id)


def check_model(model: Any, row_tokens: int) -> Any:
    """The config of a model that the ragged cache serves.

    Raises:
        ValueError: a model whose attention would read the masks otherwise than they are meant, or that keeps something else.
    """
    config = model.config.get_text_config()
    attention, window = config._attn_implementation, getattr(config, "sliding_window", None)
    if attention not in ("sdpa", BY_SEGMENT):
        raise ValueError(f"decoding with undo needs attention sdpa, the model was loaded with {attention}")
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise ValueError(f"the model has layers of kind {others[0]}, which keep nothing that a rewind could shorten")
    if "sliding_attention" in kinds and window and window < row_tokens:
        raise ValueError(f"the model's attention slides over {window} tokens, rows may have {row_tokens}")
    return config


def prefill(model: Any, cache: RaggedCache, start: int, prompts: list[tuple[int, ...]]) -> None:
    """Write prompts, shortest first, into the slots from `start` on. Their last ids are left to the first step."""
    while prompts:
        count = 1
        while count < len(prompts) and (count + 1) * len(prompts[count]) <= _PREFILL_TOKENS:
            count += 1
        group, prompts = prompts[:count], prompts[count:]
        width = len(group[-1]) - 1
        if width:
            device = model.device
            # Padding is on the right, where the causal mask hides it from the prompt and later masks hide it from the rest.
            padded = [[*ids[:-1], *[ids[-1]] * (width + 1 - len(ids))] for ids in group]
            cache.expect_prompts(start)
            model(
                input_ids=torch.tensor(padded, device=device),
                position_ids=torch.arange(width, device=device).expand(count, width),
                attention_mask=torch.ones(width, width, dtype=torch.bool, device=device).tril()[None, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        start += count


def forward(model: Any, cache: RaggedCache, last: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """[rows, vocabulary] Logits behind each row's last visible id, which is fed; a row that has just been rewound feeds again what
    is on top there."""
    device, longest = model.device, max(lengths)
    last_B, lengths_B = torch.tensor([last, lengths], device=device)
    columns_B = lengths_B - 1
    cache.expect_tokens(columns_B, longest)
    logits_BV: Tensor = model(
        input_ids=last_B.unsqueeze(1),
        position_ids=columns_B.unsqueeze(1),
        attention_mask=(torch.arange(longest, device=device) < lengths_B.unsqueeze(1))[:, None, None],
        past_key_values=cache,
        use_cache=True,
    ).logits[:, -1]
    return logits_BV


def refillable(slots: int, rows: int, waiting: int) -> bool:
    """Whether prompts are admitted now: into an empty batch, or when so many slots are free that a forward over them pays."""
    return waiting > 0 and (not rows or slots - rows >= min(waiting, -(-slots // _REFILL)))


def alike(cursors: Sequence[Cursor]) -> list[list[int]]:
    """Places of the cursors, those that decode in the same way together: requests of a server need not."""
    groups: dict[Decoding, list[int]] = {}
    if all(cursor.decoding is cursors[0].decoding for cursor in cursors):
        return [list(range(len(cursors)))]
    for place, cursor in enumerate(cursors):
        groups.setdefault(cursor.decoding, []).append(place)
    return list(groups.values())


@contextmanager
def _head_inputs(model: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """What the head reads in forwards within this, [rows, 1, width] each: the last hidden states, normalised."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        if wanted:
            hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, given: found.append(given[0]))
            stack.callback(hook.remove)
        yield found


def restrict(logits_BV: Tensor, cursors: Sequence[Cursor], decoding: Decoding) -> tuple[Tensor, list[int]]:
    """What may be chosen: logits with the bias, -inf where banned, and the ids that are certain, forced ones and U's that the
    threshold or the signal decides; -1 where the model chooses."""
    device, undo_id = logits_BV.device, decoding.rule.undo_id
    if logits_BV.dtype not in (torch.float32, torch.float64):
        logits_BV = logits_BV.float()
    picked = [-1 if cursor.forced is None else cursor.forced for cursor in cursors]
    if decoding.mode == "guided":
        picked = [undo_id if token < 0 and cursor.decides(0.0) else token for token, cursor in zip(picked, cursors, strict=True)]
    elif decoding.threshold is not None and decoding.mode != "forbidden":
        p_undo = torch.exp(logits_BV[:, undo_id] - logits_BV.logsumexp(-1)).tolist()
        for index, cursor in enumerate(cursors):
            if picked[index] < 0 and cursor.decides(p_undo[index]):
                picked[index] = undo_id
    logits_BV = logits_BV.clone()  # the model's output is not ours to write to
    if decoding.vocabulary is not None:
        logits_BV[:, decoding.vocabulary :] = -torch.inf
    if decoding.undo_bias:
        logits_BV[:, undo_id] += decoding.undo_bias
    banned = [(index, token) for index, cursor in enumerate(cursors) for token in cursor.banned()]
    if banned:
        logits_BV[tuple(torch.tensor(banned, device=device).T)] = -torch.inf
    return logits_BV, picked


def choose(logits_BV: Tensor, rows: Sequence[_Row], decoding: Decoding) -> Choices:
    """The next id of every row: forced, U by the threshold or the signal, or the model's choice without the bans."""
    device = logits_BV.device
    logits_BV, picked = restrict(logits_BV, [row.cursor for row in rows], decoding)
    logprobs_BV = logits_BV.log_softmax(-1)
    if decoding.temperature == 0:
        ids_B = logits_BV.argmax(-1)
    else:
        uniforms = [row.uniforms[row.cursor.emitted][row.cursor.in_run] for row in rows]
        uniforms_B = torch.tensor(uniforms, dtype=torch.float64, device=device)
        warm = decoding.temperature != 1
        probs_BV = (logits_BV / decoding.temperature).softmax(-1) if warm else logprobs_BV.exp()
        ids_B = sample(probs_BV, uniforms_B, decoding.top_p)
    picked_B = torch.tensor(picked, device=device)
    ids_B = torch.where(picked_B < 0, ids_B, picked_B)
    logprobs_B = logprobs_BV.gather(1, ids_B.unsqueeze(1)).squeeze(1)
    alternatives_B = torch.full_like(logprobs_B, -torch.inf)
    if decoding.weighs_paths:
        others_BV = logprobs_BV.scatter(1, ids_B.unsqueeze(1), -torch.inf)
        others_BV[:, decoding.rule.undo_id] = -torch.inf
        alternatives_B = others_BV.amax(-1)
    return Choices(ids_B, logprobs_B, alternatives_B, logits_BV)


def sample(probs_BV: Tensor, uniforms_B: Tensor, top_p: float) -> Tensor:
    """[rows] The id in whose part of the cumulated distribution the row's number in 0 .. 1 falls."""
    order_BV = None
    if top_p < 1:
        probs_BV, order_BV = probs_BV.sort(stable=True, dim=-1, descending=True)
        # The fewest ids that together have top_p: an id goes when those before it have as much.
        probs_BV = probs_BV.masked_fill(probs_BV.cumsum(-1) - probs_BV >= top_p, 0)
    cumulated_BV = probs_BV.cumsum(-1, dtype=torch.float64)
    total_B = cumulated_BV[:, -1]
    # Strictly below the total, so that rounding cannot lead behind the last id that has a probability.
    wanted_B = torch.minimum(uniforms_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    ids_B1 = torch.searchsorted(cumulated_BV, wanted_B.unsqueeze(1), right=True)
    return (ids_B1 if order_BV is None else order_BV.gather(1, ids_B1)).squeeze(1)


def _uniforms(seed: int, decoding: Decoding) -> list[list[float]]:
    """[max_tokens][2] A row's whole randomness."""
    if decoding.temperature == 0:
        return []
    uniforms: list[list[float]] = np.random.Generator(np.random.Philox(seed)).random((decoding.max_tokens, 2)).tolist()
    return uniforms


def _leave(cache: RaggedCache, rows: list[_Row]) -> list[_Row]:
    return without(cache, rows, [row.cursor.finish is not None for row in rows])


def without(cache: RaggedCache, rows: list[Any], ended: Sequence[bool]) -> list[Any]:
    """Without the rows that have ended, in whose slots the last ones move: living rows are always the first slots."""
    alive = len(rows) - sum(ended)
    target = [slot for slot in range(alive) if ended[slot]]
    source = [slot for slot in range(alive, len(rows)) if not ended[slot]]
    for slot, other in zip(target, source, strict=True):
        rows[slot] = rows[other]
    if target:
        cache.move(source, target)
    return rows[:alive]


class HfLive(Live):
    """Requests that come and go while others are decoded; all that have a slot share each forward."""

    def __init__(self, decoder: HfDecoder) -> None:
        self._decoder, self._slots, self._row_tokens = decoder, decoder._max_num_seqs, decoder._row_tokens
        self._cache = RaggedCache(decoder._layers, self._slots, self._row_tokens)
        self._waiting: dict[int, tuple[Cursor, int, Detector | None]] = {}  # with the seed
        self._rows: list[_Row] = []

    @property
    def running(self) -> int:
        return len(self._waiting) + len(self._rows)

    def add(self, key: int, request: DecodeRequest, decoding: Decoding) -> None:
        cursor = self._decoder.cursor(request, decoding)
        check_room(cursor, decoding, self._row_tokens)
        self._waiting[key] = (cursor, request.seed, self._decoder.detector(decoding))

    @torch.inference_mode()
    def abort(self, key: int) -> None:
        self._waiting.pop(key, None)
        for row in self._rows:
            if row.index == key:
                row.cursor.end()
        self._rows = _leave(self._cache, self._rows)

    @torch.inference_mode()
    def step(self) -> list[Step]:
        free = self._slots - len(self._rows)
        if new := sorted(list(self._waiting)[:free], key=lambda key: self._waiting[key][0].length):
            rows = []
            for key in new:
                cursor, seed, detector = self._waiting.pop(key)
                rows.append(_Row(key, cursor, _uniforms(seed, cursor.decoding), detector))
            prefill(self._decoder.model, self._cache, len(self._rows), [row.cursor.visible for row in rows])
            self._rows += rows
        if not self._rows:
            return []
        before = [row.cursor.emitted for row in self._rows]
        self._decoder._step(self._cache, self._rows)
        steps = [
            Step(row.index, row.cursor.emitted_since(count), row.cursor.result() if row.cursor.finish else None)
            for row, count in zip(self._rows, before, strict=True)
        ]
        self._rows = _leave(self._cache, self._rows)
        return steps
