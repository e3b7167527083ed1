"""Traces from search trees: of a task that decides first errors exactly, cut by its judge; of others, by the values of the tree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from pipeline.backtrack.harvest import SearchTree
from pipeline.backtrack.preferences import flaw
from pipeline.backtrack.trace import Role
from pipeline.backtrack.undo import Unit
from pipeline.config import DpoSettings, TraceSettings
from pipeline.stages.filters import has_late_evidence
from pipeline.stages.io import Codec
from pipeline.stages.pairs import Found, own_pairs
from pipeline.stages.sources import Candidate, judged_ends, searched_errors
from pipeline.stages.stage import StageError
from pipeline.task_config import SyntheticTask
from pipeline.tasks import synthetic
from tests.pipeline.judged import LAST, LINE_1, LINE_2, UNITS, problem, role_text, surviving
from verifiers.synthetic import attempt_text

TASK = SyntheticTask(train=8, dev=8, test=8, ood=8, families=["boxes"], hindsight_share=1)
BOXES = next(synthetic.load(TASK, 0))
"""Full boxes of two sizes: the choice of how many of one shows by what is left for the other."""
RIGHT = int(BOXES.solution.split()[1])
WRONG_2 = LINE_2.replace("7*2=<<7*2=14>>14", "7*3=<<7*3=21>>21")

# ---- values decide ----


def tree_rows(codec: Codec, **more: Any) -> dict[str, list[Any]]:
    """A right first step, behind it a right and a wrong one."""
    steps = [(), codec.encode(f"{LINE_1}\n"), codec.solution_ids(f"{LINE_2}\n{LAST}"), codec.solution_ids(f"{WRONG_2}\n{LAST}")]
    return {
        "problem": [problem().id],
        "prompt_ids": [list(codec.prompt_ids(problem()))],
        "parent": [[-1, 0, 1, 1]],
        "ids": [[list(step) for step in steps]],
        "value": [[0.5, 0.6, 1.0, 0.0]],
        "right": [[-1, -1, 1, 0]],
    } | more


def searched(codec: Codec, folder: Path, rows: dict[str, list[Any]], **more: Any) -> list[Candidate]:
    Dataset.from_dict(rows).save_to_disk(folder)
    return list(searched_errors(str(folder), {one.id: one for one in (problem(), BOXES)}, TraceSettings(**more), codec, 0))


@pytest.mark.parametrize("unit", UNITS)
def test_search_trees(unit: Unit, codecs: Callable[..., Codec], tmp_path: Path) -> None:
    codec = codecs(unit=unit)
    (one,) = searched(codec, tmp_path / "trees", tree_rows(codec))
    assert (one.source, one.correction, one.kinds, one.rollouts) == ("search", "search", ("search",), ())
    assert codec.decode(surviving(one, codec)).text == problem().solution
    assert one.trace.ids[: one.trace.prompt_length] == codec.prompt_ids(problem())
    assert role_text(one.trace, codec, Role.ERROR).startswith("3=<<7*3=21>>21")


def test_trees_that_teach_nothing_are_passed_over(codecs: Callable[..., Codec], tmp_path: Path) -> None:
    codec = codecs()
    assert searched(codec, tmp_path / "trees", tree_rows(codec, right=[[-1, -1, 0, 0]])) == []


def test_a_tree_gives_no_more_errors_than_a_trace_may_hold(codecs: Callable[..., Codec], tmp_path: Path) -> None:
    codec = codecs()
    ids = [[], [1], *([token] for token in (10, 11, 12))]
    rows = tree_rows(codec, parent=[[-1, 0, 0, 0, 0]], ids=[ids], value=[[0.5, 1.0, 0.0, 0.0, 0.0]], right=[[-1, 1, 0, 0, 0]])
    for most in (1, 2, 3):
        (one,) = searched(codec, tmp_path / str(most), rows, max_errors=most)
        assert len(one.kinds) == one.trace.roles.count(Role.ERROR) == most


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"problem": ["gsm8k/test/0"]}, "'gsm8k/test/0' is no training problem"),
        ({"parent": [[-1, 0, -1, 1]]}, "gsm8k/train/0: node 2 of a search tree has parent -1"),
        ({"parent": [[-1, 2, 1, 1]]}, "gsm8k/train/0: node 1 of a search tree has parent 2"),
        ({"value": [[0.5, 0.6]]}, "gsm8k/train/0: a search tree whose parent, ids, value and right differ in length"),
    ],
    ids=["held out", "two roots", "cycle", "lengths"],
)
def test_bad_search_trees(codecs: Callable[..., Codec], tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError, match=r"traces\.search_trees: ") as error:
        searched(codecs(), tmp_path / "trees", tree_rows(codecs()) | more)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["prompt_ids", "ids"])
def test_undo_tokens_in_search_trees(where: str, codecs: Callable[..., Codec], tmp_path: Path) -> None:
    codec = codecs()
    rows = tree_rows(codec)
    (rows["prompt_ids"][0] if where == "prompt_ids" else rows["ids"][0][2]).insert(1, codec.rule.undo_id)
    part = "prompt" if where == "prompt_ids" else "solution"
    with pytest.raises(StageError, match=f"traces.search_trees: gsm8k/train/0: the {part} holds the undo token"):
        searched(codec, tmp_path / "trees", rows)


def test_no_search_trees(codecs: Callable[..., Codec], tmp_path: Path) -> None:
    """A folder that is not there, is no dataset, or has no rows: one line each."""
    (tmp_path / "empty").mkdir()
    DatasetDict({"train": Dataset.from_dict(tree_rows(codecs()))}).save_to_disk(tmp_path / "splits")
    nothing = tmp_path / "nothing"
    for folder in (tmp_path / "missing", tmp_path / "empty", tmp_path / "splits", nothing):
        if folder == nothing:
            Dataset.from_dict({name: [] for name in tree_rows(codecs())}).save_to_disk(folder)
        with pytest.raises(StageError, match=r"traces\.search_trees: ") as error:
            list(searched_errors(str(folder), {}, TraceSettings(), codecs(), 0))
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["problem", "prompt_ids", "parent", "ids", "value", "right"])
def test_search_trees_that_lack_a_column(column: str, codecs: Callable[..., Codec], tmp_path: Path) -> None:
    rows = {name: values for name, values in tree_rows(codecs()).items() if name != column}
    with pytest.raises(StageError, match=f"lacks the columns {column}$"):
        searched(codecs(), tmp_path / "trees", rows)


# ---- the judge decides ----


def saved(choice: int, result: int = 3) -> str:
    """A wrong choice, and a false result that makes it fit."""
    return f"{attempt_text(BOXES, choice)}{result}>>{result} boxes."


def boxes_rows(codec: Codec, *ways: str, right: int = 1) -> dict[str, list[Any]]:
    """A tree of whole ways from the root, the first `right` of them right; each is two steps, its first line and the rest."""
    parent, ids, ends = [-1], [[]], [-1]
    for number, way in enumerate(ways):
        first, rest = way.split("\n", 1)
        parent += [0, len(parent)]
        ids += [list(codec.encode(f"{first}\n")), list(codec.continued_ids(rest)) + [codec.stop_id]]
        ends += [-1, int(number < right)]
    prompt = list(codec.prompt_ids(BOXES))
    value = [float(one == 1) for one in ends]
    return {"problem": [BOXES.id], "prompt_ids": [prompt], "parent": [parent], "ids": [ids], "value": [value], "right": [ends]}


@pytest.mark.parametrize("unit", UNITS)
def test_a_searched_choice_loses_the_false_result_that_hides_it(unit: Unit, codecs: Callable[..., Codec], tmp_path: Path) -> None:
    """As a rollout's would: the number alone is the error, right inferences behind it show that it is one."""
    codec, wrong = codecs(unit=unit), RIGHT + 1
    rows = boxes_rows(codec, BOXES.solution, f"{saved(wrong)}\nThere are 3.\n#### 3")
    (one,) = searched(codec, tmp_path / "trees", rows)
    assert (one.source, one.correction, one.kinds, one.rollouts) == ("search", "search", ("choice",), (f"{BOXES.id}#4",))
    assert codec.decode(surviving(one, codec)).text == BOXES.solution
    assert role_text(one.trace, codec, Role.ERROR) == str(wrong)
    assert role_text(one.trace, codec, Role.CONSEQUENCE).endswith(attempt_text(BOXES, wrong).partition(str(wrong))[2])


