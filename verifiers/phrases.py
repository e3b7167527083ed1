"""Which tokens before and after an equals sign belong to its two sides.

Words after a number are its unit (`3 bags/doll x 40 dolls`), other words end the expression, and a letter that stands for
an unknown makes the side unreadable. Called by `verifiers.arithmetic` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from verifiers.expressions import MAX_UNIT_WORDS, SCALES, SYMBOLS, WORD_OPERATORS, Token

OPENERS = ("num", "lpar", "frac", "cur", "vulgar")
BREAK = Token("break", "", 0, 0)


@dataclass
class Reader:
    """One pass over the tokens of a side; `out` holds tokens of the grammar with BREAK where the expression ends."""

    items: list[Token]
    line_start: bool
    """the side begins where its line begins, so that a leading dash is a bullet"""
    out: list[Token] = field(default_factory=list)
    after_word: bool = False
    unit_words: int = 0
    label: bool = False
    """within words that name what the equation gives, as in `$50 - $33 Total cost = $17`"""

    def operand_before(self) -> bool:
        return bool(self.out) and self.out[-1].kind in ("num", "rpar", "pct")

    def add_break(self, after_word: bool = False) -> None:
        self.after_word = after_word
        self.out.append(BREAK)

    def kind_at(self, at: int) -> str:
        return self.items[at].kind if at < len(self.items) else ""

    def read(self) -> list[Token]:
        at = 0
        while at < len(self.items):
            at += self.step(at)
        return self.out

    def step(self, at: int) -> int:
        """Handle the token at `at`; how many tokens that used up."""
        token, before = self.items[at], self.operand_before()
        self.label = self.label and token.kind in ("word", "text")
        match token.kind:
            case "cur":
                if self.kind_at(at + 1) not in ("num", "op", "vulgar", "lpar"):
                    if not before:
                        self.add_break()
                    return 1
                if before:
                    self.add_break()
                return 1
            case "lpar" if before and (used := self.aside(at)):
                return used
            case "num" | "vulgar" | "lpar" | "frac":
                self.operand(at, token, before)
            case "rpar":
                self.out.append(token)
            case "pct":
                self.out.append(token) if before else self.add_break()
            case "pow":
                self.power(at, token, before)
            case "op":
                return self.operator(at, token, before)
            case "word" | "text":
                return self.word(at, token, before)
            case _:
                self.out.append(token._replace(kind="bad")) if token.text == "!" and before else self.add_break()
        return 1

    def operand(self, at: int, token: Token, before: bool) -> None:
        token = token._replace(kind="num") if token.kind == "vulgar" else token
        if before:
            if token.text == "{" and self.out[-1].text == "}":
                self.out.append(token)  # the second argument of a LaTeX fraction
                return
            last, spaced = self.out[-1], self.items[at - 1].spaced
            if last.kind == "num" and not last.unit and self.is_fraction(at, token) and last.text.isdigit():
                self.out.append(token._replace(kind="op", text="mixed+"))
            elif not last.unit and (token.kind == "lpar" and not spaced or last.kind == "rpar" and token.kind != "frac"):
                self.out.append(Token("op", "implicit*", token.start, token.start))
            else:
                self.add_break()
        self.unit_words = 0
        self.out.append(token)

    def aside(self, at: int) -> int:
        """How many tokens a remark in parentheses takes, as in `3 (breakfast) + 5 (baked)`; 0 when it holds more than words."""
        for used in range(1, MAX_UNIT_WORDS + 2):
            kind = self.kind_at(at + used)
            if kind == "rpar":
                return used + 1 if used > 1 else 0
            if kind not in ("word", "text") or len(self.items[at + used].text) == 1:
                return 0  # `4(x)` is a product
        return 0

    def is_fraction(self, at: int, token: Token) -> bool:
        """The token starts the proper fraction of a mixed number such as `2 1/2` or `2½`."""
        if token.text.isdigit() and [self.kind_at(at + 1), self.kind_at(at + 2)] == ["op", "num"]:
            slash, bottom = self.items[at + 1].text, self.items[at + 2].text
            return slash in "/⁄" and bottom.isdigit() and len(bottom) <= 3 and int(token.text) < int(bottom)
        return not token.text[0].isdigit() and token.kind == "num" and token.text[0] != "."

    def power(self, at: int, token: Token, before: bool) -> None:
        follows = self.kind_at(at + 1) in ("num", "lpar") or self.kind_at(at + 1) == "op" and token.text == "^"
        if token.text == "**" and not (before and follows and token.spaced == self.items[at - 1].spaced):
            return  # bold face
        self.out.append(token if before else token._replace(kind="bad"))

    def operator(self, at: int, token: Token, before: bool) -> int:
        text = SYMBOLS.get(token.text, token.text)
        token = token._replace(text=text)
        next_kind = self.kind_at(at + 1)
        if before and next_kind in ("word", "text"):
            word = self.items[at + 1]
            if text == "/" and len(word.text) > 1 or text == "-" and not token.spaced and not self.items[at - 1].spaced:
                return 1 + self.word(at + 1, word, True, force_unit=True)
        fresh = not self.out or self.out[-1] is BREAK
        if fresh:
            bullet = token.spaced and self.line_start and at == 0
            if bullet or (text in "*/" and not self.after_word):
                return 1
            if self.after_word and (text != "-" or token.spaced or not self.items[at - 1].spaced):
                token = token._replace(kind="bad")
        self.out.append(token)
        return 1

    def word(self, at: int, token: Token, before: bool, force_unit: bool = False) -> int:
        lower = token.text.lower()
        if not force_unit:
            pair = at + 1 < len(self.items) and lower in ("divided", "multiplied") and self.items[at + 1].text == "by"
            used = 2 if pair else 1
            op = ("/" if lower == "divided" else "*") if pair else WORD_OPERATORS.get(token.text, "")
            share = lower == "of" and bool(self.out) and bool(self.out[-1].unit)  # `$300 for a total of 500+300`
            if before and op and not share and self.kind_at(at + used) in OPENERS:
                self.out.append(token._replace(kind="op", text=op))
                return used
        if not before:
            inside = bool(self.out) and self.out[-1].kind in ("op", "pow", "lpar", "bad")
            if inside and self.out[-1].kind != "lpar":
                self.out.append(token._replace(kind="bad"))
            else:
                self.add_break(after_word=True)
            return 1
        last = self.out[-1]
        if self.label or token.text[0].isupper() and len(token.text) > 1 and not last.unit:
            self.label = True
            return 1
        if token.text in SCALES and last.kind == "num" and not last.unit and last.scale == 1:
            self.out[-1] = last._replace(scale=SCALES[token.text])
        else:
            self.unit_words += 1
            if self.unit_words > MAX_UNIT_WORDS:
                self.add_break(after_word=True)
            else:
                self.out[-1] = last._replace(unit=f"{last.unit} {lower if len(lower) > 1 else token.text}".strip())
        return 1


def left_side(items: list[Token], line_start: bool) -> list[Token]:
    """The tokens of the expression that ends where the items end; empty when none does."""
    out = Reader(items, line_start).read()
    depth, start = 0, 0
    for at in range(len(out) - 1, -1, -1):
        depth += (out[at].kind == "rpar") - (out[at].kind == "lpar")
        if out[at] is BREAK or depth < 0:
            start = at + 1
            break
    return out[start:]


def right_side(items: list[Token]) -> list[Token]:
    """The tokens of the expression with which the items begin; empty when none does."""
    out = Reader(items, line_start=False).read()
    depth = 0
    for at, token in enumerate(out):
        depth += (token.kind == "lpar") - (token.kind == "rpar")
        if token is BREAK or depth < 0:
            return out[:at]
    return out


def expressions(items: list[Token]) -> list[list[Token]]:
    """All stretches of tokens that may be expressions with an operator, equals sign or not."""
    found: list[list[Token]] = [[]]
    for token in Reader(items, line_start=True).read():
        if token is BREAK:
            found.append([])
        else:
            found[-1].append(token)
    return [stretch for stretch in found if any(token.kind == "op" for token in stretch)]
