"""The process reward model: what it is trained on, that packing changes nothing, that a folder gives the same values, its users."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from actors.heads import HeadError
from actors.labelled import LabelError, Labelled, linear, step_ends
from actors.prm import (
    HEAD,
    NOTE,
    ProcessRewardModel,
    VerifierCurve,
    VerifierTrainingError,
    best_of,
    fit,
    solution_score,
)
from pipeline.prm_config import PrmSettings
from tests.actors.trained import content, prepared

END, STOP = 9, 1
ENDS = frozenset({END})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prm") / "base"
    prepared(folder)
    return folder


def spoiled_rows(count: int) -> list[Labelled]:
    """Solutions of three steps; id 20 spoils a step and all behind it, id 21 does not."""
    found = []
    for number in range(count):
        wrong = number % 4  # 3: none
        ids, labels = [5, 6], []
        for step in range(3):
            ids += [20 if step == wrong else 21, 30 + number % 7, END]
            labels.append(float(step < wrong))
        found.append(Labelled(linear(ids), (4, 7, 10), tuple(labels)))
    return found


def settings(**more: int | float) -> PrmSettings:
    return PrmSettings.model_validate({"steps": 60, "rows": 4, "row_tokens": 64, "lr": 3e-3, "check_every": 20, "width": 32} | more)


@pytest.fixture(scope="module")
def trained(base: Path) -> tuple[Path, VerifierCurve]:
    target, curve = base.parent / "prm", VerifierCurve()
    fit(base, target, spoiled_rows(32), spoiled_rows(8), settings(), ENDS, STOP, 0, curve)
    return target, curve


def killed_after(writes: int, source: Path, target: Path, resume: Path) -> None:
    """Train in another process that is killed by -9 as it begins to write its checkpoint of that number, counted from 0."""
    done = subprocess.run(
        [sys.executable, __file__, str(writes), str(source), str(target), str(resume)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."}, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert not target.exists()


def fit_resumed(source: Path, target: Path, resume: Path | None) -> VerifierCurve:
    small = settings(steps=30, check_every=8, checkpoint_every=7)
    return fit(source, target, spoiled_rows(32), spoiled_rows(8), small, ENDS, STOP, 0, VerifierCurve(), resume)


def test_killed_and_gone_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the second checkpoint is written. The weights are those of one go, bit for bit."""
    whole = fit_resumed(base, tmp_path / "whole", None)
    killed_after(1, base, tmp_path / "again", tmp_path / "resume")
    assert sorted(path.name for path in (tmp_path / "resume").iterdir()) == ["step-14.part", "step-7"]
    again = fit_resumed(base, tmp_path / "again", tmp_path / "resume")
    assert content(tmp_path / "again") == content(tmp_path / "whole") and asdict(again) == asdict(whole)
    assert (tmp_path / "again" / HEAD).read_bytes() == (tmp_path / "whole" / HEAD).read_bytes()
    # Behind the last step nothing is trained again.
    monkeypatch.setattr("actors.prm.loss", lambda *_: pytest.fail("trained again"))
    assert asdict(fit_resumed(base, tmp_path / "third", tmp_path / "resume")) == asdict(whole)
    assert content(tmp_path / "third") == content(tmp_path / "whole")


def slow_values(model: ProcessRewardModel, ids: Sequence[int], at: Sequence[int]) -> list[float]:
    """A plain forward of transformers over each beginning."""
    plain = AutoModel.from_pretrained(model.backbone.config._name_or_path, dtype=torch.float32).eval()
    plain.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        states = [plain(input_ids=torch.tensor([list(ids[: end + 1])])).last_hidden_state[0, -1] for end in at]
        return [float(torch.sigmoid(model.head(state))) for state in states]


def test_it_learns_which_steps_are_right_so_far(trained: tuple[Path, VerifierCurve]) -> None:
    folder, curve = trained
    rows = spoiled_rows(4)
    for row, values in zip(rows, ProcessRewardModel.load(folder).values(rows), strict=True):
        assert [round(value) for value in values] == list(row.labels or ())
    assert curve.step == 60 and curve.rows == 32 and curve.left_out == 0
    assert [step for step, _ in curve.checks] == [20, 40, 60]
    assert curve.kept_step == min(curve.checks, key=lambda point: point[1])[0]
    assert curve.losses[-1][1] < curve.losses[0][1]


