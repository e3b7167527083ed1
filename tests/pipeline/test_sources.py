"""Errors of every source become traces with the model's own ids: nothing that it wrote is tokenised again."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.backtrack.trace import Role, build_trace
from pipeline.backtrack.undo import Unit, apply_undo
from pipeline.config import TraceSettings, UndoSettings
from pipeline.stages.io import Codec
from pipeline.stages.sources import (
    Candidate,
    Ids,
    Judged,
    aligned_errors,
    clean_row,
    locate,
    own_errors,
    random_errors,
)
from tests.pipeline.judged import (
    LAST,
    LINE_1,
    LINE_2,
    UNITS,
    problem,
    right_row,
    role_text,
    sorted_rows,
    surviving,
    wrong_row,
)

# ---- sorting ----


def test_sorting(codecs: Callable[..., Codec]) -> None:
    codec = codecs()
    gold = problem().solution
    line = LINE_2.replace("7*2", "7*3")
    judged = sorted_rows(
        codec,
        right_row(codec, "right", gold),
        right_row(codec, "right with a wrong step", gold, error_step=0),
        (right_row(codec, "cut", gold)[0], right_row(codec, "cut", gold)[1] | {"finish": "length"}),
        wrong_row(codec, "wrong", f"{LINE_1}\n", line, "3", "\n#### 21", continuation=[1, 2, codec.stop_id]),
        wrong_row(codec, "nowhere", f"{LINE_1}\n", line, "3", try_start=-1),
    )
    name = problem().id
    assert judged.right == {name: [codec.solution_ids(gold)]}
    assert [one.rollout for one in judged.wrong[name]] == ["wrong"]
    assert [rollout for rollout, _ in judged.wholly_wrong[name]] == ["wrong", "nowhere"]
    assert judged.dropped == {"not_located": 1}
    assert judged.resampled == {(name, codec.encode(f"{LINE_1}\n")): (1, 2, codec.stop_id)}
    (one,) = judged.wrong[name]
    assert codec.decode(one.continued).text == "\n#### 21"


def test_a_continuation_of_another_step_is_not_taken(codecs: Callable[..., Codec]) -> None:
    """The search found the first wrong step elsewhere than where the try begins: what it sampled does not belong there."""
    codec = codecs()
    row = wrong_row(codec, "r", f"{LINE_1}\n", LINE_2.replace("7*2", "7*3"), "3", continuation=[1], error_step=0)
    assert not sorted_rows(codec, row).resampled


def test_a_rollout_of_a_held_out_problem_is_an_error(codecs: Callable[..., Codec]) -> None:
    with pytest.raises(KeyError):
        sorted_rows(codecs(), right_row(codecs(), "r", "#### 14", problem="gsm8k/test/0"))


# ---- the model's own errors ----

SIBLING = "3+4=<<3+4=7>>7\nSo 2*7=<<2*7=14>>14 dollars.\n#### 14"
WRONG_2 = LINE_2.replace("7*2=<<7*2=14>>14", "7*3=<<7*3=21>>21")


def own(codec: Codec, judged: Judged, hot: bool = False, seed: int = 0, **more: Any) -> list[Candidate]:
    return list(own_errors(judged, "near_miss" if hot else "self", TraceSettings(**more), codec, seed))


@pytest.mark.parametrize("unit", UNITS)
def test_the_correction_is_a_siblings_or_resampled_or_gold(unit: Unit, codecs: Callable[..., Codec]) -> None:
    codec = codecs(unit=unit)
    before = SIBLING[: SIBLING.index("\n") + 1]
    resampled = codec.solution_ids("That is 14.\n#### 14")
    wrong = wrong_row(codec, "w", before, WRONG_2, "3", "\n#### 21", continuation=list(resampled))
    unsampled = wrong_row(codec, "w", before, WRONG_2, "3", "\n#### 21")
    other = right_row(codec, "other", problem().solution)  # begins otherwise
    sibling = right_row(codec, "s", SIBLING)
    prefix = codec.encode(before)
    ways = {
        "sibling": ([wrong, other, sibling], codec.solution_ids(SIBLING)),
        "resampled": ([wrong, other], prefix + resampled),
        "gold": ([unsampled, other], prefix + codec.solution_ids(f"{LINE_2}\n{LAST}")),
    }
    for name, (rows, solution) in ways.items():
        judged = sorted_rows(codec, *rows)
        (one,) = own(codec, judged)
        assert (one.source, one.correction, one.rollouts, one.kinds) == ("self", name, ("w",), ("copy",))
        assert one.trace.ids[: one.trace.prompt_length] == codec.prompt_ids(problem())
        assert surviving(one, codec) == solution
        assert codec.decode(one.continued).text == "\n#### 21"
        (located,) = judged.wrong[problem().id]
        assert one.trace.roles.count(Role.ERROR) == sum(located.wrong_try.wrong) == 1
        assert role_text(one.trace, codec, Role.ERROR) == "3"
        before_undo = one.trace.ids.index(codec.rule.undo_id)
        written = one.trace.ids[one.trace.prompt_length : before_undo]
        assert written == tuple(unsampled[1]["token_ids"][: len(written)])


def test_no_correction_is_counted(codecs: Callable[..., Codec]) -> None:
    """The gold solution has no line left, and no other way is known."""
    codec = codecs()
    bare = problem(solution="3+4=<<3+4=7>>7", answer="7")
    judged = sorted_rows(codec, wrong_row(codec, "w", "So 3+4=<<3+4=7>>7\n", "Then 7+1=8", "1"), problems=[bare])
    assert own(codec, judged) == [] and judged.dropped == {"no_correction": 1}


@pytest.mark.parametrize("unit", UNITS)
def test_a_sibling_that_goes_the_same_wrong_way_is_no_correction(unit: Unit, codecs: Callable[..., Codec]) -> None:
    """It wrote the same step and came out right: to undo the step and to write it again would teach nothing but the error."""
    codec = codecs(unit=unit)
    before = f"{LINE_1}\n"
    same = right_row(codec, "same", f"{before}{WRONG_2}\nNo: {LINE_2}\n{LAST}")
    wrong = wrong_row(codec, "w", before, WRONG_2, "3", "\n#### 21")
    (one,) = own(codec, sorted_rows(codec, same, wrong))
    assert one.correction == "gold" and codec.decode(surviving(one, codec)).text == problem().solution
    sibling = right_row(codec, "s", f"{before}So {LINE_2}\n{LAST}")
    (one,) = own(codec, sorted_rows(codec, same, sibling, wrong))
    assert one.correction == "sibling" and surviving(one, codec) == tuple(sibling[1]["token_ids"])
    resampled = wrong_row(codec, "w", before, WRONG_2, "3", continuation=list(codec.solution_ids(f"{WRONG_2}\n{LAST}")))
    (one,) = own(codec, sorted_rows(codec, resampled))
    assert one.correction == "gold"


def several(codec: Codec) -> Judged:
    """Wrong tries of one problem: two at its first step, two at its second, one of them twice."""
    return sorted_rows(
        codec,
        wrong_row(codec, "a", "", LINE_1.replace("3+4=<<3+4=7>>7", "3+5=<<3+5=8>>8"), "5", "\nA"),
        wrong_row(codec, "b", "", "She has 3*4=<<3*4=12>>12.", "*", "\nB"),
        wrong_row(codec, "c", f"{LINE_1}\n", WRONG_2, "3", "\nC"),
        wrong_row(codec, "d", f"{LINE_1}\n", "Ana pays 7-2=<<7-2=5>>5 dollars.", "-", "\nD"),
        wrong_row(codec, "again", f"{LINE_1}\n", WRONG_2, "3", "\nC"),
    )


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_chains_of_errors(unit: Unit, most: int, codecs: Callable[..., Codec]) -> None:
    """Every different try leads one trace; others come along, at the same place and elsewhere, `max_errors` in all."""
    codec = codecs(unit=unit)
    judged = several(codec)
    by_name = {one.rollout: one for one in judged.wrong[problem().id]}
    sizes: Counter[int] = Counter()
    together: set[tuple[str, ...]] = set()
    for seed in range(12):
        some = own(codec, judged, seed=seed, max_errors=most)
        assert sorted({"again": "c"}.get(one.rollouts[0], one.rollouts[0]) for one in some) == ["a", "b", "c", "d"]
        for one in some:
            sizes[len(one.rollouts)] += 1
            together.add(one.rollouts)
            assert len(set(one.rollouts)) == len(one.rollouts) == len(one.kinds) <= most
            assert codec.decode(surviving(one, codec)).text == problem().solution
            errors = sum(sum(by_name[name].wrong_try.wrong) for name in one.rollouts)
            assert one.trace.roles.count(Role.ERROR) == errors
            assert set(states_before_undos(one, codec)) == {
                by_name[name].prefix + by_name[name].wrong_try.ids for name in one.rollouts
            }
    assert set(sizes) == set(range(1, min(most, 4) + 1))
    if most > 1:
        assert any({"a", "b"} <= {*names} for names in together), "two at one place"
        assert any({"a", "d"} <= {*names} for names in together), "at two places"
    assert own(codec, judged, seed=5) == own(codec, several(codec), seed=5)


def states_before_undos(one: Candidate, codec: Codec) -> list[Ids]:
    """What stands where each run of undos begins."""
    ids, undo_id = one.trace.ids[one.trace.prompt_length :], codec.rule.undo_id
    starts = [at for at in range(1, len(ids)) if ids[at] == undo_id != ids[at - 1]]
    return [apply_undo(ids[:at], codec.rule).surviving for at in starts]


@pytest.mark.parametrize("unit", UNITS)
def test_what_the_model_wrote_behind_the_last_error(unit: Unit, codecs: Callable[..., Codec]) -> None:
    """The last error is the one whose undo comes last. With unit `token` that is not the one chosen last: what a try has in common
    with the right way stays, so it leaves the way later."""
    codec = codecs(unit=unit)
    judged = several(codec)
    for seed in range(12):
        for one in own(codec, judged, seed=seed):
            last = states_before_undos(one, codec)[-1]
            (expected,) = {
                other.continued for other in judged.wrong[problem().id] if other.prefix + other.wrong_try.ids == last
            }  # fmt: skip
            assert codec.decode(one.continued).text == codec.decode(expected).text


def test_near_misses_are_near(codecs: Callable[..., Codec]) -> None:
    """By the tokens that the wrong step and the right one share, as a share of both; just at the limit is near enough."""
    codec = codecs()
    before = f"{LINE_1}\n"
    tries = {"near": WRONG_2, "far": "Bob said: six of 3!"}
    rows = [wrong_row(codec, name, before, line, "3", hot=True) for name, line in tries.items()]
    way = list(codec.encode(f"{LINE_2}\n"))
    shares = {}
    for name, line in tries.items():
        rest, common = list(way), 0
        for token in codec.encode(line):
            if token in rest:
                rest.remove(token)
                common += 1
        shares[name] = 2 * common / (len(way) + len(codec.encode(line)))
    assert shares["far"] < 0.5 < shares["near"]
    for nearness in (0.0, shares["far"], shares["far"] + 1e-9, shares["near"], shares["near"] + 1e-9, 1.0):
        judged = sorted_rows(codec, *rows)
        some = own(codec, judged, hot=True, nearness=nearness, max_errors=1)
        near = [name for name in tries if shares[name] >= nearness]
        assert sorted(one.rollouts[0] for one in some) == sorted(near)
        assert {one.source for one in some} <= {"near_miss"}
        assert judged.dropped["not_near"] == 2 - len(near)


def test_hot_and_ordinary_samples_stay_apart(codecs: Callable[..., Codec]) -> None:
    codec = codecs()
    before = f"{LINE_1}\n"
    hot = wrong_row(codec, "hot", before, WRONG_2, "3", hot=True)
    cold = wrong_row(codec, "cold", before, LINE_2.replace("7*2", "7*5"), "5")
    judged = sorted_rows(codec, hot, cold)
    for seed in range(5):
        assert [(one.source, one.rollouts) for one in own(codec, judged, False, seed)] == [("self", ("cold",))]
        assert [(one.source, one.rollouts) for one in own(codec, judged, True, seed)] == [("near_miss", ("hot",))]


def second_error(codec: Codec) -> Judged:
    """It decides on 7*3, which makes 21, and writes 20."""
    line = LINE_2.replace("7*2=<<7*2=14>>14", "7*3=<<7*3=20>>20")
    row = wrong_row(codec, "w", f"{LINE_1}\n", line, "3", "\n#### 20", try_own=False)
    row[0]["try_text"] = line.replace("20>>20", "21>>21")
    return sorted_rows(codec, row)


def test_a_second_error_is_taken_back_within_the_first(codecs: Callable[..., Codec]) -> None:
    """Unit `token`: `7*3=<<7*3=20` is what it wrote; the 0 goes, the right inference stands, then all goes."""
    codec = codecs(unit="token")
    judged = second_error(codec)
    (located,) = judged.wrong[problem().id]
    (inner,) = located.wrong_try.inner
    assert codec.decode(located.wrong_try.ids[: inner.at]).text == "She pays 7*3=<<7*3=2"
    assert codec.decode(inner.wrong_try.ids).text == "0" and inner.wrong_try.wrong == (True,)
    (one,) = own(codec, judged)
    assert role_text(one.trace, codec, Role.ERROR) == "30"
    ids, undo_id = one.trace.ids, codec.rule.undo_id
    start = one.trace.prompt_length
    first = ids.index(undo_id)
    assert codec.decode(ids[start:first]).text == f"{LINE_1}\nShe pays 7*3=<<7*3=20"
    assert ids[first + 1] != undo_id
    second = ids.index(undo_id, first + 1)
    assert codec.decode(ids[first + 1 : second]).text == "1>>21 dollars."
    stood = codec.decode(apply_undo(ids[start:second], codec.rule).surviving).text
    assert stood == f"{LINE_1}\nShe pays 7*3=<<7*3=21>>21 dollars."
    assert codec.decode(surviving(one, codec)).text == problem().solution
    assert one.continued == ()


@pytest.mark.parametrize("unit", ["step", "all"])
def test_a_second_error_that_no_undo_can_take_back_alone_is_left_out(unit: Unit, codecs: Callable[..., Codec]) -> None:
    codec = codecs(unit=unit)
    (one,) = own(codec, second_error(codec))
    assert role_text(one.trace, codec, Role.ERROR) == "3"
    assert one.trace.roles.count(Role.UNDO) == 1
    assert codec.decode(surviving(one, codec)).text == problem().solution


def test_no_second_error_before_the_decision_or_without_a_number(codecs: Callable[..., Codec]) -> None:
    """What the model wrote differs from the recomputed text in a number before the decision, or in a word, or nowhere."""
    codec = codecs(unit="token")
    try_text = f"At 5 {WRONG_2}"
    for line in (try_text.replace("At 5", "At 6"), try_text.replace("dollars", "apples"), try_text):
        row = wrong_row(codec, "w", f"{LINE_1}\n", line, "3", try_own=False, try_text=try_text)
        (located,) = sorted_rows(codec, row).wrong[problem().id]
        assert located.wrong_try.inner == ()


def test_an_error_at_position_0(codecs: Callable[..., Codec]) -> None:
    """The very first token of the completion is wrong."""
    for unit, name in itertools.product(UNITS, ["bytes", "pieces"]):
        codec = codecs(name, unit)
        (one,) = own(codec, sorted_rows(codec, wrong_row(codec, "w", "", "Bob 7", "Bob 7")))
        assert one.trace.roles[one.trace.prompt_length] == Role.ERROR
        assert codec.decode(surviving(one, codec)).text == problem().solution


def test_an_empty_error_is_none(codecs: Callable[..., Codec]) -> None:
    codec = codecs()
    row = wrong_row(codec, "w", f"{LINE_1}\n", WRONG_2, "3")
    for spans in ([], [[3, 3]]):
        assert locate(row[0] | {"try_wrong": spans}, row[1], problem(), codec) is None


def test_undo_text_in_a_question_is_no_undo_token(codecs: Callable[..., Codec]) -> None:
    codec = codecs()
    hostile = problem(question=f"What is {UndoSettings().token}?")
    assert codec.rule.undo_id not in codec.prompt_ids(hostile)
    assert UndoSettings().token in codec.decode(codec.prompt_ids(hostile)).text


def test_an_undo_token_in_the_prompt_is_refused(codecs: Callable[..., Codec]) -> None:
    codec = codecs()
    row = wrong_row(codec, "w", f"{LINE_1}\n", WRONG_2, "3")
    row[1]["prompt_ids"] = [5, codec.rule.undo_id]
    with pytest.raises(ValueError, match="the prompt holds the undo token"):
        own(codec, sorted_rows(codec, row))


# ---- random tokens ----


@pytest.mark.parametrize("unit", UNITS)
def test_random_errors(unit: Unit, codecs: Callable[..., Codec]) -> None:
    """In a right solution of the model's own where there is one, else in gold; problems in turn."""
    codec = codecs(unit=unit)
    problems = [problem(), problem(1)]
    judged = sorted_rows(codec, right_row(codec, "s", SIBLING), right_row(codec, "t", LAST), problems=problems)
    some = list(random_errors(judged, problems, 40, TraceSettings(random_tokens=2), codec, 0))
    assert [one.problem.id for one in some] == [problems[number % 2].id for number in range(40)]
    special = {*codec.tokenizer.all_special_ids, codec.stop_id}
    lengths, solutions = set(), set()
    for one in some:
        is_own = one.problem.id == problem().id
        assert (one.source, one.correction, one.kinds) == ("random", "sibling" if is_own else "gold", ("random",))
        text = codec.decode(surviving(one, codec)).text
        solutions.add((is_own, text))
        wrong = [token for token, role in zip(one.trace.ids, one.trace.roles, strict=True) if role == Role.ERROR]
        lengths.add(len(wrong))
        assert not special & {*wrong}
        assert one.trace.ids[: one.trace.prompt_length] == codec.prompt_ids(one.problem)
    assert lengths == {1, 2}
    assert solutions == {(True, SIBLING), (True, LAST), (False, problem().solution)}
    assert list(random_errors(judged, problems, 40, TraceSettings(random_tokens=2), codec, 0)) == some
    assert list(random_errors(judged, problems, 40, TraceSettings(random_tokens=2), codec, 1)) != some
    assert list(random_errors(judged, problems, 0, TraceSettings(), codec, 0)) == []


