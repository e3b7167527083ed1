"""A page that draws search trees: plain data in, one self-contained HTML page out. Called by the stage search.

Model text is untrusted: the template escapes everything, and control characters are taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.backtrack.searched import Ids, Searched
from pipeline.report import templates, visible
from pipeline.tasks.problem import Problem

_LONGEST = 300
"""Characters of one step that the page shows."""
_SHOWN = 80
"""Nodes of one tree that the page draws, the most visited ones."""


@dataclass(frozen=True)
class Step:
    """One node."""

    number: int
    parent: int
    text: str
    """Of its step; of the root none."""
    value: float
    q: float
    visits: int
    samples: int
    prior: float
    right: int
    undone: int


@dataclass(frozen=True)
class Drawn:
    """One tree with its problem."""

    problem: str
    family: str
    question: str
    answer: str
    solved: bool
    simulations: int
    tokens: int
    steps: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def shown(self) -> frozenset[int]:
        """Nodes that are drawn: the most visited and those above them."""
        ranked = sorted(self.steps, key=lambda step: (-step.visits, step.number))[:_SHOWN]
        found: set[int] = set()
        for step in ranked:
            at = step.number
            while at >= 0 and at not in found:
                found.add(at)
                at = self.steps[at].parent
        return frozenset(found)

    def below(self, number: int) -> list[Step]:
        """Children that are drawn, the most visited first."""
        shown = self.shown
        return sorted(
            (step for step in self.steps if step.parent == number and step.number in shown),
            key=lambda step: (-step.visits, step.number),
        )


def draw(problem: Problem, tree: Searched, decode: Callable[[Ids], str]) -> Drawn:
    """A tree with text for ids."""
    steps = tuple(
        Step(
            number,
            tree.parent[number],
            decode(tree.ids[number]),
            tree.value[number],
            tree.q[number],
            tree.visits[number],
            tree.samples[number],
            tree.prior[number],
            tree.right[number],
            tree.undone[number],
        )
        for number in range(len(tree.parent))
    )
    return Drawn(problem.id, problem.family, problem.question, problem.answer, tree.solved, tree.simulations, tree.tokens, steps)


def render(trees: Sequence[Drawn], name: str, searched: int, solved: int) -> str:
    """The page. `searched` and `solved` count all problems of the stage, of which `trees` are some."""
    environment = templates()
    environment.filters["text"] = step_text
    template = environment.get_template("search.html.j2")
    return template.render(trees=trees, name=name, searched=searched, solved=solved)


def step_text(text: str) -> str:
    """What the page shows of one step."""
    shown = visible(text.rstrip("\n"))
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]} …"
