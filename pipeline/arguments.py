"""What the command lines share: one line for a wrong argument."""

from __future__ import annotations

import argparse
from typing import NoReturn

USAGE = 2
"""Exit code for what a user got wrong."""


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of two."""
        self.exit(USAGE, f"error: {message}; see `{self.prog} --help`\n")


def positive(text: str) -> int:
    """A whole number above 0, for `type=`."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)