def test_a_searched_choice_has_late_evidence(codecs: Callable[..., Codec], tmp_path: Path) -> None:
    codec = codecs()
    (one,) = searched(codec, tmp_path / "trees", boxes_rows(codec, BOXES.solution, f"{saved(RIGHT + 1)}\n#### 3"))
    assert has_late_evidence(one)


def test_a_right_way_of_other_words_is_gone_on_with(codecs: Callable[..., Codec], tmp_path: Path) -> None:
    """The branch goes wrong behind a right step that the solution does not have: only what is wrong is taken back."""
    codec = codecs()
    first, _, answer = BOXES.solution.partition("\n")
    first = first.replace(" boxes of", " full boxes of", 2).replace(f"Try {RIGHT} full", f"Try {RIGHT}", 1)
    rows = boxes_rows(codec, BOXES.solution, f"{first}\n{answer.splitlines()[0]}\n#### {int(BOXES.answer) + 1}")
    (one,) = searched(codec, tmp_path / "trees", rows)
    assert one.correction == "gold" and codec.decode(surviving(one, codec)).text == f"{first}\n{answer}"
    assert role_text(one.trace, codec, Role.ERROR) == str(int(BOXES.answer) + 1)


@pytest.mark.parametrize("most", [1, 3])
def test_every_other_wrong_end_is_a_trace(most: int, codecs: Callable[..., Codec], tmp_path: Path) -> None:
    codec = codecs()
    choices = [one for one in range(1, RIGHT + 4) if one != RIGHT][:3]
    ways = [f"{saved(choice, result)}\n#### 2" for choice in choices for result in (2, 3)]  # one error, two excuses
    found = searched(codec, tmp_path / "trees", boxes_rows(codec, BOXES.solution, *ways), max_errors=most)
    assert len(found) == len(choices) and len({one.trace.ids for one in found}) == len(choices)
    if most == 1:
        assert {role_text(one.trace, codec, Role.ERROR) for one in found} == {str(choice) for choice in choices}
    assert (max(len(one.kinds) for one in found) > 1) == (most > 1)


