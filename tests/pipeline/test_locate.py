"""A rollout is cut at its first error between tokens, under every kind of tokenizer: nothing it wrote is tokenised again."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pipeline.backtrack.undo import Unit
from pipeline.config import TraceSettings
from pipeline.stages.io import Codec
from pipeline.stages.sources import (
    locate,
    own_errors,
)
from tests.pipeline.judged import (
    LAST,
    LINE_1,
    LINE_2,
    TOKENIZERS,
    UNITS,
    bytes_of,
    problem,
    rollout_of,
    sorted_rows,
    surviving,
    verdict_of,
    wrong_row,
)

words = st.sampled_from(["Ana", "pays", "3+4=7", "12", "é", "naïve", "日本", "🍎", "🍎🍎", "=", "x.", "She", "本日は"])
lines = st.lists(words, min_size=1, max_size=4).map(" ".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=120)
@given(st.data())
def test_a_rollout_is_cut_at_token_borders(name: str, codecs: Callable[..., Codec], data: st.DataObject) -> None:
    """Prefix, try and what followed are the rollout's own ids; errors are the tokens that hold a byte of what is marked."""
    codec = codecs(name)
    text_lines = data.draw(st.lists(lines, min_size=1, max_size=4))
    text_lines[1:] = [data.draw(st.sampled_from(["", "", " "])) + line for line in text_lines[1:]]
    text = "\n".join(text_lines)
    step = data.draw(st.integers(0, len(text_lines) - 1))
    start = sum(len(line) + 1 for line in text_lines[:step])
    line = text_lines[step]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(line)), min_size=2, max_size=4))) if len(line) > 3 else [0, len(line)]
    marked = list(zip(cuts[::2], cuts[1::2], strict=False))
    ids = codec.encode(text)
    if name == "bytes" and data.draw(st.booleans()):  # as a model may write it, unlike the tokenizer
        at = sorted(data.draw(st.sets(st.integers(1, len(text)), max_size=5)) | {0, len(text)})
        ids = tuple(token for first, last in itertools.pairwise(at) for token in codec.encode(text[first:last]))
    ended = (*ids, codec.stop_id) if data.draw(st.booleans()) else ids
    held = bytes_of(codec, ids)
    assert b"".join(held).decode() == text
    ends = list(itertools.accumulate(map(len, held), initial=0))
    found = locate(verdict_of(text, start, start + len(line), marked), rollout_of(codec, "r", ended, hot=True), problem(), codec)
    from_byte, to_byte = (len(text[:at].encode()) for at in (start, start + len(line)))
    if from_byte not in ends or to_byte not in ends:
        event("inside a token")
        assert found is None
        return
    event("located")
    assert found is not None
    first, tried = len(found.prefix), len(found.wrong_try.ids)
    assert found.prefix + found.wrong_try.ids + found.continued == ids
    assert (ends[first], ends[first + tried]) == (from_byte, to_byte)
    wrong_bytes = {
        byte
        for low, high in marked
        for byte in range(len(text[: start + low].encode()), len(text[: start + high].encode()))
    }  # fmt: skip
    for at, is_wrong in enumerate(found.wrong_try.wrong, start=first):
        own = set(range(ends[at], ends[at + 1]))
        assert not own or is_wrong == bool(own & wrong_bytes)
    assert (found.rollout, found.kind, found.made, found.prompt) == ("r", "copy", "near_miss", codec.prompt_ids(problem()))


@pytest.mark.parametrize("name", ["bytes", "pieces"])
@pytest.mark.parametrize("first", ["🍎", "日本", "é"])
def test_a_wrong_step_that_begins_with_a_character_of_several_tokens(name: str, first: str, codecs: Callable[..., Codec]) -> None:
    codec = codecs(name)
    before, line = "Ana pays.\n", f"{first} pays 7."
    ids = codec.encode(f"{before}{line}\nx")
    verdict = verdict_of(f"{before}{line}\nx", len(before), len(before) + len(line), [(0, len(first))])
    found = locate(verdict, rollout_of(codec, "r", ids), problem(), codec)
    assert found is not None
    assert b"".join(bytes_of(codec, found.prefix)).decode() == codec.decode(found.prefix).text == before
    assert found.prefix + found.wrong_try.ids == ids[: len(found.prefix) + len(found.wrong_try.ids)]
    wrong = [token for token, is_wrong in zip(found.wrong_try.ids, found.wrong_try.wrong, strict=True) if is_wrong]
    assert len(wrong) > 1 and codec.decode((*codec.encode("x"), *wrong)).text == f"x{first}"


def test_a_border_inside_a_token(codecs: Callable[..., Codec]) -> None:
    codec = codecs("pieces over lines")
    text = f"{LINE_1}\n{LINE_2}"
    ids = codec.encode(text)
    assert any(b"\n" in held and not held.endswith(b"\n") for held in bytes_of(codec, ids)), "a token that spans the line break"
    verdict = verdict_of(text, len(LINE_1) + 1, len(text), [(0, 3)])
    assert locate(verdict, rollout_of(codec, "r", ids), problem(), codec) is None
    judged = sorted_rows(codec, (verdict, rollout_of(codec, "r", ids)))
    assert judged.dropped == {"inside_a_token": 1} and not judged.wrong
    assert judged.wholly_wrong[problem().id] == [("r", ids)]


@pytest.mark.parametrize("name", ["bytes", "pieces"])
@pytest.mark.parametrize("step", [0, 1])
def test_a_recomputed_try_reads_on_from_its_prefix(name: str, step: int, codecs: Callable[..., Codec]) -> None:
    """The ids of the prefix are the rollout's own; the recomputed text behind them adds no character to it."""
    codec = codecs(name)
    own = [LINE_1.replace("3+4", "3+5"), LINE_2.replace("7*2", "7*3")][step]
    before = ["", LINE_1 + "\n"][step]
    recomputed = [own.replace("7>>7", "8>>8"), own.replace("14>>14", "21>>21")][step]
    decision = own.index(["5", "3"][step])
    text = f"{before}{own}\n{LAST}"
    verdict = verdict_of(text, len(before), len(before) + len(own), [(decision, decision + 1)])
    verdict |= {"try_own": False, "try_text": recomputed}
    ids = codec.encode(text)
    found = locate(verdict, rollout_of(codec, "r", ids), problem(), codec)
    assert found is not None and found.continued == ()
    assert found.prefix == ids[: len(found.prefix)] and codec.decode(found.prefix).text == before
    assert codec.decode(found.prefix + found.wrong_try.ids).text == before + recomputed
    marked = [token for token, wrong in zip(found.wrong_try.ids, found.wrong_try.wrong, strict=True) if wrong]
    assert [held.strip() for held in bytes_of(codec, (ids[0], *marked))[1:]] == [["5", "3"][step].encode()]


@pytest.mark.parametrize("name", ["bytes", "pieces"])
@pytest.mark.parametrize("unit", UNITS)
def test_the_gold_solution_reads_on_from_the_models_words(name: str, unit: Unit, codecs: Callable[..., Codec]) -> None:
    codec = codecs(name, unit)
    for before, line, mark in (("", LINE_1.replace("3+4", "3+5"), "5"), (LINE_1 + "\n", LINE_2.replace("7*2", "7*3"), "3")):
        judged = sorted_rows(codec, wrong_row(codec, "r", before, line, mark, f"\n{LAST}"))
        (one,) = own_errors(judged, "self", TraceSettings(), codec, 0)
        assert one.correction == "gold"
        assert codec.decode(surviving(one, codec)).text == problem().solution
        assert surviving(one, codec)[-1] == codec.stop_id
