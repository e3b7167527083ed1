"""vLLM and transformers behind one interface: same greedy tokens, same log-probabilities, bans, stops, weights in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.decode import HfDecoder
from actors.engines import Completion, Engine, HfEngine, Request, Sampling, VllmEngine, engine_kind
from actors.weights import Weights, check_weights, probe_of_folder
from pipeline.backtrack.cursor import DecodeRequest, Decoding
from pipeline.backtrack.undo import UndoRule
from pipeline.config import EngineSettings, ScratchModel
from pipeline.stages.base import new_model, train_tokenizer

PROMPTS = [tuple(range(3 + i, 8 + 2 * i)) for i in range(24)]
STOP = 1
GREEDY = Sampling(temperature=0, top_p=1, max_tokens=24, stop_id=STOP, logprobs=True)


def save_model(folder: Path, seed: int) -> Path:
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    new_model(ScratchModel(layers=2, width=64, heads=2, vocab=300), tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_model(root / "one", 0), save_model(root / "two", 1)


@pytest.fixture(scope="module")
def vllm(folders: tuple[Path, Path]) -> Iterator[Engine]:
    yield VllmEngine(folders[0], EngineSettings(), context=128, seed=0)


@pytest.fixture(scope="module")
def hf(folders: tuple[Path, Path]) -> Engine:
    return HfEngine.from_folder(folders[0], EngineSettings())


def plain(folder: Path, sampling: Sampling) -> list[Completion]:
    """The slow and obvious twin: one row at a time, no cache, one forward a token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    done = []
    for prompt in PROMPTS:
        ids, chosen = list(prompt), []
        while len(chosen) < sampling.max_tokens and ids[-1] != sampling.stop_id:
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].clone()
                logprobs = torch.log_softmax(logits, -1)
                logits[list(sampling.forbidden_ids)] = -torch.inf
            ids.append(int(logits.argmax()))
            chosen.append(float(logprobs[ids[-1]]))
        finish = "stop" if ids[-1] == sampling.stop_id else "length"
        done.append(Completion(tuple(ids[len(prompt) :]), tuple(chosen), finish))
    return done


def assert_same(found: list[Completion], wanted: list[Completion]) -> None:
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert [one.finish for one in found] == [one.finish for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def requests() -> list[Request]:
    return [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]


def test_greedy_equals_one_forward_a_token(vllm: Engine, hf: Engine, folders: tuple[Path, Path]) -> None:
    wanted = plain(folders[0], GREEDY)
    assert_same(hf.generate(requests(), GREEDY), wanted)
    assert_same(vllm.generate(requests(), GREEDY), wanted)


def test_a_forbidden_token_is_never_emitted(vllm: Engine, hf: Engine, folders: tuple[Path, Path]) -> None:
    common = max({t for one in plain(folders[0], GREEDY) for t in one.token_ids} - {STOP})
    ban = Sampling(temperature=0, top_p=1, max_tokens=24, stop_id=STOP, forbidden_ids=(common,), logprobs=True)
    wanted = plain(folders[0], ban)
    assert all(common not in one.token_ids for one in wanted)
    assert_same(hf.generate(requests(), ban), wanted)
    assert_same(vllm.generate(requests(), ban), wanted)


def test_generation_ends_with_the_stop_id(vllm: Engine, hf: Engine, folders: tuple[Path, Path]) -> None:
    first = plain(folders[0], GREEDY)[0].token_ids
    ends = Sampling(temperature=0, top_p=1, max_tokens=24, stop_id=first[3], logprobs=True)
    for engine in (hf, vllm):
        one = engine.generate(requests(), ends)[0]
        assert one.finish == "stop" and one.token_ids == first[: first.index(first[3]) + 1]


@pytest.mark.parametrize("name", ["vllm", "hf"])
def test_new_weights_in_place_equal_a_fresh_engine(name: str, request: pytest.FixtureRequest, folders: tuple[Path, Path]) -> None:
    engine = request.getfixturevalue(name)
    engine.load_weights(folders[1])
    check_weights(engine, probe_of_folder(folders[1]), "float32", "it")
    with pytest.raises(RuntimeError, match="does not generate with the weights"):
        check_weights(engine, probe_of_folder(folders[0]), "float32", "it")
    assert_same(engine.generate(requests(), GREEDY), plain(folders[1], GREEDY))
    engine.load_weights(folders[0])
    assert_same(engine.generate(requests(), GREEDY), plain(folders[0], GREEDY))


@pytest.mark.parametrize("name", ["vllm", "hf"])
def test_a_sampled_row_depends_on_its_seed_alone(name: str, request: pytest.FixtureRequest) -> None:
    """In fp32 with one row a batch and with all rows: the same seeds give the same tokens up to rounding of ties."""
    engine: Engine = request.getfixturevalue(name)
    hot = Sampling(temperature=1, top_p=0.95, max_tokens=24, stop_id=STOP)
    together = engine.generate(requests(), hot)
    assert engine.generate(requests(), hot) == together
    other = engine.generate([Request(prompt, seed + 1000) for seed, prompt in enumerate(PROMPTS)], hot)
    assert other != together
    alone = [engine.generate([one], hot)[0] for one in requests()]
    assert sum(a == b for a, b in zip(alone, together, strict=True)) >= len(PROMPTS) - 1


def test_rows_that_have_ended_make_room_for_others(folders: tuple[Path, Path]) -> None:
    """Five slots for 24 rows of different lengths: every row is what it is alone, as far as it has room."""
    whole, how = plain(folders[0], GREEDY), replace(GREEDY, top=2)
    engine = HfEngine.from_folder(folders[0], EngineSettings(max_num_seqs=5))
    rooms = [1 + 5 * at % 30 for at in range(len(PROMPTS))]
    found = engine.generate([Request(prompt, 0, room) for prompt, room in zip(PROMPTS, rooms, strict=True)], how)
    for one, other, room in zip(found, whole, rooms, strict=True):
        assert one.token_ids == other.token_ids[:room] and one.logprobs == pytest.approx(other.logprobs[:room], abs=1e-4)
        assert [named[0][0] for named in one.top] == list(one.token_ids)
    assert engine.generate([], how) == []


def test_a_row_may_have_less_room_than_its_batch(vllm: Engine, folders: tuple[Path, Path]) -> None:
    rooms = [1 + 5 * at % 30 for at in range(len(PROMPTS))]
    found = vllm.generate([Request(prompt, 0, room) for prompt, room in zip(PROMPTS, rooms, strict=True)], GREEDY)
    wanted = [one.token_ids[:room] for one, room in zip(plain(folders[0], GREEDY), rooms, strict=True)]
    assert [one.token_ids for one in found] == wanted


def test_auto_takes_vllm_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_kind("auto") == "vllm"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert engine_kind("auto") == "hf"
    with pytest.raises(RuntimeError, match="set engine"):
        engine_kind("vllm")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["vllm", "hf"])
