"""The judge: how good and how fast, on real solutions, human labels and injected errors.

    RETRACT_DATA=folder python benchmarks/judge.py [--quick]

The folder holds gsm8k_train.jsonl, gsm8k_test.jsonl, example_model_solutions_dev.jsonl and the two PARC files. One core;
throughputs are measured in turns within one run. Prints tables and one JSON line. docs/judge.md says what each figure means.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
GOALS = {
    "precision": 0.999, "recall": 0.999, "gold_right": 1.0, "arithmetic_false_alarms": 0.005, "parc_positives": 1.0,
    "labelled_exact": 0.55, "labelled_within_one": 0.85, "labelled_late": 0.2, "alternative_false_alarms": 0.05,
    "answers_ratio": 10.0, "solutions_per_s": 500.0,
}  # fmt: skip
AT_MOST = {"arithmetic_false_alarms", "labelled_late", "alternative_false_alarms"}


@dataclass(frozen=True)
class Wrong:
    """A wrong solution whose first wrong step is known."""

    kind: str
    question: str
    gold: str
    answer: str
    steps: tuple[str, ...]
    first: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer solutions")
    quick = parser.parse_args().quick
    if not os.environ.get("RETRACT_DATA"):
        print("set RETRACT_DATA to the folder with the data files (see the head of this script)", file=sys.stderr)
        return 2
    data = Path(os.environ["RETRACT_DATA"])
    gold = [json.loads(line) for name in ("train", "test") for line in (data / f"gsm8k_{name}.jsonl").open(encoding="utf-8")]
    gold = gold[:: 8 if quick else 1]
    solutions = list(model_solutions(data))[:: 4 if quick else 1]
    figures = answers(solutions) | gold_solutions(gold) | labelled(data) | injected(gold) | alternatives(solutions)
    figures |= throughput(solutions[:400])
    figures = {name: round(value, 4) for name, value in figures.items()}
    missed = [name for name, goal in GOALS.items() if (figures[name] > goal if name in AT_MOST else figures[name] < goal)]
    for name, goal in GOALS.items():
        mark = "MISSED" if name in missed else "ok"
        print(f"{name:28}{figures[name]:12.4f}   goal: {'at most' if name in AT_MOST else 'at least'} {goal}   {mark}")
    print(json.dumps({"benchmark": "judge", "figures": figures, "goals": GOALS, "ok": not missed}))
    return 1 if missed else 0


def model_solutions(data: Path) -> Iterator[tuple[str, str, str, bool]]:
    """(question, gold solution, solution, right by its label)."""
    for line in (data / "example_model_solutions_dev.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        for name in MODELS:
            yield row["question"], row["ground_truth"], row[name]["solution"], row[name]["is_correct"]


def last_line(solution: str) -> str:
    return solution.rpartition("\n")[2]


def answers(solutions: Sequence[tuple[str, str, str, bool]]) -> dict[str, float]:
    """Final answers against the labels that come with the solutions."""
    from verifiers.answers import is_right

    seen = Counter((is_right(solution, last_line(gold)), label) for _, gold, solution, label in solutions)
    precision = seen[True, True] / max(1, seen[True, True] + seen[True, False])
    recall = seen[True, True] / max(1, seen[True, True] + seen[False, True])
    print(f"answers: {len(solutions)} model solutions, {seen[True, True] + seen[False, True]} right by label")
    return {"precision": precision, "recall": recall}


def gold_solutions(gold: Sequence[dict[str, str]]) -> dict[str, float]:
    """Gold solutions: every answer right; an equation that is called false is a false alarm or a mistake of the data."""
    from verifiers.answers import is_right
    from verifiers.arithmetic import equations

    right = sum(is_right(row["answer"], last_line(row["answer"])) for row in gold)
    false = sum(any(equation.verdict == "false" for equation in equations(row["answer"])) for row in gold)
    print(f"gold solutions: {len(gold)}, {false} with an equation that is called false")
    return {"gold_right": right / len(gold), "arithmetic_false_alarms": false / len(gold)}


def labelled(data: Path) -> dict[str, float]:
    """PARC's human step labels: the perturbed solutions' first wrong steps, and that every positive is accepted."""
    from verifiers.answers import is_right

    positives = json.loads((data / "parc_gsm8k_positives.json").read_text("utf-8"))
    accepted = sum(is_right(row["model_answer"], row["ground_truth_answer"]) for row in positives if row["is_correct"])
    wrong = []
    for row in json.loads((data / "parc_gsm8k_positives_perturbed.json").read_text("utf-8")):
        labels = row["error_annotation"]["error_annotations"]["step_level"]
        first = min(label["step_number"] for label in labels if label["has_error"]) - 1
        gold, answer = row["ground_truth_solution"], row["ground_truth_answer"]
        wrong.append(Wrong("PARC perturbed", row["question"], gold, answer, tuple(row["steps"]), first))
    exact, within, late, _ = place("human labels", wrong)
    return {
        "parc_positives": accepted / max(1, sum(row["is_correct"] for row in positives)),
        "labelled_exact": exact,
        "labelled_within_one": within,
        "labelled_late": late,
    }


def place(title: str, wrong: Sequence[Wrong]) -> tuple[float, float, float, float]:
    """Shares of exact, within one, late and early first steps; prints them."""
    apart = [found_step(one) - one.first for one in wrong]
    total = max(1, len(apart))
    shares = (
        sum(distance == 0 for distance in apart) / total,
        sum(abs(distance) <= 1 for distance in apart) / total,
        sum(distance > 0 for distance in apart) / total,
        sum(distance < 0 for distance in apart) / total,
    )
    exact, within, late, early = shares
    print(f"{title:28} n {len(apart):5}   exact {exact:.3f}   within one {within:.3f}   late {late:.3f}   early {early:.3f}")
    return shares


def found_step(one: Wrong) -> int:
    from verifiers.judge import judge

    text = "\n".join(one.steps)
    error = judge(text, one.gold, one.answer, one.question).error
    if error is None:
        return len(one.steps)
    ends, at = [], 0
    for step in one.steps:
        at += len(step) + 1
        ends.append(at)
    return next(index for index, end in enumerate(ends) if error.start < end)


# --- injected errors ------------------------------------------------------------------------------------------------------


def injected(gold: Sequence[dict[str, str]]) -> dict[str, float]:
    """One error in a gold solution, carried on through its later steps, so that it ends wrong as a model's would."""
    draw = random.Random(0)
    by_kind: dict[str, list[Wrong]] = defaultdict(list)
    for row in gold:
        for kind, inject in INJECTIONS.items():
            one = inject_into(row["question"], row["answer"], kind, inject, draw)
            if one:
                by_kind[kind].append(one)
    figures = {}
    everything: list[Wrong] = []
    for kind, some in by_kind.items():
        some = draw.sample(some, min(len(some), 600))
        everything += some
        figures[f"injected_{kind}_exact"] = place(f"injected {kind}", some)[0]
    exact, within, late, _ = place("injected, all", everything)
    return figures | {"injected_exact": exact, "injected_within_one": within, "injected_late": late}


