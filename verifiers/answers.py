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
from functools import lru_cache

MAX_SPAN = 200  # characters of an answer
MAX_TAIL = 4000  # characters at the end that are searched when no marker stands in the text
MAX_DIGITS = 100
MAX_EXPONENT = 100
MAX_DEPTH = 24  # of brackets
MAX_MARKERS = 64  # the last ones of a text are tried

CURRENCY = "[$€£¥₹¢₩₽]"
DIGITS = r"(?:(?!0,)[0-9]{1,3}(?:[,_' \u00a0\u202f][0-9]{2,3})*[,_' \u00a0\u202f][0-9]{3}(?![0-9])|[0-9]+)"
DECIMAL = rf"(?:{DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]{{1,4}}|\s?[x×*·]\s?10\^\(?[+-]?[0-9]{{1,4}}\)?)?"
PLAIN = rf"(?:[0-9]{{1,9}}[ -])?[0-9]+\s?/\s?[0-9]+(?![/0-9])|{DECIMAL}"
SCALES = {"hundred": 100, "thousand": 1000, "k": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s?{CURRENCY}?\s?(?P<inner>[+-]?)(?P<body>{PLAIN})\s?(?P<percent>%|percent\b)?{CURRENCY}?"
    rf"(?:\s?(?P<scale>{'|'.join(SCALES)})(?![a-z]))?",
    re.IGNORECASE,
)
EUROPEAN = re.compile(
    rf"-?{CURRENCY}?(?:(?:[0-9]{{1,3}}(?:[. '][0-9]{{3}})*|0),(?:[0-9]{{1,2}}|(?<=0,)[0-9]+)|[0-9]{{1,3}}(?:\.[0-9]{{3}}){{2,}})"
    r"(?:[^0-9,.].*)?"
)
UNIT = re.compile(r"(?:\s?/?(?:[^\W\d_]|°)[^0-9=+*×÷]*(?:\^?[23](?![0-9]))?)?[\s.,;:!?)\]'\"。]*")
IN_TEXT = re.compile(
    rf"(?<![\w.,/^])(?<![0-9]:)(?:(?<![0-9)$€£%] )[+-])?{CURRENCY}?(?<![0-9])"
    rf"(?:[0-9]{{1,3}}(?:\.[0-9]{{3}})*,[0-9]{{1,2}}(?![0-9]|,[0-9])|{PLAIN})(?![0-9]*:[0-9])\s?%?",
    re.IGNORECASE,
)
HEDGE = re.compile(
    r"\bor\b[^0-9]{0,20}[0-9]|\b(?:and|to|vs)\s+\$?[0-9]|[0-9]\s?[|;]\s?[0-9]|^\W*not\b|±"
    r"|[0-9]\s?(?:years?|weeks?|days?|hours?|hrs?|minutes?|mins?|yards?|feet|foot|ft|pounds?|lbs?|dollars|gallons?),?\s[0-9]+\s?"
    r"(?:months?|days?|hours?|hrs?|minutes?|mins?|seconds?|feet|foot|inch(?:es)?|in|ounces?|oz|cents?|quarts?)\b",
    re.IGNORECASE,
)
ENDS = re.compile(r"[.,;:!?]?(?:\s[^0-9]|$)")
# what makes a number the first of several; may be cut off
CALCULATION = re.compile(
    r"\s?(?:(?:->|[→<>≈≠])\s*[-+($€£]*[0-9]|(?:[-+*/×÷:x·]|plus\b|minus\b|times\b)\s*(?:[-+($€£]*[0-9]|$))", re.IGNORECASE
)

