"""What the model thread does with its time: computes, waits for deltas though there are jobs, or has no job."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds since the server started; of the three kinds only `busy` is work."""

    busy: float
    waiting: float
    """Jobs were running, and all of them waited for their workers."""
    jobless: float


class Idle:
    """Counts it. Any thread may call."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()
        self._busy = self._waiting = self._jobless = 0.0
        self._working = False
        self._jobs = 0

    def times(self) -> Times:
        """Up to now."""
        with self._lock:
            self._count()
            return Times(self._busy, self._waiting, self._jobless)

    @contextmanager
    def working(self) -> Iterator[None]:
        """The model thread computes."""
        self._change(working=True)
        try:
            yield
        finally:
            self._change(working=False)

    @contextmanager
    def job(self) -> Iterator[None]:
        """A job runs."""
        self._change(jobs=1)
        try:
            yield
        finally:
            self._change(jobs=-1)

    def _change(self, *, working: bool | None = None, jobs: int = 0) -> None:
        with self._lock:
            self._count()
            self._working = self._working if working is None else working
            self._jobs += jobs

    def _count(self) -> None:
        now = self._clock()
        passed, self._since = now - self._since, now
        if self._working:
            self._busy += passed
        elif self._jobs:
            self._waiting += passed
        else:
            self._jobless += passed
