"""One connected life of a worker: from Hello to a Goodbye, or to a stream that breaks."""

import asyncio
import math
import time
from contextlib import suppress

import structlog

from cola_common.errors import ColaError, Reason
from cola_common.messages import (
    Ack,
    Assign,
    Capture,
    Drain,
    Draining,
    Heartbeat,
    Hello,
    NormTotal,
    Refusal,
    Revoke,
    SnapshotRequest,
    StepEnd,
    ToServer,
    ToWorker,
    Welcome,
)
from cola_common.rpc.duplex import Duplex, MessageRefused, StreamBroken, StreamClosed, StreamFinished
from cola_common.rpc.limits import MAX_MESSAGE_BYTES
from cola_worker.expected import Admission, violation
from cola_worker.shards import Shards
from cola_worker.thread import TrainerThread
from cola_worker.trainer import ToTrainer, Trainer, refuse

WELCOME_SECONDS = 10.0  # a server that takes a stream and then says nothing is no server
DRAIN_SECONDS = 20.0  # for the server to move the jobs: with the two below it stays within an orchestrator's usual 30
GOODBYE_SECONDS = 1.0
STOP_SECONDS = 8.0  # for the message that is worked on, where the process is to end
HANG_SECONDS = 60.0  # for the same where it is not: as long as a server waits, who must not be lost for being slow

log = structlog.get_logger(__name__)


