"""Figures and their intervals, against cases counted by hand."""

from __future__ import annotations

from dataclasses import replace
from math import isclose, sqrt
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import Evaluated, Probed, acceptance, in_numbers, rounds_table, summarise, tokens_table
from pipeline.statistics import LEAST, auroc, paired, share

scores = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), max_size=12)


def test_wilson_by_hand() -> None:
    found = share(8, 10)
    assert found is not None
    assert (found.value, found.n) == (0.8, 10)
    assert found.low == pytest.approx(0.4902, abs=5e-5) and found.high == pytest.approx(0.9433, abs=5e-5)


@settings(deadline=None)
@given(st.integers(1, 400), st.data())
def test_wilson_by_its_formula(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    found, p, z = share(hits, n), hits / n, 1.959963984540054
    assert found is not None
    middle, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found.low == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-9)
    assert found.high == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_paired_by_hand() -> None:
    before = [True] * 2 + [False] * 8 + [True] * 6 + [False] * 4
    after = [False] * 2 + [True] * 8 + [True] * 6 + [False] * 4
    found = paired(before, after)
    assert found is not None
    assert (found.gained, found.lost, found.n, found.difference) == (8, 2, 20, 0.3)
    assert found.mcnemar_p == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    # variance of the mean of +1 eight times, -1 twice, 0 ten times: (10/20 - .3 x .3) / 20
    half = 1.96 * sqrt((0.5 - 0.09) / 20)
    assert found.low and found.high
    assert found.low == pytest.approx(0.3 - half) and found.high == pytest.approx(0.3 + half)


