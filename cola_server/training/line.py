"""The line for the model: every tenant's jobs in the order in which they came, and as many at once as its quota allows.

Where memory is short (`Admission`), the next place goes to the tenant that runs the fewest jobs for its weight. Its
first job may have to wait until enough is free; others that fit go before it meanwhile, but not for ever.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from cola_common.errors import ColaError, Reason
from cola_server.tenants import Quotas
from cola_server.training.admission import Admission

MOST_BEFORE = 16
"""Jobs of other tenants that may go before one that does not fit yet: then all wait for it."""


@dataclass(eq=False)
class Place:
    """One job's."""

    job: str
    tenant: str
    bytes: int
    before: int = 0
    """Jobs that came later and went first."""
    answer: "asyncio.Future[bool]" = field(init=False)

    def __post_init__(self) -> None:
        self.answer = asyncio.get_running_loop().create_future()


class Line:
    """Belongs to the event loop, but for `number`."""

    def __init__(self, quotas: Quotas, admission: Admission, rest: Callable[[str], None]) -> None:
        """`rest` is told of each tenant that has no running job left."""
        self._quotas = quotas
        self._admission = admission
        self._rest = rest
        self._waiting: dict[str, tuple[Place, ...]] = {}  # by tenant; tuples, because other threads read them
        self._running: Counter[str] = Counter()
        self._turns = itertools.count(1)
        self._last: dict[str, int] = {}  # the turn that a tenant got last

    async def stand(self, place: Place) -> bool:
        """Waits at the end. Returns: whether the job may run, until it leaves; False where it was withdrawn.

        Raises: `ColaError(JOB_TOO_LARGE)` where there could never be room: it would keep all others waiting.
        """
        if place.bytes > self._admission.memory_bytes:
            raise ColaError(Reason.JOB_TOO_LARGE, bytes=place.bytes, limit=self._admission.memory_bytes)
        self._waiting[place.tenant] = (*self._waiting.get(place.tenant, ()), place)
        self._admit()
        try:
            return await place.answer
        except asyncio.CancelledError:
            if place.answer.cancelled():
                self._remove(place)
                self._admit()
            elif place.answer.result():  # it was its turn just now
                self.leave(place)
            raise

    def withdraw(self, place: Place) -> None:
        """The job waits no more, if it still does."""
        if not place.answer.done():
            place.answer.set_result(False)
            self._remove(place)
            self._admit()

    def leave(self, place: Place) -> None:
        """The job runs no more."""
        self._admission.release(place.job)
        self._running[place.tenant] -= 1
        if not self._running[place.tenant]:
            self._rest(place.tenant)
        self._admit()

    def number(self, place: Place) -> int | None:
        """Where the job stands among its tenant's, from 1; None where it does not wait. Any thread may call."""
        waiting = self._waiting.get(place.tenant, ())
        return waiting.index(place) + 1 if place in waiting else None

    def _remove(self, place: Place) -> None:
        rest = tuple(other for other in self._waiting[place.tenant] if other is not place)
        if rest:
            self._waiting[place.tenant] = rest
        else:
            del self._waiting[place.tenant]

    def _admit(self) -> None:
        """Lets in whom there is room for."""
        while (place := self._next()) is not None:
            self._admission.take(place.job, place.bytes)
            self._running[place.tenant] += 1
            self._last[place.tenant] = next(self._turns)
            place.answer.set_result(True)
            self._remove(place)

    def _next(self) -> Place | None:
        passed: list[Place] = []
        for tenant in sorted(self._waiting, key=self._standing):
            first = self._waiting[tenant][0]
            if self._running[tenant] >= self._quotas.of(tenant).max_running or first.answer.done():
                continue
            if self._admission.fits(first.bytes):
                for place in passed:
                    place.before += 1
                return first
            if first.before >= MOST_BEFORE:
                return None
            passed.append(first)
        return None

    def _standing(self, tenant: str) -> tuple[float, int]:
        """Who is less goes first: it runs less for its weight, or had its turn longer ago."""
        return self._running[tenant] / self._quotas.of(tenant).weight, self._last.get(tenant, 0)
