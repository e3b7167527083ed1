"""A saved model folder as its users need it: tokenizer, undo rule, how it is meant to answer, prompts from what users write.

Commands and the server call it. The folder is an ordinary Hugging Face folder; `retract.json` in it, where there is one, holds
values of AnswerSettings, such as {"undo_token": "<|BACKTRACK|>", "unit": "step", "prompt": "{question}\\n", "threshold": 0.7}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator
from transformers import AutoConfig, AutoTokenizer

from pipeline.backtrack.cursor import Decoding, Mode, Signal
from pipeline.backtrack.embedding import undo_rule
from pipeline.backtrack.undo import UndoRule, Unit
from pipeline.config import BaseSettings, DecodeSettings, SamplingSettings, UndoSettings, prompt_template

NOTE = "retract.json"
_CONTEXT = 4096  # of a model whose config names no longest row
_INVISIBLE = "\u200b"  # a space without width


class InputError(ValueError):
    """What was given cannot be used. One line, for the user."""


class AnswerSettings(SamplingSettings, DecodeSettings):
    """How a saved model answers. Bounds and defaults are those of a run's settings, but for the temperature."""

    temperature: float = Field(0.0, ge=0, le=5, description="0 decodes greedily.")
    mode: Mode = Field("rewind", description="Deleted text leaves the context, or stays; or there is no undo at all.")
    undo_token: str = Field(UndoSettings().token, min_length=1, max_length=64, description="The undo token's text.")
    unit: Unit = Field(UndoSettings().unit, description="What one undo token deletes.")
    prompt: str = Field(BaseSettings().prompt, description="How a question becomes a prompt; holds {question} once.")

    @field_validator("prompt")
    @classmethod
    def _has_question(cls, value: str) -> str:
        return prompt_template(value)


