"""An event loop on a thread of its own, for callers that have none."""

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError
from typing import Any, TypeVar, final

T = TypeVar("T")

CANCEL_SECONDS = 5.0  # how long an interrupted caller waits for the call's own end


@final
class BackgroundLoop:
    """Runs coroutines for synchronous callers, from any thread. Ends with `close`, or with the process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="cola-client", daemon=True)
        thread.start()
        # Neither the thread nor this holds `self`: a client that is dropped without `close` takes its thread along.
        self._end = weakref.finalize(self, _stop, self._loop, thread)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What the coroutine returns. An interrupt, such as Ctrl-C, cancels it.

        Raises: what the coroutine raises; `RuntimeError` after `close`.
        """
        if not self._end.alive:
            coroutine.close()
            raise RuntimeError("the client is closed")
        over = threading.Event()

        async def told() -> T:
            try:
                return await coroutine
            finally:
                over.set()

        future = asyncio.run_coroutine_threadsafe(told(), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise RuntimeError("the client was closed during the call") from None
        except BaseException:
            future.cancel()
            over.wait(CANCEL_SECONDS)
            raise

    def iterate(self, generator: AsyncGenerator[T, None]) -> Iterator[T]:
        """The generator's values; it is closed when the iteration ends, wherever that is."""
        try:
            while True:
                try:
                    value = self.run(_next(generator))
                except StopAsyncIteration:
                    return
                yield value
        finally:
            if self._end.alive:
                # Nobody waits for it: the garbage collector may end an iteration, on whatever thread it runs.
                asyncio.run_coroutine_threadsafe(_close(generator), self._loop)

    def close(self, before: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Runs `before` and ends the thread; the second time, nothing."""
        if self._end.alive:
            if before is not None:
                self.run(before())
            self._end()


async def _next(generator: AsyncGenerator[T, None]) -> T:
    return await anext(generator)


async def _close(generator: AsyncGenerator[T, None]) -> None:
    await generator.aclose()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    async def cancel_all() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await loop.shutdown_asyncgens()

    if threading.current_thread() is thread:  # the garbage collector may run on any thread
        loop.stop()
        return
    asyncio.run_coroutine_threadsafe(cancel_all(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