@dataclass
class Line:
    """A gold line with one annotation: `expression = <<expression=value>>value rest`; without one, only `rest`."""

    expression: str
    value: Fraction
    rest: str

    def render(self) -> str:
        if not self.expression:
            return self.rest
        return f"{self.expression} = <<{self.expression}={show(self.value)}>>{show(self.value)}{self.rest}"


def show(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):g}"


def evaluate(expression: str) -> Fraction | None:
    from verifiers.arithmetic import read
    from verifiers.expressions import tokens
    from verifiers.phrases import left_side

    node = read(left_side(tokens(expression, 0, len(expression)), line_start=False)).node
    return node.value if node else None


def parse(solution: str) -> list[Line] | None:
    """The lines of a gold solution; None where one holds more than a single annotation."""
    lines = []
    for text in solution.split("\n")[:-1]:
        found = list(re.finditer(r"<<([-+*/().0-9]+)=([.0-9]+)>>[.0-9,]*[0-9]", text))
        if len(found) > 1 or not found and "<<" in text:
            return None
        if found:
            value = evaluate(found[0][1])
            if value is None or value <= 0 or value != Fraction(found[0][2]):
                return None
            lines.append(Line(found[0][1], value, text[found[0].end() :]))
        else:
            lines.append(Line("", Fraction(0), text))
    return lines if sum(bool(line.expression) for line in lines) >= 2 else None


