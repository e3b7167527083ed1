"""Holds a run at a URL for one job: a small object there with a beat that its holder changes every few seconds.

Whether a holder lives is judged by whether its object changes while we watch, by our own monotonic clock: no time of one machine
is ever compared with that of another, so clocks may be as wrong as they like.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Self

from pipeline.store import StoreError
from pipeline.store.remote import Remote

NAME = ".lease"
BEAT = 10.0  # seconds between two changes of the object
DEAD = 60.0  # seconds without a change, after which its holder counts as dead
_SETTLE = 2.0  # seconds after a takeover, in which another one's may come in


class Lease:
    """A context manager. Raises StoreError, naming the holder, when another job has the run.

    Args:
        home: identity of the working copy, which this process has locked. A lease of the same home is of a dead process and is
            taken over at once.
        say: told when a takeover takes time.
    """

    def __init__(
        self,
        remote: Remote,
        home: str = "",
        say: Callable[[str], None] = print,
        beat: float = BEAT,
        dead: float = DEAD,
        settle: float = _SETTLE,
    ) -> None:
        self._remote, self._home, self._say = remote, home or uuid.uuid4().hex, say
        self._beat_seconds, self._dead_seconds, self._settle_seconds = beat, dead, settle
        self._token = uuid.uuid4().hex
        self._holder = f"process {os.getpid()} of {_user()} on {socket.gethostname()}"
        self._beats = 0
        self._lost_to: str | None = None
        self._done = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> Self:
        if not self._remote.create(NAME, self._content()):
            self._take_over()
        self._heart = threading.Thread(target=self._keep, daemon=True)
        self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()
        if self._heart:
            self._heart.join()
        try:
            if self._token_of(self._remote.read(NAME)) == self._token:
                self._remote.remove(NAME)
        except StoreError as failure:
            if error is None:
                raise
            error.add_note(f"the lease could not be given back either: {failure}")

    def check(self) -> None:
        """Raises StoreError when another job has taken the run, as it may when this one has not been heard of for long."""
        found = self._remote.read(NAME)
        if self._token_of(found) != self._token:
            self._lost_to = _holder_of(found)
        if self._lost_to is not None:
            raise StoreError(f"{self._remote.url} was taken over by {self._lost_to}, since this job was not heard of for too long")

    def _take_over(self) -> None:
        """Watch the lease of another job until it changes, which refuses us, or has stood still for long enough."""
        seen = self._remote.read(NAME)
        until = time.monotonic() + self._dead_seconds
        if seen is not None and _value(seen, "home") != self._home:
            self._say(f"{self._remote.url} is held by {_holder_of(seen)}: {self._dead_seconds:.0f} s to see whether that is alive")
        while seen is not None and _value(seen, "home") != self._home and time.monotonic() < until:
            time.sleep(min(1.0, self._beat_seconds / 4))
            now = self._remote.read(NAME)
            if now is not None and now != seen:
                raise StoreError(f"{self._remote.url} is in use by {_holder_of(now)}; stop that run or use another name")
            seen = now
        self._remote.remove(NAME)
        if not self._remote.create(NAME, self._content()):
            found = self._remote.read(NAME)
            raise StoreError(f"{self._remote.url} is in use by {_holder_of(found)}; stop that run or use another name")
        # Two that have watched the same dead lease may each have removed what it took for that one: the last to write has it.
        time.sleep(self._settle_seconds)
        found = self._remote.read(NAME)
        if self._token_of(found) != self._token:
            raise StoreError(f"{self._remote.url} is in use by {_holder_of(found)}; stop that run or use another name")

    def _keep(self) -> None:
        while not self._done.wait(self._beat_seconds) and self._lost_to is None:
            try:
                found = self._remote.read(NAME)
                if self._token_of(found) != self._token:
                    self._lost_to = _holder_of(found)
                    return
                self._beats += 1
                self._remote.write(NAME, self._content())
            except StoreError:
                continue  # the work goes on; whoever writes an output hears of it

    def _content(self) -> bytes:
        about = {"token": self._token, "home": self._home, "holder": self._holder, "beat": self._beats}
        return json.dumps(about).encode()

    @staticmethod
    def _token_of(content: bytes | None) -> str:
        return _value(content, "token")


def _value(content: bytes | None, name: str) -> str:
    try:
        return str(json.loads(content or b"{}")[name])
    except (ValueError, KeyError, TypeError):  # half-written, on a store that shows such things
        return ""


def _holder_of(content: bytes | None) -> str:
    return _value(content, "holder") or "another job"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"user {os.getuid()}"
