"""Which texts have come before: what a stream of a million problems needs to have each once."""

from __future__ import annotations

import hashlib

_WIDTH = 16
_EMPTY = bytes(_WIDTH)


class Seen:
    """A set of texts that does not hold them: 24 to 48 bytes for each, however long they are.

    It keeps digests of 128 bits, so that no two texts are taken for one, in a table with open addressing.

    Example:
        seen = Seen()
        assert seen.add("a") and not seen.add("a") and "a" in seen and "b" not in seen
    """

    def __init__(self) -> None:
        self._table, self._slots, self._count = bytearray(8 * _WIDTH), 8, 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, text: str) -> bool:
        return self._find(_digest(text))[1]

    def add(self, text: str) -> bool:
        """Whether it is new."""
        key = _digest(text)
        at, known = self._find(key)
        if known:
            return False
        self._table[at : at + _WIDTH] = key
        self._count += 1
        if 3 * self._count > 2 * self._slots:
            self._grow()
        return True

    def _find(self, key: bytes) -> tuple[int, bool]:
        """The place of a key in the table, or that where it belongs; whether it is there."""
        slot = int.from_bytes(key[:8], "little") % self._slots
        while (there := self._table[slot * _WIDTH : (slot + 1) * _WIDTH]) != _EMPTY:
            if there == key:
                return slot * _WIDTH, True
            slot = (slot + 1) % self._slots
        return slot * _WIDTH, False

    def _grow(self) -> None:
        old, self._slots = self._table, 2 * self._slots
        self._table = bytearray(self._slots * _WIDTH)
        for at in range(0, len(old), _WIDTH):
            if (key := bytes(old[at : at + _WIDTH])) != _EMPTY:
                place, _ = self._find(key)
                self._table[place : place + _WIDTH] = key


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=_WIDTH).digest()