NUMBER = r"(?<![.0-9])[0-9]+(?:\.[0-9]+)?"
Inject = Callable[[Line, str, random.Random], "Line | None"]


def wrong_operator(line: Line, question: str, draw: random.Random) -> Line | None:
    signs = [at for at, char in enumerate(line.expression) if char in "+-*/" and at]
    if not signs:
        return None
    at = draw.choice(signs)
    other = draw.choice([sign for sign in "+-*/" if sign != line.expression[at]])
    return recomputed(line, line.expression[:at] + other + line.expression[at + 1 :])


def wrong_quantity(line: Line, question: str, draw: random.Random) -> Line | None:
    """Another quantity of the question."""
    given = sorted(set(re.findall(NUMBER, question)))
    return replaced_operand(line, draw, lambda old: draw.choice([one for one in given if one != old] or [old]))


def wrong_copy(line: Line, question: str, draw: random.Random) -> Line | None:
    """A quantity that stands nowhere: one digit is another."""

    def slip(old: str) -> str:
        at = draw.randrange(len(old))
        return old[:at] + draw.choice("123456789") + old[at + 1 :] if old[at] != "." else old

    return replaced_operand(line, draw, slip)


def wrong_result(line: Line, question: str, draw: random.Random) -> Line | None:
    off = Fraction(draw.choice([-10, -2, -1, 1, 2, 10]))
    return Line(line.expression, line.value + off, line.rest) if line.value + off > 0 else None


def wrong_unit(line: Line, question: str, draw: random.Random) -> Line | None:
    """A conversion is left out: a factor or divisor of 7, 12, 24, 52, 60 or 100 that the question does not name."""
    found = re.search(r"(?<=[0-9)])[*/](?:7|12|24|52|60|100)(?![.0-9])", line.expression)
    if not found or re.search(rf"(?<![0-9]){found.group()[1:]}(?![0-9])", question):
        return None
    shorter = line.expression[: found.start()] + line.expression[found.end() :]
    return recomputed(line, shorter) if any(sign in shorter for sign in "+-*/") else None


def replaced_operand(line: Line, draw: random.Random, other: Callable[[str], str]) -> Line | None:
    operands = list(re.finditer(NUMBER, line.expression))
    if not operands:
        return None
    found = draw.choice(operands)
    new = other(found.group())
    return (
        None if new == found.group() else recomputed(line, line.expression[: found.start()] + new + line.expression[found.end() :])
    )


def recomputed(line: Line, expression: str) -> Line | None:
    value = evaluate(expression)
    return Line(expression, value, line.rest) if value is not None and value > 0 and value != line.value else None


INJECTIONS: dict[str, Inject] = {
    "operator": wrong_operator, "quantity": wrong_quantity, "copy": wrong_copy, "arithmetic": wrong_result, "unit": wrong_unit,
    "missing step": lambda line, question, draw: None,
}  # fmt: skip