class Session:
    """To be run once. `welcomed` tells afterwards whether the server let the worker in."""

    def __init__(self, duplex: Duplex[ToServer, ToWorker], hello: Hello, shards: Shards) -> None:
        self.welcomed = False
        self._duplex = duplex
        self._hello = hello
        self._shards = shards
        self._outgoing: asyncio.Queue[ToServer] = asyncio.Queue()
        self._leaving = asyncio.Event()
        self._listened = 0.0
        """Since when this side has taken what the server says; infinity while it does not."""

    @property
    def draining(self) -> bool:
        """Whether this side or the server has asked for the worker to leave."""
        return self._leaving.is_set()

    def drain(self) -> None:
        """Asks the server to take the worker's jobs away; the session ends when it has, or after `DRAIN_SECONDS`."""
        self._leaving.set()

    async def run(self) -> None:
        """Returns when the server has said Goodbye, or when the worker has left.

        Raises: `StreamBroken`, also where nothing was heard from the server for the lease, when it has given the jobs
        to others; `ColaError(PROTOCOL_VIOLATION)` for a server that cannot be followed;
        `ColaError(INTERNAL)` when the trainer hangs, after which only another process can go on.
        """
        try:
            await self._attend(await self._enter())
        except (StreamFinished, StreamClosed) as end:
            log.info("the session is over", said=str(end))
        finally:
            self._duplex.close()

    async def _enter(self) -> Welcome:
        # Beside each other: a server that refuses the stream may do so before it reads, and says why to who receives.
        sending = asyncio.create_task(self._duplex.send(self._hello))
        try:
            async with asyncio.timeout(WELCOME_SECONDS):
                welcome = await self._duplex.receive()
        except TimeoutError:
            raise violation(f"no Welcome within {WELCOME_SECONDS:g} seconds") from None
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        if not isinstance(welcome, Welcome):
            raise violation(f"{type(welcome).__name__} in place of a Welcome")
        self.welcomed = True
        log.info("attending", worker=self._hello.worker, session=welcome.session, owned=len(self._hello.owned))
        return welcome

    async def _attend(self, welcome: Welcome) -> None:
        memory, window = self._hello.capacity.memory_bytes, welcome.window_bytes
        admission = Admission(memory_bytes=memory, window_bytes=window)
        self._duplex.admit = admission.admit
        self._duplex.chunk_bytes = max(1, min(welcome.chunk_bytes, MAX_MESSAGE_BYTES // 2))
        thread = TrainerThread(Trainer(self._shards), self._outgoing.put_nowait, backlog_bytes=window)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write())
                tasks.create_task(self._beat(welcome.heartbeat_seconds, thread))
                tasks.create_task(self._leave())
                tasks.create_task(self._fence(welcome.lease_seconds))
                tasks.create_task(_watch(thread))
                await self._read(admission, thread)
        except BaseExceptionGroup as group:
            end = group.exceptions[0]  # the first to fail is the reason; it ended the others
            log.info("the session ends", problem=str(end))  # now: a trainer that hangs is waited for
            raise end from None
        finally:
            self._duplex.close()  # the server need not wait for the trainer to know
            if not await self._stop(thread):
                raise ColaError(Reason.INTERNAL, problem="the trainer hangs; start this worker anew")

    async def _read(self, admission: Admission, thread: TrainerThread) -> None:
        while True:
            try:
                message = await self._duplex.receive()
            except MessageRefused as refused:
                self._refuse(refused)
                continue
            match message:
                case Revoke():
                    admission.forget(message.job, message.epoch)
                    await self._hand(message, thread)
                case Assign() | Capture() | StepEnd() | NormTotal() | Ack() | SnapshotRequest():
                    await self._hand(message, thread)
                case Refusal():
                    log.warning("the server refused", job=message.job, reason=message.reason, problem=message.message)
                case Drain():
                    self.drain()
                case Heartbeat():
                    pass  # it was heard
                case _:
                    raise violation(f"an unexpected {type(message).__name__}")

    async def _hand(self, message: ToTrainer, thread: TrainerThread) -> None:
        self._listened = math.inf  # a trainer that is behind makes a server wait that has much to say
        await thread.put(message)
        self._listened = time.monotonic()

    def _refuse(self, refused: MessageRefused) -> None:
        """Answers in the trainer's place to what it will not see."""
        assert isinstance(refused.message, Assign | Capture)  # nothing else of a server's has tensors
        for answer in refuse(refused.message, refused.error):
            self._outgoing.put_nowait(answer)

    async def _write(self) -> None:
        while True:
            await self._duplex.send(await self._outgoing.get())

    async def _beat(self, seconds: float, thread: TrainerThread) -> None:
        while True:
            await self._duplex.send(Heartbeat(thread.progress, thread.busy_seconds))
            await asyncio.sleep(seconds)

    async def _fence(self, seconds: float) -> None:
        """Ends the session when the lease is over. What the server would still be told then is of no use to it."""
        while True:
            left = max(self._duplex.heard, self._listened) + seconds - time.monotonic()
            if left <= 0:
                problem = f"it was silent for {seconds:g} s"
                raise StreamBroken(ColaError(Reason.UNAVAILABLE, address="the server", problem=problem))
            await asyncio.sleep(min(left, seconds))

    async def _leave(self) -> None:
        await self._leaving.wait()
        log.info("draining")
        self._outgoing.put_nowait(Draining())
        await asyncio.sleep(DRAIN_SECONDS)
        log.warning("the server has not taken all jobs away; leaving", seconds=DRAIN_SECONDS)
        with suppress(TimeoutError):  # the server ends the stream first, as a rule
            async with asyncio.timeout(GOODBYE_SECONDS):
                await self._duplex.goodbye("drained")
                await asyncio.sleep(GOODBYE_SECONDS)
        self._duplex.close()

    async def _stop(self, thread: TrainerThread) -> bool:
        """Returns: whether the trainer has ended, in the time that there is."""
        stopping = asyncio.ensure_future(thread.stop(HANG_SECONDS))
        leaving = asyncio.ensure_future(self._leaving.wait())
        await asyncio.wait({stopping, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        await asyncio.wait({stopping}, timeout=STOP_SECONDS)
        return thread.ended.done()


async def _watch(thread: TrainerThread) -> None:
    """Raises what ended the thread before it was stopped."""
    await asyncio.wait({thread.ended})
    thread.ended.result()