def test_a_problem_that_nothing_solves_takes_the_gold_way(codecs: Callable[..., Codec], tmp_path: Path) -> None:
    codec = codecs()
    (one,) = searched(codec, tmp_path / "trees", boxes_rows(codec, f"{saved(RIGHT + 1)}\n#### 3", right=0))
    assert one.correction == "gold" and codec.decode(surviving(one, codec)).text == BOXES.solution


def test_an_end_that_was_cut_is_no_solution(codecs: Callable[..., Codec], tmp_path: Path) -> None:
    codec = codecs()
    rows = boxes_rows(codec, BOXES.solution, f"{saved(RIGHT + 1)}\n#### 3")
    rows["ids"][0][2].pop()
    (one,) = searched(codec, tmp_path / "trees", rows)
    assert one.correction == "gold" and surviving(one, codec)[-1] == codec.stop_id


def test_an_undo_token_in_a_judged_tree(codecs: Callable[..., Codec], tmp_path: Path) -> None:
    codec = codecs()
    rows = boxes_rows(codec, BOXES.solution, f"{saved(RIGHT + 1)}\n#### 3")
    rows["prompt_ids"][0].insert(1, codec.rule.undo_id)
    with pytest.raises(StageError, match=f"traces.search_trees: {BOXES.id}: the prompt holds the undo token"):
        searched(codec, tmp_path / "trees", rows)


def test_preferences_of_a_judged_tree_part_where_the_evidence_stands(codecs: Callable[..., Codec]) -> None:
    """Undo against the false result that hides the error; the choice and what follows from it stand on both sides."""
    codec, wrong = codecs(), RIGHT + 1
    row = {name: one[0] for name, one in boxes_rows(codec, BOXES.solution, f"{saved(wrong)}\n#### 3").items()}
    tree = SearchTree.of_columns(row["parent"], row["ids"], row["value"], row["right"])
    judged, whole = judged_ends(tree, BOXES, tuple(row["prompt_ids"]), codec)
    assert {codec.decode(ids).text for ids in whole.values()} == {BOXES.solution, f"{saved(wrong)}\n#### 3"}
    found = Found()
    own_pairs(judged, whole, TraceSettings(), DpoSettings(), codec, 0, found, ("search",))
    undo, step, keep = (next(pair for _, pair in found.pairs if pair.kind == kind) for kind in ("undo", "step", "keep"))
    assert (
        len(found.pairs) == 3
        and not found.left_out
        and not any(flaw(pair, codec.rule, codec.vocabulary) for _, pair in found.pairs)
    )
    at = undo.shared
    assert codec.decode(undo.chosen_ids[:at]).text == attempt_text(BOXES, wrong)
    assert undo.chosen_ids[at] == codec.rule.undo_id and codec.decode(undo.rejected_ids[at:]).text.startswith("3>>3")
    assert codec.decode(step.rejected_ids).text == f"{saved(wrong)}\n" and keep.rejected_ids == (codec.rule.undo_id,)
    own_pairs(judged, whole, TraceSettings(), DpoSettings(), codec, 0, nothing := Found())
    assert not nothing.pairs  # none of these is a rollout of the round
