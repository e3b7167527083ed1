"""What the command lines share: one line for a wrong argument."""

from __future__ import annotations

import argparse
import socket
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


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before whatever takes its time to load.

    Raises:
        OSError: the place is taken, or there is none such. One line.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise OSError(f"cannot listen at {host}:{port}: {getattr(error, 'strerror', None) or error}") from error
    return listening