def inject_into(question: str, solution: str, kind: str, inject: Inject, draw: random.Random) -> Wrong | None:
    from verifiers.answers import is_right

    lines = parse(solution)
    if lines is None:
        return None
    places = [at for at, line in enumerate(lines) if line.expression]
    at = draw.choice(places)
    changed: dict[Fraction, Fraction] = {}
    if kind == "missing step":
        users = [user for user in places if user > at and show(lines[at].value) in re.findall(NUMBER, lines[user].expression)]
        if not users:
            return None
        changed[lines[at].value] = Fraction(re.findall(NUMBER, lines[at].expression)[0])
        first, out = users[0] - 1, lines[:at]
    else:
        new = inject(lines[at], question, draw)
        if new is None:
            return None
        changed[lines[at].value] = new.value
        first, out = at, [*lines[:at], new]
    for line in lines[at + 1 :]:
        expression = re.sub(
            NUMBER, lambda found: show(changed.get(Fraction(found.group()), Fraction(found.group()))), line.expression
        )
        value = evaluate(expression) if expression else Fraction(0)
        if value is None or expression and value <= 0:
            return None
        if expression and value != line.value:
            changed[line.value] = value
        rest = (
            line.rest
            if expression
            else re.sub(NUMBER, lambda found: show(changed.get(Fraction(found.group()), Fraction(found.group()))), line.rest)
        )
        out.append(Line(expression, value, rest))
    gold_answer = last_line(solution)
    final = changed.get(Fraction(re.sub(r"[^0-9.]", "", gold_answer) or "0"))
    steps = (*(line.render() for line in out), f"#### {show(final)}" if final else gold_answer)
    text = "\n".join(steps)
    if final is None or any(not step.strip() for step in steps) or is_right(text, gold_answer):
        return None
    return Wrong(kind, question, solution, gold_answer, steps, first)


# --- right solutions and speed --------------------------------------------------------------------------------------------


def alternatives(solutions: Sequence[tuple[str, str, str, bool]]) -> dict[str, float]:
    """Right model solutions, most of which take another way than gold, asked for an error regardless of their answer."""
    from verifiers.judge import judge

    right = [(question, gold, solution) for question, gold, solution, label in solutions if label]
    alarms = sum(judge(s, gold, last_line(gold), question, regardless=True).error is not None for question, gold, s in right)
    print(f"right solutions of models: {len(right)}, {alarms} with an error found regardless of the answer")
    return {"alternative_false_alarms": alarms / max(1, len(right))}


def throughput(solutions: Sequence[tuple[str, str, str, bool]], repeats: int = 3) -> dict[str, float]:
    """Solutions a second: final answers beside Math-Verify on the same rows, and symbolic judging of wrong ones."""
    from math_verify import parse as mv_parse
    from math_verify import verify as mv_verify

    from verifiers.answers import _gold, is_right
    from verifiers.dataflow import gold_of
    from verifiers.judge import judge
    from verifiers.quantities import given

    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def mine() -> None:
        for _, gold, solution, _ in solutions:
            is_right(solution, last_line(gold))

    def theirs() -> None:
        for _, gold, solution, _ in solutions:
            mv_verify(
                mv_parse(last_line(gold), parsing_timeout=None), mv_parse(solution, parsing_timeout=None), timeout_seconds=None
            )

    wrong = [(question, gold, solution) for question, gold, solution, label in solutions if not label]

    def symbolic() -> None:
        for question, gold, solution in wrong:
            judge(solution, gold, last_line(gold), question)

    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        for cached in (gold_of, given, _gold):
            cached.cache_clear()  # what is shared is shared by the solutions of one problem within a pass
        for name, work, rows in (
            ("answers", mine, len(solutions)),
            ("math_verify", theirs, len(solutions)),
            ("symbolic", symbolic, len(wrong)),
        ):
            begun = time.perf_counter()
            work()
            rates[name].append(rows / (time.perf_counter() - begun))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:28}{rate:10.0f} solutions/s, median of {repeats}")
    return {
        "answers_per_s": medians["answers"],
        "answers_ratio": medians["answers"] / medians["math_verify"],
        "solutions_per_s": medians["symbolic"],
    }


if __name__ == "__main__":
    sys.exit(main())
