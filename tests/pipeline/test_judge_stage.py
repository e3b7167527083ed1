"""The stage judge without Ray: what it writes is what judging all at once would have, a killed one does again only what it had not
come to, and little of it is in memory at a time."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest
from datasets import load_from_disk

from actors.engines import Completion, Request, Sampling, make_engine
from actors.judge import Judged, judge_each, judge_rows
from actors.localise import Case, Localiser
from actors.parts import Quarantine, Quarantined, TooManyQuarantined
from pipeline.config import EngineSettings, JudgeSettings, Settings, UndoSettings
from pipeline.stages import judge, localised, rollouts
from pipeline.stages.io import Codec, Text, write_rows
from pipeline.stages.judged import row_of, verdict_of
from pipeline.stages.localised import _relocated, case_of
from pipeline.stages.stage import Context
from pipeline.task_config import CountdownTask
from pipeline.tasks import countdown
from pipeline.tasks.problem import Problem
from tests.pipeline.saved import PROBLEMS, save_problems_and_models
from verifiers.localise import BinarySearch, PosteriorSearch, symbolic_prior
from verifiers.tasks import judge_of

SETTINGS = Settings(undo=UndoSettings(unit="token"), judge=JudgeSettings(batch=3))
TRAIN = [problem for problem in PROBLEMS if problem.split == "train"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With rollouts half of which are wrong."""
    root = tmp_path_factory.mktemp("judge")
    found = save_problems_and_models({name: root / name for name in ("problems", "model")})
    codec = Codec(found["model"], SETTINGS.undo, SETTINGS.base.prompt)
    engine = make_engine(found["model"], EngineSettings(kind="scripted", script=str(found["problems"])), 512, 0)
    rows = []
    for seed in range(4):
        prompts = [codec.prompt_ids(problem) for problem in TRAIN]
        made = engine.generate([Request(one, seed) for one in prompts], Sampling(1.0, 1.0, 400, codec.stop_id, logprobs=True))
        rows += [
            {"id": f"{p.id}#1.{seed}", "problem": p.id, "prompt_ids": ids, "hot": False, "version": "v"}
            | {name: getattr(one, name) for name in ("token_ids", "logprobs", "finish")}
            for p, ids, one in zip(TRAIN, prompts, made, strict=True)
        ]
    write_rows(rows, rollouts.FEATURES, root / "rollouts")
    return found | {"rollouts": root / "rollouts"}


class Judges:
    """In this process: interrupted after so many batches, and unable to judge one row."""

    def __init__(self, batches: int = 999, unable: int | None = None, watching: bool = False) -> None:
        self.left, self.unable, self.judged, self.watching = batches, unable, 0, watching
        self.texts = self.problems = 0

    def __call__(self, rows: Iterable[Any], count: int, batch: int, *_: Any) -> Iterator[list[Judged | Quarantined]]:
        source = iter(rows)
        for start in range(0, count, batch):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            found = judge_each(list(itertools.islice(source, batch)), 1)
            self.judged += len(found)
            if self.watching:
                self.texts, self.problems = max(self.texts, alive(Text)), max(self.problems, alive(Problem))
            if self.unable is not None and start <= self.unable < start + batch:
                found[self.unable - start] = Quarantined(3, "no")
            yield found


def alive(kind: type) -> int:
    return sum(type(one) is kind for one in gc.get_objects())


class Pool:
    """Its scripted engine, which dies after so many calls."""

    def __init__(self, inputs: dict[str, Path], calls: int = 999, watching: bool = False) -> None:
        self.engine = make_engine(inputs["model"], EngineSettings(kind="scripted", script=str(inputs["problems"])), 512, 0)
        self.left, self.asked, self.cases, self.watching = calls, Counter[int](), 0, watching

    def generate(self, requests: Sequence[Request], how: Sampling, *_: Any) -> tuple[list[Completion], str]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked.update(one.seed for one in requests)
        self.cases = max(self.cases, alive(Case) if self.watching else 0)
        return self.engine.generate(requests, how), "v"


class Terminal:
    @contextmanager
    def stage(self, *_: Any) -> Iterator[Any]:
        yield SimpleNamespace(update=lambda *_: None)

    def warn(self, text: str) -> None: ...


