"""Planted errors, forced undos and biases: what is planted, what counts as noticed, exact or a false alarm; and the whole stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from datasets import load_from_disk

from pipeline.backtrack.cursor import Decoded, Decoding
from pipeline.backtrack.undo import apply_undo
from pipeline.causal import WITHIN, Outcome, hazards, interventions
from pipeline.config import UndoSettings
from pipeline.metrics import SELECTED
from pipeline.stages.io import Codec
from pipeline.stages.measured import undo_lengths
from pipeline.stages.planted import Planted, _left, _undos, in_solution, outcome
from pipeline.stages.votes import requests_for
from rewards.rollout import state_is_wrong
from tests.pipeline.saved import CONTEXT, PROBLEMS, save_problems_and_models
from tests.pipeline.test_evaluate import SHARED, evaluated, settings_of
from verifiers.tasks import judge_of

TEST = [problem for problem in PROBLEMS if problem.split == "test"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("planted")
    return save_problems_and_models({name: folder / name for name in ("problems", "model", "sft")})


def codec_of(inputs: dict[str, Path], unit: str) -> Codec:
    return Codec(inputs["model"], UndoSettings(unit=cast(Any, unit)), "{question}\n")


def test_each_kind_is_wrong_or_right_as_it_says(inputs: dict[str, Path]) -> None:
    codec = codec_of(inputs, "step")
    kinds: dict[str, int] = {}
    for problem in TEST:
        gold = codec.encode(problem.solution)
        for one in in_solution(problem, codec, codec.plain_ids(), 3, seed=0):
            kinds[one.kind] = kinds.get(one.kind, 0) + 1
            text = codec.decode(one.ids).text
            assert one.ids[: one.place] == gold[: one.place] and len(one.ids) > one.place
            if one.kind == "right":
                assert problem.solution.startswith(text) and not state_is_wrong(problem, text)
            elif one.kind == "paraphrase":
                assert not problem.solution.startswith(text) and not state_is_wrong(problem, text)
            elif one.kind == "arithmetic":
                assert state_is_wrong(problem, text) and not state_is_wrong(problem, codec.decode(one.ids[: one.place]).text)
            else:
                assert one.kind == "random" and one.ids[one.place] != gold[one.place]
        assert list(in_solution(problem, codec, codec.plain_ids(), 3, seed=0)) == list(
            in_solution(problem, codec, codec.plain_ids(), 3, seed=0)
        )
    assert kinds["random"] == kinds["right"] == len(TEST) and kinds["paraphrase"] > 3 and kinds["arithmetic"] > 3


CHAIN = next(problem for problem in TEST if problem.family == "chain")
FIRST, SECOND = (f"{line}\n" for line in CHAIN.solution.split("\n")[:2])


def made(codec: Codec, planted: Planted, *pieces: str | int) -> Outcome:
    """What became of a planted text behind which the model wrote these; numbers are runs of U."""
    ids = [*planted.ids]
    for piece in pieces:
        ids += codec.encode(piece) if isinstance(piece, str) else [codec.rule.undo_id] * piece
    done = Decoded(tuple(ids), apply_undo(ids, codec.rule).surviving, (), (), 0, 0, "stop")
    return outcome("sft", planted, "free", done, codec)


def test_an_undo_is_exact_that_leaves_what_stood_before_the_error(inputs: dict[str, Path]) -> None:
    step, token, whole = (codec_of(inputs, unit) for unit in ("step", "token", "all"))
    rest = CHAIN.solution[len(FIRST) :]
    head = SECOND[:4]
    ids = step.encode(FIRST + head + "zz")
    planted = Planted(CHAIN, "random", ids, len(step.encode(FIRST + head)))
    seen = made(step, planted, 1, rest)
    assert (seen.delay, seen.exact, seen.correct, seen.spurious, seen.planted) == (1, True, True, False, len(ids))
    late = made(step, planted, "!", 1, rest)
    assert (late.delay, late.exact) == (1 + len(step.encode("!")), True)
    assert not made(step, planted, "\nAna", 1).exact  # the line with the error stands behind
    assert not made(step, planted, 2).exact and made(step, planted, "no undo").delay == 0
    count = len(ids) - planted.place
    assert made(token, planted, count).exact and not made(token, planted, count + 1).exact and not made(token, planted, 1).exact
    assert made(whole, planted, 1).exact and (_undos(planted, token.rule), _undos(planted, step.rule)) == (count, 1)
    assert (_left(planted, step.rule), _left(planted, whole.rule)) == (len(step.encode(FIRST)), 0)


def test_a_false_alarm_is_an_undo_where_nothing_wrong_stands(inputs: dict[str, Path]) -> None:
    """An error that the model makes itself behind the right text may be taken back."""
    codec = codec_of(inputs, "step")
    planted = Planted(CHAIN, "right", codec.encode(FIRST), 3)
    assert made(codec, planted, 1).spurious and made(codec, planted, SECOND, 1).spurious
    wrong = SECOND.replace("=", "=9")
    own = made(codec, planted, wrong.removesuffix("\n"), 1)
    assert own.delay > 1 and not own.spurious
    assert not made(codec, replace(planted, kind="own"), 1).spurious


def test_lengths_of_runs_of_undos(inputs: dict[str, Path]) -> None:
    rule = codec_of(inputs, "token").rule
    u = rule.undo_id
    assert undo_lengths([5, 6, u, u, u, 7, u, 8], rule) == (2, 1) and undo_lengths([u, 5], rule) == (0,)
    assert undo_lengths([5, 6], rule) == ()


def told(kind: str, delay: int, arm: str = "free", correct: bool = True, hindsight: bool = False, **more: Any) -> Outcome:
    fate = {"exact": delay > 0, "spurious": False} | more
    return Outcome("sft", "p", "boxes" if hindsight else "chain", hindsight, kind, arm, delay, **fate, correct=correct,
                   planted=5, token_ids=(1,))  # fmt: skip


def test_hazards_by_hand() -> None:
    some = [told("own", 1), told("own", 3, exact=False), told("own", 0, correct=False), told("own", 30, hindsight=True)]
    some += [told("right", 0), told("right", 2, spurious=True), told("own", 9, "forced")]
    found = {(one["kind"], one["group"]): one for one in hazards(some, 2)}
    own = found["own", "all"]
    within = {j: value for j, value, _, _ in own["within"]}
    assert own["n"] == 4 and [within[j] for j in (1, 2, 3, 24, 32, 64)] == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert tuple(within) == WITHIN and own["undone"]["value"] == 0.75 and own["false_alarms"] is None
    assert (own["exact"]["value"], own["exact"]["n"], own["right"]["value"]) == (pytest.approx(2 / 3), 3, 0.75)
    assert found["right", "all"]["false_alarms"]["value"] == 0.5 and found["own", "hindsight"]["n"] == 1
    nothing = found["random", "all"]
    assert nothing["n"] == 0 and nothing["within"] == [] and nothing["undone"] == {"value": None, "ci95": None, "n": 0}


def test_interventions_by_hand() -> None:
    some = [told("own", 1, arm, right) for arm, right in (("free", True), ("forced", True), ("forbidden", False))] * 2
    some += [told("random", 1)]
    (found,) = [one for one in interventions(some, 1) if one["group"] == "all"]
    assert found["kind"] == "own" and found["free"]["value"] == 1 and found["free"]["n"] == 2
    assert found["forced"]["value"] == 1 and found["forbidden"]["value"] == 0


def test_the_stage_keeps_every_row(inputs: dict[str, Path], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"test": 3, "dev": 1, "ood": 2, "unit": "step", "votes": 2, "planted": 2, "biases": [3.0]}
    how: dict[str, Any] = {"samples": 2, "everywhere": True, "also_at": [0.9], "max_tokens": 110, "modes": ["rewind", "soft"]}
    rows = evaluated(inputs, tmp_path, settings_of(**asked, **how))
    counts: dict[tuple[str, float, str], int] = {}
    for row in rows:
        if row["model"] == "sft":
            place = (row["mode"], row["temperature"], row["split"])
            counts[place] = counts.get(place, 0) + 1
    assert counts == {
        **{(mode, at, split): n for mode in ("rewind", "soft") for at in (0.0, 0.9) for split, n in (("test", 3), ("ood", 2))},
        ("rewind", 0.0, "dev"): 1,
    }
    codec = codec_of(inputs, "step")
    known = {problem.id: problem for problem in PROBLEMS}
    for row in rows:
        assert row["steps"] == known[row["problem"]].solution.count("\n") > 0
        assert (row["first_errors"] > 0) or row["first_correct"]
        if row["mode"] in SELECTED:  # whose tokens are those of all samples
            assert row["undo_lengths"] == []
            continue
        assert sum(row["undo_lengths"]) + row["undos"] == row["tokens"] - len(apply_undo(row["token_ids"], codec.rule).surviving)
    samples = [dict(row) for row in load_from_disk(tmp_path / "samples")]
    assert [(one["model"], one["mode"], one["number"]) for one in samples] == [
        (model, mode, number) for model, mode in (("base", "forbidden"), ("sft", "rewind")) for _ in range(3) for number in (0, 1)
    ]
    from actors.decode import HfDecoder

    decoder = HfDecoder.from_folder(inputs["sft"], 1, CONTEXT)
    ends: Any = (0.7, 1.0, 110, codec.stop_id, codec.rule)
    rewind = Decoding("rewind", *ends, **SHARED, threshold=0.01, vocabulary=codec.vocabulary)
    chosen = [known[one["problem"]] for one in samples[6::2]]
    for request, one in zip(requests_for(chosen, codec, 2, 0), samples[6:], strict=True):
        assert list(decoder.decode([request], rewind)[0].ids) == one["token_ids"]
    planted = [dict(row) for row in load_from_disk(tmp_path / "planted")]
    assert {one["model"] for one in planted} == {"sft"} and {one["arm"] for one in planted} == {"free", "forced", "forbidden"}
    for one in planted:
        behind = one["token_ids"][one["planted"] :]
        if one["arm"] == "free":
            first = behind.index(codec.rule.undo_id) + 1 if codec.rule.undo_id in behind else 0
            assert one["delay"] == first
        assert one["delay"] == 0 or one["arm"] == "free"
        assert one["arm"] != "forced" or behind[0] == codec.rule.undo_id
        assert one["arm"] != "forbidden" or codec.rule.undo_id not in one["token_ids"]
        text = codec.decode(apply_undo(one["token_ids"], codec.rule).surviving).text
        assert one["correct"] == judge_of(known[one["problem"]]).correct(known[one["problem"]], text)
    biased = [dict(row) for row in load_from_disk(tmp_path / "biases")]
    assert {row["mode"] for row in biased} == {"bias 3"} and len(biased) == 3
