"""One engine for many clients: a thread that steps it, requests that come from an asyncio loop, and steps that go back there.

The server (actors/openai_api.py) calls it. All that touches the engine happens in that thread; texts and HTTP are unknown here.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from actors.live import Live, Step
from pipeline.backtrack.cursor import DecodeRequest, Decoding

Asked = tuple[DecodeRequest, Decoding]


class EngineDied(RuntimeError):
    """The engine has failed and answers nothing any more."""


@dataclass(frozen=True)
class _Job:
    """One decode of a client."""

    place: int  # among those that the client asked for together
    asked: Asked
    loop: asyncio.AbstractEventLoop
    arrived: asyncio.Queue[tuple[int, Step | Exception]]


class Service:
    """Runs `make()`, and the engine that it returns, in a thread of its own.

    Example:
        service = Service(lambda: HfLive(decoder))
        service.start()
        async with aclosing(service.decode([(request, decoding)])) as steps:
            async for place, step in steps:
                ...
        service.stop()
    """

    def __init__(self, make: Callable[[], Live]) -> None:
        self._make = make
        self._commands: queue.SimpleQueue[tuple[int, _Job | None] | None] = queue.SimpleQueue()
        self._keys = itertools.count()
        self._jobs: dict[int, _Job] = {}
        self._door = threading.Lock()  # held to send jobs and to close: no job is sent to an engine that takes none any more
        self._open = True
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.error: Exception | None = None
        """Why the engine has died."""

    @property
    def running(self) -> int:
        """Decodes that the engine works on or holds in its queue."""
        return len(self._jobs)

    def start(self) -> None:
        """Returns when the engine is ready.

        Raises:
            Exception: whatever `make` raises.
        """
        self._thread.start()
        self._ready.wait()
        if self.error:
            raise self.error

    def stop(self) -> None:
        """Ends what runs; who still waits gets EngineDied."""
        self._commands.put(None)
        self._thread.join()

    async def decode(self, asked: Sequence[Asked]) -> AsyncGenerator[tuple[int, Step], None]:
        """The steps of several decodes, each with its place in `asked`, as they come. Closing the iterator aborts the rest.

        Raises:
            ValueError: a request that the engine refuses.
            EngineDied: it has failed.
        """
        arrived: asyncio.Queue[tuple[int, Step | Exception]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        keys = []
        try:
            with self._door:
                if not self._open:
                    raise EngineDied(self._end())
                for place, one in enumerate(asked):
                    keys.append(next(self._keys))
                    self._commands.put((keys[-1], _Job(place, one, loop, arrived)))
            left = len(asked)
            while left:
                place, step = await arrived.get()
                if isinstance(step, Exception):
                    raise step
                left -= step.decoded is not None
                yield place, step
        finally:
            for key in keys:
                self._commands.put((key, None))

    def _run(self) -> None:
        try:
            live = self._make()
            self._ready.set()
            while self._obey(live):
                self._deliver([(self._jobs[step.key], step) for step in live.step()])
        except Exception as error:  # whatever an engine fails with, its clients must not wait for ever
            self.error = error
        finally:
            self._ready.set()
            died = EngineDied(self._end())
            with self._door, suppress(queue.Empty):
                self._open = False
                while True:
                    command = self._commands.get_nowait()
                    if command and command[1]:  # sent, and never begun
                        self._jobs[command[0]] = command[1]
            self._deliver([(job, died) for job in self._jobs.values()])
            self._jobs.clear()

    def _end(self) -> str:
        return f"the engine has failed: {self.error}" if self.error else "the engine has stopped"

    def _obey(self, live: Live) -> bool:
        """Let requests join and leave; waits where nothing runs. False: it is time to stop."""
        with suppress(queue.Empty):
            while True:
                command = self._commands.get(block=not live.running)
                if command is None:
                    return False
                key, job = command
                if job is None:
                    live.abort(key)
                    self._jobs.pop(key, None)
                    continue
                self._jobs[key] = job  # before the engine sees it: should it die of it, the client hears
                try:
                    live.add(key, *job.asked)
                except ValueError as error:
                    del self._jobs[key]
                    self._deliver([(job, error)])
        return True

    def _deliver(self, found: Sequence[tuple[_Job, Step | Exception]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Step | Exception]]] = defaultdict(list)
        for job, step in found:
            by_loop[job.loop].append((job, step))
            if isinstance(step, Step) and step.decoded:
                del self._jobs[step.key]
        for loop, some in by_loop.items():
            with suppress(RuntimeError):  # a loop that is closed waits for nothing
                loop.call_soon_threadsafe(_put, some)


def _put(found: Sequence[tuple[_Job, Any]]) -> None:
    for job, step in found:
        job.arrived.put_nowait((job.place, step))