def test_packed_rows_score_as_one_row_at_a_time_does(trained: tuple[Path, VerifierCurve]) -> None:
    model = ProcessRewardModel.load(trained[0])
    rows = [Labelled(linear(range(5, 5 + n)), tuple(sorted({0, n // 2, n - 1}))) for n in (3, 9, 9, 1, 14)]
    packed = model.batch([[rows[0], rows[3], rows[1]], [rows[4]], [rows[2]]])
    with torch.inference_mode():
        logits = torch.sigmoid(model(packed))
    side_by_side = dict(zip([0, 3, 1], torch.split(logits[0, packed.scored[0]], [3, 1, 3]), strict=True))
    side_by_side |= {4: logits[1, packed.scored[1]], 2: logits[2, packed.scored[2]]}
    for index, (row, values) in enumerate(zip(rows, model.values(rows), strict=True)):
        wanted = slow_values(model, row.segment.ids, row.at)
        assert list(values) == pytest.approx(wanted, abs=1e-4)
        assert side_by_side[index].tolist() == pytest.approx(wanted, abs=1e-4)


def test_a_saved_model_gives_the_same_values(base: Path, tmp_path: Path) -> None:
    model = ProcessRewardModel.new(base, 16, ENDS, STOP).eval()
    model.save(tmp_path / "one")
    model.save(tmp_path / "one")  # in the place of the old one
    again = ProcessRewardModel.load(tmp_path / "one")
    assert again.values(spoiled_rows(4)) == model.values(spoiled_rows(4))
    assert (again.step_end_ids, again.stop_id) == (ENDS, STOP)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_its_users_see_the_same_values(trained: tuple[Path, VerifierCurve]) -> None:
    model = ProcessRewardModel.load(trained[0])
    prompt, ids = (5, 6), (21, 30, END, 20, 31, END, 21, 32, STOP)
    ends = [len(prompt) + end for end in (2, 5, 7)]
    wanted = slow_values(model, prompt + ids, ends)
    assert model.step_values([(prompt, ids), (prompt, ()), (prompt, (STOP,))]) == [pytest.approx(wanted, abs=1e-4), (), ()]
    assert model.value_of([(prompt, ids[:3]), (prompt, ids[:6])]) == pytest.approx(wanted[:2], abs=1e-4)
    visible = [prompt + ids[:3], prompt + ids[:4], prompt + ids[:6]]
    scores = model.scorer()(torch.zeros(3, 32), visible).tolist()
    assert scores[1] == math.inf
    assert [scores[0], scores[2]] == pytest.approx(wanted[:2], abs=1e-4)


def test_states_that_begin_alike_share_a_row_and_are_worth_the_same(
    trained: tuple[Path, VerifierCurve], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ProcessRewardModel.load(trained[0])
    prompt, other = (5, 6), (5, 7)
    ways = [(21, 30, END), (21, 30, END, 20, 31, END), (), (21, 30, END, 20, 31, END, 22, STOP), (21, 33, END), (21, 30, END)]
    states = [(one, ids) for ids in ways for one in (prompt, other)]
    rows: list[int] = []
    values = model.values
    monkeypatch.setattr(model, "values", lambda some: rows.append(len(some)) or values(some))
    found = model.value_of(states)
    wanted = []
    for one, ids in states:
        seen = one + (ids[:-1] if ids[-1:] == (STOP,) else ids)  # a stop id is no step's end
        wanted += slow_values(model, seen, [len(seen) - 1])
    assert found == pytest.approx(wanted, abs=1e-4) and rows == [4]
    assert model.value_of([]) == []


def test_step_ends() -> None:
    assert step_ends([5, END, 6, END, END, 7, STOP], ENDS, STOP) == (1, 4, 5)
    assert step_ends([5, END, STOP], ENDS, STOP) == (1,)
    assert step_ends([5, 6], ENDS, STOP) == (1,)
    assert step_ends([], ENDS, STOP) == step_ends([STOP], ENDS, STOP) == ()


def test_best_of_n() -> None:
    solutions = [(0.9, 0.9, 0.5), (0.2, 0.9, 0.8), ()]
    assert [solution_score(one, "last") for one in solutions] == [0.5, 0.8, 0]
    assert [solution_score(one, "min") for one in solutions] == [0.5, 0.2, 0]
    assert solution_score(solutions[0], "product") == pytest.approx(0.405)
    assert best_of(solutions, "last") == 1 and best_of(solutions, "min") == 0 and best_of(solutions, "product") == 0
    assert best_of([(0.5,), (0.5,)], "last") == 0
    with pytest.raises(ValueError, match="at least one solution"):
        best_of([], "last")


@pytest.mark.parametrize(
    ("at", "labels", "said"),
    [
        ((), (), "without a place"),
        ((0, 9), (1.0, 0.0), "within a row of 3 tokens"),
        ((1, 0), (1.0, 0.0), "must rise"),
        ((0, 1), (1.0,), "2 places need as many labels"),
        ((0,), (1.5,), "0 to 1, is 1.5"),
        ((0,), (float("nan"),), "0 to 1, is nan"),
        ((0,), (None,), "0 to 1, is None"),
    ],
)
def test_rows_that_cannot_be_learnt_from(at: tuple[int, ...], labels: tuple[float, ...], said: str) -> None:
    with pytest.raises(LabelError, match=said):
        Labelled(linear((5, 6, 7)), at, labels)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no solution fits into prm.row_tokens=64"),
        ([Labelled(linear(range(90)), (3,), (1.0,))], "no solution fits into prm.row_tokens=64"),
        ([Labelled(linear((5, 6)), (1,), (1.0,))] * 3, "all 3 labels are 1: there is nothing to tell apart"),
    ],
)
def test_trainings_that_end_in_one_line(base: Path, tmp_path: Path, rows: list[Labelled], said: str) -> None:
    with pytest.raises(VerifierTrainingError, match=said):
        fit(base, tmp_path / "prm", rows, [], settings(), ENDS, STOP, 0, VerifierCurve())
    assert not (tmp_path / "prm").exists()


def test_a_loss_that_is_no_number_names_the_step(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.prm.loss", lambda logits, labels, scored: logits.sum() * float("nan"))
    with pytest.raises(VerifierTrainingError, match=r"nan at step 1: lower the learning rate \(prm.lr\)"):
        fit(base, tmp_path / "prm", spoiled_rows(4), [], settings(), ENDS, STOP, 0, VerifierCurve())


def test_folders_that_are_none(trained: tuple[Path, VerifierCurve], base: Path, tmp_path: Path) -> None:
    with pytest.raises(HeadError, match="is no process reward model"):
        ProcessRewardModel.load(base)
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in trained[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / HEAD)
    (folder / HEAD).unlink()
    with pytest.raises(HeadError, match=r"has no head\.safetensors"):
        ProcessRewardModel.load(folder)
    save_file(weights, folder / HEAD)  # without what is said about it
    with pytest.raises(HeadError, match="is no head"):
        ProcessRewardModel.load(folder)
    (folder / NOTE).write_text("[")
    with pytest.raises(HeadError, match="cannot be read"):
        ProcessRewardModel.load(folder)


def test_damaged_weights_are_not_used(base: Path, tmp_path: Path) -> None:
    model = ProcessRewardModel.new(base, 8, ENDS, STOP).eval()
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="its weights are damaged"):
        model.values(spoiled_rows(1))
    with torch.no_grad():
        next(model.head.parameters()).fill_(math.nan)
    model.save(tmp_path / "prm")
    with pytest.raises(HeadError, match="not finite"):
        ProcessRewardModel.load(tmp_path / "prm")


def _die(writes: int) -> None:
    """Make this process kill itself, as `kill -9` would, with a checkpoint half written."""
    write, done = torch.save, list[Path]()

    def patched(state: Any, file: Path) -> None:
        if len(done) == writes:
            file.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(file)
        write(state, file)

    torch.save = patched  # type: ignore[assignment]


if __name__ == "__main__":
    _die(int(sys.argv[1]))
    fit_resumed(*map(Path, sys.argv[2:]))