def test_paired_without_a_change() -> None:
    found = paired([True, False] * 5, [True, False] * 5)
    assert found is not None
    assert (found.difference, found.low, found.high, found.mcnemar_p) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="zip"):
        paired([True], [])


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_paired_turns_round(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    there, back = paired(before, after), paired(after, before)
    assert there and back
    assert isclose(there.difference, -back.difference) and there.mcnemar_p == back.mcnemar_p
    assert isclose(there.difference, sum(after) / len(pairs) - sum(before) / len(pairs), abs_tol=1e-12)
    if len(pairs) < LEAST:
        assert there.low is there.high is back.low is back.high is None
        return
    assert there.low is not None and there.high is not None and back.high is not None
    assert isclose(there.low, -back.high, abs_tol=1e-12) and there.low <= there.difference <= there.high


@settings(deadline=None)
@given(scores, scores)
def test_auroc_counts_pairs(positive: list[float], negative: list[float]) -> None:
    found = auroc(positive, negative)
    if not positive or not negative:
        assert found is None
        return
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert found == pytest.approx(wins / len(positive) / len(negative))


def test_nothing_to_measure_is_none() -> None:
    assert share(0, 0) is None and paired([], []) is None and auroc([], []) is None
    assert summarise([], [], 1, "rewind") == {"evaluations": [], "comparisons": [], "probes": []}


def row(model: str, number: int, first: bool, last: bool, **more: Any) -> Evaluated:
    """A row of the test split in mode rewind; every third problem has hindsight."""
    hindsight = number % 3 == 0
    given: dict[str, Any] = {"mode": "rewind", "split": "test", "tokens": 10, "undos": 0, "noops": 0, "spurious": 0}
    given |= {"finish": "stop", "temperature": 0.5} | more
    return Evaluated(
        model=model,
        problem=str(number),
        family="boxes" if hindsight else "chain",
        hindsight=hindsight,
        correct=last,
        first_correct=first,
        token_ids=(),
        first_token_ids=(1, 2, 3),
        **given,
    )


ROWS = [
    row("base", 0, False, False),
    row("base", 1, True, True),
    row("base", 2, False, False),
    row("base", 3, True, True),
    row("sft", 0, False, True, undos=3, noops=1, spurious=1, tokens=40),
    row("sft", 1, True, False, undos=2, spurious=2, tokens=30),
    row("sft", 2, False, True, undos=1, noops=1),
    row("sft", 3, True, True, finish="length", tokens=20),
    row("base", 4, True, True, split="dev"),
    row("sft", 4, True, True, split="dev"),
]
BOTH = [
    *ROWS,
    *(
        row(model, number, number in (1, 3), number == 0, mode="soft", tokens=50)
        for model in ("base", "sft")
        for number in range(4)
    ),
    *(row(model, 4, True, True, mode="soft", split="dev") for model in ("base", "sft")),
]


def only(entries: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    found = [entry for entry in entries if wanted.items() <= entry.items()]
    assert len(found) == 1
    return found[0]


def test_figures_of_hand_made_rows() -> None:
    evaluations = summarise(ROWS, [], 2, "rewind")["evaluations"]
    found = only(evaluations, model="sft", split="test", group="all", mode="rewind")
    assert (found["round"], found["temperature"], found["n"], found["accuracy"]) == (2, 0.5, 4, 0.75)
    assert found["ci95"] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    assert (found["first_try_accuracy"], found["wrong_to_right"], found["right_to_wrong"]) == (0.5, 2, 1)
    assert (found["undo_rate"], found["undos_per_problem"], found["spurious_undo_rate"]) == (0.75, 1.5, 0.5)
    assert (found["noop_undos"], found["tokens_per_problem"], found["cut_at_max_tokens"]) == (2, 25, 1)
    forbidden = only(evaluations, model="sft", split="test", group="all", mode="forbidden")
    assert (forbidden["n"], forbidden["accuracy"], forbidden["first_try_accuracy"]) == (4, 0.5, 0.5)
    assert (forbidden["tokens_per_problem"], forbidden["undo_rate"], forbidden["wrong_to_right"]) == (3, 0, 0)
    hindsight = only(evaluations, model="sft", split="test", group="hindsight", mode="rewind")
    assert (hindsight["n"], hindsight["accuracy"], hindsight["wrong_to_right"]) == (2, 1, 1)
    boxes = only(evaluations, model="sft", split="test", group="boxes", mode="rewind")
    assert {**boxes, "group": ""} == {**hindsight, "group": ""}
    absent = only(evaluations, model="sft", split="dev", group="hindsight", mode="rewind")
    assert absent["n"] == 0 and absent["accuracy"] is absent["ci95"] is absent["undo_rate"] is None


def test_a_mode_has_figures_on_the_splits_it_was_measured_on() -> None:
    rows = [*ROWS, *(row("sft", number, True, True, mode="guided", tokens=70) for number in range(4))]
    evaluations = summarise(rows, [], 1, "rewind")["evaluations"]
    assert {one["split"] for one in evaluations if one["mode"] == "guided"} == {"test"}
    table = tokens_table(evaluations)
    assert [line.split()[:2] for line in table[1:]] == [
        [model, mode]
        for model in ("base", "sft")
        for mode in ("rewind", "guided", "forbidden")
        if (model, mode) != ("base", "guided")
    ]
    assert "sft            guided     0.5    1.000 0.510 .. 1.000     70.0      0.000     0.000" in table
    assert tokens_table([]) == []


def test_temperatures_are_told_apart() -> None:
    """What is measured at another temperature changes nothing, and is compared with its like."""
    hot = [replace(one, temperature=1.0, correct=one.model == "base") for one in ROWS if one.split == "test"]
    alone, both = summarise(ROWS, [], 1, "rewind"), summarise([*ROWS, *hot], [], 1, "rewind")
    for name in ("evaluations", "comparisons"):
        assert [one for one in both[name] if one["temperature"] == 0.5] == alone[name]
    place = {"split": "test", "group": "all", "temperature": 1.0}
    assert only(both["evaluations"], model="base", mode="rewind", **place)["accuracy"] == 1
    lost = only(both["comparisons"], before="base rewind", after="sft rewind", **place)
    assert (lost["gained"], lost["lost"], lost["n"]) == (0, 4, 4)


def test_comparisons_of_hand_made_rows() -> None:
    comparisons = summarise(ROWS, [], 1, "rewind")["comparisons"]
    base = only(comparisons, split="test", group="all", before="base rewind", after="sft rewind")
    assert (base["difference"], base["gained"], base["lost"], base["n"], base["mcnemar_p"]) == (0.25, 2, 1, 4, 1.0)
    own = only(comparisons, split="test", group="all", before="sft forbidden")
    assert (own["gained"], own["lost"]) == (2, 1)
    assert not [entry for entry in comparisons if entry["n"] == 0]


def test_modes_are_measured_apart_and_compared_in_the_main_one() -> None:
    found = summarise(BOTH, [], 1, "rewind")
    alone = summarise(ROWS, [], 1, "rewind")
    assert [entry for entry in found["evaluations"] if entry["mode"] != "soft"] == alone["evaluations"]
    soft = only(found["evaluations"], model="sft", split="test", group="all", mode="soft")
    assert (soft["n"], soft["accuracy"], soft["tokens_per_problem"], soft["wrong_to_right"]) == (4, 0.25, 50, 1)
    modes = {(one["before"], one["after"]) for one in found["comparisons"]}
    assert modes == {(name, "sft rewind") for name in ("base rewind", "sft forbidden", "sft soft")}
    own = only(found["comparisons"], split="test", group="all", before="sft soft")
    assert (own["difference"], own["gained"], own["lost"], own["n"]) == (0.5, 2, 0, 4)
    turned = summarise(BOTH, [], 1, "soft")["comparisons"]
    assert {(one["before"], one["after"]) for one in turned} == {
        (name, "sft soft") for name in ("base soft", "sft forbidden", "sft rewind")
    }
    base = only(turned, split="test", group="all", before="base soft")
    assert (base["difference"], base["gained"], base["lost"]) == (0, 0, 0)


def test_probes_of_hand_made_rows() -> None:
    probes = [
        Probed("base", "a", "chain", False, "operand", 0.1, 0.1, -1.0),
        Probed("base", "b", "boxes", True, "choice", 0.1, 0.1, -2.0),
        Probed("sft", "a", "chain", False, "operand", 0.2, 0.4, -1.5),
        Probed("sft", "b", "boxes", True, "choice", 0.8, 0.0, -1.0),
    ]
    found = summarise(ROWS, probes, 1, "rewind")["probes"]
    sft = only(found, model="sft", group="all")
    assert (sft["n"], sft["p_undo_error"], sft["p_undo_right"], sft["auroc"]) == (2, 0.5, 0.2, 0.75)
    assert sft["logp_error_change"] == pytest.approx((-0.5 + 1.0) / 2)
    assert only(found, model="base", group="all")["logp_error_change"] == 0
    assert only(found, model="sft", group="hindsight")["auroc"] == 1


@pytest.mark.parametrize(("base", "sft", "yes"), [(2, 2, True), (2, 3, True), (3, 2, False), (0, 0, True)])
def test_a_round_is_accepted_when_dev_accuracy_did_not_fall(base: int, sft: int, yes: bool) -> None:
    rows = [row("base", i, False, i < base, split="dev") for i in range(4)]
    rows += [row("sft", i, True, i < sft, split="dev") for i in range(4)]
    rows += [row("clean_control", i, True, True, split="dev") for i in range(4)]
    rows += [row("base", i, True, yes, split="test") for i in range(4)]  # the test split has no say
    rows += [row("sft", i, True, not yes, split="dev", mode="soft") for i in range(4)]  # nor has another mode
    rows += [row("base", i, True, yes, split="dev", mode="soft") for i in range(4)]
    assert acceptance(rows, "rewind", 1)["accepted"] is yes
    assert acceptance(rows, "soft", 1)["accepted"] is not yes


@pytest.mark.parametrize(("p", "yes"), [(0.05, True), (0.2, False), (1.0, False)])
def test_a_fall_is_told_from_chance_by_mcnemar(p: float, yes: bool) -> None:
    """1 gained and 6 lost: the exact test gives 2 (1 + 7) / 2^7 = .125."""
    rows = [row("base", i, True, i < 6, split="dev") for i in range(10)]
    rows += [row("sft", i, True, i == 6, split="dev") for i in range(10)]
    found = acceptance(rows, "rewind", p)
    assert found["accepted"] is yes
    assert in_numbers(found["dev"]) == "from 0.600 to 0.100 (n 10, McNemar p 0.12)"
    assert acceptance([], "rewind", p) == {"accepted": True, "dev": None}


def test_rounds_side_by_side_say_from_which_model_each_started() -> None:
    dev = {"before": 0.5, "after": 0.25, "mcnemar_p": 0.0312}
    rounds = [(1, {"accepted": True, "dev": dev}), (2, {"accepted": False, "dev": dev}), (3, {"accepted": True, "dev": None})]
    lines = rounds_table(rounds)
    assert lines[0].split() == ["round", "starts", "from", "dev", "before", "after", "p", "accepted"]
    assert [line.split(maxsplit=1)[1] for line in lines[1:]] == [
        "base              0.500   0.250  0.031  yes",
        "round 1           0.500   0.250  0.031  no, it fell",
        "round 1               -       -      -  yes",
    ]
    assert len({line.rindex("  ") for line in (lines[0], lines[1], lines[3])}) == 1
    assert rounds_table(rounds[:1]) == []