# possessive, because two stretches of white space that may share a long one take quadratic time
LOOSE_MARKER = r"(?:final\s++|correct\s++)?answer\s*+(?:\*\*\s*+)?(?:is\b|:|=)[ \t]*+(?:\*\*)?:?"
MARKER = re.compile(
    rf"(?P<hash>\#{{4}})|(?P<boxed>\\f?boxed\s?\{{)|(?P<line>(?:^|(?<=[.!?]\ ))[ \t*]*A:)|(?P<loose>\b{LOOSE_MARKER})",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
# without any of these, an ASCII span is tidy
DRESSED = re.compile(r"[\\`*~{_<\x00-\x08\x0e-\x1b\x7f]|\$.*\$|^(?:minus|negative)\b|[0-9] and [0-9]", re.DOTALL | re.IGNORECASE)
INVISIBLE = re.compile(
    r"\x1b\[[0-9;]*[a-zA-Z]|[\x00-\x08\x0e-\x1b\x7f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe0e\ufe0f\u20e3\ufeff]"
)
POWER = re.compile(r"(?<=[0-9)])\*\*(?=[0-9]|\([-0-9])")
BOLD = re.compile(r"(?<![0-9)])\*\*|\*\*(?![0-9]|\([-0-9])")  # all other pairs of stars
BULLET = re.compile(r"[ \t:*]*[\r\n]+\s*[-•]\s+")
VULGAR = re.compile(r"\s?([¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])")
SUPERSCRIPT = re.compile(r"(?<=[a-zA-Z0-9)}])[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+")
SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
# what Math-Verify may see: digits, signs and four commands, one power at most, nothing that could grow or run
STRICT = re.compile(
    r"(?=[^^]*\^?[^^]*$)(?:[0-9+\-/*.(){} ]|\^\{?-?[0-9]{1,2}(?![0-9])\}?|\\[dt]?frac|\\sqrt|\\pi|\\cdot|\\times){1,64}"
)
# a sign without its number, numbers side by side, three signs: Math-Verify would read the part that it understands
BROKEN = re.compile(
    r"(?:^|[-+*/^({]|\\cdot|\\times)\s*(?:[*/^)}]|\\cdot|\\times|$)|[-+]\s*[-+]\s*[-+]|^\s*[-+]\s*[-+]|[0-9.]\s+[0-9.(]|[)}]\s*[0-9.]"
    r"|\.(?![0-9])|\.[0-9]+\.|\\(?:[dt]?frac|sqrt)(?!\s?[{0-9])"
)


def extract_answer(text: str) -> str | None:
    """The piece of text that states the final answer, or None when the text holds no number at all.

    The last marker that is followed by an answer decides (`####`, `A:`, `the answer is`, a LaTeX box); without a marker,
    the last number of the text. Example: "#### $16.00 on ice cream after 60 days." gives "$16.00".
    Numbers in words, and roman or hexadecimal ones, are not read.
    """
    for match in reversed(deque(MARKER.finditer(text), maxlen=MAX_MARKERS)):
        answer = after_marker(text, match)
        if answer is not None:
            return answer
    whole = text.strip() if len(text) <= MAX_SPAN else ""
    if re.search(r"[\\^]", whole) and strict(tidy(whole)):
        return whole  # `\\sqrt{16}`
    numbers: list[str] = IN_TEXT.findall(plain(text[-MAX_TAIL:]))
    return bare(numbers[-1]) if numbers else None


def stated_answer(gold: str) -> str | None:
    """The answer of a gold solution. A line without a marker is the answer itself: `12:30` and `18 or 20` are no numbers."""
    line = gold.strip()
    return extract_answer(gold if "\n" in line or MARKER.search(line) else f"#### {line}")


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
    if leading and alone(clean, leading) and "=" not in clean:
        return span if hedged else bare(leading.group())
    if "=" in clean:
        return span if re.search(r"\bor\b", clean) else after_marker_value(clean.rpartition("=")[2].strip()) or span
    numbers = list(IN_TEXT.finditer(clean))
    if match["line"] and len(numbers) != 1:
        return None
    if not numbers or hedged or leading or CALCULATION.match(clean, numbers[0].end()):
        return span if match["hash"] or numbers else None
    return bare(numbers[0].group())


def after_marker_value(value: str) -> str | None:
    leading = NUMBER.match(value)
    if parse_number(value) is not None or leading is None:
        return value or None
    return bare(leading.group()) if alone(value, leading) else value


def alone(clean: str, leading: re.Match[str]) -> bool:
    """Whether the number with which the text begins ends at a word or at the end, and begins no calculation."""
    rest = clean[len(leading.group().rstrip()) :]
    return ENDS.match(rest) is not None and CALCULATION.match(rest) is None


def bare(number: str) -> str:
    return number.strip().rstrip(".,")


def line_at(text: str, start: int) -> str:
    """The rest of the line, or the next line when the rest is empty; at most MAX_SPAN characters, more is no answer."""
    part = text[start : start + MAX_SPAN + 1]
    bullet = BULLET.match(part)
    line, newline, _ = (part[bullet.end() :] if bullet else part.lstrip(" \t:*\r\n")).partition("\n")
    return BOLD.sub("", line).strip() if newline or len(part) <= MAX_SPAN else ""


def boxed(text: str, start: int) -> str | None:
    """Contents of a LaTeX box that opens before start; None when it is empty, never closes or is too long."""
    depth = 1
    for at in range(start, min(len(text), start + MAX_SPAN)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[start:at].strip() or None
    return None


def plain(span: str) -> str:
    """ASCII digits, signs and slashes, and no characters that do not show."""
    span = INVISIBLE.sub("", span)
    if span.isascii():
        return span
    span = VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found[1]), span)
    span = SUPERSCRIPT.sub(lambda found: "^" + found.group().translate(SUPERSCRIPTS), span)
    span = unicodedata.normalize("NFKC", span).replace("⁄", "/").replace("’", "'")
    span = "".join(str(unicodedata.decimal(char, char)) for char in span)
    span = re.sub(r"√\s?\(?([0-9]{1,12})\)?", r"\\sqrt{\1}", span)
    return re.sub(r"[−–‐‑‒﹣]", "-", span)


