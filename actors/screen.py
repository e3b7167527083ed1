"""Shows a text that takes back parts of itself: on a terminal with cursor movements, elsewhere when it is done.

The command `actors.generate` calls it with the events of actors/streaming.py. Text of models is untrusted: control characters
are shown as pictures, so that none moves the cursor or changes the terminal.
"""

from __future__ import annotations

import unicodedata
from typing import Literal, TextIO

from actors.streaming import Appended, Deleted

Deletions = Literal["strike", "erase", "raw"]

_STRIKE, _PLAIN, _CLEAR_BELOW = "\x1b[9m", "\x1b[0m", "\x1b[J"
_TAB = 4


class Screen:
    """Text on a terminal of `columns` x `rows`. Deleted characters are struck through, or gone with `erase`.

    Lines are broken here, one column before the terminal would: the cursor's place is always known, and a deletion goes back up
    to where it starts and writes anew from there. What has left the screen at the top stays as it is.
    """

    def __init__(self, out: TextIO, columns: int, rows: int, erase: bool) -> None:
        self._out, self._columns, self._rows, self._erase = out, max(2, columns), max(2, rows), erase
        self._cells: list[str] = []
        self._struck: list[bool] = []
        self._standing: list[int] = []  # cells of what has not been deleted
        self._starts: list[tuple[int, int]] = []  # row and column of each cell
        self._cursor = (0, 0)

    def show(self, event: Appended | Deleted) -> None:
        if isinstance(event, Appended):
            for character in event.text:
                self._standing.append(len(self._cells))
                self._cells.append(character)
                self._struck.append(False)
            self._write(len(self._starts))
        else:
            gone = self._standing[len(self._standing) - event.chars :]
            del self._standing[len(self._standing) - event.chars :]
            for cell in gone:
                self._struck[cell] = True
            self._back_to(gone[0])
        self._out.flush()

    def close(self) -> None:
        """Leave the terminal as it was, behind the text."""
        self._out.write(f"{_PLAIN}\n")
        self._out.flush()

    def _back_to(self, cell: int) -> None:
        """Write again from the line on that holds the cell, or from the first line that is still on the screen."""
        row = max(self._starts[cell][0], 0 if self._erase else self._cursor[0] - self._rows + 1)
        if self._erase:
            kept = cell
            del self._cells[kept:], self._struck[kept:], self._starts[kept:]
        first = next((i for i, start in enumerate(self._starts) if start[0] >= row), len(self._starts))
        up = min(self._cursor[0] - row, self._rows - 1)
        self._out.write("\r" + (f"\x1b[{up}A" if up else "") + _CLEAR_BELOW)
        del self._starts[first:]
        self._cursor = (row, 0)
        self._write(first)

    def _write(self, first: int) -> None:
        """Write the cells from `first` on, where the cursor is."""
        row, column = self._cursor
        parts, struck = [], False
        for cell in range(first, len(self._cells)):
            character = self._cells[cell]
            shown = _visible(character)
            width = sum(_width(one) for one in shown)
            if character != "\n" and column + width >= self._columns:
                parts.append("\r\n")
                row, column = row + 1, 0
            self._starts.append((row, column))
            if self._struck[cell] != struck:
                struck = self._struck[cell]
                parts.append(_STRIKE if struck else _PLAIN)
            if character == "\n":
                parts.append("\r\n")
                row, column = row + 1, 0
            else:
                parts.append(shown)
                column += width
        if struck:
            parts.append(_PLAIN)
        self._cursor = (row, column)
        self._out.write("".join(parts))


def _visible(character: str) -> str:
    if character == "\t":
        return " " * _TAB
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    return "\u2421" if character == "\x7f" or "\x80" <= character < "\xa0" else character


def _width(character: str) -> int:
    """Columns that a terminal gives a character."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
