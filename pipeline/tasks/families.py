"""The families of synthetic problems: how their numbers are drawn and how question and solution are worded.

The judge asks the hindsight families for `attempt`: the text of a try up to the point where its evidence stands, for
any choice. That makes the first error of a solution exact and lets a wrong choice keep its right consequences.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

Params = SimpleNamespace

NAMES = "Ana Ben Carla Dan Eva Finn Gina Hugo Iris Jack Kim Leo Mia Noah Olga Paul Rosa Sam Tina Will".split()
THINGS = "apples books cards coins dolls eggs flags keys pens shells stamps toys".split()
ANIMALS = [
    ("squids", 10, "crabs", 8),
    ("squids", 10, "ants", 6),
    ("squids", 10, "frogs", 4),
    ("squids", 10, "ducks", 2),
    ("spiders", 8, "beetles", 6),
    ("spiders", 8, "cats", 4),
    ("crabs", 8, "ducks", 2),
    ("beetles", 6, "frogs", 4),
    ("ants", 6, "birds", 2),
    ("cats", 4, "birds", 2),
]


@dataclass(frozen=True)
class Family:
    """One kind of problem. `sample` draws params as JSON values: `core` and `extra` are the
    problem's numbers (`core` alone decides the split), the rest words them."""

    name: str
    hindsight: bool
    sample: Callable[[random.Random, int], dict[str, Any]]
    """(rng, steps) -> params."""
    render: Callable[[Params], tuple[str, list[str], int]]
    """params -> (question, solution lines without the answer line, answer)."""
    attempt: Callable[[Params, int], str] | None = None
    """(params, choice) -> a try's line up to its evidence; hindsight families only."""
    right_choice: Callable[[Params], int] | None = None


def equation(left: str, value: int) -> str:
    """GSM8K's calculator annotation and the result that the reader sees; no second copy of the left side, to keep rows short."""
    return f"<<{left}={value}>>{value}"


# --- forward families -------------------------------------------------------------------------------------------------

_EVENTS = {
    "+": ("finds {} more", "gets {} from a friend"),
    "-": ("gives away {}", "loses {}"),
    "*": ("has {} times as many",),
}


def _sample_chain(rng: random.Random, steps: int) -> dict[str, Any]:
    value = start = rng.randint(3, 15)
    events: list[list[Any]] = []
    for _ in range(steps):
        kinds = ["+"] + (["-"] if value > 4 else []) + (["*"] if value <= 12 else [])
        kind = rng.choice(kinds)
        if kind == "+":
            amount = rng.randint(2, 12)
        elif kind == "-":
            amount = rng.randint(2, min(value - 1, 12))
        else:
            amount = rng.randint(2, 3)
        value = _apply(value, kind, amount)
        events.append([kind, amount, rng.randrange(len(_EVENTS[kind]))])
    core = [start, [event[:2] for event in events]]
    return {"core": core, "events": events, "start": start, "name": rng.choice(NAMES), "thing": rng.choice(THINGS)}


def _apply(value: int, kind: str, amount: int) -> int:
    return {"+": value + amount, "-": value - amount, "*": value * amount}[kind]


def _render_chain(p: Params) -> tuple[str, list[str], int]:
    told = [_EVENTS[kind][wording].format(amount) for kind, amount, wording in p.events]
    question = f"{p.name} has {p.start} {p.thing}. {p.name} " + ". Then ".join(told) + "."
    question += f" How many {p.thing} does {p.name} have now?"
    value, lines = p.start, []
    for kind, amount, _ in p.events:
        after = _apply(value, kind, amount)
        lines.append(f"{p.name} has {equation(f'{value}{kind}{amount}', after)} {p.thing}.")
        value = after
    return question, lines, value


