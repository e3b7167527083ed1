"""Answers of a saved model with its mistakes taken back: `python -m actors.generate --model DIR "question"`, and functions for
people's own code, `generate` and `undoing`, the latter for `model.generate(..., custom_generate=undoing(tokenizer))`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from actors.decode import HfDecoder, HfLive
from actors.saved import AnswerSettings, InputError, SavedModel, answer_settings, decoding_of
from actors.screen import Deletions, Screen
from actors.streaming import Appended, Deleted, Finished, TextStream
from pipeline.arguments import USAGE, OneLineParser
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding, Mode
from pipeline.backtrack.embedding import undo_rule
from pipeline.backtrack.undo import Unit

_INTERRUPTED = 130
_SEQS = 32  # rows at a time, unless the caller says otherwise


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]] | Tensor,
    attention_mask: Tensor | None = None,
    *,
    seed: int = 0,
    max_num_seqs: int = _SEQS,
    **settings: Any,
) -> Tensor:
    """Continue prompts with undo, as `model.generate` continues them without.

    Args:
        prompts: texts, encoded as they stand; lists of ids; or [rows, tokens] left-padded ids, then with `attention_mask`.
        seed: of the first row; the others take the next ones.
        settings: any of actors.saved.AnswerSettings: mode, temperature, top_p, max_tokens, threshold, unit, undo_token, ...

    Returns:
        [rows, longest prompt + longest answer] prompts padded on the left, the ids that survive behind them, padded on the right.

    Raises:
        InputError: a setting that is not allowed.
        ValueError: an empty prompt, one with U in it, or a model or tokenizer that cannot undo.
    """
    asked = answer_settings(settings)
    rule, stop_id = undo_rule(tokenizer, asked.undo_token, asked.unit), int(tokenizer.eos_token_id)
    if isinstance(prompts, Tensor):
        rows = _unpadded(prompts, attention_mask)
    else:
        rows = [_encode(tokenizer, prompt) if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]
    decoding = decoding_of(asked, rule, stop_id, asked.max_tokens)
    found = _decode(model, rows, range(seed, seed + len(rows)), decoding, max_num_seqs)
    pad_id = stop_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    longest = max(map(len, rows), default=0)
    padded = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows], dtype=torch.long)
    return _joined(padded.reshape(len(rows), longest), found, pad_id)


def undoing(tokenizer: Any, *, max_num_seqs: int = _SEQS, **settings: Any) -> Callable[..., Tensor]:
    """A `custom_generate` for transformers: `model.generate(**inputs, custom_generate=undoing(tokenizer), max_new_tokens=200)`.

    How long, how hot and with which end and padding ids comes from `generate`, which counts what is emitted, deleted
    ids included; when to undo comes from `settings`, see `generate` above. Seeds come from torch's generator.

    Raises:
        InputError: a setting that is not allowed.
        ValueError: a tokenizer without the undo token; when called, an argument of `generate` that undo does not know.
    """
    for key in ("temperature", "top_p", "max_tokens"):
        if key in settings:
            raise InputError(f"{key}: model.generate takes it (temperature, top_p, max_new_tokens), not undoing")
    asked = answer_settings(settings)
    rule, stop_id = undo_rule(tokenizer, asked.undo_token, asked.unit), int(tokenizer.eos_token_id)

    def undo_generate(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        known = (TemperatureLogitsWarper, TopPLogitsWarper, MaxLengthCriteria, EosTokenCriteria)
        for one in (*logits_processor, *stopping_criteria):
            if not isinstance(one, known):
                raise ValueError(f"decoding with undo does not know {type(one).__name__}: switch it off (top_k=0, ...)")
        if generation_config.num_beams != 1:
            raise ValueError("decoding with undo knows no beams: num_beams must be 1")
        hot = generation_config.do_sample
        budget = generation_config.max_length - input_ids.shape[1]
        how: dict[str, Any] = {**settings, "max_tokens": budget}
        if hot:
            how |= {"temperature": _or_one(generation_config.temperature), "top_p": _or_one(generation_config.top_p)}
        ends = generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or [stop_id]
        end = stop_id if stop_id in ends else ends[0]
        rows = _unpadded(input_ids, model_kwargs.get("attention_mask"))
        seeds = torch.randint(2**31, (len(rows),)).tolist() if hot else [0] * len(rows)
        found = _decode(model, rows, seeds, decoding_of(answer_settings(how), rule, int(end), budget), max_num_seqs)
        pad_id = generation_config.pad_token_id
        return _joined(input_ids, found, int(end) if pad_id is None else int(pad_id))

    return undo_generate


def _or_one(value: float | None) -> float:
    return 1.0 if value is None else float(value)


def _encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def _unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[tuple[int, ...]]:
    if attention_mask is None:
        return [tuple(row) for row in input_ids.tolist()]
    return [tuple(row[seen].tolist()) for row, seen in zip(input_ids, attention_mask.bool(), strict=True)]


def _decode(
    model: Any, rows: Sequence[tuple[int, ...]], seeds: Sequence[int], decoding: Decoding, max_num_seqs: int
) -> list[Decoded]:
    longest = max(map(len, rows), default=0) + decoding.max_tokens
    requests = [DecodeRequest(row, seed) for row, seed in zip(rows, seeds, strict=True)]
    return HfDecoder(model, max_num_seqs, longest).decode(requests, decoding)


def _joined(input_ids: Tensor, found: Sequence[Decoded], pad_id: int) -> Tensor:
    longest = max((len(one.surviving) for one in found), default=0)
    answers = [[*one.surviving, *[pad_id] * (longest - len(one.surviving))] for one in found]
    answers_BT = torch.tensor(answers, dtype=torch.long, device=input_ids.device).reshape(len(found), longest)
    return torch.cat([input_ids, answers_BT], dim=1)


def stream(
    live: HfLive, saved: SavedModel, request: DecodeRequest, decoding: Decoding, raw: bool = False
) -> Iterator[Appended | Deleted | Finished]:
    """One answer as it is made. Closing the iterator ends the decode."""
    texts = TextStream(saved.tokenizer, saved.rule, saved.stop_id, raw)
    live.add(0, request, decoding)
    try:
        while live.running:
            for step in live.step():
                yield from texts.feed(step.ids)
                if step.decoded:
                    yield Finished(step.decoded.finish)
    finally:
        live.abort(0)


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """Options that are settings of a model's answers, by the settings' names; those that were not given are None."""
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a model folder with the undo token")
    parser.add_argument("--undo-token", metavar="TEXT", help="the undo token's name")
    parser.add_argument("--unit", choices=get_args(Unit), help="what one undo token deletes")
    parser.add_argument("--prompt", metavar="TEXT", help="how a question becomes a prompt; holds {question}")
    parser.add_argument("--mode", choices=get_args(Mode), help="deleted text leaves the model's context, or stays, or no undo")
    parser.add_argument("--temperature", type=float, help="0 decodes greedily")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--max-tokens", type=int, help="tokens of an answer, deleted ones included")
    parser.add_argument("--max-undos", type=int, help="undo tokens of an answer")
    parser.add_argument("--threshold", type=_threshold, metavar="P", help="undo where P(undo) is above it; null samples it")


def given_settings(options: argparse.Namespace) -> Mapping[str, Any]:
    """What was given of the settings."""
    values = {key: value for key, value in vars(options).items() if key in AnswerSettings.model_fields and value is not None}
    return values | ({"threshold": None} if values.get("threshold") == "null" else {})


def _threshold(text: str) -> float | str:
    return text if text == "null" else float(text)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m actors.generate", description="Ask a saved model one question.")
    parser.add_argument("question", help="- reads it from stdin")
    add_answer_options(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--deletions",
        choices=get_args(Deletions),
        default="strike",
        help="deleted text on a terminal; raw shows undo tokens, anywhere",
    )
    parser.add_argument("--escape", action="store_true", help="an undo token in the question is text, not an error")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str], out: TextIO, err: TextIO) -> int:
    """Exit code: 0; 2 for what cannot be answered, 130 when interrupted."""
    options = _parse(arguments)
    screen: Screen | None = None
    try:
        saved = SavedModel.load(options.model, given_settings(options))
        question = _read(sys.stdin) if options.question == "-" else options.question
        prompt_ids = saved.question_ids(question.rstrip("\n"), options.escape)
        decoding = saved.decoding(saved.settings, saved.room(prompt_ids, saved.context))
        if options.seed < 0:
            raise InputError(f"seed must be 0 or more, is {options.seed}")
        live = HfLive(load_decoder(saved, 1, len(prompt_ids) + decoding.max_tokens))
        raw = options.deletions == "raw"
        if out.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            size = shutil.get_terminal_size()
            screen = Screen(out, size.columns, size.lines, options.deletions == "erase")
        text = ""
        for event in stream(live, saved, DecodeRequest(prompt_ids, options.seed), decoding, raw):
            if isinstance(event, Finished):
                break
            if screen:
                screen.show(event)
            else:
                text = text + event.text if isinstance(event, Appended) else text[: len(text) - event.chars]
        if not screen:
            out.write(f"{text}\n")
            out.flush()
    except InputError as error:
        err.write(f"error: {error}\n")
        return USAGE
    except KeyboardInterrupt:
        return _INTERRUPTED
    finally:
        if screen:
            screen.close()
    return 0


def _read(source: TextIO) -> str:
    try:
        return source.read()
    except UnicodeDecodeError as error:
        raise InputError("stdin is no text") from error


def load_decoder(saved: SavedModel, max_num_seqs: int, row_tokens: int) -> HfDecoder:
    """
    Raises:
        InputError: weights that cannot be loaded, or a model that cannot be decoded with undo.
    """
    try:
        decoder = HfDecoder.from_folder(saved.folder, max_num_seqs, row_tokens)
        decoding = saved.decoding(saved.settings, 1)
        decoder.detector(decoding)  # a verifier that is missing shall not be missed later
        decoder.cursor(DecodeRequest((saved.stop_id,), 0), decoding)  # nor a tokenizer of another model
        return decoder
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{saved.folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a model may write what the terminal cannot show
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(main(sys.argv[1:], sys.stdout, sys.stderr))
