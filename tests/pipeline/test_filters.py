"""Nothing held out becomes a trace; each filter leaves out what it says and counts it; an undo has to help the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from actors.probe import ProbeRow, probe
from pipeline.backtrack.trace import Detour, Role, WrongTry, build_trace
from pipeline.backtrack.undo import UndoRule, Unit, apply_undo
from pipeline.config import LossFilter, ScratchModel, Settings, TraceFilters
from pipeline.stages.base import new_model, train_tokenizer
from pipeline.stages.filters import HeldOut, Removed, has_late_evidence, keep, question_hash, undo_helps
from pipeline.stages.graph import longest_trace
from pipeline.stages.sources import Candidate, clean_row
from pipeline.stages.stage import StageError
from pipeline.tasks.problem import Problem

U, END = 9, 0
OFF = TraceFilters(duplicates=False)


def problem(name: str = "gsm8k/train/0", question: str = "How many apples?", split: str = "train") -> Problem:
    return Problem(name, split, "gsm8k", False, question, "2+2=4\n#### 4", "4")


def rule(unit: Unit = "all") -> UndoRule:
    return UndoRule(U, unit, frozenset({END}))


def wrong(ids: Sequence[int], *decisions: int, inner: Sequence[Detour] = ()) -> WrongTry:
    return WrongTry(tuple(ids), tuple(at in decisions for at in range(len(ids))), tuple(inner))


def candidate(*tries: WrongTry, solution: Sequence[int] = (1, 2, 3), unit: Unit = "all", at: int = 0, **more: Any) -> Candidate:
    trace = build_trace((5, 6), solution, [Detour(at, one) for one in tries], rule(unit))
    return Candidate(**{"problem": problem(), "source": "self", "trace": trace, "kinds": ("copy",) * len(tries)} | more)


class FakeCodec:
    """All that the loss filter asks of a codec."""

    def __init__(self, unit: Unit = "all") -> None:
        self.rule = rule(unit)


def kept(some: Sequence[Candidate], filters: TraceFilters, most: int = 99) -> tuple[list[int], dict[tuple[str, str], int]]:
    removed = Removed()
    found = list(keep(some, filters, most, HeldOut([]), removed))
    return [some.index(one) for one in found], dict(removed.counts)


# ---- held out ----


@pytest.mark.parametrize("split", ["test", "dev", "ood"])
def test_a_question_that_a_held_out_problem_asks(split: str) -> None:
    """Also in other case and with other spacing; the message names both."""
    held_out = HeldOut([problem(), problem("gsm8k/held/3", " how  MANY\n apples? ", split)])
    with pytest.raises(StageError, match=re.escape("gsm8k/train/0 is no training problem: gsm8k/held/3 asks the same question")):
        list(keep([candidate()], OFF, 99, held_out, Removed()))


@pytest.mark.parametrize("split", ["test", "dev", "ood"])
def test_a_held_out_problem_itself(split: str) -> None:
    one = problem("gsm8k/test/7", split=split)
    with pytest.raises(StageError, match="gsm8k/test/7 is no training problem"):
        HeldOut([one]).check(one)
    with pytest.raises(StageError, match="gsm8k/test/7 is no training problem"):
        HeldOut([]).check(one)  # though nobody told of it


def test_the_check_comes_before_every_filter() -> None:
    """A held-out question is no matter of counts, even where another filter would have left the candidate out."""
    held_out = HeldOut([problem("gsm8k/test/7", split="test")])
    with pytest.raises(StageError):
        list(keep([candidate(wrong([4], 0))], OFF, 1, held_out, Removed()))


def test_training_questions_may_be_alike() -> None:
    held_out = HeldOut([problem(), problem("gsm8k/train/1"), problem("gsm8k/test/7", "How many pears?", "test")])
    assert len(list(keep([candidate()], OFF, 99, held_out, Removed()))) == 1


@given(st.text(max_size=12), st.text(max_size=12))
def test_question_hashes(one: str, other: str) -> None:
    same = one.casefold().split() == other.casefold().split()
    assert (question_hash(one) == question_hash(other)) == same
    assert question_hash(one) == question_hash(f"  {one.upper().lower()}\t") or one.upper().lower().casefold() != one.casefold()
    assert re.fullmatch("[0-9a-f]{64}", question_hash(one))


# ---- filters that need no model ----


def test_each_filter_counts_by_source() -> None:
    long = candidate(wrong([4] * 20, 0), source="near_miss")
    two = candidate(wrong([4], 0), wrong([7], 0), source="aligned")
    odd = candidate(wrong([7], 0), kinds=("quantity",))
    early = candidate(wrong([8], 0), source="random")
    late = candidate(wrong([8, 8], 0))
    filters = TraceFilters(max_tokens=20, most_undos=1, kinds=["copy"], late_evidence=True)
    assert kept([long, two, odd, early, late, late, late], filters) == (
        [4],
        {
            ("length", "near_miss"): 1,
            ("most_undos", "aligned"): 1,
            ("kinds", "self"): 1,
            ("late_evidence", "random"): 1,
            ("duplicates", "self"): 2,
        },
    )


def test_the_first_filter_that_fails_is_the_one_that_counts() -> None:
    """length, most_undos, kinds, late_evidence, duplicates: one that fails all is counted under the first, and so on."""
    one = candidate(wrong([4], 0), wrong([4], 0), kinds=("quantity", "quantity"))
    order: list[tuple[str, dict[str, Any]]] = [
        ("late_evidence", {"late_evidence": True}),
        ("kinds", {"kinds": ["copy"]}),
        ("most_undos", {"most_undos": 1}),
        ("length", {"max_tokens": 8}),
    ]
    asked: dict[str, Any] = {}
    for name, more in order:
        asked |= more
        assert kept([one], TraceFilters(**asked)) == ([], {(name, "self"): 1})


def test_what_is_left_out_makes_no_duplicate() -> None:
    """The first copy fails another filter, so the second, judged otherwise, is no duplicate of anything."""
    odd, good = candidate(wrong([4], 0), kinds=("quantity",)), candidate(wrong([4], 0))
    assert kept([odd, good, good], TraceFilters(kinds=["copy"])) == ([1], {("kinds", "self"): 1, ("duplicates", "self"): 1})
    assert kept([good, good], OFF) == ([0, 0], {})


def test_duplicates_are_token_for_token() -> None:
    """The same tokens from another source are the same trace; the same solution with another error is not."""
    one, other = candidate(wrong([4], 0)), candidate(wrong([7], 0))
    again = candidate(wrong([4], 0), source="search")
    assert kept([one, other, again], TraceFilters()) == ([0, 1], {("duplicates", "search"): 1})


@pytest.mark.parametrize(
    ("setting", "most", "left"), [(None, 6, [0]), (None, 7, [0, 1]), (6, 99, [0]), (99, 6, [0]), (8, 99, [0, 1, 2])]
)
def test_the_longest_trace(setting: int | None, most: int, left: list[int]) -> None:
    """The tighter of the setting and of what rows and model have room for; as many tokens as the limit still fit."""
    some = [candidate(wrong([4], 0), solution=[1] * length) for length in (2, 3, 4)]
    assert [len(one.trace.ids) for one in some] == [6, 7, 8]
    found, counts = kept(some, OFF.model_copy(update={"max_tokens": setting}), most)
    assert found == left and counts == ({("length", "self"): 3 - len(left)} if len(left) < 3 else {})


def test_a_trace_longer_than_the_context_is_left_out_and_counted() -> None:
    """The model made here sees 64 tokens, though a row of the learner holds 256."""
    some = Settings.model_validate({"base": {"scratch": {"context": 64}}, "sft": {"row_tokens": 256}})
    assert longest_trace(some) == 64
    assert longest_trace(Settings.model_validate({"base": {"model": "some/hub"}, "sft": {"row_tokens": 256}})) == 256
    fits, longer = (candidate(wrong([4] * length, 0)) for length in (58, 59))
    assert (len(fits.trace.ids), len(longer.trace.ids)) == (64, 65)
    assert kept([longer, fits], some.traces.filters, longest_trace(some)) == ([1], {("length", "self"): 1})


def test_kinds_are_asked_of_judged_errors_alone() -> None:
    judged = [("self", "copy"), ("self", "quantity"), ("near_miss", "quantity"), ("search", "operator"), ("search", "quantity")]
    unnamed = [(source, source) for source in ("random", "aligned", "search")]
    some = [candidate(wrong([4], 0), source=source, kinds=("copy", kind)) for source, kind in judged]
    some += [candidate(wrong([4], 0), source=source, kinds=(kind,)) for source, kind in unnamed]
    filters = TraceFilters(kinds=["copy", "operator"], duplicates=False)
    assert kept(some, filters) == ([0, 3, 5, 6, 7], dict.fromkeys((("kinds", one) for one in ("self", "near_miss", "search")), 1))


@pytest.mark.parametrize("unit", ["token", "step", "all"])
def test_late_evidence(unit: Unit) -> None:
    """Every error of the trace has to be followed by a right inference before its undo."""

    def late(*tries: WrongTry) -> bool:
        return has_late_evidence(candidate(*tries, unit=unit, solution=(1, 2, END)))

    assert late(wrong([4, 7], 0))
    assert not late(wrong([4, 7], 1)) and not late(wrong([4, 7], 0, 1)) and not late(wrong([4], 0))
    assert late(wrong([4, 7], 0), wrong([7, 7], 0))
    assert not late(wrong([4, 7], 0), wrong([7], 0)) and not late(wrong([7], 0), wrong([4, 7], 0))
    assert late(), "a clean row has no error that could lack it"


def test_late_evidence_of_errors_within_errors() -> None:
    def outer(second: WrongTry) -> bool:
        return has_late_evidence(candidate(wrong([4, 7, 8], 0, inner=[Detour(2, second)]), unit="token"))

    assert outer(wrong([1, 1], 0)) and not outer(wrong([1], 0))


def test_removed_by_filter() -> None:
    removed = Removed()
    removed.counts.update({("length", "self"): 2, ("length", "random"): 3, ("kinds", "self"): 1})
    assert removed.by_filter() == {"kinds": 1, "length": 5}


# ---- the loss filter ----


class FakeProbe:
    """Answers with the given mean losses and keeps what it was asked."""

    def __init__(self, *losses: float) -> None:
        self._losses = iter(losses)
        self.asked: list[ProbeRow] = []

    def __call__(self, rows: Sequence[ProbeRow]) -> list[tuple[float, ...]]:
        self.asked += rows
        return [(-next(self._losses),) * len(row.at) for row in rows]


def helped(some: Sequence[Candidate], answers: FakeProbe, removed: Removed | None = None, **more: Any) -> list[int]:
    rewinds = more.pop("rewinds", False)
    codec: Any = FakeCodec(more.pop("unit", "all"))
    found = undo_helps(some, LossFilter(**more), rewinds, codec, answers, Removed() if removed is None else removed)
    return [some.index(one) for one in found]


@pytest.mark.parametrize(("margin", "passes"), [(0.0, True), (1.0, True), (1.5, True), (1.501, False), (-1.0, True)])
def test_the_margin(margin: float, passes: bool) -> None:
    """Loss .5 with the undo, 2 without: a fall of 1.5."""
    removed = Removed()
    assert helped([candidate(wrong([4], 0))], FakeProbe(0.5, 2.0), removed, margin=margin) == ([0] if passes else [])
    assert removed.counts == ({} if passes else {("loss", "self"): 1})


def test_it_has_to_beat_the_better_alternative() -> None:
    """Losses with the undo, without it, of the model's own words: the third one counts where there is one."""
    known = candidate(wrong([4], 0), continued=(7, 8))
    unknown = candidate(wrong([4], 0), source="search")
    answers = FakeProbe(1.0, 3.0, 1.4, 1.0, 3.0, 1.0, 3.0, 1.6, 1.0, 1.4, 9.0)
    removed = Removed()
    some = [known, unknown, known, known]
    assert len(undo_helps(some, LossFilter(margin=0.5), False, FakeCodec(), answers, removed)) == 2  # type: ignore[arg-type]
    assert removed.counts == {("loss", "self"): 2}
    assert len(answers.asked) == 3 + 2 + 3 + 3


