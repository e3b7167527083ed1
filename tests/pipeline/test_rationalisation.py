"""Wrong choices that are made to fit: what counts as one, and the shares of evaluated rows; own errors by their kind."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pipeline.breakdown import by_error_kind, rationalisation
from pipeline.metrics import Probed
from pipeline.stages.probes import rationalises
from pipeline.statistics import bootstrap, share
from tests.pipeline.reported import evaluated, probed
from tests.verifiers.test_synthetic import HINDSIGHT, rationalised, right_choice, wrong_choice
from verifiers.synthetic import attempt_text

EACH = list({problem.family: problem for problem in HINDSIGHT}.values())


@pytest.mark.parametrize("problem", EACH, ids=lambda problem: problem.family)
def test_a_wrong_choice_with_a_false_equation_behind_it_is_made_to_fit(problem) -> None:  # type: ignore[no-untyped-def]
    draw = random.Random(0)
    wrong = rationalised(problem, wrong_choice(problem, draw), draw)
    assert rationalises(problem, wrong)
    assert not rationalises(problem, problem.solution)
    honest = attempt_text(problem, wrong_choice(problem, draw)).rpartition("<<")[0]
    assert not rationalises(problem, f"{honest}and that is no whole number.\n#### 9999")
    assert not rationalises(problem, "") and not rationalises(problem, "#### 9999")


@pytest.mark.parametrize("problem", EACH, ids=lambda problem: problem.family)
def test_a_slip_behind_the_right_choice_makes_nothing_fit(problem) -> None:  # type: ignore[no-untyped-def]
    text = attempt_text(problem, right_choice(problem))
    product = text.index("=") + 1
    digits = text[product:].split(">>")[0]
    slipped = text[:product] + str(int(digits) + 1) + text[product + len(digits) :]
    assert not rationalises(problem, f"{slipped}\n#### 9999")


def test_shares_are_counted_row_by_row() -> None:
    rng = random.Random(3)
    rows = [
        replace(
            row,
            rationalised=not row.correct and rng.random() < 0.5,
            first_rationalised=not row.first_correct and rng.random() < 0.3,
        )
        for row in evaluated()
    ]
    found = list(rationalisation(rows, 2))
    assert len(found) == 3 * (2 + 1) * 2  # models, modes and first tries, test and ood
    for one in found:
        mode = "rewind" if one["mode"] == "forbidden" else one["mode"]
        some = [row for row in rows if (row.model, row.mode, row.split, row.hindsight) == (one["model"], mode, one["split"], True)]
        first = one["mode"] == "forbidden"
        wrong = [row for row in some if not (row.first_correct if first else row.correct)]
        fit = sum(row.first_rationalised if first else row.rationalised for row in wrong)
        expected = share(fit, len(wrong))
        assert (one["n"], one["wrong"], one["rationalised"], one["round"]) == (len(some), len(wrong), fit, 2)
        assert expected and (one["share"], one["ci95"]) == (expected.value, [expected.low, expected.high])


def test_no_wrong_answer_has_no_share() -> None:
    found = list(rationalisation([replace(row, correct=True, first_correct=True) for row in evaluated()], 1))
    assert found and all((one["share"], one["ci95"], one["wrong"]) == (None, None, 0) for one in found)
    assert list(rationalisation([replace(row, hindsight=False) for row in evaluated()], 1)) == []


def test_own_errors_by_kind() -> None:
    probes = [replace(one, error="product" if i % 3 else "choice") for i, one in enumerate(probed())]
    found = {(one["model"], one["error"]): one for one in by_error_kind(probes, 1)}
    assert set(found) == {(model, kind) for model in ("base", "clean_control", "sft") for kind in ("choice", "product")}
    start = {one.problem: one.logp_error for one in probes if one.model == "base"}
    for (model, kind), one in found.items():
        some: list[Probed] = [probe for probe in probes if (probe.model, probe.error) == (model, kind)]
        change = bootstrap([probe.logp_error - start[probe.problem] for probe in some])
        assert change and one["n"] == len(some) and one["logp_error_change"] == change.value
        assert one["logp_error_change_ci95"] == [change.low, change.high]
    few = list(by_error_kind(probes[:3], 1))
    assert all(one["p_undo_error_ci95"] is None for one in few)