def _sample_shop(rng: random.Random, steps: int) -> dict[str, Any]:
    # Each kind of thing takes a step and all but the first a second one for the running total.
    kinds = max(1, (steps + 1) // 2)
    items = [[rng.randint(2, 6), rng.randint(2, 9)] for _ in range(kinds)]
    total = sum(count * price for count, price in items)
    paid = total + rng.randint(2, 20) if steps % 2 == 0 else 0
    return {
        "core": [items, paid],
        "items": items,
        "paid": paid,
        "name": rng.choice(NAMES),
        "things": rng.sample(THINGS, kinds),
    }


def _render_shop(p: Params) -> tuple[str, list[str], int]:
    bought = [f"{count} {thing} at ${price} each" for (count, price), thing in zip(p.items, p.things, strict=True)]
    question = f"{p.name} buys {' and '.join(bought)}."
    lines, total = [], 0
    for (count, price), thing in zip(p.items, p.things, strict=True):
        cost = count * price
        lines.append(f"The {thing} cost {equation(f'{count}*{price}', cost)} dollars.")
        if total:
            lines.append(f"Together that is {equation(f'{total}+{cost}', total + cost)} dollars.")
        total += cost
    if not p.paid:
        return question + " How many dollars is that?", lines, total
    change = p.paid - total
    lines.append(f"{p.name} keeps {equation(f'{p.paid}-{total}', change)} dollars.")
    return question + f" How much of ${p.paid} does {p.name} keep?", lines, change


def _sample_compare(rng: random.Random, steps: int) -> dict[str, Any]:
    start, links = rng.randint(4, 15), []
    value = start
    # Every link takes a step; one more adds the first and the last.
    for _ in range(max(1, steps - 1)):
        kinds = ["more"] + (["fewer"] if value > 4 else []) + (["times"] if value <= 12 else [])
        kind = rng.choice(kinds)
        amount = {
            "more": rng.randint(2, 20),
            "fewer": rng.randint(2, max(2, min(value - 2, 20))),
            "times": rng.randint(2, 4),
        }
        links.append([kind, amount[kind]])
        value = _apply(value, {"more": "+", "fewer": "-", "times": "*"}[kind], amount[kind])
    names = rng.sample(NAMES, len(links) + 1)
    return {"core": [start, links], "start": start, "links": links, "names": names, "thing": rng.choice(THINGS)}


def _render_compare(p: Params) -> tuple[str, list[str], int]:
    names, value = p.names, p.start
    told, lines = [f"{names[0]} has {value} {p.thing}."], []
    for (kind, amount), before, name in zip(p.links, names, names[1:], strict=False):
        told.append(f"{name} has {amount} {'times as many as' if kind == 'times' else f'{kind} than'} {before}.")
        sign = {"more": "+", "fewer": "-", "times": "*"}[kind]
        after = _apply(value, sign, amount)
        lines.append(f"{name} has {equation(f'{value}{sign}{amount}', after)} {p.thing}.")
        value = after
    told.append(f"How many do {names[0]} and {names[-1]} have together?")
    lines.append(f"Together they have {equation(f'{p.start}+{value}', p.start + value)} {p.thing}.")
    return " ".join(told), lines, p.start + value


# --- hindsight families -----------------------------------------------------------------------------------------------


def _sample_parts(rng: random.Random, steps: int) -> dict[str, Any]:
    """Two unknown counts x, y >= 1 with a*x + b*y = total and no second solution."""
    while True:
        a, b = rng.randint(2, 9), rng.randint(5, 12)
        x, y = rng.randint(1, 9), rng.randint(1, 9)
        total = a * x + b * y
        if a != b and total <= 120 and sum((total - a * k) % b == 0 for k in range(1, (total - 1) // a + 1)) == 1:
            break
    return {
        "core": [a, b, total],
        "a": a,
        "b": b,
        "x": x,
        "y": y,
        "total": total,
        "name": rng.choice(NAMES),
        "thing": rng.choice(THINGS),
        "things": rng.sample(THINGS, 2),
    } | _draw_extra(rng, steps)


def _draw_extra(rng: random.Random, steps: int) -> dict[str, list[int]]:
    """Follow-up numbers, so that a hindsight problem has about as many steps as asked: a try is worth three to five."""
    return {"extra": [rng.randint(2, 9) for _ in range(max(0, steps - 4))]}


def _parts_try(p: Params, choice: int, head: str) -> str:
    """`head`, a*choice, what is left, and the division that must come out whole: U stands where its result would."""
    part = choice * p.a
    rest = p.total - part
    text = f"{head} {equation(f'{choice}*{p.a}', part)}, "
    if rest <= 0:
        return text + f"<<{p.total}-{part}="
    return text + f"{equation(f'{p.total}-{part}', rest)}, <<{rest}/{p.b}="


def _extra(p: Params, value: int, told: str, unit: str) -> tuple[str, list[str], int]:
    """Follow-up steps that make a problem longer: the value is added to, once for each extra number."""
    question, lines = "", []
    for amount in p.extra:
        question += " " + told.format(amount)
        lines.append(f"Then there are {equation(f'{value}+{amount}', value + amount)} {unit}.")
        value += amount
    return question, lines, value


def _try_boxes(p: Params, choice: int) -> str:
    return _parts_try(p, choice, f"Try {choice} boxes of {p.a}:")


def _render_boxes(p: Params) -> tuple[str, list[str], int]:
    more, lines, value = _extra(p, p.x + p.y, "Then {} more boxes come.", "boxes")
    question = f"{p.name} packs {p.total} {p.thing} into full boxes of {p.a} and full boxes of {p.b}, some of each."
    first = [f"{_try_boxes(p, p.x)}{p.y}>>{p.y} boxes of {p.b}."]
    first.append(f"There are {equation(f'{p.x}+{p.y}', p.x + p.y)} boxes.")
    return f"{question}{more} How many boxes are there?", first + lines, value


def _try_budget(p: Params, choice: int) -> str:
    return _parts_try(p, choice, f"Try {choice} {p.things[0]}:")


def _render_budget(p: Params) -> tuple[str, list[str], int]:
    one, other = p.things
    more, lines, value = _extra(p, p.x + p.y, "Then {} more come.", "things")
    question = f"{one} cost ${p.a} and {other} cost ${p.b}. {p.name} buys some of each for exactly ${p.total}."
    first = [f"{_try_budget(p, p.x)}{p.y}>>{p.y} {other}."]
    first.append(f"There are {equation(f'{p.x}+{p.y}', p.x + p.y)} things.")
    return f"{question}{more} How many things are there?", first + lines, value


def _sample_legs(rng: random.Random, steps: int) -> dict[str, Any]:
    animals = rng.randrange(len(ANIMALS))
    x, y = rng.randint(1, 13), rng.randint(1, 13)
    return {"core": [animals, x, y], "animals": animals, "x": x, "y": y, "name": rng.choice(NAMES)} | _draw_extra(rng, steps)


def _try_legs(p: Params, choice: int) -> str:
    many, high, few, low = ANIMALS[p.animals]
    heads, legs = p.x + p.y, p.x * high + p.y * low
    other, part = heads - choice, choice * high
    text = f"Try {choice} {many}: "
    if other <= 0:
        return text + f"<<{heads}-{choice}="
    text += f"{equation(f'{heads}-{choice}', other)} {few}, {equation(f'{choice}*{high}', part)}, "
    rest, others = legs - part, other * low
    if rest <= 0:
        return text + f"<<{legs}-{part}="
    text += f"{equation(f'{legs}-{part}', rest)}, {equation(f'{other}*{low}', others)}, "
    return text + (f"<<{rest}-{others}=" if rest < others else equation(f"{rest}-{others}", rest - others))


def _render_legs(p: Params) -> tuple[str, list[str], int]:
    many, high, few, low = ANIMALS[p.animals]
    heads, legs = p.x + p.y, p.x * high + p.y * low
    more, lines, value = _extra(p, p.x, "Then {} more " + many + " come.", many)
    question = f"{p.name} sees {heads} animals, {many} with {high} legs and {few} with {low}. They have {legs} legs."
    return f"{question}{more} How many {many} are there?", [_try_legs(p, p.x) + " legs left.", *lines], value


def _sample_rows(rng: random.Random, steps: int) -> dict[str, Any]:
    """x rows of a, fewer than 10; what is left after giving some away fills groups of b: exactly one x fits."""
    while True:
        a, b, x, given = rng.randint(3, 12), rng.randint(5, 12), rng.randint(2, 9), rng.randint(1, 40)
        fitting = [k for k in range(1, 10) if (a * k - given) % b == 0 and a * k > given]
        if a != b and fitting == [x]:
            break
    params = {"core": [a, b, given], "a": a, "b": b, "x": x, "given": given, "name": rng.choice(NAMES)}
    return params | {"thing": rng.choice(THINGS)} | _draw_extra(rng, steps)


def _try_rows(p: Params, choice: int) -> str:
    count = choice * p.a
    rest = count - p.given
    text = f"Try {choice} rows of {p.a}: {equation(f'{choice}*{p.a}', count)}, "
    if rest <= 0:
        return text + f"<<{count}-{p.given}="
    return text + f"{equation(f'{count}-{p.given}', rest)}, <<{rest}/{p.b}="


def _render_rows(p: Params) -> tuple[str, list[str], int]:
    count = p.a * p.x
    groups = (count - p.given) // p.b
    more, lines, value = _extra(p, count, "Then {} more come.", p.thing)
    question = f"{p.name} has fewer than 10 full rows of {p.a} {p.thing}. Without {p.given} of them, the rest fill groups of {p.b}."
    first = f"{_try_rows(p, p.x)}{groups}>>{groups} groups."
    return f"{question}{more} How many {p.thing} are there?", [first, *lines], value


def _right_choice(p: Params) -> int:
    return int(p.x)


FAMILIES: tuple[Family, ...] = (
    Family("chain", False, _sample_chain, _render_chain),
    Family("shop", False, _sample_shop, _render_shop),
    Family("compare", False, _sample_compare, _render_compare),
    Family("boxes", True, _sample_parts, _render_boxes, _try_boxes, _right_choice),
    Family("budget", True, _sample_parts, _render_budget, _try_budget, _right_choice),
    Family("legs", True, _sample_legs, _render_legs, _try_legs, _right_choice),
    Family("rows", True, _sample_rows, _render_rows, _try_rows, _right_choice),
)
BY_NAME = {family.name: family for family in FAMILIES}
