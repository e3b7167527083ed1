"""Text for a reader from a growing stream of emitted ids: what is appended, what is taken back, the end.

Commands and the server call it. What an undo deletes is UndoStream's word; here ids only become characters. It knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.backtrack.cursor import Decoding, Finish
from pipeline.backtrack.undo import UndoRule, UndoStream, apply_undo

_BROKEN = "\ufffd"
_PENDING = 16  # ids that may be part of an unfinished character, which has 4 bytes at most; what is longer is broken for good


@dataclass(frozen=True, slots=True)
class Appended:
    """The reader sees more text behind what stands there."""

    text: str


@dataclass(frozen=True, slots=True)
class Deleted:
    """The reader's last `chars` characters (code points) go."""

    chars: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing comes any more."""

    reason: Finish


class _Frame(NamedTuple):
    """What is known behind each id of the stack. An undo goes back to an earlier one."""

    plain: int = 0  # ids with text
    chars: int = 0  # shown
    start: int = 0  # of the window that is decoded, among the ids with text
    settled: int = 0  # ids whose characters are whole
    settled_chars: int = 0


class TextStream:
    """What the reader sees, id by id. At every moment that is the text of the surviving ids without special tokens, and without
    the character at its end whose bytes have not all come: a broken character is never shown, nor taken back.

    Each id costs a decode of a few ids: of those since the last whole character, and of the ones before that give a tokenizer
    the neighbours on which its spaces depend.

    Example:
        stream = TextStream(tokenizer, UndoRule(undo_id), stop_id)
        stream.feed([hello, world, undo_id])  # [Appended("Hello"), Appended(" world"), Deleted(6)]
    """

    def __init__(self, tokenizer: Any, rule: UndoRule, stop_id: int, raw: bool = False) -> None:
        """`raw`: all that is emitted, with U in its written form, and nothing is taken back."""
        self._tokenizer, self._raw = tokenizer, raw
        self._hidden = special_ids(tokenizer) | {stop_id}
        self._hidden = self._hidden - {rule.undo_id} if raw else self._hidden | {rule.undo_id}
        self._stream = UndoStream(rule)
        self._plain: list[int] = []
        self._frames = [_Frame()]
        self._pieces: list[str] = [""]

    @property
    def text(self) -> str:
        """What the reader sees now. A copy."""
        return "".join(self._pieces)

    @property
    def undos(self) -> int:
        """U's so far, no-ops included."""
        return self._stream.undos

    @property
    def surviving(self) -> tuple[int, ...]:
        """Ids on the stack. A copy."""
        return self._stream.surviving

    @property
    def depth(self) -> int:
        """How many ids are on the stack."""
        return len(self._frames) - 1

    def between(self, start: int, end: int) -> str:
        """What the ids of the stack from place `start` to before `end` have added to the text."""
        return "".join(self._pieces[start + 1 : end + 1])

    def feed(self, ids: Iterable[int]) -> list[Appended | Deleted]:
        """Take the next ids; at most one event for each, none for ids that change nothing on the page."""
        return [event for token in ids if (event := self.take(token))]

    def take(self, token: int) -> Appended | Deleted | None:
        deleted = self._stream.take(token)
        if deleted >= 0 and not self._raw:
            before = self._frames[-1].chars
            keep = len(self._frames) - deleted
            del self._frames[keep:], self._pieces[keep:]
            now = self._frames[-1]
            del self._plain[now.plain :]
            return Deleted(before - now.chars) if before > now.chars else None
        piece = ""
        if token in self._hidden:
            self._frames.append(self._frames[-1])
        else:
            self._plain.append(token)
            frame, piece = self._grown(self._frames[-1])
            self._frames.append(frame)
        self._pieces.append(piece)
        return Appended(piece) if piece else None

    def _grown(self, frame: _Frame) -> tuple[_Frame, str]:
        """One id with text more."""
        count = len(self._plain)
        known = len(self._decode(frame.start, frame.settled)) + frame.chars - frame.settled_chars
        text = self._decode(frame.start, count)
        whole = not text.endswith(_BROKEN) or count - frame.settled > _PENDING
        piece = (text if whole else text.rstrip(_BROKEN))[known:]
        chars = frame.chars + len(piece)
        if whole and piece:
            return _Frame(count, chars, frame.settled, count, chars), piece
        return frame._replace(plain=count, chars=chars), piece

    def _decode(self, start: int, end: int) -> str:
        ids = self._plain[start:end]
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


class SettledStream:
    """Text that cannot be taken back any more, for readers who can only append.

    At most r more undos can come, for `max_undos` and `max_tokens` bound them: settled is what r further undos would leave.
    With unit `all` that is nothing while one undo is left, with the others all but the last r lines or tokens.
    """

    def __init__(self, tokenizer: Any, decoding: Decoding) -> None:
        self._texts = TextStream(tokenizer, decoding.rule, decoding.stop_id)
        self._decoding = decoding
        self._emitted = self._depth = 0
        self._undos_left = -1  # for which what is settled was found
        self._line_opens = True  # with the next id

    def feed(self, ids: Iterable[int]) -> str:
        """Take the next ids; the text that is settled now and was not before."""
        return "".join(self._take(token) for token in ids)

    def finish(self) -> str:
        """The rest of the text."""
        return self._show(self._texts.depth)

    def _take(self, token: int) -> str:
        texts, decoding, rule = self._texts, self._decoding, self._decoding.rule
        texts.take(token)
        self._emitted += 1
        left = max(0, min(decoding.max_undos - texts.undos, decoding.max_tokens - self._emitted - 1))
        if not left or decoding.mode == "forbidden":
            return self._show(texts.depth)
        if rule.unit == "token":
            return self._show(texts.depth - left)
        opened, self._line_opens = self._line_opens, token == rule.undo_id or token in rule.step_end_ids
        if rule.unit == "all" or left == self._undos_left and not opened:
            return ""  # unit `step`: only the last line has grown
        self._undos_left = left
        return self._show(len(apply_undo((*texts.surviving, *[rule.undo_id] * left), rule).surviving))

    def _show(self, depth: int) -> str:
        start, self._depth = self._depth, max(self._depth, depth)
        return self._texts.between(start, self._depth)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that stand for no text."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {token for token, content in added.items() if content.special}


def text_of(tokenizer: Any, ids: Iterable[int], rule: UndoRule, stop_id: int) -> str:
    """What a reader sees of emitted ids."""
    stream = TextStream(tokenizer, rule, stop_id)
    stream.feed(ids)
    return stream.text
