"""Traces drawn at random and the forms they are laid out in, for the tests of what the learner trains on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from pipeline.backtrack.targets import Form
from pipeline.backtrack.trace import Detour, Trace, WrongTry, build_trace
from pipeline.backtrack.undo import Unit
from tests.pipeline.tiny import VOCABULARY, U, rule, tiny_model

PAD, ROW = 0, 96
UNITS: list[Unit] = ["token", "step", "all"]
LAYOUTS = {
    "soft": Form("soft"),
    "hard": Form("hard"),
    "hard, depths": Form("hard", positions="depth"),
    "hard, hidden undos": Form("hard", hide_undos=True, positions="depth"),
    "rewind": Form("rewind", "immediate"),
    "rewind, deferred": Form("rewind", "deferred"),
}
model_of = functools.cache(tiny_model)
tokens = st.integers(0, VOCABULARY - 2)  # all but U


@st.composite
def traces(draw: st.DrawFn, prompts: Sequence[tuple[int, ...]] = ((5, 2), (5,), (0, 4, 1)), units: Sequence[Unit] = UNITS) -> Any:
    """(unit, traces of that unit) with detours at several places and, with unit `token`, errors within errors."""
    unit = draw(st.sampled_from(units))

    def wrong_try(nested: bool) -> WrongTry:
        ids = draw(st.lists(tokens, min_size=1, max_size=4))
        decision = draw(st.integers(0, len(ids) - 1))
        wrong = tuple(at == decision or draw(st.booleans()) for at in range(len(ids)))
        inner = ()
        if nested and unit == "token" and draw(st.booleans()):
            inner = (Detour(draw(st.integers(wrong.index(True) + 1, len(ids))), wrong_try(False)),)
        return WrongTry(tuple(ids), wrong, inner)

    def trace() -> Trace:
        solution = draw(st.lists(tokens, max_size=6))
        some = [Detour(draw(st.integers(0, len(solution))), wrong_try(True)) for _ in range(draw(st.integers(0, 2)))]
        return build_trace(draw(st.sampled_from(prompts)), solution, some, rule(unit))

    return unit, [trace() for _ in range(draw(st.integers(1, 4)))]


def solved(prompt: Sequence[int], solution: Sequence[int], tries: int = 0) -> Trace:
    detours = [Detour(0, WrongTry((4, 4), (True, False)))] * tries
    return build_trace(prompt, solution, detours, rule("token"))


def undos(trace: Trace) -> int:
    return trace.ids.count(U)
