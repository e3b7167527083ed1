"""The report: what became of each token, what is said of a comparison, and that a model's output cannot disturb the page."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from pipeline.config import DecodeSettings, SignalSettings
from pipeline.figures import Line, Plot
from pipeline.metrics import summarise
from pipeline.report import (
    LONGEST,
    NBSP,
    NONE,
    Page,
    Piece,
    ShownGroup,
    in_words,
    interval,
    number,
    percent,
    pieces,
    render,
    tabulate,
    visible,
)
from tests.pipeline.reported import (
    STEP,
    TOKEN,
    UNDO,
    evaluated,
    page,
    parsed,
    probed,
    shown,
    with_rollout,
)


class TestPieces:
    def test_a_step_is_struck_out_by_its_undo(self) -> None:
        found = pieces([1, 0, 2, 3, UNDO, 4], ["a", "\n", "b", "c", "U", "d"], STEP)
        assert found == [Piece("kept", "a\n"), Piece("deleted", "bc", 1), Piece("undo", "", 1, 1), Piece("kept", "d")]

    def test_a_run_of_undos_is_one_mark_and_counts_those_that_met_nothing(self) -> None:
        found = pieces([1, 2, UNDO, UNDO, UNDO, 3], ["a", "b", "U", "U", "U", "c"], TOKEN)
        assert found == [Piece("deleted", "ab", 1), Piece("undo", "", 1, 3, 1), Piece("kept", "c")]

    def test_each_deleted_stretch_names_the_run_that_deleted_it(self) -> None:
        found = pieces([1, 2, UNDO, 3, UNDO, UNDO], ["a", "b", "U", "c", "U", "U"], TOKEN)
        assert [(piece.kind, piece.text, piece.run) for piece in found] == [
            ("deleted", "a", 2),
            ("deleted", "b", 1),
            ("undo", "", 1),
            ("deleted", "c", 2),
            ("undo", "", 2),
        ]

    def test_a_very_long_text_is_cut_and_the_rest_counted(self) -> None:
        found = pieces([1, UNDO, 2, 3], ["a" * 10, "U", "b" * 2 * LONGEST, "ccc"], TOKEN)
        assert sum(len(piece.text) for piece in found) == LONGEST
        assert found[-1] == Piece("cut", count=LONGEST + 10 + 3)

    def test_nothing_written(self) -> None:
        assert pieces([], [], STEP) == []


class TestWords:
    def comparison(self, **others: Any) -> dict[str, Any]:
        return {
            "round": 1,
            "split": "test",
            "group": "hindsight",
            "before": "clean_control rewind",
            "after": "sft rewind",
            "difference": 0.125,
            "ci95": [0.04, 0.21],
            "mcnemar_p": 0.004,
            "gained": 31,
            "lost": 12,
            "n": 1350,
        } | others

    def test_gain(self) -> None:
        assert in_words(self.comparison()).replace(NBSP, " ") == (
            "sft is 12.5 points above the clean control on hindsight problems (test): 95 % interval +4.0 to +21.0, "
            "McNemar p 0.004, 31 gained, 12 lost, n 1,350."
        )

    def test_loss_is_said_as_plainly(self) -> None:
        text = in_words(self.comparison(difference=-0.125, ci95=[-0.21, -0.04], mcnemar_p=1e-9)).replace(NBSP, " ")
        assert "12.5 points below the clean control" in text and "−21.0 to −4.0" in text
        assert "p < 0.001" in text and "not decided" not in text

    @pytest.mark.parametrize("ends", [[-0.01, 0.2], [0.0, 0.2], [-0.2, 0.0], [0.0, 0.0]])
    def test_an_interval_with_0_decides_nothing(self, ends: list[float]) -> None:
        assert in_words(self.comparison(ci95=ends)).endswith("not decided at this n.")

    def test_no_difference(self) -> None:
        assert "level with its own first tries" in in_words(self.comparison(difference=0.0, before="sft forbidden"))

    def test_what_sft_is_compared_with(self) -> None:
        assert "above itself in mode “soft” on hindsight" in in_words(self.comparison(before="sft soft"))
        assert "above the model before on" in in_words(self.comparison(before="base rewind"))
        assert "above the clean control by majority vote on" in in_words(self.comparison(before="clean_control vote"))
        assert "above the model before guided by a signal on" in in_words(self.comparison(before="base guided"))
        assert "above some other model on" in in_words(self.comparison(before="some_other_model rewind"))

    @pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "x"])
    def test_what_is_no_number_is_never_0(self, value: Any) -> None:
        assert percent(value) == number(value) == interval(value) == interval([value, 0.5]) == NONE

    def test_what_is_too_small_for_its_digits_is_not_0(self) -> None:
        assert number(0.0001, 3) == f"<{NBSP}0.001" and number(0.0, 3) == "0.000" and number(-0.002, 2, True) == "0.00"

    def test_control_characters_and_reading_direction_are_taken_out(self) -> None:
        assert visible("a\x00b\r\x1b[31m\u202ec\ud800\n\té😀") == "a�b��[31m�c�\n\té😀"


class TestPage:
    def test_is_well_formed_self_contained_and_equal_twice(self) -> None:
        full = page(
            plots=[
                Plot("base: dev accuracy", [Line("dev", [[200, 0.5], [400, 0.7]])], True, 400),
                Plot("loss", [Line("sft", [[1, 2.0], [2, 1.0]]), Line("clean control", [[1, 1.5], [2, 1.0]])]),
                Plot("empty", [Line("none", [])]),
            ],
            tables=[tabulate("counts", "family", ["a", "b"], {("x", "a"): 3, ("y", "b"): 4000})],
            groups=[ShownGroup("with undo, right", 1, [shown([Piece("kept", "7")], True)])],
            config="a: 1\n",
            versions=[("Python", "3")],
        )
        html = render(full)
        found = parsed(html)
        assert html == render(full)
        assert html.lstrip().startswith("<!DOCTYPE html>")
        assert not found.tags & {"script", "link", "img", "iframe"}
        assert not re.search(r"https?://(?!www\.w3\.org/)", html)
        assert html.count("<figure>") == 2 + 2  # of the plots, one is empty; accuracy by kind of problem
        assert len(re.findall(r' id="', html)) == len(set(re.findall(r' id="[^"]*"', html)))
        assert "4,000" in html and "viewport" in html

    def test_deleted_text_is_struck_through_and_wrong_ones_say_so(self) -> None:
        ids = [1, 0, 2, UNDO, 3]
        html = with_rollout(shown(pieces(ids, ["two\n", "", "three", "", "four"], STEP)))
        assert '<del class="by-1" title="deleted by undo 1">three</del><span class="undo by-1" title="undo 1">⟲</span>four<' in html
        assert "✗ WRONG" in html and "gold answer <b>7</b>" in html

    def test_model_output_is_escaped(self) -> None:
        attack = '</div></article><script>alert(1)</script><img src=x onerror="a()">&amp;{{ 7*7 }}'
        one = shown([Piece("kept", attack), Piece("deleted", attack, 1), Piece("undo", run=1, count=1)], question=attack)
        found = parsed(with_rollout(replace(one, answer=attack, problem=attack, family=attack)))
        assert not found.tags & {"script", "img"} and "onerror" not in found.attributes
        assert "".join(found.text).count(attack) == 6

    def test_missing_control(self) -> None:
        models = ("base", "sft")
        html = render(page(evaluated(models), probed(models)))
        assert "no clean control was trained" in html
        assert "the clean control on" not in html
        parsed(html)

    def test_the_model_that_a_round_ends_with_leads(self) -> None:
        models = ("base", "clean_control", "sft", "grpo")
        html = render(page(evaluated(models), probed(("base", "sft"))))
        parsed(html)
        right = [row.correct for row in evaluated(models) if (row.model, row.mode, row.split) == ("grpo", "rewind", "test")]
        assert f"grpo is right on {percent(sum(right) / len(right))} of 80" in html and "Gained: wrong there, right in grpo" in html
        assert ">grpo against<" in html and "Rollouts of grpo" in html and ">the model after fine-tuning<" in html

    def test_nothing_measured_is_a_dash(self) -> None:
        rows = [row for row in evaluated() if row.split != "dev"]
        html = render(page(rows, []))
        assert f"(before {NONE}, after {NONE})" in html
        assert "No own error was there to measure on." in html
        parsed(html)

    def test_none_in_a_record_is_a_dash(self) -> None:
        full = page()
        for one in full.metrics["probes"]:
            one |= {"auroc": None, "logp_error_change": None}
        for one in full.metrics["evaluations"]:
            one |= {"accuracy": None, "ci95": None, "tokens_per_problem": None}
        cells = re.findall(r"<td[^>]*>([^<]*)</td>", render(full))
        assert cells.count(NONE) > 40
        assert not {"None", "nan"} & set(cells)

    def test_no_rows_at_all(self) -> None:
        html = render(Page("empty", "U", "all", 1.0, {"rounds": [], "evaluations": [], "comparisons": [], "probes": []}))
        parsed(html)
        assert "Nothing was evaluated." in html

    def test_two_rounds_stand_in_one_table(self) -> None:
        first, second = (summarise(evaluated(), probed(), round, "rewind") for round in (1, 2))
        both = {name: first[name] + second[name] for name in first}
        dev = {"before": 0.625, "after": 0.375, "mcnemar_p": 0.125}
        rounds = [{"round": round, "accepted": round == 2, "mode": "rewind", "dev": dev} for round in (1, 2)]
        html = render(replace(page(), metrics={"run": "made", "rounds": rounds, **both}))
        assert "Round by round" in html and "fell: not accepted" in html
        parsed(html)
        assert html.count("<td>62.5\u00a0%</td><td>37.5\u00a0%</td><td>0.125</td>") == 2

    def test_another_temperature_has_a_part_of_its_own(self) -> None:
        hot = [
            replace(row, correct=row.split == "test")
            for row in evaluated(modes=("rewind",), temperature=0.5)
            if row.split == "test"
        ]
        alone, both = render(page()), render(page([*evaluated(), *hot]))
        parsed(both)
        part = both[both.index("At temperature 0.5") : both.index("</section>", both.index("At temperature 0.5"))]
        assert part.count('<td class="main">100.0') == 9 and "n\N{NO-BREAK SPACE}80" in part  # 3 models x 3 kinds
        without = both.replace(
            both[both.index("<h3>At temperature 0.5") : both.index("</section>", both.index("At temperature 0.5"))], ""
        )
        assert "At temperature" not in alone and without == alone

    def test_the_main_mode_leads_and_all_modes_stand_side_by_side(self) -> None:
        rows = evaluated()
        for modes in (("rewind", "soft"), ("soft", "rewind")):
            html = render(page([row for mode in modes for row in rows if row.mode == mode]))
            lead = html[html.index('class="lead"') : html.index("<nav")]
            right = [row.correct for row in rows if (row.model, row.mode, row.split) == ("sft", modes[0], "test")]
            assert f"right on {percent(sum(right) / len(right))} of 80 test problems" in lead
            assert f"itself in mode “{modes[1]}”" in html and f"itself in mode “{modes[0]}”" not in html
            table = html[html.index("Mode by mode") : html.index("</table>", html.index("Mode by mode"))]
            assert re.findall(r'<tr><th scope="row">(\w+)', table) == [*modes, "forbidden"] * 3
            parsed(html)

    def test_a_model_that_is_decoded_in_another_mode_alone_has_its_rows_too(self) -> None:
        html = render(page([*evaluated(modes=("rewind", "guided")), *evaluated(("in_context",), modes=("soft",))]))
        table = html[html.index("Mode by mode") : html.index("</table>", html.index("Mode by mode"))]
        before, here = table.split("<small>in_context</small>")
        assert "control that searches in its context" in before and '<th scope="row">soft' not in before
        assert set(re.findall(r'<tr><th scope="row">(\w+)', here)) == {"soft", "forbidden"}
        assert "<small>in_context</small>" not in html[: html.index("Mode by mode")]  # no place among those of the main mode
        parsed(html)

    def test_the_page_says_how_it_was_decoded(self) -> None:
        html = render(page())
        assert "gone from the model's context, undo written exactly where its probability is above 0.7 and what was taken" in html
        sampled = DecodeSettings(threshold=None, ban_tried=False)
        assert "gone from the model's context (mode “rewind”)." in render(page(decode=sampled))
        guided = render(page(evaluated(modes=("rewind", "guided"))))
        assert "where the probability of the token just written is below 0.3" in guided and "with undo forbidden, first" in guided
        parsed(guided)
        score = DecodeSettings(signal=SignalSettings(kind="score", threshold=0.4))
        assert "where the score of a learned verifier is below 0.4" in render(
            page(evaluated(modes=("rewind", "guided")), decode=score)
        )
        assert "the one that the process reward model scores highest" in render(page(evaluated(modes=("rewind", "best_of_n"))))
        alone = render(page(evaluated(modes=("soft",))))
        assert "still in the model's context (mode “soft”)." in alone
        assert "Mode by mode" not in alone and "rewind" not in alone
