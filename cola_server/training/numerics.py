"""The one thread on which the base model computes: forward, backward, folds, evaluation, merging.

Synchronous code, apart from the event loop; one thread also because a model's hooks and weights belong to one cohort
at a time.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import structlog

from cola_common.messages import Heartbeat
from cola_server.training.idle import Idle

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger(__name__)


class Numerics:
    """Runs functions in order on its thread."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="numerics")
        self.idle = Idle()
        self._finished = 0
        self._began: float | None = None

    def pulse(self) -> Heartbeat:
        """How many functions have finished, and how long the present one has run."""
        began = self._began
        return Heartbeat(self._finished, 0.0 if began is None else time.monotonic() - began)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Awaits `function` on the thread. A cancelled caller leaves; the function ends before the next one starts."""
        return await asyncio.wrap_future(self._submit(partial(function, *args, **kwargs)))

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for callers on other threads that may block. Not for the event loop."""
        return self._submit(partial(function, *args, **kwargs)).result()

    def post(self, function: Callable[[], None]) -> None:
        """The same for callers that do not wait: what `function` raises is logged."""
        self._submit(function).add_done_callback(_log_error)

    def close(self) -> None:
        """Waits for what runs and drops what waits."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _submit(self, function: Callable[[], T]) -> Future[T]:
        def timed() -> T:
            self._began = time.monotonic()
            try:
                with self.idle.working():
                    return function()
            finally:
                self._began = None
                self._finished += 1

        return self._executor.submit(timed)


def _log_error(done: "Future[None]") -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        log.error("numerics broke", exc_info=error)
