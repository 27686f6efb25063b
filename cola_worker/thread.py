"""The trainer's own thread: numerics stay off the event loop, and heartbeats tell of them and not of the loop."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from cola_common.messages import Credit, Revoke, ToServer, payload
from cola_worker.trainer import ToTrainer, Trainer


class TrainerThread:
    """Feeds a trainer with messages in the order of `put`. All methods belong to the event loop that made it.

    `deliver` is called on the event loop with each answer.
    """

    def __init__(self, trainer: Trainer, deliver: Callable[[ToServer], None], *, backlog_bytes: int) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the thread has ended; with an exception, which can only be a defect, if that was not asked for."""
        self.progress = 0
        """Messages done."""
        self._loop = asyncio.get_running_loop()
        self._trainer = trainer
        self._deliver = deliver
        self._limit = backlog_bytes
        self._backlog = 0
        self._done = asyncio.Event()
        self._queue: queue.SimpleQueue[tuple[ToTrainer, float] | None] = queue.SimpleQueue()
        """Messages, each with the time at which it came."""
        self._busy_since: float | None = None
        # A daemon: a product that never ends must not keep a process alive that is to end.
        threading.Thread(target=self._run, name="trainer", daemon=True).start()

    @property
    def busy_seconds(self) -> float:
        """How long the message that is worked on has taken so far; 0 between messages."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    async def put(self, message: ToTrainer) -> None:
        """Queues a message, once no more than `backlog_bytes` of tensors wait before it: a server that sends more than
        it may is slowed down by the transport, and takes no memory here.
        """
        came = time.monotonic()
        while self._backlog > self._limit:
            self._done.clear()
            await self._done.wait()
        self._backlog += _size(message)
        self._queue.put((message, came))

    async def stop(self, seconds: float) -> bool:
        """Lets the message that is worked on end.

        Of the messages that wait, those that take a job away are still followed. The others ask for answers, and there
        is nobody left to have them.

        Returns: whether that took no longer than `seconds`.
        """
        waiting = []
        while not self._queue.empty():
            waiting.append(self._queue.get_nowait())
        for item in waiting:
            if item is not None and isinstance(item[0], Revoke):
                self._queue.put(item)
        self._queue.put(None)
        await asyncio.wait({self.ended}, timeout=seconds)
        return self.ended.done()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while (item := self._queue.get()) is not None:
                message, came = item
                self._busy_since = time.monotonic()
                answers = self._trainer.handle(message)
                self._busy_since = None
                there = time.monotonic() - came
                told = [replace(a, seconds=there) if isinstance(a, Credit) else a for a in answers]
                self._loop.call_soon_threadsafe(self._finished, _size(message), told)
                del item, message, answers, told  # a capture's buffer is not to live until the next message comes
        except BaseException as raised:  # noqa: BLE001 - nothing is swallowed: whoever awaits `ended` gets it
            error = raised
        self._loop.call_soon_threadsafe(self._end, error)

    def _finished(self, size: int, answers: Sequence[ToServer]) -> None:
        self.progress += 1
        self._backlog -= size
        self._done.set()
        for answer in answers:
            self._deliver(answer)

    def _end(self, error: BaseException | None) -> None:
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


def _size(message: ToTrainer) -> int:
    return sum(tensor.nbytes for tensor in payload(message))