@dataclass(frozen=True)
class SavedModel:
    """All of a model but its weights.

    Example:
        saved = SavedModel.load(Path("runs/tiny/model"), {"temperature": 0.7})
        request = DecodeRequest(saved.question_ids("What is 6 x 7?"), seed=0)
    """

    folder: Path
    tokenizer: Any
    settings: AnswerSettings
    rule: UndoRule
    stop_id: int
    context: int
    """Longest row that the model can see, in tokens."""

    @classmethod
    def load(cls, folder: Path, given: Mapping[str, Any]) -> SavedModel:
        """`given` goes before what the folder's note says, and that before the defaults.

        Raises:
            InputError: no such folder, no tokenizer with the undo token in it, or a value that is not allowed.
        """
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} is no model folder: it has no config.json")
        if not any(folder.glob("*.safetensors")):
            raise InputError(f"{folder} has no weights in safetensors; pickled ones can run code when they are read, and are not")
        settings = answer_settings({**read_note(folder), **given})
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            config: Any = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        try:
            rule = undo_rule(tokenizer, settings.undo_token, settings.unit)
        except ValueError as error:
            raise InputError(f"{folder}: {error}; --undo-token names another one") from error
        if tokenizer.eos_token_id is None:
            raise InputError(f"{folder}: the tokenizer has no end-of-text token")
        context = getattr(config, "max_position_embeddings", None) or _CONTEXT
        return cls(folder, tokenizer, settings, rule, int(tokenizer.eos_token_id), int(context))

    def question_ids(self, question: str, escape: bool = False) -> tuple[int, ...]:
        """Ids of the prompt that asks a question.

        Raises:
            InputError: an empty question, or one with the undo token in it, unless `escape`.
        """
        if not question.strip():
            raise InputError("the question is empty")
        return self.prompt_ids(self.settings.prompt.format(question=question), escape)

    def prompt_ids(self, text: str, escape: bool = False) -> tuple[int, ...]:
        """Ids of text as it stands; text that spells a special token is split like any other text.

        Raises:
            InputError: empty text, or text with the undo token in it, unless `escape`.
        """
        text = self.plain(text, escape)
        return self._checked(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    def chat_ids(self, messages: Sequence[Mapping[str, str]], escape: bool = False) -> tuple[int, ...]:
        """Ids of a conversation, which ends with a question: by the tokenizer's chat template, or the last question alone.

        Raises:
            InputError: nothing asked, a template that refuses the messages, or the undo token in them, unless `escape`.
        """
        if not self.tokenizer.chat_template:
            questions = [message["content"] for message in messages if message["role"] == "user"]
            if not questions:
                raise InputError("no message has the role user")
            return self.question_ids(questions[-1], escape)
        plain = [{"role": message["role"], "content": self.plain(message["content"], escape)} for message in messages]
        # Templates are code of the model folder, in a sandbox of transformers, and raise what they like.
        try:
            text = self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise InputError(f"the chat template refuses these messages: {' '.join(str(error).split())[:200]}") from error
        return self._checked(self.tokenizer(text, add_special_tokens=False).input_ids)

    def plain(self, text: str, escape: bool) -> str:
        """Text without the undo token: escaped, it has a space without width behind its first character."""
        token = self.settings.undo_token
        if token in text and not escape:
            raise InputError(f"the prompt contains the undo token {token!r}, which only the model writes; escape makes it text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("the prompt is no valid Unicode text") from error
        return text.replace(token, f"{token[0]}{_INVISIBLE}{token[1:]}")

    def decoding(self, settings: AnswerSettings, max_tokens: int) -> Decoding:
        """How to decode by settings of this model, which may be a request's own, within `max_tokens` ids."""
        return decoding_of(settings, self.rule, self.stop_id, max_tokens, len(self.tokenizer))

    def room(self, prompt_ids: Sequence[int], row_tokens: int) -> int:
        """Ids that fit behind a prompt in rows of so many.

        Raises:
            InputError: none do.
        """
        most = min(self.context, row_tokens)
        if len(prompt_ids) >= most:
            raise InputError(f"the prompt is too long: it has {len(prompt_ids)} tokens, and with the answer {most} at most fit")
        return most - len(prompt_ids)

    def _checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        if not ids:
            raise InputError("the prompt is empty")
        if self.rule.undo_id in ids:
            raise InputError("the prompt contains the undo token, and this tokenizer reads it in its escaped form too")
        return tuple(int(token) for token in ids)


def read_note(folder: Path) -> dict[str, Any]:
    """What a model folder says about itself in `retract.json`; nothing where there is none. Other keys are left out.

    Raises:
        InputError: the file is no JSON object.
    """
    file = folder / NOTE
    if not file.is_file():
        return {}
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is no JSON: {error}") from error
    if not isinstance(note, dict):
        raise InputError(f"{file} must hold an object")
    return {key: value for key, value in note.items() if key in AnswerSettings.model_fields}


def answer_settings(values: Mapping[str, Any]) -> AnswerSettings:
    """
    Raises:
        InputError: a value that is not allowed, named by its key.
    """
    try:
        return AnswerSettings.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(explain(error)) from error


def explain(error: ValidationError) -> str:
    """The first mistake in one line."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    shown = "" if isinstance(first["input"], dict) else f", not {first['input']!r:.60}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}{shown}".removeprefix(": ")


def decoding_of(settings: AnswerSettings, rule: UndoRule, stop_id: int, max_tokens: int, vocabulary: int | None = None) -> Decoding:
    return Decoding(
        settings.mode,
        settings.temperature,
        settings.top_p,
        min(max_tokens, settings.max_tokens),
        stop_id,
        rule,
        rewinding=settings.rewinding,
        threshold=settings.threshold,
        undo_bias=settings.undo_bias,
        ban_tried=settings.ban_tried,
        max_undos=settings.max_undos,
        max_undos_per_state=settings.max_undos_per_state,
        signal=Signal(**settings.signal.model_dump()),
        vocabulary=vocabulary,
    )
