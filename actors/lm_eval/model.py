"""The harness's model `retract`: a saved folder that answers with undo as in the stage evaluate, by actors/decode.py.

The harness calls it with texts and gets surviving text, or log-probabilities. It knows no tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from actors.decode import HfDecoder, HfLive
from actors.generate import load_decoder
from actors.saved import AnswerSettings, InputError, SavedModel, answer_settings
from actors.streaming import special_ids
from pipeline.backtrack.cursor import DecodeRequest, Decoding
from pipeline.backtrack.undo import UndoRule, apply_undo

_SEQS = 32  # rows at a time with batch_size=auto
_LOOK = 8  # emitted ids between two looks for a stop string
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one thing; the first one given counts
# What tasks may say of decoding with values that ask for nothing; other values cannot be done with undo.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (None, 0, -1), "min_p": (None, 0), "typical_p": (None, 1), "num_beams": (None, 1), "repetition_penalty": (None, 1),
    "num_return_sequences": (None, 1), "use_cache": (None, True),
}  # fmt: skip
_LOG = logging.getLogger(__name__)

Scored = tuple[Any, list[int], list[int]]
"""Texts, for the cache; ids that are given; ids whose log-probabilities are asked for."""


@dataclass(frozen=True)
class _Plan:
    """One request of `generate_until`."""

    prompt_ids: tuple[int, ...]
    decoding: Decoding
    until: tuple[str, ...]
    """Texts that end the answer, and are no part of it."""


@register_model("retract")
class RetractLM(TemplateLM):
    """A model folder with the undo token.

    Example:
        simple_evaluate(model=RetractLM("runs/tiny/model"), tasks=["gsm8k"])
    """

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        """
        Args:
            pretrained: the folder; what its `retract.json` says holds where neither `settings` nor a task says otherwise.
            batch_size: rows decoded at a time; `auto` is max_batch_size, or 32.
            settings: any of actors.saved.AnswerSettings: mode, threshold, unit, max_tokens, ...

        Raises:
            InputError: a folder that cannot be used, or a setting that is not allowed. One line.
        """
        super().__init__()
        if not pretrained:
            raise InputError("model_args must name a model folder: pretrained=runs/NAME/model")
        if unknown := sorted(set(settings) - set(AnswerSettings.model_fields)):
            known = ", ".join(("pretrained", *AnswerSettings.model_fields))
            raise InputError(f"model_args: model retract knows no {unknown[0]}; it knows {known}")
        self._saved = SavedModel.load(Path(pretrained), settings)
        self._slots = _slots(batch_size, max_batch_size)
        self._model = load_decoder(self._saved, self._slots, self._saved.context).model
        if device and torch.cuda.is_available():  # without one, the harness's default `cuda` means what there is
            self._model.to(device)
        self._device = self._model.device
        self.tokenizer = self._saved.tokenizer
        self._templated = False

    @property
    def eot_token_id(self) -> int:
        return self._saved.stop_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        return self._saved.context

    @property
    def max_gen_toks(self) -> int:
        return self._saved.settings.max_tokens

    @property
    def batch_size(self) -> int:
        return self._slots

    @property
    def tokenizer_name(self) -> str:
        return str(self._saved.folder.resolve()).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """How it decodes where tasks do not say otherwise; goes into the harness's results."""
        return {"model_num_parameters": self._model.num_parameters(), "retract": self._saved.settings.model_dump()}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of text as in training: nothing is put before it, and special tokens come from a chat template only.

        Raises:
            InputError: text with the undo token in it.
        """
        text = self._saved.plain(string, escape=False)
        split = not self._templated
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=split).input_ids)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        self._templated = bool(chat_template)
        self._check_template()
        found: str | None = super().chat_template(chat_template)
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """
        Raises:
            InputError: no chat template, or one that refuses these messages.
        """
        self._templated = True
        self._check_template()
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **how))
        except Exception as error:  # templates are code of the folder, and raise what they like
            raise InputError(f"the chat template refuses these messages: {' '.join(str(error).split())[:200]}") from error

    def _check_template(self) -> None:
        if self._templated and not self.tokenizer.chat_template:
            raise InputError(f"{self._saved.folder} has no chat template: leave --apply_chat_template out")

    @torch.inference_mode()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Surviving text of each answer, to its first stop string; seeds come from torch's generator, which the harness seeds.

        Raises:
            InputError: an empty prompt, or decoding that cannot be done with undo.
        """
        plans = [self._planned(*request.args) for request in requests]
        hot = any(plan.decoding.temperature for plan in plans)
        seeds = torch.randint(2**31, (len(plans),)).tolist() if hot else [0] * len(plans)
        longest = max((len(plan.prompt_ids) + plan.decoding.max_tokens for plan in plans), default=0)
        live = HfLive(HfDecoder(self._model, self._slots, longest, self._saved.folder))
        for key in sorted(range(len(plans)), key=lambda key: len(plans[key].prompt_ids)):  # like lengths together: less padding
            live.add(key, DecodeRequest(plans[key].prompt_ids, seeds[key]), plans[key].decoding)
        emitted: list[list[int]] = [[] for _ in plans]
        texts = [""] * len(plans)
        with tqdm(total=len(plans), disable=disable_tqdm, desc="Running generate_until requests") as progress:
            while live.running:
                for step in live.step():
                    plan, ids = plans[step.key], emitted[step.key]
                    ids += step.ids
                    final = step.decoded.surviving if step.decoded else None
                    if final is None and plan.until and step.ids and len(ids) % _LOOK == 0:
                        final = settled(ids, plan.decoding)
                        if not self._ends(final, plan.until):
                            final = None
                    if final is not None:
                        live.abort(step.key)  # of no effect where it has ended
                        texts[step.key] = self._read(final, plan.until)
                        self.cache_hook.add_partial("generate_until", requests[step.key].args, texts[step.key])
                        progress.update()
        return texts

    def _planned(self, context: str, asked: Mapping[str, Any]) -> _Plan:
        """What a task says of decoding goes before what model_args say, and that before the folder's note."""
        given = dict(asked)
        until = given.pop("until", None) or []
        lengths = [length for key in _LENGTHS if (length := given.pop(key, None)) is not None]
        how: dict[str, Any] = {"max_tokens": int(lengths[0]) if lengths else None}
        sampled, temperature = given.pop("do_sample", None), given.pop("temperature", None)
        if sampled and temperature == 0:
            raise InputError("gen_kwargs: do_sample=true needs a temperature above 0")
        if sampled is False:
            temperature = 0.0
        elif sampled and temperature is None:
            temperature = self._saved.settings.temperature or 1.0
        how |= {"temperature": temperature, "top_p": given.pop("top_p", None)}
        for key, value in given.items():
            if value not in _NEUTRAL.get(key, ()):
                raise InputError(f"gen_kwargs: {key}={value!r} cannot be done with undo; leave it out")
        changed = {key: value for key, value in how.items() if value is not None}
        settings = answer_settings(self._saved.settings.model_dump() | changed)
        room = self.max_length - settings.max_tokens
        if room < 1:
            most = f"the model sees {self.max_length} tokens"
            raise InputError(f"max_gen_toks is {settings.max_tokens}, but {most}, prompt and answer together")
        ids = self.tok_encode(context)
        if not ids:
            raise InputError("the prompt is empty")
        if len(ids) > room:
            _LOG.warning("a prompt of %d tokens is cut on the left to the %d for which there is room", len(ids), room)
        stops = (until,) if isinstance(until, str) else tuple(until)
        return _Plan(tuple(ids[-room:]), self._saved.decoding(settings, settings.max_tokens), tuple(stop for stop in stops if stop))

    def _ends(self, ids: Sequence[int], until: Sequence[str]) -> bool:
        return self._read(ids, until) != self._read(ids, ())

    def _read(self, ids: Sequence[int], until: Sequence[str]) -> str:
        """Text of surviving ids as evaluation reads it, to the first of the stop strings."""
        ends = {self._saved.stop_id, *self._special(until)}
        whole = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        # As pipeline/stages/io.py's Codec: special tokens other than the stop id are written out, half a character is not.
        text = str(self.tokenizer.decode(list(ids[:whole]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        text = text.rstrip("\ufffd")
        return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]

    def _special(self, until: Iterable[str]) -> set[int]:
        return {token for stop in until if (token := self.tokenizer.get_added_vocab().get(stop)) in special_ids(self.tokenizer)}

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability of ids behind others, and whether each is the most probable one.

        Undo's probability is taken away and the rest renormalised: these are the texts' probabilities where no undo comes between,
        which is what the decoder draws from too, and a model is not marked down for its doubt about a wrong choice.
        """
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: len(requests[index][1]) + len(requests[index][2]), reverse=True)
        size = override_bs or self._slots
        for start in tqdm(range(0, len(order), size), disable=disable_tqdm, desc="Running loglikelihood requests"):
            some = order[start : start + size]
            rows = [[*requests[index][1], *requests[index][2]][-(self.max_length + 1) :] for index in some]
            width = max(map(len, rows)) - 1
            padded = [[*row[:-1], *[self.eot_token_id] * (width + 1 - len(row))] for row in rows]
            seen = [[1] * (len(row) - 1) + [0] * (width + 1 - len(row)) for row in rows]
            logits_BTV = self._model(
                input_ids=torch.tensor(padded, device=self.device), attention_mask=torch.tensor(seen, device=self.device)
            ).logits
            for place, (index, row) in enumerate(zip(some, rows, strict=True)):
                texts, _, wanted = requests[index]
                if len(wanted) >= len(row):
                    raise InputError(f"a text of {len(wanted)} tokens is to be scored, but the model sees {self.max_length} tokens")
                logits_TV = logits_BTV[place, len(row) - 1 - len(wanted) : len(row) - 1].float()
                logits_TV[:, len(self.tokenizer) :] = -torch.inf
                logits_TV[:, self._saved.rule.undo_id] = -torch.inf
                ids_T = torch.tensor(wanted, dtype=torch.long, device=self.device)
                logprob = float(logits_TV.log_softmax(-1).gather(1, ids_T.unsqueeze(1)).sum())
                found[index] = (logprob, bool((logits_TV.argmax(-1) == ids_T).all()))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, found[index])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, longer ones in windows, each token once."""
        scored: list[Scored] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                scored.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(scored, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals


def settled(ids: Sequence[int], decoding: Decoding) -> tuple[int, ...]:
    """What survives of emitted ids whatever the model does from here on: only so many undos can still come."""
    rule: UndoRule = decoding.rule
    undos = sum(token == rule.undo_id for token in ids)
    left = 0 if decoding.mode == "forbidden" else max(0, min(decoding.max_undos - undos, decoding.max_tokens - len(ids)))
    return apply_undo((*ids, *[rule.undo_id] * left), rule).surviving


def _slots(batch_size: int | str, max_batch_size: int | None) -> int:
    if str(batch_size).partition(":")[0] == "auto":
        return max_batch_size or _SEQS
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise InputError(f"batch_size must be a whole number above 0, or auto, is {batch_size}")
    return int(batch_size)
