"""Whose turn at the model it is: tenants share its time by weight.

Each tenant has a clock that runs with the model seconds it has had, divided by its weight; who is behind goes first.
A tenant that had nothing to do joins at the clock of the one that is furthest behind: it neither owes nor saves up.
One whose jobs wait for slow workers may fall behind, and catch up on a little of it.
Start-time fair queueing (Goyal, Vin, Cheng 1996), with a pass in place of a packet.
"""

import itertools
from collections.abc import Collection, Mapping

CREDIT_SECONDS = 5.0
"""What a tenant with running jobs may catch up on: some passes, whose deltas take now longer and now shorter."""


class Shares:
    """Not thread-safe."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """A tenant without a weight has 1."""
        self._weights = weights
        self._clocks: dict[str, float] = {}
        self._active: set[str] = set()
        self._time = 0.0  # the clock of who went first last, and never back
        self._uses = itertools.count(1)
        self._last: dict[str, int] = {}  # the use that was a tenant's last

    def order(self, waiting: Collection[str]) -> list[str]:
        """The tenants that have something to do, who is furthest behind first: it is the one that goes."""
        for tenant in sorted(set(waiting)):
            floor = self._time - CREDIT_SECONDS
            if tenant not in self._active:
                floor = max(floor, min((self._clocks[other] for other in self._active), default=self._time))
                self._active.add(tenant)
            self._clocks[tenant] = max(self._clocks.get(tenant, 0.0), floor)
        # Of those that are equal, who came last or has waited longest.
        order = sorted(set(waiting), key=lambda tenant: (self._clocks[tenant], self._last.get(tenant, 0), tenant))
        if order:
            self._time = max(self._time, self._clocks[order[0]])
        return order

    def ahead(self, tenant: str, seconds: float) -> float:
        """Where the tenant's clock would stand after so many more seconds."""
        return self._clocks[tenant] + seconds / self._weights.get(tenant, 1.0)

    def used(self, tenant: str, seconds: float) -> None:
        """The tenant has had so many model seconds."""
        self._clocks[tenant] = self.ahead(tenant, seconds)
        self._last[tenant] = next(self._uses)

    def rest(self, tenant: str) -> None:
        """The tenant has no job any more."""
        self._active.discard(tenant)