def test_weights_handed_over_equal_those_of_a_folder(
    name: str, dtype: str, request: pytest.FixtureRequest, folders: tuple[Path, Path]
) -> None:
    engine: Engine = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    weights = Weights.of(model, dtype)
    assert len(weights.arrays) == len(list(model.parameters()))  # a tied head is there once
    engine.set_weights(weights.tensors())
    check_weights(engine, weights.probe, dtype, "it")
    with pytest.raises(RuntimeError, match="does not generate with the weights of other"):
        check_weights(engine, probe_of_folder(folders[0]), "float32", "other")
    if dtype == "float32":
        assert_same(engine.generate(requests(), GREEDY), plain(folders[1], GREEDY))
    engine.load_weights(folders[0])


def test_an_engine_decodes_with_the_weights_it_was_given_last(vllm: Engine, folders: tuple[Path, Path]) -> None:
    how = Decoding("rewind", 0.0, 1.0, 24, STOP, UndoRule(undo_id=299), "immediate", threshold=0.003)
    wanted = [DecodeRequest(prompt, 0) for prompt in PROMPTS]
    hf: Engine = HfEngine.from_folder(folders[0], EngineSettings(), 128)
    for folder in (folders[1], folders[0]):
        for engine in (vllm, hf):
            engine.load_weights(folder)
        fresh = HfDecoder.from_folder(folder, 8, 128).decode(wanted, how)
        assert [one.ids for one in hf.decode(wanted, how)] == [one.ids for one in fresh]
        assert [one.ids for one in vllm.decode(wanted, how)] == [one.ids for one in fresh]


def test_the_most_probable_ids_of_each_place_and_other_stops(vllm: Engine, hf: Engine, folders: tuple[Path, Path]) -> None:
    greedy = plain(folders[0], GREEDY)
    stop = greedy[0].token_ids[3]
    how = replace(GREEDY, top=3, also_stop=(stop,), logprobs=False)
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32).eval()
    for engine in (hf, vllm):
        for prompt, whole, one in zip(PROMPTS, greedy, engine.generate(requests(), how), strict=True):
            end = min((whole.token_ids.index(token) + 1 for token in (stop, STOP) if token in whole.token_ids), default=24)
            assert one.token_ids == whole.token_ids[:end] and one.logprobs == () and len(one.top) == end
            assert one.finish == ("stop" if one.token_ids[-1] in (stop, STOP) else "length")
            with torch.inference_mode():
                logprobs = model(input_ids=torch.tensor([prompt + one.token_ids])).logits[0].log_softmax(-1)
            for place, named in enumerate(one.top):
                best = logprobs[len(prompt) - 1 + place].topk(3)
                assert named[0][0] == one.token_ids[place]
                assert [value for _, value in named] == pytest.approx(best.values.tolist(), abs=1e-4)
