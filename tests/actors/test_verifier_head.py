"""The verifier head: it reads what decoding hands over, learns on a frozen policy, is found in folders, and guides decoding."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors import verifier_head
from actors.decode import HfDecoder, HfLive
from actors.generate import load_decoder
from actors.heads import Head, HeadError, save_head
from actors.labelled import Labelled, linear
from actors.learner import Curve
from actors.learner import fit as fit_policy
from actors.packing import TrainingSet
from actors.prm import ProcessRewardModel, VerifierCurve, VerifierTrainingError
from actors.saved import InputError, SavedModel
from actors.scorers import scorer_of
from actors.verifier_head import FILE, JointHead, fit, hidden_states, p_should_undo, policy_of
from pipeline.backtrack.cursor import DecodeRequest, Decoding, Signal
from pipeline.backtrack.layout import rewind
from pipeline.backtrack.targets import Form
from pipeline.backtrack.trace import Detour, WrongTry, build_trace
from pipeline.backtrack.tree import Walk, grow
from pipeline.backtrack.undo import UndoRule
from pipeline.config import CheckSettings, SftSettings
from pipeline.prm_config import HeadSettings
from tests.actors.trained import prepared

WIDTH, STOP, NEWLINE = 32, 1, 9
SETTINGS = HeadSettings(steps=150, batch=64, width=16, lr=1e-2)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, UndoRule]:
    folder = tmp_path_factory.mktemp("head") / "policy"
    return folder, prepared(folder)


def rows(count: int, seed: int = 0) -> list[Labelled]:
    """Undo is due behind id 20."""
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = [5, *torch.randint(20, 24, (6,), generator=drawn).tolist()]
        found.append(Labelled(linear(ids), tuple(range(1, 7)), tuple(float(token == 20) for token in ids[1:])))
    return found


@pytest.fixture(scope="module")
def head(policy: tuple[Path, UndoRule]) -> Path:
    target = policy[0].parent / "head"
    before = {file.name: file.read_bytes() for file in policy[0].iterdir()}
    curve = fit(policy[0], target, rows(40), rows(10, 1), SETTINGS, 0, VerifierCurve())
    assert before == {file.name: file.read_bytes() for file in policy[0].iterdir()}  # the policy is frozen
    assert curve.step == 150 and curve.rows == 240 and curve.kept_step in (100, 150)
    return target


def test_it_learns_when_undo_is_due(policy: tuple[Path, UndoRule], head: Path) -> None:
    unseen = rows(10, 2)
    for row, found in zip(unseen, p_should_undo(policy[0], head, unseen), strict=True):
        assert [round(p) for p in found] == list(row.labels or ())


def test_hidden_states_are_those_of_one_row_at_a_time_and_of_trees(policy: tuple[Path, UndoRule]) -> None:
    """Slow twin: a plain forward over the visible ids of each state."""
    folder, rule = policy
    tree = rewind(grow([Walk((5, 6), (20, 21, rule.undo_id, 22)), Walk((5, 6), (22, 23, 24))], rule, "immediate"))
    asked = [Labelled(tree, tuple(range(len(tree.ids)))), Labelled(linear((5, 7, 8)), (1, 2)), Labelled(linear((9,)), (0,))]
    plain = policy_of(folder)
    for row, states in zip(asked, hidden_states(policy_of(folder), asked), strict=True):
        segment = row.segment
        for place, state in zip(row.at, states, strict=True):
            seen = [j for j in range(len(segment.ids)) if segment.enter[j] <= segment.enter[place] < segment.leave[j]]
            ids = [segment.ids[j] for j in sorted(seen, key=lambda j: segment.positions[j])]
            with torch.no_grad():
                wanted = plain(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
            assert state.tolist() == pytest.approx(wanted.tolist(), abs=1e-4)


def decoding(rule: UndoRule, **more: Any) -> Decoding:
    given: dict[str, Any] = {"mode": "guided", "temperature": 1.0, "top_p": 1.0, "max_tokens": 24, "stop_id": STOP, "rule": rule}
    return Decoding(**given | {"max_undos_per_state": 99, "max_undos": 99} | more)


@pytest.mark.parametrize("by", ["head", "prm"])
def test_guided_decoding_by_a_verifier_undoes_exactly_where_its_score_is_low(
    policy: tuple[Path, UndoRule], head: Path, tmp_path: Path, by: Any
) -> None:
    folder, rule = policy
    if by == "prm":
        torch.manual_seed(3)
        ProcessRewardModel.new(folder, 8, frozenset(range(20, 60)), STOP).eval().save(tmp_path / "prm")
    place = head if by == "head" else tmp_path / "prm"
    signal = Signal("score", 0.5, by=by, folder=str(place))
    how = decoding(UndoRule(rule.undo_id, "token"), signal=signal)
    requests = [DecodeRequest((5, 6), seed, forced_ids=(30, 20)) for seed in range(6)]
    decoder = HfDecoder.from_folder(folder, 4, 64)
    found = decoder.decode(requests, how)
    score = scorer_of(signal, decoder.model, None)
    model: Any = policy_of(folder)
    for one in found:
        stack: list[int] = []
        for at, token in enumerate(one.ids[:-1]):
            if token == rule.undo_id:
                stack.pop()
                continue
            stack.append(token)
            visible = (5, 6, *stack)
            with torch.no_grad():
                hidden = model(input_ids=torch.tensor([visible]), output_hidden_states=True).hidden_states[-1][:, -1]
                low = float(score(hidden, [visible])[0]) < signal.threshold
            if at >= 1 and at + 3 <= how.max_tokens:  # behind the forced ids, and with room for an undo and what follows
                assert low == (one.ids[at + 1] == rule.undo_id)
    assert any(rule.undo_id in one.ids for one in found)
    live = HfLive(decoder)
    for key, request in enumerate(requests):
        live.add(key, request, how)
    done = {}
    while live.running:
        done |= {step.key: step.decoded for step in live.step() if step.decoded}
    assert [done[key].ids for key in range(6)] == [one.ids for one in found]


def test_a_head_within_the_model_folder_is_found(policy: tuple[Path, UndoRule], head: Path, tmp_path: Path) -> None:
    folder, rule = policy
    with_head = tmp_path / "model"
    shutil.copytree(folder, with_head)
    shutil.copy(head / FILE, with_head)
    requests = [DecodeRequest((5, 6), 0)]
    inside = HfDecoder.from_folder(with_head, 4, 64).decode(requests, decoding(rule, signal=Signal("score", 0.5)))
    named = HfDecoder.from_folder(folder, 4, 64).decode(requests, decoding(rule, signal=Signal("score", 0.5, folder=str(head))))
    assert inside == named


def test_folders_without_a_head(policy: tuple[Path, UndoRule], tmp_path: Path) -> None:
    folder, rule = policy
    decoder = HfDecoder.from_folder(folder, 4, 64)
    with pytest.raises(HeadError, match=r"policy has no verifier_head.safetensors: the stage prm trains it"):
        decoder.decode([DecodeRequest((5,), 0)], decoding(rule, signal=Signal("score", 0.5)))
    with pytest.raises(HeadError, match="must name the folder"):
        HfDecoder(decoder.model, 4, 64).decode([DecodeRequest((5,), 0)], decoding(rule, signal=Signal("score", 0.5)))
    with pytest.raises(HeadError, match="is no process reward model"):
        HfLive(decoder).add(0, DecodeRequest((5,), 0), decoding(rule, signal=Signal("score", 0.5, by="prm")))
    saved = SavedModel.load(folder, {"undo_token": "<U>", "mode": "guided", "signal": {"kind": "score"}})
    with pytest.raises(InputError, match=r"has no verifier_head.safetensors"):
        load_decoder(saved, 1, 64)


def test_heads_that_do_not_fit(policy: tuple[Path, UndoRule], tmp_path: Path) -> None:
    model = policy_of(policy[0])
    save_head(Head(WIDTH + 1, 4), tmp_path / FILE, {})
    with pytest.raises(HeadError, match="reads hidden states of width 33, the model has 32"):
        verifier_head.load(tmp_path, model)
    broken = Head(WIDTH, 4)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    save_head(broken, tmp_path / FILE, {})
    with pytest.raises(HeadError, match="not finite"):
        verifier_head.load(tmp_path, model)
    (tmp_path / FILE).write_bytes(b"no safetensors")
    with pytest.raises(HeadError, match="is no head"):
        verifier_head.load(tmp_path, model)


@pytest.mark.parametrize(("some", "said"), [([], "no state with a target"), (None, "all 3 labels are 0")])
def test_trainings_that_end_in_one_line(policy: tuple[Path, UndoRule], tmp_path: Path, some: Any, said: str) -> None:
    given = [Labelled(linear((5, 6)), (1,), (0.0,))] * 3 if some is None else some
    with pytest.raises(VerifierTrainingError, match=said):
        fit(policy[0], tmp_path / "head", given, [], SETTINGS, 0, VerifierCurve())
    assert not (tmp_path / "head").exists()


# --- jointly with fine-tuning -----------------------------------------------------------------------------------------


def test_a_joint_head_is_saved_with_the_model_and_knows_when_undo_is_due(policy: tuple[Path, UndoRule], tmp_path: Path) -> None:
    folder, rule = policy
    traces = [
        build_trace((5, 6), (21, 22, end, STOP), [Detour(1, WrongTry((20, end), (True, False)))], rule) for end in range(30, 36)
    ]
    sft = SftSettings(steps=60, rows=4, row_tokens=64, lr=3e-3, form="rewind", head_weight=1.0, checks=CheckSettings(every=None))
    data = TrainingSet(traces, rule, form=Form("rewind"))
    fit_policy(folder, tmp_path / "joint", data, sft, 0, Curve())
    fit_policy(folder, tmp_path / "plain", data, sft.model_copy(update={"head_weight": 0.0}), 0, Curve())
    assert (tmp_path / "joint" / FILE).is_file() and not (tmp_path / "plain" / FILE).exists()
    asked = [Labelled(linear((5, 6, 21, 20, 30)), (4,)), Labelled(linear((5, 6, 21, 22, 30)), (4,))]
    due, right = p_should_undo(tmp_path / "joint", tmp_path / "joint", asked)
    assert due[0] > 0.8 > 0.2 > right[0]


def test_the_joint_loss_is_the_plain_one() -> None:
    """Slow twin: target by target."""
    torch.manual_seed(0)
    model: Any = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(8, 4), device="cpu")
    joint = JointHead(model, undo_id=7, seed=0)
    hidden, weight = torch.randn(4, 4, requires_grad=True), torch.tensor([1.0, 2.0, 1.0, 5.0])
    last, target, ends = torch.tensor([1, 2, 3, 7]), torch.tensor([7, 3, 7, 7]), torch.tensor([False, False, True, False])
    found = joint.loss(hidden, last, target, ends, weight, learn=True)
    due = [True, False, False]  # the last one stands within a run
    slow = 0.0
    for at, wanted in enumerate(due):
        p = float(torch.sigmoid(joint.head(hidden[at])).detach())
        slow -= float(weight[at]) * math.log(p if wanted else 1 - p)
    assert float(found.detach()) == pytest.approx(slow, rel=1e-5)
    found.backward()
    assert hidden.grad is not None and hidden.grad[:3].abs().sum() > 0  # it reaches the policy
    before = {name: tensor.clone() for name, tensor in joint.head.state_dict().items()}
    state = joint.tensors()  # makes the step that is due
    assert any(not torch.equal(before[name], tensor) for name, tensor in joint.head.state_dict().items())
    other = JointHead(model, undo_id=7, seed=1)
    other.restore(state)
    assert {name: one.tolist() for name, one in other.tensors().items()} == {name: one.tolist() for name, one in state.items()}
