"""A reader of the stream always sees the decode of what survives, whole characters only, whatever is taken back."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from actors.streaming import Appended, Deleted, SettledStream, TextStream, text_of
from pipeline.backtrack.cursor import Decoding, Mode
from pipeline.backtrack.undo import UndoRule, Unit, apply_undo
from tests.actors.readers import STOP, UNDO, byte_fallback, byte_level

KINDS: dict[str, Any] = {"byte level": functools.cache(byte_level), "byte fallback": functools.cache(byte_fallback)}
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
UNITS: list[Unit] = ["token", "step", "all"]
TEXTS = ["a", " ab", "€", "é", "b\n", "\n\na", "😀", "日本", "  a", "👨‍👩‍👧", "\ufeff", "a.", " "]


def undo_id(tokenizer: Any) -> int:
    return int(tokenizer.convert_tokens_to_ids(UNDO))


def rule_of(tokenizer: Any, unit: Unit) -> UndoRule:
    ends = frozenset(token for token in range(len(tokenizer)) if "\n" in tokenizer.decode([token]))
    return UndoRule(undo_id(tokenizer), unit, ends)


def full(tokenizer: Any, ids: Sequence[int]) -> str:
    """The decode of all ids at once."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def by_bytes(tokenizer: Any, ids: Sequence[int]) -> str | None:
    """The text said once more by the bytes of the tokens, without the character that has not ended; None: no text at all."""
    special = {undo_id(tokenizer), tokenizer.eos_token_id}
    tokens = tokenizer.convert_ids_to_tokens([token for token in ids if token not in special])
    if "▁" in tokenizer.get_vocab():
        parts = [bytes([int(token[3:5], 16)]) if token[:3] == "<0x" else token.replace("▁", " ").encode() for token in tokens]
        whole = b"".join(parts).removeprefix(b" ")
    else:
        whole = bytes(BYTES[character] for token in tokens for character in token)
    try:
        return codecs.getincrementaldecoder("utf-8")("strict").decode(whole)
    except UnicodeDecodeError:
        return None


@st.composite
def emitted(draw: st.DrawFn) -> tuple[str, Unit, list[int]]:
    """Ids of texts with undos between any two of them, so within characters too."""
    kind, unit = draw(st.sampled_from(sorted(KINDS))), draw(st.sampled_from(UNITS))
    tokenizer = KINDS[kind]()
    special = [undo_id(tokenizer), tokenizer.eos_token_id]
    ids = []
    for text in draw(st.lists(st.sampled_from(TEXTS), max_size=12)):
        ids += tokenizer(text, add_special_tokens=False).input_ids
    for place in draw(st.lists(st.integers(0, len(ids)), max_size=10)):
        ids[place:place] = [draw(st.sampled_from(special[:1] * 3 + special[1:]))]
    return kind, unit, ids


def euro(tokenizer: Any) -> list[int]:
    return [int(token) for token in tokenizer("€", add_special_tokens=False).input_ids[-3:]]


@settings(max_examples=200, deadline=None)
@given(emitted())
def test_the_reader_sees_the_decode_of_what_survives(case: tuple[str, Unit, list[int]]) -> None:
    kind, unit, ids = case
    tokenizer = KINDS[kind]()
    rule = rule_of(tokenizer, unit)
    stream, page = TextStream(tokenizer, rule, tokenizer.eos_token_id), ""
    for end, token in enumerate(ids, 1):
        for event in stream.feed([token]):
            if isinstance(event, Appended):
                page += event.text
                assert event.text
            else:
                assert 0 < event.chars <= len(page)
                page = page[: -event.chars]
        surviving = apply_undo(ids[:end], rule).surviving
        wanted = full(tokenizer, surviving)
        assert page == stream.text
        if (said := by_bytes(tokenizer, surviving)) is not None:
            assert page == said
            assert page == wanted or wanted.endswith("\ufffd")
        elif kind == "byte level" and "\ufffd" * 8 not in wanted:  # an undo has left halves of characters side by side
            assert page == wanted.rstrip("\ufffd")
        assert stream.surviving == surviving and stream.undos == ids[:end].count(rule.undo_id)
    assert text_of(tokenizer, ids, rule, tokenizer.eos_token_id) == page


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", UNITS)
def test_a_character_comes_whole_and_goes_whole(kind: str, unit: Unit) -> None:
    tokenizer = KINDS[kind]()
    stream, (first, second, third) = TextStream(tokenizer, rule_of(tokenizer, unit), tokenizer.eos_token_id), euro(tokenizer)
    assert stream.feed([first, second]) == [] and stream.text == ""
    assert stream.feed([third]) == [Appended("€")]
    assert stream.feed([first]) == [] and stream.text == "€"  # the next one does not break the last one
    gone = stream.feed([undo_id(tokenizer)] * 2)
    assert gone == [Deleted(1)] and stream.text == ""
    if unit == "token":
        assert stream.feed([third]) == [Appended("€")]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_no_text_and_trailing_undos_count(kind: str) -> None:
    tokenizer = KINDS[kind]()
    rule, stop = rule_of(tokenizer, "token"), tokenizer.eos_token_id
    a, b = (tokenizer(text, add_special_tokens=False).input_ids for text in ("a", " b"))
    assert text_of(tokenizer, [*a, stop, *b, stop], rule, stop) == full(tokenizer, [*a, *b])
    assert text_of(tokenizer, [*a, *b, *[rule.undo_id] * len(b)], rule, stop) == full(tokenizer, a)
    assert text_of(tokenizer, [*a, *[rule.undo_id] * 9], rule, stop) == ""
    raw = TextStream(tokenizer, rule, stop, raw=True)
    raw.feed([*a, rule.undo_id, *a, stop])
    assert raw.text.replace(" ", "") == f"a{UNDO}a"


