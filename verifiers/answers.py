"""The final answer of a solution: find it, read it as an exact number, compare it with the gold answer.

Called by the judge and by the reward for being right. A wrong answer must never be paid, and a right one never be
rejected for its form. No text is ever evaluated as code; work is bounded by the lengths below.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import deque
from fractions import Fraction

MAX_SPAN = 200  # characters of an answer
MAX_TAIL = 4000  # characters at the end that are searched when no marker stands in the text
MAX_DIGITS = 100
MAX_EXPONENT = 100
MAX_MARKERS = 64  # the last ones of a text are tried

DIGITS = r"(?:(?!0,)[0-9]{1,3}(?:[,_' \u00a0\u202f][0-9]{2,3})*[,_' \u00a0\u202f][0-9]{3}(?![0-9])|[0-9]+)"
DECIMAL = rf"(?:{DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]{{1,4}}|\s?[x×*·]\s?10\^\(?[+-]?[0-9]{{1,4}}\)?)?"
PLAIN = rf"(?:[0-9]{{1,9}}[ -])?[0-9]+\s?/\s?[0-9]+(?![/0-9])|{DECIMAL}"
SCALES = {"hundred": 100, "thousand": 1000, "k": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s?[$€£]?\s?(?P<inner>[+-]?)(?P<body>{PLAIN})\s?(?P<percent>%|percent\b)?[$€£]?"
    rf"(?:\s?(?P<scale>{'|'.join(SCALES)})(?![a-z]))?",
    re.IGNORECASE,
)
UNIT = re.compile(r"(?:\s?[a-zA-Z°][^0-9=+*×÷]*(?:\^?[23](?![0-9]))?)?[\s.,;:!?)\]'\"]*")
IN_TEXT = re.compile(rf"(?<![\w.,/^])(?:(?<![0-9)$€£%] )[+-])?[$€£]?(?<![0-9])(?:{PLAIN})\s?%?", re.IGNORECASE)
HEDGE = re.compile(r"\bor\b[^0-9]{0,20}[0-9]|\b(?:and|to|vs)\s+\$?[0-9]|[0-9]\s?[|;]\s?[0-9]", re.IGNORECASE)
ENDS = re.compile(r"[.,;:!?]?(?:\s[^0-9]|$)")

LOOSE_MARKER = r"(?:final\s+|correct\s+)?answer\s*(?:\*\*)?\s*(?:is\b|:|=)\s*(?:\*\*)?:?"
MARKER = re.compile(
    rf"(?P<hash>\#{{4}})|(?P<boxed>\\f?boxed\s?\{{)|(?P<line>(?:^|(?<=[.!?]\ ))[ \t*]*A:)|(?P<loose>\b{LOOSE_MARKER})",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
VULGAR = re.compile(r"\s?([¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])")
SUPERSCRIPT = re.compile(r"[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+")
SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
# what Math-Verify may see: digits, signs and four commands, one power at most, nothing that could grow or run
STRICT = re.compile(
    r"(?=[^^]*\^?[^^]*$)(?:[0-9+\-/*.(){} ]|\^\{?-?[0-9]{1,2}(?![0-9])\}?|\\[dt]?frac|\\sqrt|\\pi|\\cdot|\\times){1,64}"
)


def extract_answer(text: str) -> str | None:
    """The piece of text that states the final answer, or None when the text holds no number at all.

    The last marker that is followed by an answer decides (`####`, `A:`, `the answer is`, a LaTeX box); without a marker,
    the last number of the text. Example: "#### $16.00 on ice cream after 60 days." gives "$16.00".
    """
    for match in reversed(deque(MARKER.finditer(text), maxlen=MAX_MARKERS)):
        answer = after_marker(text, match)
        if answer is not None:
            return answer
    numbers: list[str] = IN_TEXT.findall(text[-MAX_TAIL:])
    return bare(numbers[-1]) if numbers else None


def after_marker(text: str, match: re.Match[str]) -> str | None:
    """The answer behind one marker; None when nothing stands there or, for the weak markers, no single number does."""
    if match["boxed"]:
        return boxed(text, match.end())
    span = line_at(text, match.end())
    inner = re.search(r"\\f?boxed\s?\{", span)
    if inner:
        return boxed(span, inner.end())
    if not span:
        return None
    clean = tidy(span)
    if parse_number(clean) is not None or strict(clean):
        return span
    hedged = HEDGE.search(clean) is not None
    leading = NUMBER.match(clean)
    if match["line"] and "\n" in text[match.end() :].strip():
        return None  # `A: Janet has 16 eggs and eats 3.` opens a solution, it does not end it
    if leading and ENDS.match(clean[len(leading.group().rstrip()) :]) and "=" not in clean:
        return span if hedged else bare(leading.group())
    if "=" in clean:
        return after_marker_value(clean.rpartition("=")[2].strip()) or span
    numbers = [bare(found) for found in IN_TEXT.findall(clean)]
    if match["line"] and len(numbers) != 1:
        return None
    if not numbers or hedged or leading:
        return span if match["hash"] or numbers else None
    return numbers[0]


def after_marker_value(value: str) -> str | None:
    leading = NUMBER.match(value)
    if parse_number(value) is not None or leading is None:
        return value or None
    return bare(leading.group()) if ENDS.match(value[len(leading.group().rstrip()) :]) else value


def bare(number: str) -> str:
    return number.strip().rstrip(".,")


def line_at(text: str, start: int) -> str:
    """The rest of the line, or the next line when the rest is empty; at most MAX_SPAN characters, more is no answer."""
    part = text[start : start + MAX_SPAN + 1].lstrip(" \t:*\r\n")
    line = part.split("\n", 1)[0].replace("**", "").strip()
    return "" if len(line) > MAX_SPAN else line


def boxed(text: str, start: int) -> str | None:
    """Contents of a LaTeX box that opens before start; None when it is empty, never closes or is too long."""
    depth = 1
    for at in range(start, min(len(text), start + MAX_SPAN)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[start:at].strip() or None
    return None


def tidy(span: str) -> str:
    """One way of writing: no LaTeX or markdown dress, ASCII digits, signs and slashes."""
    span = VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found[1]), span[: MAX_SPAN * 2])
    span = SUPERSCRIPT.sub(lambda found: "^" + found.group().translate(SUPERSCRIPTS), span)
    span = unicodedata.normalize("NFKC", span).replace("⁄", "/")
    span = re.sub(r"[−–‐‑‒﹣]", "-", span)
    span = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s?\{([^{}]*)\}", r" \1", span)
    span = re.sub(r"\\[,;!: ]|\\left|\\right|~|\{,\}", lambda found: "," if found.group() == "{,}" else "", span)
    span = span.replace("\\$", "$").replace("\\%", "%")
    span = re.sub(r"\\[()\[\]]|[`*]{1,2}(?![0-9(\s])|(?<![0-9)\s])[`*]{1,2}|^\$(?=.*[^0-9.,]\$\W*$|\d+\$\W*$)", "", span)
    span = re.sub(r"\\times", "x", span)
    span = re.sub(r"10\^\{(-?[0-9]{1,4})\}", r"10^\1", span)
    span = re.sub(r"^(-?)\s?\\[dt]?frac\s?\{(-?[0-9]{1,30})\}\s?\{([0-9]{1,30})\}", r"\1\2/\3", span.strip())
    return re.sub(r"^([0-9]{1,9})\s?\\[dt]?frac\s?\{([0-9]{1,9})\}\s?\{([0-9]{1,9})\}", r"\1 \2/\3", span)


def parse_number(span: str) -> Fraction | None:
    """The exact value of a span that is one number with its dress, else None. `%` is read as a unit: 25% is 25.

    Example: "$1,080.50", "1 1/2", "−3", "2.5e3", "18 eggs." and "3 million" are numbers; "3 or 4", "5:30", "nan" are none.
    """
    read = read_number(span)
    return None if read is None else read[0]


def read_number(span: str) -> tuple[Fraction, bool] | None:
    """Value and whether it stands in percent."""
    if len(span) > MAX_SPAN * 2:
        return None
    clean = tidy(span).strip()
    if clean.startswith("(") and clean.endswith(")") and clean.count("(") == 1:
        clean = clean[1:-1].strip()
    clean = re.sub(r"^(?:USD|EUR|GBP|US\$|=|[a-zA-Z]\s?=)\s?", "", clean)
    match = NUMBER.match(clean)
    if match is None or not UNIT.fullmatch(clean[match.end() :]) or match["sign"] and match["inner"]:
        return None
    value = value_of(match["body"])
    if value is None:
        return None
    value *= SCALES[match["scale"].lower()] if match["scale"] else 1
    return (-value if "-" in match["sign"] + match["inner"] else value), match["percent"] is not None


def value_of(body: str) -> Fraction | None:
    """Value of an unsigned number without currency; None when it is too long or divides by zero."""
    if sum(char.isdigit() for char in body) > MAX_DIGITS:
        return None
    if "/" in body:
        top, bottom = (part.strip() for part in body.split("/"))
        whole, top = re.split(r"[ -]", top) if re.search(r"[ -]", top) else ("0", top)
        return Fraction(int(whole)) + Fraction(int(top), int(bottom)) if int(bottom) else None
    power = 0
    scientific = re.fullmatch(r"(.*?)(?:e|\s?[x×*·]\s?10\^\(?)([+-]?[0-9]+)\)?", body, re.IGNORECASE)
    if scientific:
        body, power = scientific[1], int(scientific[2])
        if abs(power) > MAX_EXPONENT:
            return None
    body = re.sub(r"[,_'\s]", "", body)
    return Fraction(body if not body.endswith(".") else body[:-1]) * Fraction(10) ** power


def is_right(text_or_solution: str, gold: str) -> bool:
    """Whether the answer equals the gold answer; both may be bare answers or whole solutions. Never raises.

    Numbers are compared exactly. A percentage against a bare number may mean either 25 or 1/4.
    """
    answer, target = extract_answer(text_or_solution), extract_answer(gold)
    if answer is None or target is None:
        return False
    mine, theirs = read_number(answer), read_number(target)
    if mine and theirs:
        if mine[1] == theirs[1]:
            return mine[0] == theirs[0]
        part, bare = (mine[0], theirs[0]) if mine[1] else (theirs[0], mine[0])
        return bare in (part, part / 100)
    decimal_comma = re.compile(r"-?[$€£]?(?:[0-9]{1,3}(?:\.[0-9]{3})*|0),([0-9]{1,2}|(?<=0,)[0-9]+)(?:[^0-9,.].*)?")
    if theirs and decimal_comma.fullmatch(tidy(answer)):
        european = read_number(tidy(answer).replace(".", "").replace(",", "."))
        return european is not None and european[0] == theirs[0]
    return same_expression(tidy(answer), tidy(target))


def strict(clean: str) -> bool:
    """The span may be given to Math-Verify: short, and of the few characters that a closed expression needs."""
    longest = max((len(run) for run in re.findall(r"[0-9]+", clean)), default=0)
    return STRICT.fullmatch(clean) is not None and 0 < longest <= 12 and "**" not in clean


def same_expression(answer: str, gold: str) -> bool:
    """Math-Verify's verdict on two short closed expressions such as `2^{3}` or `\\sqrt{4}`; False for anything else."""
    answer, gold = (re.sub(r"[\s.$]+$|^[\s$]+", "", side) for side in (answer, gold))
    if not strict(answer) or not strict(gold):
        return False
    # imported here because sympy takes a second, and few answers need it
    from math_verify import parse, verify  # type: ignore[import-untyped, unused-ignore]

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns on every call without a time limit
    try:
        # time limits use signals, which fail off the main thread; the grammar bounds the work instead
        left, right = (parse(f"${side}$", parsing_timeout=None) for side in (gold, answer))
        return bool(left and right and verify(left, right, timeout_seconds=None))
    except Exception:
        return False


def gold_number(text: str) -> Fraction:
    """The number of a gold answer or gold solution. Raises ValueError when it holds none."""
    answer = extract_answer(text)
    value = parse_number(answer) if answer is not None else None
    if value is None:
        raise ValueError(f"the gold answer holds no number: {text[-80:]!r}")
    return value
