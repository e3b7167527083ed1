"""The batched decoder equals one plain forward for every decision, whatever its rows do, and always ends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from actors.decode import HfDecoder, _Row, choose
from pipeline.backtrack.cursor import Cursor, Decoded, DecodeRequest, Decoding, Mode, Signal
from pipeline.backtrack.layout import rewind, soft
from pipeline.backtrack.tree import Rewinding, Walk, grow
from pipeline.backtrack.undo import Unit, apply_undo
from tests.pipeline.slow_decode import logprobs_of, slow_decode
from tests.pipeline.tiny import FORMS, VOCABULARY, U, plain, rule, score, tiny_model

STOP = 0
MODELS = ["llama", "qwen2", "gpt2"]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
WAYS: list[tuple[Mode, Unit, Rewinding]] = [
    *(("rewind", *form) for form in FORMS),
    *(("soft", unit, "immediate") for unit in ("token", "step", "all")),
    ("forbidden", "token", "immediate"),
]  # fmt: skip
model_of = functools.cache(tiny_model)


@functools.cache
def slow_logits(name: str, dtype: torch.dtype) -> Callable[[tuple[int, ...]], Sequence[float]]:
    """A plain forward over what one row sees, each context computed once."""

    @functools.cache
    def logits_of(visible: tuple[int, ...]) -> Sequence[float]:
        with torch.inference_mode():
            logits: list[float] = plain(model_of(name, dtype), visible)[-1].double().tolist()
        return logits

    return logits_of


def requests() -> list[DecodeRequest]:
    """Rows of very different length, in no order; an undo before anything else, and nested ones."""
    lengths = [1, 30, 2, 9, 1, 17, 4, 3, 1, 25, 8, 2, 14, 6]
    prompts = [tuple((length + seed + 3 * i) % (VOCABULARY - 1) for i in range(length)) for seed, length in enumerate(lengths)]
    forced = {1: (U, 1, 2), 3: (1, 2, 4, U, U, 5, U), 4: (6, 3, 1, 2), 5: (U, U)}
    return [DecodeRequest(prompt, seed, forced.get(seed, ())) for seed, prompt in enumerate(prompts)]


def decoding_of(mode: Mode, unit: Unit, rewinding: Rewinding, **more: Any) -> Decoding:
    settings: dict[str, Any] = {"temperature": 0, "top_p": 1, "max_tokens": 24, "stop_id": STOP, "threshold": None}
    return Decoding(mode, rule=rule(unit), rewinding=rewinding, **settings | more)


def allowed(decoding: Decoding) -> list[DecodeRequest]:
    """The requests, without forced undos where undos are forbidden."""
    if decoding.mode != "forbidden":
        return requests()
    return [replace(request, forced_ids=tuple(token for token in request.forced_ids if token != U)) for request in requests()]


def check(decoding: Decoding, name: str = "llama", dtype: torch.dtype = torch.float64, slots: int = 3) -> list[Decoded]:
    found = HfDecoder(model_of(name, dtype), slots, row_tokens=80).decode(allowed(decoding), decoding)
    for request, one in zip(allowed(decoding), found, strict=True):
        wanted = slow_decode(slow_logits(name, dtype), VOCABULARY, request, decoding)
        assert one.logprobs == pytest.approx(wanted.logprobs, abs=TOLERANCE[dtype])
        assert replace(one, logprobs=()) == replace(wanted, logprobs=())
        assert len(one.ids) <= decoding.max_tokens
        assert one.finish == ("stop" if one.ids[-1] == STOP else "length")
    return found


SAMPLED: dict[str, Any] = {"temperature": 1.3, "top_p": 0.95, "undo_bias": 1.0}
THRESHOLD: dict[str, Any] = {"temperature": 0.7, "threshold": 0.1}


@pytest.mark.parametrize("how", [{"undo_bias": 1.0}, SAMPLED, {"threshold": 0.05}, THRESHOLD], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_equals_a_forward_for_every_decision(way: tuple[Mode, Unit, Rewinding], how: dict[str, Any]) -> None:
    found = check(decoding_of(*way, **how))
    if way[0] != "forbidden":
        assert sum(one.undos for one in found) > 6  # not only the forced ones


GUIDED: list[tuple[Mode, Unit, Rewinding]] = [("guided", unit, "immediate") for unit in ("token", "step", "all")]
SIGNALS = [Signal("probability", 0.3), Signal("margin", 0.2), Signal("entropy", 1.2), Signal("repeat", ngram=2)]


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda signal: signal.kind)
@pytest.mark.parametrize("way", GUIDED, ids=" ".join)
def test_guided_equals_a_forward_for_every_decision(way: tuple[Mode, Unit, Rewinding], signal: Signal) -> None:
    for how in (SAMPLED | {"undo_bias": 50.0}, {"threshold": 0.0, "max_undos_per_state": 2}):
        found = check(decoding_of(*way, signal=signal, **how))
        assert sum(one.undos for one in found) > 7  # 6 of them are forced


def test_p_of_u_changes_nothing_where_a_signal_guides() -> None:
    """A model that wants U everywhere, and one that cannot say it, are guided alike."""
    decoding = decoding_of(*GUIDED[1], signal=SIGNALS[0])
    asked = [replace(request, forced_ids=()) for request in requests()]
    found = []
    for shift in (-30.0, 0.0, 30.0):
        model = tiny_model("llama")
        model.get_output_embeddings().register_forward_hook(
            lambda module, given, logits, shift=shift: logits + shift * torch.nn.functional.one_hot(torch.tensor(U), VOCABULARY)
        )
        found.append(HfDecoder(model, 3, 64).decode(asked, decoding))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert replace(one, logprobs=()) == replace(same, logprobs=())
            assert one.logprobs == pytest.approx(same.logprobs, abs=1e-9)


@pytest.mark.parametrize("reads", ["hidden state", "ids"])
@pytest.mark.parametrize("way", GUIDED, ids=" ".join)
def test_a_learned_score_guides_by_what_a_plain_forward_gives(way: tuple[Mode, Unit, Rewinding], reads: str) -> None:
    """A linear head on the last hidden state, and a judge of the ids; the slow version computes both for each id again."""
    model = model_of("llama")
    head_D = torch.linspace(-1, 1, 32, dtype=torch.float64)

    def of_ids(visible: tuple[int, ...]) -> float:
        return float(sum(visible) % 5)

    def scorer(hidden_BD: torch.Tensor, visible: Sequence[tuple[int, ...]]) -> torch.Tensor:
        assert len(hidden_BD) == len(visible) > 0
        return hidden_BD @ head_D if reads == "hidden state" else torch.tensor([of_ids(ids) for ids in visible])

    @functools.cache
    def doubted(visible: tuple[int, ...]) -> bool:
        if reads == "ids":
            return of_ids(visible) < 1
        with torch.inference_mode():
            hidden_TD = model.model(input_ids=torch.tensor([visible]), use_cache=False).last_hidden_state[0]
        return float(hidden_TD[-1] @ head_D) < 1

    def doubts(scores: list[float], token: int, surviving: tuple[int, ...], visible: tuple[int, ...]) -> bool:
        return doubted(visible)

    decoding = decoding_of(*way, signal=Signal("score", 1.0))
    found = HfDecoder(model, 3, 64).decode(requests(), decoding, scorer)
    assert sum(one.undos for one in found) > 7
    for request, one in zip(requests(), found, strict=True):
        wanted = slow_decode(slow_logits("llama", torch.float64), VOCABULARY, request, decoding, doubts)
        assert replace(one, logprobs=()) == replace(wanted, logprobs=())
        assert one.logprobs == pytest.approx(wanted.logprobs, abs=1e-9)
    with pytest.raises(ValueError, match=r"decode\.signal\.folder must name the folder of the verifier"):
        HfDecoder(model, 3, 64).decode(requests(), decoding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_on_other_models_and_in_fp32(name: str, dtype: torch.dtype) -> None:
    check(decoding_of(*WAYS[1], **SAMPLED), name, dtype)
    check(decoding_of(*WAYS[2], threshold=0.1), name, dtype)
    check(decoding_of(*WAYS[4], **SAMPLED), name, dtype)


@pytest.mark.parametrize("caps", [{"max_undos": 3}, {"max_undos_per_state": 1}, {"ban_tried": False, "max_undos": 99}], ids=str)
@pytest.mark.parametrize("way", WAYS[:5], ids=" ".join)
def test_a_model_that_would_undo_for_ever_ends(way: tuple[Mode, Unit, Rewinding], caps: dict[str, Any]) -> None:
    check(decoding_of(*way, undo_bias=50.0, **caps))
    check(decoding_of(*way, threshold=0.0, **caps))


def test_a_row_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for way in (WAYS[1], WAYS[2], WAYS[4]):
        decoding = decoding_of(*way, **SAMPLED | {"max_tokens": 30})
        together = HfDecoder(model_of("llama"), 10, 64).decode(allowed(decoding), decoding)
        monkeypatch.setattr("actors.decode._PREFILL_TOKENS", 20)
        few = HfDecoder(model_of("llama"), 2, 64).decode(allowed(decoding)[::-1], decoding)[::-1]
        alone = [HfDecoder(model_of("llama"), 1, 64).decode([request], decoding)[0] for request in allowed(decoding)]
        ids = [one.ids for one in together]
        assert ids == [one.ids for one in few] == [one.ids for one in alone]
        other = [replace(request, seed=request.seed + 100) for request in allowed(decoding)]
        assert ids != [one.ids for one in HfDecoder(model_of("llama"), 10, 64).decode(other, decoding)]


@pytest.mark.parametrize("name", MODELS)
def test_forbidden_equals_generate(name: str) -> None:
    decoding = decoding_of("forbidden", "token", "immediate", max_tokens=40)
    many = [replace(request, forced_ids=()) for request in requests()]
    found = HfDecoder(model_of(name), 3, 128).decode(many, decoding)
    for request, one in zip(many, found, strict=True):
        prompt = torch.tensor([request.prompt_ids])
        out = model_of(name).generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=40, suppress_tokens=[U],
            eos_token_id=STOP, pad_token_id=STOP,
        )  # fmt: skip
        assert one.ids == one.surviving == tuple(out[0, len(request.prompt_ids) :].tolist())


@pytest.mark.parametrize("threshold", [None, 0.05])
@pytest.mark.parametrize("way", WAYS[:7], ids=" ".join)
def test_the_tree_gives_the_same_logprobs(way: tuple[Mode, Unit, Rewinding], threshold: float | None) -> None:
    """What the learner computes for what was decoded: rewound on the token tree, or the row as it was emitted."""
    mode, unit, rewinding = way
    decoding = decoding_of(*way, temperature=1.2, threshold=threshold)
    model, undos = model_of("llama"), 0
    for request, one in zip(requests(), HfDecoder(model, 3, 64).decode(requests(), decoding), strict=True):
        walk = Walk(request.prompt_ids, one.ids, one.logprobs, one.banned)
        segment = rewind(grow([walk], rule(unit), rewinding)) if mode == "rewind" else soft(walk)
        for action, logprob in zip(segment.actions, score(model, segment).tolist(), strict=True):
            certain = threshold is not None and action.token == U and action.step >= len(request.forced_ids)
            undos += action.token == U
            if certain and not action.ends_run:
                assert action.logprob == 0 and logprob > torch.tensor(threshold).log()
            elif not action.ends_run:
                assert action.logprob == pytest.approx(logprob, abs=1e-9)
    assert undos > 6  # not only the forced ones


def test_the_stop_id_may_come_behind_an_undo() -> None:
    found = [one for way in WAYS[:4] for one in check(decoding_of(*way, **SAMPLED | {"max_tokens": 40, "temperature": 2.0}))]
    assert any(one.finish == "stop" and one.ids[-2] == U for one in found)


def test_top_p_keeps_the_fewest_ids_that_have_it() -> None:
    """With next to nothing kept, the model's first choice is all there is."""
    greedy = decoding_of("rewind", "step", "immediate")
    narrow = replace(greedy, temperature=1.0, top_p=1e-6)
    decoder = HfDecoder(model_of("llama"), 7, 64)
    assert decoder.decode(requests(), narrow) == decoder.decode(requests(), greedy)