def asked(context: Sequence[int], tokens: Sequence[int]) -> ProbeRow:
    """Each token behind what stands before it."""
    ids = (*context, *tokens)
    return ProbeRow(ids, tuple(range(len(context), len(ids))), tuple(tokens))


def test_what_is_asked_in_the_soft_form() -> None:
    """Trace 5 6 | 1 2 7 4 8 U 1 2 3 END: the solution 1 2 3 0, wrong at its third token, unit `all`."""
    one = candidate(wrong([7, 4, 8], 1), solution=(1, 2, 3, END), at=2, continued=(2, 2, 2, 2, 2, 2))
    assert one.trace.ids == (5, 6, 1, 2, 7, 4, 8, U, 1, 2, 3, END)
    answers = FakeProbe(0, 1, 1)
    helped([one], answers, window=3)
    assert answers.asked == [
        asked((5, 6, 1, 2, 7, 4, 8, U), (1, 2, 3)),
        asked((5, 6, 1, 2, 7, 4, 8), (1, 2, 3)),
        asked((5, 6, 1, 2, 7, 4, 8), (2, 2, 2)),
    ]


def test_what_is_asked_where_undos_rewind() -> None:
    """The first context is what survives; the alternatives stay as they are. A window beyond the end ends there."""
    one = candidate(wrong([7, 4, 8], 0), solution=(1, 2, 3, END), at=2, unit="token", continued=(2,))
    assert one.trace.ids == (5, 6, 1, 2, 7, 4, 8, U, U, U, 3, END)
    answers = FakeProbe(0, 1, 1)
    helped([one], answers, window=16, rewinds=True, unit="token")
    assert answers.asked == [
        asked((5, 6, 1, 2), (3, END)),
        asked((5, 6, 1, 2, 7, 4, 8), (3, END)),
        asked((5, 6, 1, 2, 7, 4, 8), (2,)),
    ]


