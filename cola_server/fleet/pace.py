"""How fast a worker is, and the way to it, from what is observed of both.

A worker tells how long each step took it, and with each credit how long the capture was there. What is left of the time
between sending and credit was the way's. (A measurement when a worker attends would cost a reconnecting fleet the very
link that it measures, and show TCP's slow start instead of the link.)
"""

import math
import statistics
from collections import deque

ENOUGH = 3
"""Observations before they count: the first step pays for cold code, and of three the middle one is no outlier."""
WEIGHT = 0.3
"""Of the newest observation."""
FORGET_SECONDS = 600.0
"""What was observed no longer ago counts: a worker that something else slowed down gets another chance."""
FASTEST = 1e9
"""Bytes/s: a faster way is as good as none."""
MESSAGE_SECONDS = 0.002
"""What a message that travels alone may take however fast the link is: two event loops wake up for it."""
LEAST_BYTES = 1 << 16
"""A rate is told from so many."""


class Average:
    """An exponential average of positive numbers that one outlier does not move: the middle of the last three goes in,
    by its logarithm, since these are ratios.
    """

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=ENOUGH)
        self._log: float | None = None
        self._at = -math.inf

    def add(self, value: float, now: float) -> None:
        """An observation; what is no positive number is none."""
        if not 0 < value < math.inf:
            return
        if now - self._at > FORGET_SECONDS:
            self._last.clear()
            self._log = None
        self._at = now
        self._last.append(math.log(value))
        if len(self._last) == ENOUGH:
            middle = statistics.median(self._last)
            self._log = middle if self._log is None else self._log + WEIGHT * (middle - self._log)

    def value(self, now: float) -> float | None:
        """None where not enough is known."""
        return math.exp(self._log) if self._log is not None and now - self._at <= FORGET_SECONDS else None


class Way:
    """What is on its way to one worker, and how long that takes. Captures arrive in the order in which they are sent,
    so the way is busy with one from when it was sent, or the one before arrived, until it arrives itself.
    """

    def __init__(self) -> None:
        self._flying: deque[tuple[int, float]] = deque()
        self._arrived = -math.inf
        self._nbytes = 0
        self._seconds = 0.0

    def sent(self, nbytes: int, now: float) -> None:
        """A capture leaves."""
        self._flying.append((nbytes, now))

    def credited(self, nbytes: int, there: float, now: float) -> None:
        """The worker is done with a capture that was `there` seconds with it. It may tell anything: what cannot be
        takes no time, and what was not sent does not count.
        """
        if not self._flying:
            return
        size, sent = self._flying.popleft()
        arrived = min(now, max(sent, now - there))
        alone = sent >= self._arrived
        taken = arrived - sent - MESSAGE_SECONDS if alone else arrived - self._arrived
        self._arrived = max(self._arrived, arrived)
        if size == nbytes:
            self._nbytes += nbytes
            self._seconds += max(0.0, taken)

    def rate(self) -> float | None:
        """Bytes/s since this was last asked; None where that was too little to tell."""
        if self._nbytes < LEAST_BYTES:
            return None
        rate = self._nbytes / max(self._seconds, self._nbytes / FASTEST)
        self._nbytes, self._seconds = 0, 0.0
        return rate


class Pace:
    """What is known of one worker process, over all its streams."""

    def __init__(self, boot: int) -> None:
        self.boot = boot
        self.speed = Average()
        """FLOP/s."""
        self.first: float | None = None
        """What that was when it was first known: what it becomes later is the worker's own."""
        self.rate = Average()
        """Bytes/s."""
        self.told: tuple[float | None, float | None] = (None, None)
        """Speed and rate when jobs last looked at where they are."""
