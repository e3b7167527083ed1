"""What is said of each claim, from figures on both sides of its bound."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.claims import Claim, claims
from pipeline.metrics import summarise
from pipeline.statistics import paired, share
from tests.pipeline.reported import evaluated, page, parsed, render

MORE = "Where the evidence comes after the choice, undo solves more than as much training on clean solutions"
VOTE = "There it solves more than controls with as many tokens for the best of several samples, or for tries kept in the context"
COST = "Where the evidence comes before the choice, undo costs no more than 1 point"
LATE = "Undo gains more where the evidence comes late than where it does not"
TRAINED = "Trained undos solve more than undos at improbable tokens, which need no training"
COLD = "Where the evidence comes after the choice, undo solves more than the control does greedily"
ALONE = "Right text is left alone: undos delete it in fewer than 3 % of the problems"
NOTICES = "Undos come of errors: a planted false result is taken back more often than a planted right one"
PLANTS = "Training plants no errors: first tries lose no more than 2 points to it"


def pair(before: str, group: str, difference: float, half: float | None = 0.02, temperature: float = 0.0) -> dict[str, Any]:
    ends = None if half is None else [difference - half, difference + half]
    told = {"before": before, "after": "sft rewind", "group": group, "difference": difference, "ci95": ends, "mcnemar_p": 0.2}
    return told | {"round": 1, "split": "test", "temperature": temperature, "n": 1500}


def row(model: str, group: str, right: int, spurious: float = 0.0, temperature: float = 0.0, n: int = 100) -> dict[str, Any]:
    found = share(right, n)
    assert found is not None
    told = {"model": model, "group": group, "accuracy": found.value, "ci95": [found.low, found.high], "n": n}
    return told | {"round": 1, "split": "test", "mode": "rewind", "temperature": temperature, "spurious_undo_rate": spurious}


def of(*pairs: dict[str, Any], rows: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, list[Claim]]:
    rows = rows or [row("sft", "all", 50), row("clean_control", "all", 50)]
    found: dict[str, list[Claim]] = {}
    for one in claims({"rounds": [{"round": 1, "mode": "rewind"}], "evaluations": rows, "comparisons": list(pairs)} | more):
        found.setdefault(one.claim, []).append(one)
    return found


@pytest.mark.parametrize(
    ("difference", "verdict"), [(0.3, "holds"), (0.01, "not decided"), (-0.01, "not decided"), (-0.3, "does not hold")]
)
def test_a_difference_holds_where_its_whole_interval_bears_it_out(difference: float, verdict: str) -> None:
    (one,) = of(pair("clean_control rewind", "hindsight", difference))[MORE]
    assert one.verdict == verdict and one.temperature == 0.0
    assert one.figures.endswith("McNemar p 0.200, n 1,500")


@pytest.mark.parametrize(
    ("difference", "half", "verdict"),
    [(0.0, 0.005, "holds"), (0.0, 0.02, "not decided"), (-0.008, 0.001, "holds"), (-0.05, 0.02, "does not hold")],
)
def test_forward_problems_may_lose_a_point(difference: float, half: float, verdict: str) -> None:
    (one,) = of(pair("clean_control rewind", "forward", difference, half))[COST]
    assert one.verdict == verdict


def test_of_several_baselines_the_best_one_counts() -> None:
    (one,) = of(pair("clean_control vote", "hindsight", 0.4), pair("clean_control best_of_n", "hindsight", 0.01))[VOTE]
    assert one.verdict == "not decided" and one.figures.startswith("+1.0 points")
    (one,) = of(pair("clean_control vote", "hindsight", 0.4))[VOTE]
    assert one.verdict == "holds"
    (one,) = of(pair("clean_control vote", "hindsight", 0.4), pair("in_context soft", "hindsight", 0.3))[VOTE]
    assert (one.verdict, one.figures.startswith("+30.0 points")) == ("holds", True) and one.figures.endswith(
        "against in_context soft"
    )
    (one,) = of(pair("clean_control vote", "hindsight", 0.4), pair("in_context soft", "hindsight", -0.1))[VOTE]
    assert one.verdict == "does not hold"


def test_late_against_early_evidence_by_both_variances() -> None:
    late = pair("clean_control rewind", "hindsight", 0.10, 0.06)
    (one,) = of(late, pair("clean_control rewind", "forward", 0.03, 0.03))[LATE]
    assert one.verdict == "holds" and "95 % +0.3 to +13.7" in one.figures  # 7 points and the root of 36 + 9
    (one,) = of(late, pair("clean_control rewind", "forward", 0.04, 0.03))[LATE]
    assert one.verdict == "not decided"


@pytest.mark.parametrize(("rate", "verdict"), [(0.0, "holds"), (0.03, "not decided"), (0.1, "does not hold")])
def test_spurious_undos_have_a_bound(rate: float, verdict: str) -> None:
    (one,) = of(rows=[row("sft", "all", 500, rate, n=1000), row("clean_control", "all", 500, n=1000)])[ALONE]
    assert one.verdict == verdict


def test_what_is_missing_is_named_and_never_decided() -> None:
    found = of(pair("clean_control rewind", "hindsight", 0.3, None))
    assert [(found[name][0].verdict, found[name][0].figures) for name in (VOTE, TRAINED, NOTICES, PLANTS)] == [
        ("not measured", "needs evaluate.votes or sft.in_context"),
        ("not measured", "needs guided in evaluate.modes"),
        ("not measured", "needs evaluate.planted"),
        ("not measured", "needs sft.checks"),
    ]
    assert found[MORE][0].verdict == "not measured"  # too few problems for an interval
    assert COLD not in found
    assert claims({"rounds": [], "evaluations": [], "comparisons": []}) == []
    assert claims({"rounds": [{"round": 1, "mode": "rewind"}], "evaluations": [row("base", "all", 5)], "comparisons": []}) == []


def test_each_temperature_has_its_own_word_and_hot_decoding_is_set_beside_cold() -> None:
    rows = [
        *(row(model, group, 30, 0.0, 0.0) for model in ("sft", "clean_control") for group in ("all", "hindsight")),
        *(row("clean_control", group, 20, 0.0, 1.0) for group in ("all", "hindsight")),
        *(row("sft", group, 60, 0.0, 1.0) for group in ("all", "hindsight")),
    ]
    cold, hot = (pair("clean_control rewind", "hindsight", gain, 0.02, at) for gain, at in ((0.1, 0.0), (-0.1, 1.0)))
    found = of(cold, hot, rows=rows)
    assert [(one.temperature, one.verdict) for one in found[MORE]] == [(0.0, "holds"), (1.0, "does not hold")]
    (one,) = found[COLD]
    assert (one.temperature, one.verdict) == (1.0, "holds")
    assert one.figures == "60.0 % of 100 against 30.0 % of 100: +30.0 points, 95 % +16.3 to +42.2"


def test_the_control_has_had_the_same_training() -> None:
    rows = [row(model, "all", 50) for model in ("sft", "grpo", "clean_control", "grpo_control")]
    some = [pair("clean_control rewind", "hindsight", 0.5), pair("grpo_control rewind", "hindsight", 0.01)]
    assert of(*some, rows=rows)[MORE][0].verdict == "not decided"
    assert of(*some, rows=[one for one in rows if "grpo" not in one["model"]])[MORE][0].verdict == "holds"


def test_planted_errors_and_first_tries() -> None:
    def hazard(kind: str, undone: int) -> dict[str, Any]:
        found = share(undone, 50)
        assert found is not None
        told = {"value": found.value, "ci95": [found.low, found.high], "n": 50}
        return {"round": 1, "model": "sft", "group": "all", "kind": kind, "undone": told}

    def audit(slope: float, half: float) -> dict[str, Any]:
        trend = {"slope": slope, "low": slope - half, "high": slope + half, "p": 0.5, "n": 100}
        return {"name": "sft, round 1, dev", "n": 100, "points": [{"at": 0}, {"at": 100}], "accuracy_trend": trend}

    found = of(hazards=[hazard("arithmetic", 40), hazard("paraphrase", 2)], planting=[audit(0.0001, 0.0002)])
    assert found[NOTICES][0].verdict == "holds" and found[PLANTS][0].verdict == "holds"
    found = of(hazards=[hazard("arithmetic", 4), hazard("paraphrase", 3)], planting=[audit(0.0, 0.0001), audit(-0.002, 0.001)])
    assert found[NOTICES][0].verdict == "not decided"
    assert found[PLANTS][0].verdict == "does not hold"
    assert found[PLANTS][0].figures.startswith("sft, round 1, dev: \u221220.0 points")  # the worst of the two


def test_claims_of_real_summaries_agree_with_their_tests_and_stand_on_the_page() -> None:
    rows = evaluated(each=60)
    metrics = {"run": "made", "rounds": [{"round": 1, "accepted": True, "mode": "rewind"}], **summarise(rows, [], 1, "rewind")}
    found = claims(metrics)
    here = [one for one in rows if (one.split, one.mode, one.hindsight) == ("test", "rewind", True)]
    right = {name: [one.correct for one in here if one.model == name] for name in ("clean_control", "sft")}
    tested = paired(right["clean_control"], right["sft"])
    assert tested is not None and tested.low is not None and tested.low > 0
    assert found[0].claim == MORE and found[0].verdict == "holds" and f"n {tested.n}" in found[0].figures
    html = render(page(metrics=metrics | {"claims": [vars(one) for one in found]}))
    assert "✓ holds" in html and "– not measured" in html and html.count('<a href="#claims">') == 1
    parsed(html)
    assert 'id="claims"' not in render(page())