def tidy(span: str) -> str:
    """One way of writing: plain, without the dress of LaTeX, HTML and markdown."""
    if span.isascii() and not DRESSED.search(span):
        return span.strip()
    span = POWER.sub("^", plain(span[: MAX_SPAN * 2]))
    span = re.sub(r"</?[a-z]{1,10}\s?/?>|(?<![0-9_])_{1,2}|_{1,2}(?![0-9_])|\^\s?\{?\\circ\}?", "", span, flags=re.IGNORECASE)
    span = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s?\{([^{}]*)\}", r" \1", span)
    span = re.sub(r"\\\\|\\[,;!: ]|\\left|\\right|~|\{,\}", lambda found: "," if found.group() == "{,}" else "", span)
    span = span.replace("\\$", "$").replace("\\%", "%")
    span = re.sub(
        r"\\[()\[\]]|(?<!\s)[`*]{1,2}(?![0-9(\s])|[`*]{1,2}(?=[^0-9(\s])|(?<![0-9)\s])[`*]{1,2}|^\$(?=.*[^0-9.,]\$\W*$|\d+\$\W*$)",
        "",
        span,
    )
    span = re.sub(r" {2,}", " ", re.sub(r"\\times|×", "*", span).replace("÷", "/")).strip()
    span = re.sub(r"10\^\{(-?[0-9]{1,4})\}", r"10^\1", span)
    span = re.sub(r"^(-?)\s?\\[dt]?frac\s?\{(-?[0-9]{1,30})\}\s?\{([0-9]{1,30})\}", r"\1\2/\3", span)
    span = re.sub(r"^(?:minus|negative)\s+(?=[$0-9])", "-", re.sub(r"^(?:\\approx|≈)\s*", "", span), flags=re.IGNORECASE)
    span = re.sub(r"^([0-9]{1,9}) and (?=[0-9]{1,9}\s?/\s?[0-9])", r"\1 ", span)
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
    if body.isdecimal():
        return Fraction(int(body))
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
    value = Fraction(body if not body.endswith(".") else body[:-1])
    return value * Fraction(10) ** power if power else value


def is_right(text_or_solution: str, gold: str) -> bool:
    """Whether the answer equals the gold answer; both may be bare answers or whole solutions. Never raises.

    Numbers are compared exactly. A percentage against a bare number may mean either 25 or 1/4.
    """
    answer, (target, theirs) = extract_answer(text_or_solution), _gold(gold)
    if answer is None or target is None:
        return False
    mine = read_number(answer)
    if mine and theirs:
        if mine[1] == theirs[1]:
            return mine[0] == theirs[0]
        part, bare = (mine[0], theirs[0]) if mine[1] else (theirs[0], mine[0])
        return bare in (part, part / 100)
    clean = tidy(answer)
    if theirs and EUROPEAN.fullmatch(clean):
        european = read_number(re.sub(r"(?<=[0-9])[. '](?=[0-9]{3})", "", clean).replace(",", "."))
        return european is not None and european[0] == theirs[0]
    return same_expression(clean, tidy(target))


@lru_cache(maxsize=1024)  # a gold answer is compared with many solutions
def _gold(gold: str) -> tuple[str | None, tuple[Fraction, bool] | None]:
    target = stated_answer(gold)
    return target, None if target is None else read_number(target)


def strict(clean: str) -> bool:
    """The span may be given to Math-Verify: short, and of the few characters that a closed expression needs."""
    longest = max((len(run) for run in re.findall(r"[0-9]+", clean)), default=0)
    return STRICT.fullmatch(clean) is not None and 0 < longest <= 12 and not BROKEN.search(clean.strip()) and balanced(clean)


def balanced(clean: str) -> bool:
    for _ in range(MAX_DEPTH):
        clean, found = re.subn(r"\([^(){}]*\)|\{[^(){}]*\}", "", clean)
        if not found:
            break
    return not re.search(r"[(){}]", clean)


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
    answer = stated_answer(text)
    value = parse_number(answer) if answer is not None else None
    if value is None:
        raise ValueError(f"the gold answer holds no number: {text[-80:]!r}")
    return value