def judged(
    inputs: dict[str, Path], out: Path, judges: Judges, monkeypatch: pytest.MonkeyPatch, settings: Settings = SETTINGS,
    pool: Pool | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    monkeypatch.setattr(judge, "judge_all", judges)
    quarantine = Quarantine(9, out.parent / "quarantine.jsonl")
    context = SimpleNamespace(
        settings=settings, out=out, resume=out.parent / "resume", counts={}, inputs=inputs, digests={"model": "v"},
        terminal=Terminal(), workers=SimpleNamespace(start=lambda: None, quarantine=lambda: quarantine, pool=lambda *_: pool),
    )  # fmt: skip
    judge.run(cast(Context, context))
    COUNTS.clear()
    COUNTS.update(context.counts)
    return [dict(row) for row in load_from_disk(out)]


COUNTS: dict[str, int] = {}


def at_once(inputs: dict[str, Path], settings: Settings, lost: Sequence[int] = ()) -> list[dict[str, Any]]:
    """The same, with everything in memory and all searches side by side."""
    codec = Codec(inputs["model"], settings.undo, settings.base.prompt)
    problems = {problem.id: problem for problem in TRAIN}
    rows = [row for at, row in enumerate(load_from_disk(str(inputs["rollouts"]))) if at not in lost]
    asked = [problems[row["problem"]] for row in rows]
    texts = [codec.decode(row["token_ids"]) for row in rows]
    found = judge_rows([(problem, text.text) for problem, text in zip(asked, texts, strict=True)])
    methods, ways = ["exact"] * len(rows), dict[int, tuple[int, ...]]()
    if settings.judge.method not in ("auto", "symbolic"):
        wrong = [at for at, one in enumerate(found) if not one.verdict.correct and one.verdict.steps]
        rate = sum(one.verdict.correct for one in found) / len(found)
        cases = [case_of(rows[at]["id"], rows[at]["prompt_ids"], texts[at], found[at].verdict) for at in wrong]
        localiser = Localiser(
            cast(Any, Pool(inputs)), Sampling(1.0, 1.0, settings.rollouts.max_tokens, codec.stop_id), settings.judge.samples, 5, 0,
            lambda case, ids: judge_of(asked[wrong[case]]).correct(asked[wrong[case]], codec.decode(ids).text),
        )  # fmt: skip
        searches: list[Any] = [
            PosteriorSearch(symbolic_prior(found[at].verdict), rate, settings.judge.sure)
            if settings.judge.method == "combined"
            else BinarySearch(len(case.prefixes))
            for at, case in zip(wrong, cases, strict=True)
        ]
        for at, case, place in zip(wrong, cases, localiser.locate(cases, searches), strict=True):
            verdict = _relocated(found[at].verdict, texts[at], case, place)
            found[at] = Judged(verdict, judge_of(asked[at]).attempt(asked[at], texts[at].text, verdict))
            methods[at] = settings.judge.method
            ways[at] = place.right[0] if place.right else ()
    return [
        row_of(row["id"], row["problem"], text.offsets, one, method, ways.get(at, ()))
        for at, (row, text, one, method) in enumerate(zip(rows, texts, found, methods, strict=True))
    ]


def settings_of(method: str) -> Settings:
    return Settings.model_validate({"undo": {"unit": "token"}, "judge": {"batch": 3, "method": method, "samples": 2}})


@pytest.mark.parametrize("method", ["symbolic", "rollouts", "combined"])
def test_rows_are_those_of_judging_all_at_once(
    method: str, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "CHUNK", 5)
    monkeypatch.setattr(localised, "_together", lambda _: 4)
    settings, lost = settings_of(method), 4
    found = judged(inputs, tmp_path / "out", Judges(unable=lost), monkeypatch, settings, Pool(inputs))
    wanted = at_once(inputs, settings, [lost])
    assert found == wanted and len({row["method"] for row in found}) == 1 + (method != "symbolic")
    write_rows(wanted, judge.FEATURES, tmp_path / "listed")
    for file in (tmp_path / "listed").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    right = sum(row["correct"] for row in wanted)
    assert (COUNTS["rows"], COUNTS["right"], COUNTS["wrong"], COUNTS["quarantined"]) == (31, right, 31 - right, 1)
    assert COUNTS["located"] == sum(row["try_start"] >= 0 for row in wanted) > 0
    assert ("completions" in COUNTS) == (method != "symbolic")


def test_little_is_in_memory_at_a_time(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "CHUNK", 5)
    monkeypatch.setattr(localised, "_together", lambda _: 4)
    judges, pool, others = Judges(watching=True), Pool(inputs, watching=True), alive(Problem)
    rows = judged(inputs, tmp_path / "out", judges, monkeypatch, settings_of("rollouts"), pool)
    assert len(rows) == 32 and sum(not row["correct"] for row in rows) > 8
    # Problems: of what was read together and of the batch, each row with its own here.
    assert judges.texts <= 2 and judges.problems - others <= 5 + 5 + 3
    assert 4 <= pool.cases <= 8  # cases: of one group, and of the last one until the next has its own


def test_a_killed_stage_judges_again_only_what_it_had_not_come_to(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = judged(inputs, tmp_path / "whole" / "out", Judges(), monkeypatch)
    assert {row["correct"] for row in whole} == {True, False} and len(whole) > 9
    # The row without a verdict is tried once more; a batch is cut where the rows that are left do not fill it.
    first, second = Judges(batches=3, unable=4), Judges()
    with pytest.raises(KeyboardInterrupt):
        judged(inputs, tmp_path / "out", first, monkeypatch)
    assert judged(inputs, tmp_path / "out", second, monkeypatch) == whole
    assert first.judged == 9 and second.judged == len(whole) - 8


def test_a_killed_stage_searches_again_only_what_it_had_not_come_to(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localised, "_together", lambda _: 4)
    settings, undisturbed = settings_of("rollouts"), Pool(inputs)
    whole = judged(inputs, tmp_path / "whole" / "out", Judges(), monkeypatch, settings, undisturbed)
    counts, first, second, judges = dict(COUNTS), Pool(inputs, calls=6), Pool(inputs), Judges()
    with pytest.raises(KeyboardInterrupt):
        judged(inputs, tmp_path / "out", Judges(), monkeypatch, settings, first)
    assert judged(inputs, tmp_path / "out", judges, monkeypatch, settings, second) == whole
    assert counts == COUNTS and judges.judged == 0
    assert 0 < sum((undisturbed.asked - second.asked).values()) <= first.asked.total()
    assert first.asked | second.asked == undisturbed.asked


def test_searches_begin_anew_where_more_rows_could_be_judged(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They start from how often the model was right."""
    monkeypatch.setattr(localised, "_together", lambda _: 4)
    settings, whole, again = settings_of("combined"), Pool(inputs), Pool(inputs)
    wanted = judged(inputs, tmp_path / "whole" / "out", Judges(), monkeypatch, settings, whole)
    with pytest.raises(KeyboardInterrupt):
        judged(inputs, tmp_path / "out", Judges(unable=4), monkeypatch, settings, Pool(inputs, calls=6))
    assert judged(inputs, tmp_path / "out", Judges(), monkeypatch, settings, again) == wanted
    assert again.asked == whole.asked and COUNTS["completions"] == whole.asked.total()


def test_too_many_rows_that_cannot_be_judged_stop_the_stage_and_keep_what_was_judged(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(rows: Iterable[Any], *_: Any) -> Iterator[list[Judged | Quarantined]]:
        found = judge_each(list(rows), 1)
        yield [*found[:12], *[Quarantined(3, "no")] * 20]

    with pytest.raises(TooManyQuarantined, match="10 rows failed 3 times"):
        judged(inputs, tmp_path / "out", cast(Judges, unable), monkeypatch)
    judges = Judges()
    assert len(judged(inputs, tmp_path / "out", judges, monkeypatch)) == 32 and judges.judged == 20


@pytest.mark.parametrize("task", [None, countdown.load(CountdownTask(name="countdown", train=8, dev=8, test=8, ood=8), 0)])
def test_a_verdict_comes_back_from_its_row_as_it_was(inputs: dict[str, Path], task: Any) -> None:
    codec = Codec(inputs["model"], SETTINGS.undo, SETTINGS.base.prompt)
    rows = [dict(row) for row in load_from_disk(str(inputs["rollouts"]))]
    asked = [(TRAIN[at % len(TRAIN)], codec.decode(row["token_ids"]).text) for at, row in enumerate(rows)]
    if task:
        asked = [(one, one.solution.replace(digit, "7")) for one in task for digit in "123"]
    found = judge_rows(asked)
    assert any(one.attempt for one in found) and any(one.verdict.error is None for one in found)
    for (problem, text), one in zip(asked, found, strict=True):
        offsets = [(at, at + 1) for at in range(len(text))]
        row = pa.Table.from_pylist([row_of("r", problem.id, offsets, one, "exact")], judge.FEATURES.arrow_schema).to_pylist()
        assert verdict_of(row[0], text) == one.verdict
