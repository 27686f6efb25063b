"""A job's place in the line for the model: so many jobs run at once, and a paused job lets the next one in."""

import asyncio
from types import TracebackType
from typing import Self


class Stopped(Exception):
    """The server stops. The job keeps its status, and goes on when a server starts again."""


class Turn:
    """Held with `async with` while a job runs. All jobs share the `line`, which is first come, first served."""

    def __init__(self, line: asyncio.Semaphore) -> None:
        self._line = line
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._interruption = asyncio.Event()
        self._stopping = False
        self._held = False

    @property
    def held(self) -> bool:
        """Whether the job runs."""
        return self._held

    @property
    def interrupted(self) -> bool:
        """Whether the job was asked to give up its turn."""
        return self._interruption.is_set()

    async def interruption(self) -> None:
        """Waits until the job is asked to give up its turn."""
        await self._interruption.wait()

    def pause(self) -> None:
        """Asks the job to give up its turn at its next step."""
        if not self._stopping:
            self._wanted.clear()
            self._interruption.set()

    def resume(self) -> None:
        """Puts the job back into the line; one that still holds its turn gives it up first: the store has it queued."""
        self._wanted.set()

    def stop(self) -> None:
        """Asks the job to give up its turn at its next step, for good."""
        self._stopping = True
        self._wanted.set()
        self._interruption.set()

    async def wanted(self) -> None:
        """Waits until the job is resumed. Raises: `Stopped`."""
        await self._wanted.wait()
        if self._stopping:
            raise Stopped

    async def again(self) -> None:
        """Gives up the turn and takes it again once the job is resumed and its turn comes. Raises: `Stopped`."""
        self._leave()
        await self._take()

    async def __aenter__(self) -> Self:
        await self._take()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    async def _take(self) -> None:
        while True:
            await self.wanted()
            await self._line.acquire()
            if self._wanted.is_set() and not self._stopping:
                self._interruption.clear()
                self._held = True
                return
            self._line.release()

    def _leave(self) -> None:
        if self._held:
            self._held = False
            self._line.release()
