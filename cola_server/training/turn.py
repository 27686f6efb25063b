"""A job's turn at the model: it is given in the line, and a paused job lets the next one in."""

import asyncio
from types import TracebackType
from typing import Protocol, Self

from cola_server.training.line import Place


class Stopped(Exception):
    """The server stops. The job keeps its status, and goes on when a server starts again."""


class Waiting(Protocol):
    """Where a job waits for its turn: the line, or a group that stands in it as one. See `Line`."""

    async def stand(self, place: Place) -> bool: ...
    def withdraw(self, place: Place) -> None: ...
    def leave(self, place: Place) -> None: ...
    def number(self, place: Place) -> int | None: ...


class Turn:
    """Held with `async with` while a job runs."""

    def __init__(self, line: Waiting, job: str, tenant: str) -> None:
        self._line = line
        self._job = job
        self._tenant = tenant
        self._place: Place | None = None
        self.bytes = 0
        """What the job needs of the server's memory: to be known before it waits for its turn."""
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
    def number(self) -> int | None:
        """Where the job stands in the line; None where it does not wait there. Any thread may ask."""
        place = self._place
        return None if place is None else self._line.number(place)

    @property
    def interrupted(self) -> bool:
        """Whether the job was asked to give up its turn."""
        return self._interruption.is_set()

    async def interruption(self) -> None:
        """Waits until the job is asked to give up its turn."""
        await self._interruption.wait()

    def pause(self) -> None:
        """Asks the job to give up its turn at its next step, or its place in the line now."""
        if not self._stopping:
            self._wanted.clear()
            self._interrupt()

    def interrupt(self) -> None:
        """Asks the job to give up its turn at its next step; it goes back to the line by itself."""
        self._interruption.set()

    def resume(self) -> None:
        """Puts the job back into the line; one that still holds its turn gives it up first: the store has it queued."""
        self._wanted.set()

    def stop(self) -> None:
        """Asks the same, for good."""
        self._stopping = True
        self._wanted.set()
        self._interrupt()

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
            self._interruption.clear()
            place = self._place = Place(self._job, self._tenant, self.bytes)
            if not await self._line.stand(place):
                continue
            if self._wanted.is_set() and not self.interrupted:
                self._held = True
                return
            self._line.leave(place)

    def _leave(self) -> None:
        if self._held and self._place is not None:
            self._held = False
            self._line.leave(self._place)

    def _interrupt(self) -> None:
        self._interruption.set()
        if self._place is not None:
            self._line.withdraw(self._place)