# ---- steps of wrong solutions ----


def test_aligned_errors(codecs: Callable[..., Codec]) -> None:
    """The first step that differs; a rollout that merely breaks off has none and is counted."""
    codec = codecs()
    judged = sorted_rows(
        codec,
        wrong_row(codec, "w", f"{LINE_1}\n", WRONG_2, "3", "\n#### 21"),
        wrong_row(codec, "cut", "", LINE_1, "3"),
    )
    (one,) = aligned_errors(judged, {problem().id: problem()}, codec, 0)
    assert (one.source, one.correction, one.rollouts, one.kinds) == ("aligned", "gold", ("w",), ("aligned",))
    assert codec.decode(surviving(one, codec)).text == problem().solution
    assert role_text(one.trace, codec, Role.ERROR) == WRONG_2[WRONG_2.index("3") :] + "\n"
    assert judged.dropped == {"not_aligned": 1}
    judged = sorted_rows(codec, wrong_row(codec, "w", f"{LINE_1}\n", WRONG_2, "3"), right_row(codec, "s", SIBLING))
    (one,) = aligned_errors(judged, {problem().id: problem()}, codec, 0)
    assert one.correction == "sibling" and codec.decode(surviving(one, codec)).text == SIBLING


# ---- clean rows ----


def test_clean_rows(codecs: Callable[..., Codec]) -> None:
    codec = codecs()
    ids, prompt = codec.solution_ids(problem().solution), codec.prompt_ids(problem())
    one = clean_row(problem(), ids, prompt, "gold")
    assert one.trace == build_trace(prompt, ids, (), codec.rule)
    assert (one.source, one.correction, one.kinds) == ("clean", "gold", ())