class Counting:
    """A tokenizer that notes how many ids each decode is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.all_special_ids, self.added_tokens_decoder = tokenizer.all_special_ids, tokenizer.added_tokens_decoder
        self.lengths: list[int] = []

    def decode(self, ids: list[int], **how: Any) -> str:
        self.lengths.append(len(ids))
        return str(self._tokenizer.decode(ids, **how))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_no_text_are_shown_broken_and_cost_little(kind: str) -> None:
    """A model can emit anything: every window stays short."""
    tokenizer = KINDS[kind]()
    counting = Counting(tokenizer)
    stream = TextStream(counting, rule_of(tokenizer, "token"), tokenizer.eos_token_id)
    stream.feed([euro(tokenizer)[0]] * 300)
    stream.feed(tokenizer("ab", add_special_tokens=False).input_ids)
    assert stream.text.endswith("ab") and set(stream.text[:-2].rstrip()) == {"\ufffd"}
    assert max(counting.lengths) < 50


MODES: list[Mode] = ["rewind", "soft", "forbidden"]


@settings(max_examples=150, deadline=None)
@given(emitted(), st.integers(1, 5), st.integers(0, 3), st.sampled_from(MODES))
@example(("byte level", "step", [10, 10]), 1, 0, "rewind")
def test_what_is_settled_stays_and_what_waits_could_go(
    case: tuple[str, Unit, list[int]], max_undos: int, spare: int, mode: Mode
) -> None:
    kind, unit, ids = case
    tokenizer = KINDS[kind]()
    rule, stop = rule_of(tokenizer, unit), tokenizer.eos_token_id
    kept: list[int] = []
    for token in ids:  # no more undos than allowed, none where it would do nothing
        allowed = mode != "forbidden" and kept.count(rule.undo_id) < max_undos and apply_undo(kept, rule).surviving
        if token != rule.undo_id or allowed:
            kept.append(token)
    max_tokens = len(kept) + 1 + spare
    decoding = Decoding(mode, 0, 1, max_tokens, stop, rule, max_undos=max_undos)
    stream, page = SettledStream(tokenizer, decoding), ""
    for end, token in enumerate(kept, 1):
        page += stream.feed([token])
        left = min(max_undos - kept[:end].count(rule.undo_id), max_tokens - end - 1) if mode != "forbidden" else 0
        futures = [apply_undo([*kept[:end], *[rule.undo_id] * more], rule).surviving for more in range(max(0, left) + 1)]
        sure = text_of(tokenizer, min(futures, key=len), rule, stop)
        assert sure.startswith(page)  # no future takes back what is shown
        assert len(page) == max(len(page), len(sure))  # and all that is sure is shown
    assert page + stream.finish() == text_of(tokenizer, kept, rule, stop)


def test_tokenizers_of_the_tests_split_characters() -> None:
    for make in KINDS.values():
        tokenizer = make()
        assert [tokenizer.decode([token]) for token in euro(tokenizer)] == ["\ufffd"] * 3
        assert tokenizer.decode(tokenizer("a ab😀", add_special_tokens=False).input_ids) == "a ab😀"
    assert STOP in byte_level().get_vocab()