def test_nothing_asked_for_is_nothing_given() -> None:
    assert HfDecoder(model_of("llama"), 3, 64).decode([], decoding_of("soft", "token", "immediate")) == []


def test_what_cannot_be_decoded_is_refused() -> None:
    decoding = decoding_of("rewind", "token", "deferred")
    with pytest.raises(ValueError, match="prompt and max_tokens need 54 tokens, rows have room for 50"):
        HfDecoder(model_of("llama"), 3, 50).decode(requests(), decoding)
    with pytest.raises(ValueError, match="needs attention sdpa, the model was loaded with eager"):
        HfDecoder(model_of("llama", torch.float64, "eager"), 3, 50)
    with pytest.raises(ValueError, match="prompt_ids contains the undo token 7"):
        HfDecoder(model_of("llama"), 3, 50).decode([DecodeRequest((U,), 0)], decoding)
    recurrent = tiny_model("qwen2")
    recurrent.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="layers of kind linear_attention, which keep nothing that a rewind could shorten"):
        HfDecoder(recurrent, 3, 50)


@pytest.mark.parametrize("way", WAYS[:7], ids=" ".join)
def test_the_same_as_one_row_whose_dynamic_cache_is_cropped(way: tuple[Mode, Unit, Rewinding]) -> None:
    """transformers' own cache: a rewind crops it, and what it still holds is not computed again."""
    decoding, model = decoding_of(*way, threshold=0.05), model_of("llama")
    found = HfDecoder(model, 3, 80).decode(requests(), decoding)
    cropped = 0
    for request, one in zip(requests(), found, strict=True):
        cursor, cache = Cursor(request, decoding, VOCABULARY), DynamicCache()
        row = _Row(0, cursor, [], None)
        while cursor.finish is None:
            new = cursor.visible[cache.get_seq_length() :]
            with torch.inference_mode():
                logits_BV = model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True).logits[:, -1]
            choice = choose(logits_BV, [row], decoding)
            cursor.take(int(choice.ids[0]), float(choice.logprobs[0]), float(choice.alternatives[0]))
            if (gone := cache.get_seq_length() + 1 - cursor.length) > 0:
                cache.crop(-gone)  # all but the last id that stands, which is fed again: its logits say what comes next
                cropped += 1
        assert replace(cursor.result(), logprobs=()) == replace(one, logprobs=())
        assert cursor.result().logprobs == pytest.approx(one.logprobs, abs=1e-9)
    assert (cropped > 6) == (way[0] == "rewind")


