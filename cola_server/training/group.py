"""A collaboration while it runs: its members stand in the line as one, and take every step together.

A member's turn comes when all that have not ended stand in line and the group's place comes; who gives it up makes all
give it up. Under their turn they meet in a `Session` for each attempt: it begins when all are there, and whoever leaves
it before its own end ends it for all, so that they go back together.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, TypeVar, cast

from cola_common.errors import ColaError
from cola_server.model import JobAdapter
from cola_server.training.line import Line, Place
from cola_server.training.turn import Turn

T = TypeVar("T")


class Parted(Exception):
    """Another member has left the session: what it was to do with the others cannot be done."""

    def __init__(self, job: str) -> None:
        super().__init__(f"the attempt of {job} ended")
        self.job = job


class Session:
    """Members that take an attempt together; a job without a group has one of its own. Belongs to the event loop."""

    def __init__(self, members: Collection[str]) -> None:
        self._members = set(members)
        self._values: dict[str, Any] = {}
        self._parted: Parted | None = None
        self._round: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def meet(self, job: str, value: T) -> Mapping[str, T]:
        """Waits for all members, and gives each what all have put. Raises: `Parted`."""
        if self._parted is not None:
            raise self._parted
        self._values[job] = value
        meeting = self._round
        self._look()
        return cast("Mapping[str, T]", await asyncio.shield(meeting))

    def part(self, job: str) -> None:
        """The member leaves: nobody meets any more."""
        if self._parted is None:
            self._parted = Parted(job)
            self._round.set_exception(self._parted)
            self._round.exception()  # it need not be that anybody waits

    def ended(self, jobs: Collection[str]) -> None:
        """The others go on without these."""
        self._members.difference_update(jobs)
        self._look()

    def _look(self) -> None:
        if self._members and self._values.keys() >= self._members and self._parted is None:
            self._round.set_result(self._values)
            self._values = {}
            self._round = asyncio.get_running_loop().create_future()


class Group:
    """See the module. To its members' turns it is the line. Belongs to the event loop, but for `number`."""

    def __init__(self, id: str, name: str, size: int, line: Line, tell: Callable[[str, str], Awaitable[None]]) -> None:
        """`tell(job, text)` is told what a job waits for."""
        self.id = id
        self.ended: dict[str, JobAdapter] = {}
        """The members that took their last step, with the adapters that stay in the mean."""
        self._name = name
        self._size = size
        self._line = line
        self._tell = tell
        self._jobs: dict[str, tuple[Turn, asyncio.Task[None]]] = {}
        self._standing: dict[str, Place] = {}
        self._holding: dict[str, Place] = {}
        self._place: Place | None = None  # of all
        self._taking: asyncio.Task[None] | None = None
        self._entering: dict[str, asyncio.Future[Session]] = {}

    def join(self, job: str, turn: Turn, task: asyncio.Task[None]) -> None:
        """A member runs from now on, in that task."""
        self._jobs[job] = (turn, task)

    def leave_off(self, job: str) -> bool:
        """Its task is over. Returns: whether it was the last."""
        del self._jobs[job]
        return not self._jobs

    def dissolve(self, job: str) -> None:
        """A member was cancelled or has failed, and with it all others: ends their tasks."""
        for other, (_, task) in self._jobs.items():
            if other != job:
                task.cancel()

    # --- one place in the line --------------------------------------------------------------------------------------

    async def stand(self, place: Place) -> bool:
        """As `Line.stand`, for all members at once."""
        if place.job in self.ended:
            return True
        self._standing[place.job] = place
        there = len(self._standing) + len(self.ended)
        try:
            if there == self._size:
                self._place = Place(self.id, place.tenant, sum(each.bytes for each in self._standing.values()))
                self._taking = asyncio.create_task(self._take(self._place))
            else:
                await self._tell(place.job, f"Waiting for the group {self._name!r}: {there} of {self._size}.")
            return await place.answer
        except asyncio.CancelledError:
            self.withdraw(place)
            self.leave(place)
            raise

    def withdraw(self, place: Place) -> None:
        """The member waits no more; one that has its turn will give it up, and so will the others."""
        if self._standing.get(place.job) is place:
            del self._standing[place.job]
            if not place.answer.done():
                place.answer.set_result(False)
            if self._place is not None:
                self._line.withdraw(self._place)
        elif self._holding.get(place.job) is place and place.job not in self.ended:
            self._interrupt()

    def leave(self, place: Place) -> None:
        """The member has given up its turn, or ended."""
        if self._holding.pop(place.job, None) is None:
            return
        if place.job not in self.ended:
            self._interrupt()
        if not self._holding and self._place is not None:
            self._line.leave(self._place)

    def number(self, place: Place) -> int | None:
        """As `Line.number`, of the group."""
        shared = self._place
        return None if shared is None or self._standing.get(place.job) is not place else self._line.number(shared)

    async def _take(self, shared: Place) -> None:
        try:
            if not await self._line.stand(shared):
                return
        except ColaError as error:  # there will never be room for all
            for place in self._standing.values():
                place.answer.set_exception(error)
            self._standing = {}
            return
        if len(self._standing) + len(self.ended) < self._size:  # one was withdrawn just now
            self._line.leave(shared)
            return
        self._holding, self._standing = self._standing, {}
        for place in self._holding.values():
            place.answer.set_result(True)

    def _interrupt(self) -> None:
        for job in self._holding:
            turn, _ = self._jobs[job]
            turn.interrupt()

    # --- one attempt ------------------------------------------------------------------------------------------------

    def enter(self, job: str) -> "asyncio.Future[Session]":
        """The session that begins when all members that have not ended have come in."""
        entering = self._entering[job] = asyncio.get_running_loop().create_future()
        self._begin()
        return entering

    def turn_away(self, job: str) -> None:
        """The member does not come in, if it has not yet."""
        self._entering.pop(job, None)

    def end(self, adapters: Mapping[str, JobAdapter]) -> None:
        """These members took their last step. Each of the others may say so."""
        self.ended.update(adapters)
        self._begin()

    def _begin(self) -> None:
        if self._entering and len(self._entering) + len(self.ended) == self._size:
            session = Session(self._entering)
            for entering in self._entering.values():
                entering.set_result(session)
            self._entering = {}