@pytest.mark.parametrize("rewinds", [False, True])
def test_the_last_of_several_undos_is_asked_about(rewinds: bool) -> None:
    """Earlier errors stand in the row as they were emitted, in the alternatives too."""
    one = candidate(wrong([4], 0), wrong([8, 8], 0), solution=(1, 2), at=0)
    assert one.trace.ids == (5, 6, 4, U, 8, 8, U, 1, 2)
    answers = FakeProbe(0, 1)
    helped([one], answers, rewinds=rewinds)
    assert answers.asked == [asked((5, 6) if rewinds else (5, 6, 4, U, 8, 8, U), (1, 2)), asked((5, 6, 4, U, 8, 8), (1, 2))]


def test_nothing_to_ask() -> None:
    assert helped([], FakeProbe()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    model = new_model(ScratchModel(layers=2, width=32, heads=2, vocab=300), tokenizer, 0)
    with torch.no_grad():
        for part in model.parameters():
            part.mul_(6)  # so that losses differ
    model.save_pretrained(path)
    return path


def slow_losses(model: Any, one: Candidate, window: int, rewinds: bool, unit: Unit) -> Iterator[float]:
    """A forward for every token."""
    ids, roles = list(one.trace.ids), list(one.trace.roles)
    after = max(at for at, role in enumerate(roles) if role == Role.UNDO) + 1
    before = max(at for at in range(after) if roles[at] != Role.UNDO) + 1
    surviving = [*ids[:2], *apply_undo(ids[2:after], rule(unit)).surviving]
    ways = [(surviving if rewinds else ids[:after], ids[after:]), (ids[:before], ids[after:])]
    if one.continued:
        ways.append((ids[:before], list(one.continued)))
    for context, tokens in ways:
        losses = []
        for token in tokens[:window]:
            with torch.no_grad():
                losses.append(-float(torch.log_softmax(model(torch.tensor([context])).logits[0, -1], -1)[token]))
            context = [*context, token]
        yield sum(losses) / len(losses)


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_with_a_model_as_by_hand(folder: Path, data: st.DataObject) -> None:
    """What a margin keeps is what a forward for every token says."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    unit = data.draw(st.sampled_from(["token", "step", "all"]))
    rewinds, window = data.draw(st.booleans()), data.draw(st.integers(1, 5))
    token = st.integers(0, 8)
    some = [
        candidate(
            wrong(data.draw(st.lists(token, min_size=1, max_size=3)), 0),
            solution=data.draw(st.lists(token, min_size=1, max_size=5)),
            unit=unit,
            continued=tuple(data.draw(st.lists(token, max_size=4))),
        )
        for _ in range(data.draw(st.integers(1, 6)))
    ]
    falls = []
    for one in some:
        with_undo, *others = slow_losses(model, one, window, rewinds, unit)
        falls.append(min(others) - with_undo)
    margin = sorted(falls)[len(falls) // 2] - 1e-3  # some pass and some fail, none by a hair
    removed = Removed()
    codec: Any = FakeCodec(unit)
    found = undo_helps(some, LossFilter(margin=margin, window=window), rewinds, codec, lambda rows: probe(folder, rows), removed)
    near = [abs(fall - margin) < 5e-4 for fall in falls]
    expected = [one for one, fall in zip(some, falls, strict=True) if fall >= margin]
    assert any(near) or [one.trace.ids for one in found] == [one.trace.ids for one in expected]
    assert len(found) + removed.counts["loss", "self"] == len(some)


def test_clean_rows_pass_every_filter_but_length() -> None:
    row = clean_row(problem(), (1, 2), (5, 6), "gold")
    filters = TraceFilters(most_undos=1, kinds=["copy"], late_evidence=True)
    assert kept([row], filters) == ([0], {})
    assert kept([row], filters, 3) == ([], {("length", "clean"): 1})