@pytest.mark.parametrize(("name", "way"), [("llama", WAYS[0]), ("qwen2", WAYS[5]), ("gpt2", GUIDED[1])])
def test_in_bf16_it_is_as_near_to_a_plain_forward_as_bf16_allows(name: str, way: tuple[Mode, Unit, Rewinding]) -> None:
    """Logits of this size are 1/64 apart, so 1e-3 holds in the mean and not for every id: 1/32 does, and what the cache changes is
    far less than what bf16 changes, by the same weights in fp32."""
    half, full = model_of(name, torch.bfloat16), tiny_model(name, torch.float32)
    full.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    decoding = decoding_of(*way, temperature=1.0, threshold=0.1, signal=SIGNALS[0])
    off: dict[str, list[float]] = {"half": [], "full": []}
    for request, one in zip(requests(), HfDecoder(half, 3, 80).decode(requests(), decoding), strict=True):
        for index, (token, logprob, bans) in enumerate(zip(one.ids, one.logprobs, one.banned, strict=True)):
            if token == U and index >= len(request.forced_ids):
                continue  # it was certain
            stands = one.ids[:index] if way[0] == "soft" else apply_undo(one.ids[:index], decoding.rule).surviving
            for kind, model in (("half", half), ("full", full)):
                with torch.inference_mode():
                    logits = model(input_ids=torch.tensor([request.prompt_ids + stands]), use_cache=False).logits[0, -1]
                off[kind].append(abs(logprobs_of(logits.double().tolist(), bans)[token] - logprob))
    mean = {kind: sum(values) / len(values) for kind, values in off.items()}
    assert len(off["half"]) > 80
    assert max(off["half"]) < 1 / 32 and mean["half"] < 3e-3
    assert mean["half"] < mean["full"] / 2
