"""Decoding with undo: what a rewind costs, against soft undos, against recomputing prefixes, and in a batch where few rows undo.

    python benchmarks/decode.py [--quick]

Two models with random weights, the default one and one of about 30M parameters. Every id is forced, undos included, so both
sides of a ratio emit the same ids whatever the weights are; a forced id costs a forward as a chosen one does. Sides take turns, a
figure is the median. The last figure is how much of what comes again behind an undo vLLM finds in its prefix cache. Prints a
table and one JSON line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from actors.decode import HfDecoder  # noqa: E402
from pipeline.backtrack.cursor import DecodeRequest, Decoding, Mode  # noqa: E402
from pipeline.backtrack.undo import UndoRule, Unit, apply_undo  # noqa: E402
from pipeline.config import EngineSettings, ScratchModel  # noqa: E402
from pipeline.stages.base import new_model, train_tokenizer  # noqa: E402

STOP, UNDO, END, FIRST = 0, 5, 6, 7  # ids; ordinary ones from FIRST on
CONTEXT, LINE, SLIPS = 1536, 12, 8
GOALS = {"rewind_over_soft": 1.25, "recomputing_over_rewind": 3.0, "throughput_with_undos": 0.7}
SIZES = {"default": ScratchModel(context=CONTEXT), "30M": ScratchModel(layers=9, width=512, heads=8, vocab=4096, context=CONTEXT)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats")
    quick = parser.parse_args().quick
    figures: dict[str, float] = {}
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    for name, size in SIZES.items():
        model = new_model(size, tokenizer, 0)
        model.resize_token_embeddings(size.vocab, mean_resizing=False)
        figures |= {
            f"{figure}_{name}": value for figure, value in measure(model.eval(), quick and name != "default", quick).items()
        }
    hits = prefix_hits(quick)
    if hits is not None:
        figures["vllm_prefix_hit_rate"] = hits
    print(f"{'':34}{'default':>10}{'30M':>10}")
    for figure in ("million_parameters", *GOALS, "rewind_over_soft_token"):
        goal = {"rewind_over_soft": "at most", "recomputing_over_rewind": "at least", "throughput_with_undos": "at least"}.get(
            figure
        )
        told = f"   goal: {goal} {GOALS[figure]}" if goal else ""
        print(f"{figure:34}" + "".join(f"{figures[f'{figure}_{name}']:10.2f}" for name in SIZES) + told)
    print(f"{'vLLM prefix-cache hit rate':34}" + (f"{hits:10.2f}" if hits is not None else "   vLLM is not installed"))
    ok = all(
        figures[f"rewind_over_soft_{name}"] <= GOALS["rewind_over_soft"]
        and figures[f"recomputing_over_rewind_{name}"] >= GOALS["recomputing_over_rewind"]
        and figures[f"throughput_with_undos_{name}"] >= GOALS["throughput_with_undos"]
        for name in SIZES
    )
    goals = {f"{goal}_{name}": value for goal, value in GOALS.items() for name in SIZES}
    print(json.dumps({"benchmark": "decode", "figures": figures, "goals": goals, "ok": ok}))
    return 0


def measure(model: Any, few: bool, quick: bool) -> dict[str, float]:
    """Ratios of one model. `few`: fewer rows, for a model that is slow here."""
    repeats, rng = (1 if few else 3 if quick else 7), random.Random(0)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    figures = {"million_parameters": sum(one.numel() for one in model.parameters()) / 1e6}

    rows = 16 if few else 64
    for unit, figure in (("step", "rewind_over_soft"), ("token", "rewind_over_soft_token")):
        scripts = [script(rng, vocabulary, 96, unit, 4) for _ in range(rows)]
        longest = max(map(len, scripts))
        prompts = [ids(rng, vocabulary, 40) for _ in scripts]
        asked = [DecodeRequest(prompt, 0, forced[:longest]) for prompt, forced in zip(prompts, scripts, strict=True)]
        decoder = HfDecoder(model, rows, CONTEXT)
        sides = {mode: decode_all(decoder, asked, mode, unit) for mode in ("rewind", "soft")}
        seconds = in_turns(sides, repeats)
        figures[figure] = seconds["rewind"] / seconds["soft"]

    rows, count = (1, 4) if few else (4, SLIPS)
    prompts = [ids(rng, vocabulary, 1000) for _ in range(rows)]
    # A wrong id, U, the right one; in the same places in all rows, so that recomputing can batch them too.
    slips = tuple(token for _ in range(count) for token in (END, UNDO, *ids(rng, vocabulary, 1)))
    asked = [DecodeRequest(prompt, 0, slips) for prompt in prompts]
    decoder = HfDecoder(model, rows, CONTEXT)
    sides = {"rewind": decode_all(decoder, asked, "rewind", "token"), "recomputing": recompute(decoder, asked)}
    seconds = in_turns(sides, repeats)
    figures["recomputing_over_rewind"] = seconds["recomputing"] / seconds["rewind"]

    rows, kept = (40, 48) if few else (256, 72)
    prompts = [ids(rng, vocabulary, 40) for _ in range(rows)]
    decoder = HfDecoder(model, rows, CONTEXT)
    batches = {}
    for name, undoing in (("without", 0), ("with", 5)):
        scripts = [script(rng, vocabulary, kept, "step", 2 if undoing and row % undoing == 0 else 0) for row in range(rows)]
        asked = [DecodeRequest(prompt, 0, forced) for prompt, forced in zip(prompts, scripts, strict=True)]
        batches[name] = decode_all(decoder, asked, "rewind", "step")
    seconds = in_turns(batches, repeats)  # as many ids survive in both
    figures["throughput_with_undos"] = seconds["without"] / seconds["with"]
    return figures


def ids(rng: random.Random, vocabulary: int, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST, vocabulary) for _ in range(count))


def script(rng: random.Random, vocabulary: int, kept: int, unit: Unit, undos: int) -> tuple[int, ...]:
    """`kept` ids that survive, in lines of LINE, and as many lines taken back in between; unit `token` by runs of three."""
    lines = [(*ids(rng, vocabulary, LINE - 1), END) for _ in range(kept // LINE)]
    emitted: list[int] = []
    for number, line in enumerate(lines):
        for _ in range(undos // len(lines) + (number < undos % len(lines))):
            emitted += (*ids(rng, vocabulary, LINE - 1), END, UNDO) if unit == "step" else (*ids(rng, vocabulary, 3), *[UNDO] * 3)
        emitted += line
    assert len(apply_undo(emitted, rule(unit)).surviving) == len(lines) * LINE
    return tuple(emitted)


def rule(unit: Unit) -> UndoRule:
    return UndoRule(UNDO, unit, frozenset({END}))


def decoding(mode: Mode, unit: Unit, max_tokens: int) -> Decoding:
    return Decoding(mode, 0.0, 1.0, max_tokens, STOP, rule(unit), max_undos=10_000, max_undos_per_state=10_000)


def decode_all(decoder: Any, asked: list[DecodeRequest], mode: Mode, unit: Unit) -> Callable[[], None]:
    """Rows of one length are decoded together; a row whose script is shorter than the longest ends with a stop."""
    longest = max(len(one.forced_ids) for one in asked) + 1
    ended = [replace(one, forced_ids=(*one.forced_ids, STOP)) for one in asked]

    def run() -> None:
        done = decoder.decode(ended, decoding(mode, unit, longest))
        assert all(one.ids == request.forced_ids for one, request in zip(done, ended, strict=True))

    return run


def recompute(decoder: HfDecoder, asked: list[DecodeRequest]) -> Callable[[], None]:
    """Decode up to each undo, then begin anew with what survives as the prompt: its keys and values are computed again."""
    forced = asked[0].forced_ids
    cuts = [0, *(index + 1 for index, token in enumerate(forced) if token == UNDO), len(forced)]

    def run() -> None:
        for start, end in pairwise(cuts):
            standing = apply_undo(forced[:start], rule("token")).surviving
            segment = [DecodeRequest((*one.prompt_ids, *standing), 0, forced[start:end]) for one in asked]
            decoder.decode(segment, decoding("rewind", "token", end - start))

    return run


def in_turns(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each side; a round before warms both up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, work in sides.items():
            began = time.perf_counter()
            work()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(some) for name, some in seconds.items()}


def prefix_hits(quick: bool) -> float | None:
    """Share of the tokens of requests that came again behind an undo that vLLM had in its cache; None without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return None
    from actors.engines import VllmEngine

    rng = random.Random(1)
    tokenizer = train_tokenizer(["Ana has 3 apples.\n#### 3"], 300)
    with tempfile.TemporaryDirectory() as folder:
        model = new_model(ScratchModel(), tokenizer, 0)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        model.save_pretrained(folder)
        engine = VllmEngine(Path(folder), EngineSettings(), 512, 0)
    rows = 32 if quick else 256
    asked = [DecodeRequest(ids(rng, vocabulary, 200), 0, script(rng, vocabulary, 60, "step", 3)) for _ in range(rows)]
    decode_all(engine, asked, "rewind", "step")()
    return engine.decoder.prefix_hits.rate


if __name__ == "__main__":
    sys.exit(main())
