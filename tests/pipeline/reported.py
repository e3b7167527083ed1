"""Made-up rows of an evaluation, a page of them, and what a browser would make of its HTML."""

from __future__ import annotations

import random
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from pipeline.backtrack.undo import UndoRule
from pipeline.metrics import Evaluated, Probed, summarise
from pipeline.report import (
    Page,
    Piece,
    Shown,
    ShownGroup,
    render,
)

UNDO = 99
STEP = UndoRule(UNDO, "step", frozenset({0}))
TOKEN = UndoRule(UNDO, "token")
FAMILIES = {"chain": False, "shop": False, "boxes": True, "legs": True}
RATES = {"base": 0.6, "clean_control": 0.72, "in_context": 0.75, "sft": 0.85, "grpo": 0.9}


def evaluated(
    models: tuple[str, ...] = ("base", "clean_control", "sft"),
    each: int = 20,
    modes: tuple[str, ...] = ("rewind", "soft"),
    temperature: float = 0.0,
) -> list[Evaluated]:
    rng = random.Random(0)
    return [
        Evaluated(
            model=model,
            mode=mode,
            problem=f"made/{split}/{family}{i}",
            split=split,
            family=family,
            hindsight=hindsight,
            temperature=temperature,
            correct=rng.random() < RATES[model] - 0.2 * (split == "ood") - 0.1 * (mode == "soft"),
            first_correct=rng.random() < RATES[model] - 0.1,
            tokens=rng.randint(20, 60),
            undos=int(model == "sft" and rng.random() < 0.4),
            noops=0,
            spurious=0,
            finish="stop",
            token_ids=(1,),
            first_token_ids=(1,),
        )
        for model in models
        for mode in modes
        for split in ("test", "dev", "ood")
        for family, hindsight in FAMILIES.items()
        for i in range(each)
    ]


def probed(models: tuple[str, ...] = ("base", "clean_control", "sft")) -> list[Probed]:
    rng = random.Random(1)
    return [
        Probed(model, f"made/{family}{i}", family, hindsight, "product", rng.random() ** 2, rng.random() ** 6, -rng.random())
        for model in models
        for family, hindsight in FAMILIES.items()
        for i in range(8)
    ]


def metrics(rows: list[Evaluated], probes: list[Probed]) -> dict[str, Any]:
    main = rows[0].mode
    found = summarise(rows, probes, 1, main)
    return {"run": "made", "rounds": [{"round": 1, "accepted": True, "mode": main}], **found}


def shown(written: list[Piece], correct: bool = False, question: str = "How many?") -> Shown:
    return Shown("made/test/1", "boxes", True, question, "7", correct, False, 1, 0, "stop", written)


def page(rows: list[Evaluated] | None = None, probes: list[Probed] | None = None, **others: Any) -> Page:
    rows = evaluated() if rows is None else rows
    probes = probed() if probes is None else probes
    plain = Page("made", "<|BACKTRACK|>", "step", 0.0, metrics(rows, probes))
    return replace(plain, **others)


def with_rollout(one: Shown) -> str:
    return render(page(groups=[ShownGroup("with undo, wrong", 3, [one])]))


class _Balance(HTMLParser):
    """Collects text; fails on a tag that is closed where another one is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(html: str) -> _Balance:
    parser = _Balance()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser
