"""The one thread on which the base model computes: forward, backward, folds, evaluation, merging.

Synchronous code, apart from the event loop; one thread also because a model's hooks and weights belong to one cohort
at a time.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Numerics:
    """Runs functions in order on its thread."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="numerics")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Awaits `function` on the thread. A cancelled caller leaves; the function ends before the next one starts."""
        return await asyncio.wrap_future(self._executor.submit(function, *args, **kwargs))

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for callers on other threads that may block. Not for the event loop."""
        return self._executor.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        """Waits for what runs and drops what waits."""
        self._executor.shutdown(wait=True, cancel_futures=True)
