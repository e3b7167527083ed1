"""Real vLLM with undo gives what the rewinding cache of transformers gives: ids, log-probabilities, bans and caps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.decode import HfDecoder
from actors.engines import Request, Sampling, VllmEngine
from pipeline.backtrack.cursor import Decoded, DecodeRequest, Decoding, Signal
from pipeline.backtrack.undo import UndoRule, apply_undo
from pipeline.config import EngineSettings
from tests.actors.test_live import drive

U, END, STOP, VOCABULARY, CONTEXT = 40, 3, 1, 64, 256
vllm = pytest.importorskip("vllm")
from actors.decode_vllm import VllmDecoder  # noqa: E402


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """vLLM and transformers with the same weights, which are far from zero: every difference in the context shows."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.2,
            bos_token_id=None, eos_token_id=STOP, pad_token_id=0, **size,
        )
    ).eval()  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return VllmEngine(Path(folder), EngineSettings(max_num_seqs=32), CONTEXT, 0), HfDecoder(model, 32, CONTEXT)


def decoding(unit: Any, **more: Any) -> Decoding:
    how: dict[str, Any] = {"mode": "rewind", "temperature": 0.0, "top_p": 1.0, "max_tokens": 40, "threshold": 0.03}
    return Decoding(stop_id=STOP, rule=UndoRule(U, unit, frozenset({END, 9, 17})), **how | more)


def requests(count: int, longest: int = 30) -> list[DecodeRequest]:
    rng = random.Random(count)
    ids = [token for token in range(2, VOCABULARY) if token != U]
    prompts = [tuple(rng.choices(ids, k=rng.randint(1, longest))) for _ in range(count)]
    return [DecodeRequest(prompt, seed) for seed, prompt in enumerate(prompts)]


def agree(found: list[Decoded], wanted: list[Decoded]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one.ids, one.surviving, one.banned, one.finish) == (other.ids, other.surviving, other.banned, other.finish)
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["rewind", "soft", "forbidden"])
@pytest.mark.parametrize(
    ("unit", "rewinding"), [("step", "immediate"), ("all", "immediate"), ("token", "immediate"), ("token", "deferred")]
)
def test_the_same_as_transformers(engines: tuple[Any, Any], unit: str, rewinding: str, mode: str) -> None:
    """More requests than slots, prompts of 1 to 30 tokens."""
    vllm_engine, hf = engines
    asked = decoding(unit, rewinding=rewinding, mode=mode)
    wanted = hf.decode(requests(60), asked)
    agree(vllm_engine.decode(requests(60), asked), wanted)
    if mode != "forbidden":
        assert sum(one.undos > 0 for one in wanted) > 20 and any(one.undos > 2 for one in wanted)


def test_forced_beginnings_caps_and_no_bans(engines: tuple[Any, Any]) -> None:
    vllm_engine, hf = engines
    forced = [DecodeRequest(one.prompt_ids, one.seed, (5, 6, U, 7)) for one in requests(30)]
    for asked in (decoding("step"), decoding("all", max_undos=2), decoding("token", max_undos_per_state=1, ban_tried=False)):
        agree(vllm_engine.decode(forced, asked), hf.decode(forced, asked))


def test_sampling_ends_and_depends_on_the_seed_alone(engines: tuple[Any, Any]) -> None:
    vllm_engine, _ = engines
    asked = decoding("step", temperature=1.0, threshold=None, undo_bias=2.0, max_tokens=30)
    some = requests(40)
    first = vllm_engine.decode(some, asked)
    assert all(1 <= len(one.ids) <= 30 and apply_undo(one.ids, asked.rule).surviving == one.surviving for one in first)
    assert sum(one.undos for one in first) > 20
    assert [one.ids for one in vllm_engine.decode(some[::-1], asked)][::-1] == [one.ids for one in first]


@pytest.mark.parametrize("kind", ["probability", "margin", "entropy", "repeat"])
@pytest.mark.parametrize("unit", ["token", "step", "all"])
def test_guided_is_the_same_as_transformers(engines: tuple[Any, Any], unit: str, kind: Any) -> None:
    """The row of logits that vLLM draws from is all that a training-free signal needs."""
    vllm_engine, hf = engines
    threshold = {"probability": 0.15, "margin": 0.0123, "entropy": 2.81}.get(kind, 0.0)  # no value here is as near as rounding
    asked = decoding(unit, mode="guided", signal=Signal(kind, threshold, ngram=2))
    wanted = hf.decode(requests(20), asked)
    agree(vllm_engine.decode(requests(20), asked), wanted)
    assert sum(one.undos > 0 for one in wanted) > 10


def test_a_signal_that_reads_hidden_states_is_refused(engines: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="reads hidden states, which vLLM keeps to itself: decode with transformers"):
        engines[0].decode(requests(2), decoding("step", mode="guided", signal=Signal("score")))


def test_what_comes_again_behind_an_undo_is_found_in_the_prefix_cache(engines: tuple[Any, Any]) -> None:
    decoder = VllmDecoder(engines[0]._llm, VOCABULARY)
    assert decoder.prefix_hits.rate is None
    prompts = [tuple(2 + (7 * i + 3 * seed) % 30 for i in range(150)) for seed in range(4)]  # blocks on CPUs have 128 tokens
    some = [DecodeRequest(prompt, seed, (5, 6, U)) for seed, prompt in enumerate(prompts)]
    decoder.decode(some, decoding("step", max_tokens=8, max_undos=1))
    hits = decoder.prefix_hits
    assert hits.asked == 4 * 150  # each came again with its prompt alone
    assert 0 < hits.cached < hits.asked  # the last block is not whole
    assert hits.rate == hits.cached / hits.asked


def test_other_requests_of_the_engine_are_left_alone(engines: tuple[Any, Any]) -> None:
    vllm_engine, hf = engines
    plain = vllm_engine.generate([Request(one.prompt_ids, 0) for one in requests(20)], Sampling(0.0, 1.0, 40, STOP, (U,)))
    assert [one.token_ids for one in plain] == [one.ids for one in hf.decode(requests(20), decoding("step", mode="forbidden"))]


def test_requests_that_come_and_go_get_what_they_get_alone(engines: tuple[Any, Any]) -> None:
    """In unlike modes and units at the same time, joining while others run; one leaves."""
    vllm_engine, hf = engines
    ways = [
        decoding("step"),
        decoding("all"),
        decoding("token"),
        decoding("step", mode="soft"),
        decoding("token", mode="forbidden"),
    ]
    asked = [(request, ways[index % len(ways)]) for index, request in enumerate(requests(40))]
    live = vllm_engine.live()
    emitted, done = drive(live, asked, 2, frozenset({7}))
    for key, (request, way) in enumerate(asked):
        one = hf.decode([request], way)[0]
        assert tuple(emitted[key]) == one.ids[: len(emitted[key])]
        if key in done:
            agree([done[key]], [one])
    assert live.running == 0 and set(range(40)) - set(done) <= {7}
    assert not vllm_engine._llm.llm_engine.has_unfinished_requests()
