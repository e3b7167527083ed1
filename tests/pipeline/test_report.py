"""The report: what became of each token, what is said of a comparison, and that a model's output cannot disturb the page."""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from datasets import Features

from pipeline.backtrack.undo import UndoRule
from pipeline.card import GROUPS, model_card
from pipeline.config import DecodeSettings, Settings
from pipeline.metrics import Evaluated, Probed, summarise
from pipeline.report import (
    LONGEST,
    NBSP,
    NONE,
    Line,
    Page,
    Piece,
    Plot,
    Shown,
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
from pipeline.stages import evaluate, judge, problems, rollouts, traces
from pipeline.stages import report as stage
from pipeline.stages.base import train_tokenizer
from pipeline.stages.io import Codec, write_json, write_rows
from pipeline.stages.stage import Context

UNDO = 99
STEP = UndoRule(UNDO, "step", frozenset({0}))
TOKEN = UndoRule(UNDO, "token")
FAMILIES = {"chain": False, "shop": False, "boxes": True, "legs": True}
RATES = {"base": 0.6, "clean_control": 0.72, "sft": 0.85, "grpo": 0.9}


def evaluated(
    models: tuple[str, ...] = ("base", "clean_control", "sft"),
    each: int = 20,
    modes: tuple[str, ...] = ("rewind", "soft"),
    temperature: float = 0.0,
) -> list[Evaluated]:
    rng = random.Random(0)
    return [
        Evaluated(
            model=model,
            mode=mode,
            problem=f"made/{split}/{family}{i}",
            split=split,
            family=family,
            hindsight=hindsight,
            temperature=temperature,
            correct=rng.random() < RATES[model] - 0.2 * (split == "ood") - 0.1 * (mode == "soft"),
            first_correct=rng.random() < RATES[model] - 0.1,
            tokens=rng.randint(20, 60),
            undos=int(model == "sft" and rng.random() < 0.4),
            noops=0,
            spurious=0,
            finish="stop",
            token_ids=(1,),
            first_token_ids=(1,),
        )
        for model in models
        for mode in modes
        for split in ("test", "dev", "ood")
        for family, hindsight in FAMILIES.items()
        for i in range(each)
    ]


def probed(models: tuple[str, ...] = ("base", "clean_control", "sft")) -> list[Probed]:
    rng = random.Random(1)
    return [
        Probed(model, f"made/{family}{i}", family, hindsight, "product", rng.random() ** 2, rng.random() ** 6, -rng.random())
        for model in models
        for family, hindsight in FAMILIES.items()
        for i in range(8)
    ]


def metrics(rows: list[Evaluated], probes: list[Probed]) -> dict[str, Any]:
    main = rows[0].mode
    found = summarise(rows, probes, 1, main)
    return {"run": "made", "rounds": [{"round": 1, "accepted": True, "mode": main}], **found}


def shown(written: list[Piece], correct: bool = False, question: str = "How many?") -> Shown:
    return Shown("made/test/1", "boxes", True, question, "7", correct, False, 1, 0, "stop", written)


def page(rows: list[Evaluated] | None = None, probes: list[Probed] | None = None, **others: Any) -> Page:
    rows = evaluated() if rows is None else rows
    probes = probed() if probes is None else probes
    plain = Page("made", "<|BACKTRACK|>", "step", 0.0, metrics(rows, probes))
    return replace(plain, **others)


def with_rollout(one: Shown) -> str:
    return render(page(groups=[ShownGroup("with undo, wrong", 3, [one])]))


class _Balance(HTMLParser):
    """Collects text; fails on a tag that is closed where another one is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(html: str) -> _Balance:
    parser = _Balance()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


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
        assert html.count("<figure>") == 2
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
        rounds = [{"round": round, "accepted": round == 2, "mode": "rewind"} for round in (1, 2)]
        html = render(replace(page(), metrics={"run": "made", "rounds": rounds, **both}))
        assert "Round by round" in html and "fell: not accepted" in html
        parsed(html)

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

    def test_the_page_says_how_it_was_decoded(self) -> None:
        html = render(page())
        assert "gone from the model's context, undo written exactly where its probability is above 0.7 and what was taken" in html
        sampled = DecodeSettings(threshold=None, ban_tried=False)
        assert "gone from the model's context (mode “rewind”)." in render(page(decode=sampled))
        guided = render(page(evaluated(modes=("rewind", "guided"))))
        assert "where the probability of the token just written is below 0.3" in guided and "with undo forbidden, first" in guided
        parsed(guided)
        alone = render(page(evaluated(modes=("soft",))))
        assert "still in the model's context (mode “soft”)." in alone
        assert "Mode by mode" not in alone and "rewind" not in alone


QUESTIONS = {
    "boxes": "Pens come in boxes of 3 and boxes of 5. Ada bought 47 pens in 11 boxes. How many boxes of 5 did she buy?",
    "chain": "Tom has 12 <b>apples</b> & buys 4 bags of 6. How many apples has he now?",
}
WRITTEN = {
    "boxes": [
        "try 5 boxes of 5: 5*5=<<5*5=25>>25, 6*3=<<6*3=18>>18, 25+18=43\n",
        "try 7 boxes of 5: 7*5=35, 4*3=12, 35+12=47\n#### 7",
    ],
    "chain": ["4*6=26\n", "4*6=24\n12+24=36\n#### 36"],
}


def stage_inputs(folder: Path, settings: Settings) -> dict[str, Path]:
    """Outputs of the earlier stages, made by hand."""
    base = folder / "base"
    tokenizer = train_tokenizer([*QUESTIONS.values(), *(text for pair in WRITTEN.values() for text in pair)], 320)
    tokenizer.add_special_tokens({"additional_special_tokens": [settings.undo.token]})
    tokenizer.save_pretrained(base)
    write_json(
        {"losses": [[20, 2.5], [40, 1.25]], "checks": [[40, 0.5]], "kept_step": 40, "step": 40, "tokens": 900}, base / "curve.json"
    )
    codec = Codec(base, settings.undo, settings.base.prompt)

    def rows(name: str, some: list[dict[str, Any]], features: Features) -> Path:
        write_rows(some, features, folder / name)
        return folder / name

    known = [
        {"id": f"made/{split}/{family}", "split": split, "family": family, "hindsight": family == "boxes"}
        | {"question": question, "solution": "#### 7", "answer": "7", "params": "{}"}
        for split in ("train", "dev", "test")
        for family, question in QUESTIONS.items()
    ]
    judged = [
        dict.fromkeys(judge.FEATURES, "")
        | {"id": f"{family}#{i}", "problem": f"made/train/{family}", "correct": i == 0, "try_start": start, "steps": []}
        | {"error_step": min(start, 0), "error_chars": [-1, -1] if start < 0 else [0, 8], "error_tokens": [-1, -1]}
        | {"try_wrong": [], "try_own": False, "later_errors": [], "continuation": [], "error_kind": "choice", "method": "exact"}
        for family in QUESTIONS
        for i, start in enumerate((-1, 0, 0, -1))
    ]
    made = [
        {"problem": "made/train/boxes", "family": "boxes", "source": source, "correction": "gold", "rollouts": used}
        | {"errors": len(used), "difficulty": undone, "input_ids": [1] * tokens, "roles": [0], "id": "", "split": "train"}
        | {"kinds": [], "undos": len(used), "partner": 0}
        for source, used, undone, tokens in (("self", ["boxes#1"], 5, 300), ("clean", [], 0, 64))
    ]
    sampled = [
        {
            "id": row["id"],
            "problem": row["problem"],
            "prompt_ids": [1],
            "token_ids": codec.encode(WRITTEN[row["id"].split("#")[0]][0]),
        }
        | {"logprobs": [], "finish": "stop", "hot": False, "version": ""}
        for row in judged
    ]
    done = []
    for row in evaluated(each=1):
        if row.split == "ood" or row.family not in QUESTIONS:
            continue
        wrong, right = WRITTEN[row.family]
        ids = (*codec.encode(wrong), codec.rule.undo_id, *codec.solution_ids(right))
        right_now = row.family == "boxes" and row.mode == "rewind"
        done.append(replace(row, problem=f"made/{row.split}/{row.family}", undos=1, correct=right_now, token_ids=ids))
    found = {
        "problems": rows("problems", known, problems.FEATURES),
        "base": base,
        "rollouts-1": rows("rollouts", sampled, rollouts.FEATURES),
        "judge-1": rows("judge", judged, judge.FEATURES),
        "traces-1": rows("traces", made, traces.FEATURES),
        "sft-1": folder / "sft",
        "evaluate-1": rows("evaluate", [asdict(row) for row in done], evaluate.ROWS),
    }
    write_json([{"filter": "length", "source": "self", "count": 4}], folder / "traces" / "removed.json")
    (folder / "sft").mkdir()
    write_json({"losses": [[5, 0.5]], "checks": [], "step": 5, "tokens": 80}, folder / "sft" / "curve.json")
    write_json(summarise(done, probed(), 1, "rewind") | {"accepted": True, "mode": "rewind"}, folder / "evaluate" / "metrics.json")
    return found


class _Terminal:
    def stage(self, *_: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return SimpleNamespace(update=lambda *_: None)

    def __exit__(self, *_: object) -> None:
        return None


class TestStage:
    @pytest.fixture(scope="class")
    def written(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
        folder = tmp_path_factory.mktemp("report")
        settings = Settings()
        inputs = stage_inputs(folder, settings)
        counts: dict[str, int] = {}
        for name in ("out", "again"):
            (folder / name).mkdir()
            context = SimpleNamespace(
                settings=settings, round=1, out=folder / name, inputs=inputs, counts=counts, terminal=_Terminal()
            )
            stage.run(cast(Context, context))
        return folder, counts

    def test_page_shows_decoded_rollouts_and_raw_metrics_stand_beside_it(self, written: tuple[Path, dict[str, int]]) -> None:
        folder, counts = written
        html = (folder / "out" / "report.html").read_text()
        parsed(html)
        assert counts["rows"] == 2 and html.count("✓ right") == 1  # of the main mode alone
        assert "25+18=43\n</del>" in html and "&lt;&lt;5*5=25&gt;&gt;25" in html
        assert "12 &lt;b&gt;apples&lt;/b&gt; &amp; buys" in html
        assert "&lt;|end|&gt;" not in html
        found = json.loads((folder / "out" / "metrics.json").read_text())
        assert found["run"] == "tiny" and found["rounds"] == [{"round": 1, "accepted": True, "mode": "rewind"}]
        assert {row["model"] for row in found["evaluations"]} == {"base", "clean_control", "sft"}
        assert found["counts"]["problems"] == {"train": 2, "dev": 2, "test": 2}

    def test_the_card_says_what_was_trained_on_what_and_how_it_did(self, written: tuple[Path, dict[str, int]]) -> None:
        card = (written[0] / "out" / "README.md").read_text()
        metrics = json.loads((written[0] / "out" / "metrics.json").read_text())
        rows = [row for row in metrics["evaluations"] if row["split"] == "test" and row["group"] in GROUPS and row["n"]]
        assert rows and all(f"| {row['model']} | {row['mode']} | 0 | {row['group']} | {row['n']} |" in card for row in rows)
        assert "round 1 of 1, seed 0" in card and "- Training run `sft-1`: 5 steps, 80 tokens." in card
        metrics["rounds"][0]["accepted"] = False
        refused = model_card(Settings(), metrics, "base")
        assert "None of 1 rounds was accepted" in refused and "masked fine-tuning" not in refused

    def test_equal_inputs_give_equal_bytes(self, written: tuple[Path, dict[str, int]]) -> None:
        for name in ("report.html", "metrics.json", "README.md"):
            assert (written[0] / "out" / name).read_bytes() == (written[0] / "again" / name).read_bytes()

    def test_rollouts_are_counted_on_their_way_into_traces(self, written: tuple[Path, dict[str, int]]) -> None:
        tables = json.loads((written[0] / "out" / "metrics.json").read_text())["counts"]["tables"]
        assert tables["round 1: rollouts and what became of them"] == {
            "rollouts": 8,
            "right": 2,
            "wrong": 6,
            "located": 4,
            "in traces": 1,
            "not used": 3,
            "not located": 2,
        }
        made = {"traces": 1, "clean rows": 1, "source self": 1, "correction gold": 1, "1 error": 1}
        assert tables["round 1: training rows"] == made
        sizes = {name: count for name, count in tables["round 1: training rows by source"].items() if count}
        assert sizes == {"rows": 2, "8 or fewer undone": 1, "64 or fewer tokens": 1, "over 256 tokens": 1}
        assert tables["round 1: left out by filter"] == {"length": 4}

    def test_first_errors_are_marked_and_counted_by_step(self, written: tuple[Path, dict[str, int]]) -> None:
        html = (written[0] / "out" / "report.html").read_text()
        assert html.count("<mark>") == 4 and "step 1: choice" in html
        first = WRITTEN["boxes"][0]
        assert f"<mark>{first[:8]}</mark>{first[8:].split('<')[0]}" in html
        assert "round 1: first wrong step" in html and "round 1: kinds of first error, by method" in html

    def test_quota_is_even_and_fills_up_where_a_group_is_short(self) -> None:
        plenty = dict.fromkeys(stage.GROUPS, 1000)
        assert list(stage._quota(plenty, 50).values()) == [15, 15, 15, 5]
        assert list(stage._quota(plenty | {stage.GROUPS[1]: 2}, 20).values()) == [8, 2, 8, 2]
        assert list(stage._quota(dict.fromkeys(stage.GROUPS, 1), 50).values()) == [1, 1, 1, 1]
        assert sum(stage._quota(plenty, 0).values()) == 0
