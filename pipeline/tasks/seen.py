"""Which texts have come before: what a stream of a million problems needs to have each once."""

from __future__ import annotations

import hashlib


class Seen:
    """A set of texts that does not hold them but digests of 128 bits, so that no two are taken for one: about 100 bytes each.

    Example:
        seen = Seen()
        assert seen.add("a") and not seen.add("a") and "a" in seen and "b" not in seen
    """

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, text: str) -> bool:
        return _digest(text) in self._digests

    def add(self, text: str) -> bool:
        """Whether it is new."""
        before = len(self._digests)
        self._digests.add(_digest(text))
        return len(self._digests) > before


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
