"""Tokenizers of three kinds and judged rollouts made by hand, for the tests of where traces come from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.backtrack.trace import Role, Trace
from pipeline.backtrack.undo import Unit, apply_undo
from pipeline.stages.base import train_tokenizer
from pipeline.stages.io import Codec
from pipeline.stages.sources import (
    Candidate,
    Ids,
    Judged,
    sort_rollouts,
)
from pipeline.tasks.problem import Problem

UNITS: list[Unit] = ["token", "step", "all"]
PROMPT = "{question}\n"
LINE_1, LINE_2, LAST = "Ana has 3+4=<<3+4=7>>7 apples.", "She pays 7*2=<<7*2=14>>14 dollars.", "#### 14"
QUESTION = "Ana has 3 apples and buys 4. Each costs 2 dollars. What does she pay?"


def problem(number: int = 0, split: str = "train", **more: str) -> Problem:
    asked = {"question": QUESTION, "solution": f"{LINE_1}\n{LINE_2}\n{LAST}", "answer": "14"} | more
    return Problem(f"gsm8k/{split}/{number}", split, "gsm8k", False, **asked)


# ---- tokenizers ----

CORPUS = [f"{QUESTION}\n{LINE_1}\n{LINE_2}\n{LAST}", "naive Ana pays 12 = 3 * 4 dollars.\nShe has x = 12.\nAna pays x."] * 4


def byte_level() -> PreTrainedTokenizerFast:
    return train_tokenizer(CORPUS, 320)


def pieces(newlines: bool) -> PreTrainedTokenizerFast:
    """As sentencepiece makes them for Llama 2: words begin with ▁, what is not in the vocabulary is spelt in bytes.

    Args:
        newlines: line breaks are characters like any other, so that tokens may hold one in their middle; else they are bytes.
    """
    texts = CORPUS if newlines else [line for text in CORPUS for line in text.split("\n")]
    learnt = Tokenizer(models.BPE())
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Digits(individual_digits=True)]
    )
    learnt.pre_tokenizer = words
    special = ["<unk>", "<s>", "</s>"]
    learnt.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False))
    model = json.loads(learnt.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in model["merges"]]
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = words
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="</s>")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": byte_level,
    "pieces": lambda: pieces(newlines=False),
    "pieces over lines": lambda: pieces(newlines=True),
}


def bytes_of(codec: Codec, ids: Ids) -> list[bytes]:
    """What each token stands for, read off the vocabulary."""
    tokens = codec.tokenizer.convert_ids_to_tokens(list(ids))
    if "<0x0A>" not in codec.tokenizer.get_vocab():
        alphabet = {char: byte for byte, char in _byte_alphabet().items()}
        return [bytes(alphabet[char] for char in token) for token in tokens]
    found = []
    for place, token in enumerate(tokens):
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            found.append(bytes([int(token[3:5], 16)]))
        else:
            text = token.replace("▁", " ")
            found.append((text.removeprefix(" ") if place == 0 else text).encode())
    return found


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(rest)}


# ---- judged rollouts ----


def verdict_of(text: str, start: int, end: int, wrong: Sequence[tuple[int, int]], **more: Any) -> dict[str, Any]:
    """As the judge writes it: the wrong step is text[start:end], `wrong` counts from its first character."""
    spans, at = [], 0
    for line in text.split("\n"):
        spans.append([at, at + len(line)])
        at += len(line) + 1
    return {
        "problem": problem().id, "correct": False, "steps": spans, "error_step": text.count("\n", 0, start),
        "error_kind": "copy", "try_start": start, "try_text": text[start:end], "try_wrong": [list(span) for span in wrong],
        "try_own": True, "continuation": [],
    } | more  # fmt: skip


def rollout_of(codec: Codec, name: str, ids: Ids, **more: Any) -> dict[str, Any]:
    row = {"id": name, "token_ids": list(ids), "prompt_ids": list(codec.prompt_ids(problem())), "finish": "stop", "hot": False}
    return row | more


Row = tuple[dict[str, Any], dict[str, Any]]


def wrong_row(codec: Codec, name: str, before: str, line: str, mark: str, after: str = "", hot: bool = False, **more: Any) -> Row:
    """A rollout that goes wrong in `line`, at the first place where it holds `mark`."""
    at = line.index(mark)
    text = before + line + after
    verdict = verdict_of(text, len(before), len(before) + len(line), [(at, at + len(mark))], **more)
    return verdict, rollout_of(codec, name, codec.solution_ids(text), hot=hot)


def right_row(codec: Codec, name: str, text: str, **more: Any) -> Row:
    verdict = {"problem": problem().id, "correct": True, "error_step": -1} | more
    return verdict, rollout_of(codec, name, codec.solution_ids(text))


def sorted_rows(codec: Codec, *rows: Row, problems: Sequence[Problem] = (problem(),)) -> Judged:
    verdicts = [verdict | {"id": rollout["id"]} for verdict, rollout in rows]
    rollouts = [rollout for _, rollout in rows]
    return sort_rollouts(verdicts, rollouts, {one.id: one for one in problems}, codec)


def surviving(one: Candidate, codec: Codec) -> Ids:
    start = one.trace.prompt_length
    return apply_undo(one.trace.ids[start:], codec.rule).surviving


def role_text(trace: Trace, codec: Codec, *roles: Role) -> str:
    return codec.decode([token for token, role in zip(trace.ids, trace.roles, strict=True) if role in roles]).text
