"""A job's place in the line for the model: jobs run one after another, and a paused job lets the next one in."""

import asyncio
from types import TracebackType
from typing import Self


class Turn:
    """Held with `async with` while a job runs. All jobs share the `line`, which is first come, first served."""

    def __init__(self, line: asyncio.Lock) -> None:
        self._line = line
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._held = False

    @property
    def paused(self) -> bool:
        """Whether the job was asked to let others in."""
        return not self._wanted.is_set()

    def pause(self) -> None:
        """Asks the job to give up its turn at its next step."""
        self._wanted.clear()

    def resume(self) -> None:
        """Puts the job back into the line."""
        self._wanted.set()

    async def again(self) -> None:
        """Gives up the turn and takes it again once the job is resumed and its turn comes."""
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
            await self._wanted.wait()
            await self._line.acquire()
            if self._wanted.is_set():
                self._held = True
                return
            self._line.release()

    def _leave(self) -> None:
        if self._held:
            self._held = False
            self._line.release()
