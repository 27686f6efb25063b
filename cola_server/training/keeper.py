"""Takes snapshots of a job under one epoch while the job goes on.

The request goes out between two steps, the server's own copy is made there too; the workers' halves come while the next
step runs, and the file is written off the event loop.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from cola_common import failpoints, messages
from cola_common.adapters import Parameters
from cola_common.errors import ColaError, Reason
from cola_common.tensor import decode, digest
from cola_server.fleet import Exchange, WorkerBlamed
from cola_server.training.snapshots import Snapshot, Snapshots


class Keeper:
    """Belongs to the event loop."""

    def __init__(self, exchange: Exchange, snapshots: Snapshots) -> None:
        self._exchange = exchange
        self._snapshots = snapshots
        self._task: asyncio.Task[None] | None = None
        self._writing: asyncio.Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a snapshot is under way."""
        return self._task is not None

    def begin(self, parameters: Sequence[Parameters], trained_tokens: int) -> None:
        """Asks the workers for the state that belongs to `parameters`, the server's copy as it is between two steps."""
        step = self._exchange.request_snapshot()
        failpoints.hit("snapshot.requested")
        self._task = asyncio.create_task(self._take(step, parameters, trained_tokens))

    def look(self) -> None:
        """Takes note of a snapshot that has been taken meanwhile. Raises: as `wait`."""
        if self._task is not None and self._task.done():
            task, self._task = self._task, None
            task.result()

    async def wait(self) -> None:
        """Waits for the snapshot that is under way, if one is.

        Raises: `WorkerLost`, `WorkerBlamed`; `ColaError(STORAGE_FULL)`.
        """
        if self._task is not None:
            await asyncio.wait([self._task])
            self.look()

    async def close(self) -> None:
        """Gives up what is waited for, and waits for what is being written."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError, Exception):  # the attempt has its end already
                await self._task
        if self._writing is not None:
            await asyncio.wait([self._writing])

    async def _take(self, step: int, parameters: Sequence[Parameters], trained_tokens: int) -> None:
        halves = await self._exchange.snapshots()
        work = asyncio.to_thread(self._write, step, parameters, trained_tokens, halves)
        self._writing = asyncio.ensure_future(work)
        await asyncio.shield(self._writing)

    def _write(
        self,
        step: int,
        parameters: Sequence[Parameters],
        trained_tokens: int,
        halves: Sequence[messages.Snapshot],
    ) -> None:
        optimizer: list[Parameters] = [{} for _ in parameters]
        digests = [""] * len(parameters)
        for worker, half in zip(self._exchange.workers, halves, strict=True):
            try:
                self._unpack(half, parameters, optimizer, digests)
            except ColaError as error:
                raise WorkerBlamed(worker, step - 1, error) from None
        epoch = self._exchange.epoch
        self._snapshots.write(Snapshot(epoch, step, trained_tokens, list(parameters), optimizer, digests))

    @staticmethod
    def _unpack(
        half: messages.Snapshot,
        parameters: Sequence[Parameters],
        optimizer: list[Parameters],
        digests: list[str],
    ) -> None:
        for (index, entry), tensor in zip(half.names, half.tensors, strict=True):
            optimizer[index][entry] = decode(tensor, what=f"{entry} of shard {index}")
        for index, told in half.digests:
            digests[index] = digest.state({**parameters[index], **optimizer[index]})
            if digests[index] != told:
                raise ColaError(Reason.DIGEST_MISMATCH, job=half.job, step=half.step)
