"""How long a job waits for a worker's delta before it looks for another worker: as long as its own steps suggest."""

import statistics
from collections import deque

SHORTEST_SECONDS = 10.0  # below it a pause of the network would move jobs about
TIMES = 4.0  # the longest of the last waits: steps of one job differ by their rows, and seldom by so much
REMEMBERED = 20
RECENT = 3  # as soon as the observed speed of a worker follows a change (`cola_server.fleet.pace`), this does


class Patience:
    """One job's waits."""

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=REMEMBERED)

    def waited(self, seconds: float) -> None:
        """A step's deltas came after so long."""
        self._waits.append(seconds)

    def typical(self) -> float | None:
        """The middle one of the last; None as long as no step tells."""
        return statistics.median(list(self._waits)[-RECENT:]) if self._waits else None

    def limit(self) -> float | None:
        """Seconds to wait; None as long as no step tells."""
        return max(SHORTEST_SECONDS, TIMES * max(self._waits)) if self._waits else None
