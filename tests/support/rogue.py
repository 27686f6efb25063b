"""A worker that trains as it should and then sends something else: over a real stream, in the test's own process."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from cola_common import ids
from cola_common.errors import ColaError
from cola_common.messages import PROTOCOL, Capacity, Delta, Heartbeat, Hello, Refusal, Snapshot, ToServer, Welcome
from cola_common.rpc.channels import connect
from cola_common.rpc.duplex import StreamEnded
from cola_common.rpc.fleet import attend
from cola_common.tensor import CODECS
from cola_worker.expected import REDUCTIONS
from cola_worker.shards import Shards
from cola_worker.trainer import Trainer

Corruption = Callable[[Delta], Delta | Refusal]


class Rogue:
    """Runs on a thread from `with` on. It says that it is fast, so that jobs come to it first."""

    def __init__(
        self,
        address: str,
        folder: Path,
        corrupt: Corruption,
        corrupt_half: Callable[[Snapshot], Snapshot] = lambda half: half,
    ) -> None:
        self.worker = ids.new("wkr")
        self.end: Exception | None = None
        """How its stream ended."""
        self.attending = threading.Event()
        self._address = address
        self._folder = folder
        self._corrupt = corrupt
        self._corrupt_half = corrupt_half
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self.attending.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    async def _run(self) -> None:
        async with connect(self._address) as channel:
            stream = attend(channel)
            stream.admit = lambda _message: None
            hello = Hello(
                protocol_min=PROTOCOL,
                protocol_max=PROTOCOL,
                worker=self.worker,
                boot=time.time_ns(),
                capacity=Capacity(cores=64, memory_bytes=1 << 40, device="cpu", gflops=1e9),
                codecs=CODECS,
                owned=(),
                reductions=REDUCTIONS,
            )
            await stream.send(hello)
            trainer = Trainer(Shards(self._folder))
            stopping = asyncio.create_task(asyncio.to_thread(self._stop.wait))
            try:
                while True:
                    receiving = asyncio.create_task(stream.receive())
                    await asyncio.wait([receiving, stopping], return_when=asyncio.FIRST_COMPLETED)
                    if not receiving.done():
                        receiving.cancel()
                        stream.close()
                        return
                    message = receiving.result()
                    if isinstance(message, Welcome):
                        self.attending.set()
                    elif not isinstance(message, Heartbeat | Refusal):
                        for answer in trainer.handle(message):  # type: ignore[arg-type]
                            await stream.send(self._corrupted(answer))
            except (StreamEnded, ColaError) as error:
                self.end = error
            finally:
                self._stop.set()
                await stopping

    def _corrupted(self, answer: ToServer) -> ToServer:
        if isinstance(answer, Delta):
            return self._corrupt(answer)
        return self._corrupt_half(answer) if isinstance(answer, Snapshot) else answer


def replace_first(delta: Delta, **fields: object) -> Delta:
    """The delta with fields of its first tensor changed."""
    first = dataclasses.replace(delta.tensors[0], **fields)  # type: ignore[arg-type]
    return dataclasses.replace(delta, tensors=(first, *delta.tensors[1:]))
