"""Where the thresholds of decoding come from: `python -m pipeline.calibrate runs/tiny` prints what each value gives on dev.

Arguments -> a curve for people, `calibration.json` in the run's folder, and every way that can end -> one line and an exit
code. Decodes in this process; evaluation reports on the test split, which has no part in the choice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.arguments import USAGE, OneLineParser, positive
from pipeline.backtrack.cursor import Decoded, Decoding, Signal
from pipeline.config import Settings
from pipeline.metrics import Evaluated, figures
from pipeline.settings_file import ConfigError, load_settings
from pipeline.store import RunLock, Store, StoreError
from pipeline.telemetry import Terminal, quiet_third_parties

_FAILED, _INTERRUPTED = 1, 130
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
STAGES = {"sft": "sft", "clean_control": "sft", "base": "base", "dpo": "dpo", "grpo": "grpo", "grpo_control": "grpo"}
"""Models by their names in metrics.json, and the stages that make them."""


@dataclass(frozen=True)
class Sweep:
    """One setting, tried at each value of a grid."""

    key: str
    """The setting that a value is written to."""
    values: tuple[float, ...]
    with_also: str
    """Other settings that the value needs."""
    apply: Callable[[Decoding, float], Decoding]


def _guided(kind: Any) -> Callable[[Decoding, float], Decoding]:
    return lambda decoding, value: replace(decoding, mode="guided", signal=Signal(kind, value))


def _by_score(decoding: Decoding, value: float) -> Decoding:
    signal = decoding.signal or Signal("score")
    return replace(decoding, mode="guided", signal=replace(signal, threshold=value))


def _by_bias(decoding: Decoding, value: float) -> Decoding:
    return replace(decoding, threshold=None, undo_bias=value)


def _by_threshold(decoding: Decoding, value: float) -> Decoding:
    return replace(decoding, threshold=value, undo_bias=0.0)


SWEEPS = {
    "threshold": Sweep("decode.threshold", _SHARES, "", _by_threshold),
    "score": Sweep("decode.signal.threshold", _SHARES, "decode.signal.kind=score", _by_score),
    "bias": Sweep("decode.undo_bias", (-4, -2, -1, 0, 1, 2, 4), "decode.threshold=null", _by_bias),
    **{
        kind: Sweep("decode.signal.threshold", values, f"decode.signal.kind={kind}", _guided(kind))
        for kind, values in (("probability", _SHARES), ("margin", _SHARES), ("entropy", (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3)))
    },
}
"""By name: what decides of a trained U, and the signals that it is set beside, learned or not, each at its own best value."""


@dataclass(frozen=True)
class Point:
    """What one value gives."""

    value: float | None
    """None: undo forbidden."""
    all: dict[str, Any]
    """As in metrics.json; the other two on the problems with and without hindsight."""
    hindsight: dict[str, Any]
    forward: dict[str, Any]


def best_of(points: Iterable[Point]) -> Point:
    """The most accurate; among equals the one that spends the fewest tokens."""
    return max(points, key=lambda point: (point.all["accuracy"], -point.all["tokens_per_problem"]))


def point_of(value: float | None, rows: Sequence[Evaluated]) -> Point:
    of_kind = [[row for row in rows if row.hindsight == kind] for kind in (True, False)]
    return Point(value, figures(rows), *map(figures, of_kind))


def table_of(name: str, first: Point, points: Sequence[Point]) -> list[str]:
    """The curve in lines."""
    best, sweep = best_of(points), SWEEPS[name]
    kept = f" ({sweep.with_also})" if sweep.with_also else ""
    heads = f"{'accuracy':>10}{'95 %':>16}{'hindsight':>11}{'forward':>9}{'spurious':>10}{'undo':>7}{'tokens':>8}"
    lines = [f"{sweep.key}{kept}", f"{'value':>10}{heads}"]
    for point in (first, *points):
        row = point.all
        value = "forbidden" if point.value is None else f"{point.value:g}"
        interval = "{:.3f} .. {:.3f}".format(*row["ci95"])
        groups = [f"{group['accuracy']:.3f}" if group["n"] else "–" for group in (point.hindsight, point.forward)]
        rates = f"{row['spurious_undo_rate']:10.3f}{row['undo_rate']:7.3f}{row['tokens_per_problem']:8.1f}"
        mark = "  <- best" if point is best else ""
        lines.append(f"{value:>10}{row['accuracy']:10.3f}{interval:>16}{groups[0]:>11}{groups[1]:>9}{rates}{mark}")
    return lines


def calibrate(
    settings: Settings, store: Store, round: int, model: str, names: Sequence[str], problems: int | None, terminal: Terminal
) -> dict[str, Any]:
    """Decode the dev split at every value; prints the tables as they are ready. What `calibration.json` holds.

    Raises:
        StoreError: an output of the run is missing or damaged.
    """
    from actors.decode import HfDecoder  # here, so that `--help` needs no torch
    from actors.engines import Completion
    from pipeline.stages.io import Codec, read_problems
    from pipeline.stages.measured import evaluated, evaluation_decoding, requests_of
    from pipeline.stages.prm import named_signal
    from pipeline.stages.probes import spread
    from pipeline.stages.sft import CONTROL

    stage = STAGES[model]
    at = 0 if model == "base" else round
    for place in ((0, "problems"), (at, stage)):
        if damage := store.check(*place):
            raise StoreError(f"{store.path(*place)}: {damage}")
    folder = store.path(at, stage) / (CONTROL if model.endswith("control") else "")
    if not folder.is_dir():
        raise StoreError(f"{folder} is not there: the run was made with {stage}.control=false")
    codec = Codec(folder, settings.undo, settings.base.prompt)
    chosen = spread(read_problems(store.path(0, "problems")), "dev", problems or settings.evaluate.dev)
    chosen = [problem for problem in chosen if len(codec.prompt_ids(problem)) <= settings.engine.max_prompt]
    if not chosen:
        raise StoreError(f"no dev prompt has at most engine.max_prompt={settings.engine.max_prompt} tokens")
    requests = requests_of(settings, codec, chosen)
    room = max(len(request.prompt_ids) for request in requests) + settings.evaluate.max_tokens
    decoder = HfDecoder.from_folder(folder, settings.engine.max_num_seqs, room)

    def judged(decoding: Decoding, first: Sequence[Completion] | None) -> tuple[list[Completion], list[Evaluated]]:
        done = [_completion(one) for one in decoder.decode(requests, decoding)]
        cases = zip(chosen, done, first or done, strict=True)
        how = (decoding.mode, decoding.temperature)
        return done, [evaluated(model, *how, problem, one, other, codec) for problem, one, other in cases]

    def _completion(one: Decoded) -> Completion:
        return Completion(one.ids, (), one.finish)

    rewind = evaluation_decoding(settings, codec, "rewind")
    verifiers = store.path(round, "prm") if store.manifest(round, "prm") else None
    asked = settings.decode.signal
    rewind = replace(rewind, signal=named_signal(Signal("score", by=asked.by, folder=asked.folder), verifiers, model))
    if "score" in names:
        try:
            decoder.detector(_by_score(rewind, 0.5))
        except ValueError as error:
            raise StoreError(str(error)) from error
    found: dict[str, Any] = {}
    total = 1 + sum(len(SWEEPS[name].values) for name in names)
    with terminal.stage("calibrate", total, "values") as progress:
        first, rows = judged(replace(rewind, mode="forbidden"), None)
        progress.advance()
        without = point_of(None, rows)
        for name in names:
            points = []
            for value in SWEEPS[name].values:
                points.append(point_of(value, judged(SWEEPS[name].apply(rewind, value), first)[1]))
                progress.advance()
            for line in table_of(name, without, points):
                terminal.info(line)
            sweep, best = SWEEPS[name], best_of(points)
            use = f"{sweep.with_also} {sweep.key}={best.value:g}".strip()
            if best.all["accuracy"] <= without.all["accuracy"]:
                terminal.warn(f"{name}: no value is more accurate than undo forbidden")
            terminal.info(f"use: python run.py {use}")
            found[name] = {"key": sweep.key, "best": best.value, "use": use, "curve": [asdict(point) for point in points]}
    about = {"round": round, "model": model, "split": "dev", "n": len(chosen), "temperature": settings.evaluate.temperature}
    return about | {"forbidden": asdict(without), "sweeps": found}


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, 1 for a run that cannot be calibrated, 2 for wrong arguments, 130 when stopped."""
    options = _parse(arguments)
    terminal = Terminal(None)
    folder = Path(options.run)
    try:
        settings = load_settings(folder / "config.yaml", options.overrides)
    except ConfigError as error:
        terminal.error(str(error))
        return USAGE
    store = Store(folder)
    made = [n for n in range(1, settings.run.rounds + 1) if store.manifest(n, STAGES[options.model])]
    round = options.round or max(made, default=1)
    try:
        with RunLock(folder):
            (folder / "logs").mkdir(exist_ok=True)
            quiet_third_parties(folder / "logs" / "calibrate.log")
            names = list(dict.fromkeys(options.sweep or ("threshold", "probability")))
            found = calibrate(settings, store, round, options.model, names, options.problems, terminal)
            target = folder / "calibration.json"
            part = target.with_suffix(".part")
            part.write_text(json.dumps(found, indent=1, sort_keys=True, allow_nan=False) + "\n")
            part.replace(target)
    except (StoreError, OSError) as error:
        terminal.error(str(error))
        return _FAILED
    except KeyboardInterrupt:
        terminal.error("interrupted; calibration.json is as it was before")
        return _INTERRUPTED
    terminal.info(f"curves: {target}")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    about = "Decode the dev split of a run at a grid of values, print the curve and name the best one."
    parser = OneLineParser(prog="python -m pipeline.calibrate", description=about)
    parser.add_argument("run", metavar="RUN", help="folder of a run, such as runs/tiny")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the run's own")
    choices = ", ".join(SWEEPS)
    parser.add_argument(
        "--sweep", action="append", choices=list(SWEEPS), metavar="WHAT", help=f"{choices}; default: threshold, probability"
    )
    parser.add_argument("--model", choices=list(STAGES), default="sft", help="model of the run (default: %(default)s)")
    parser.add_argument("--round", type=positive, metavar="N", help="round of the model (default: the newest)")
    parser.add_argument("--problems", type=positive, metavar="N", help="dev problems (default: evaluate.dev)")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
