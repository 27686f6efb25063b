"""One connected life of a worker: from Hello to a Goodbye, or to a stream that breaks."""

import asyncio

import structlog

from cola_common.errors import ColaError, Reason
from cola_common.messages import (
    Drain,
    Draining,
    Heartbeat,
    Hello,
    Refusal,
    Revoke,
    ToServer,
    ToWorker,
    Welcome,
)
from cola_common.rpc.duplex import Duplex, MessageRefused, StreamBroken, StreamEnded
from cola_common.rpc.limits import MAX_MESSAGE_BYTES
from cola_worker.expected import Admission, violation
from cola_worker.shards import Shards
from cola_worker.thread import TrainerThread
from cola_worker.trainer import ToTrainer, Trainer, refuse

WELCOME_SECONDS = 10.0  # a server that takes a stream and then says nothing is no server
DRAIN_SECONDS = 20.0  # for the server to move the jobs; with STOP_SECONDS it stays within an orchestrator's usual 30
STOP_SECONDS = 8.0  # for the message that is worked on, and for writing what is kept

log = structlog.get_logger(__name__)


class Session:
    """`run` it once. `welcomed` tells afterwards whether the server let the worker in."""

    def __init__(self, duplex: Duplex[ToServer, ToWorker], hello: Hello, shards: Shards) -> None:
        self.welcomed = False
        self._duplex = duplex
        self._hello = hello
        self._shards = shards
        self._outgoing: asyncio.Queue[ToServer] = asyncio.Queue()
        self._leave = asyncio.Event()

    def drain(self) -> None:
        """Asks the server to take the worker's jobs away, and ends the session when it has, or after `DRAIN_SECONDS`."""
        self._leave.set()

    async def run(self) -> None:
        """Returns when the server has said Goodbye, or when the worker is drained.

        Raises: `StreamEnded` when the stream broke; `ColaError` for a server that is not understood.
        """
        welcome = await self._enter()
        admission = Admission(memory_bytes=self._hello.capacity.memory_bytes, window_bytes=welcome.window_bytes)
        self._duplex.admit = admission.admit
        self._duplex.chunk_bytes = max(1, min(welcome.chunk_bytes, MAX_MESSAGE_BYTES // 2))
        thread = TrainerThread(Trainer(self._shards), self._outgoing.put_nowait, backlog_bytes=welcome.window_bytes)
        try:
            await self._until_over(welcome, admission, thread)
        finally:
            stopped = await thread.stop(STOP_SECONDS)
            self._duplex.close()
        if not stopped:
            raise ColaError(Reason.INTERNAL, problem="the trainer does not come to an end; this process cannot go on")

