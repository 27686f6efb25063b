"""Checkpoints: list and download."""

import asyncio
import os
from contextlib import aclosing
from pathlib import Path
from typing import final

from cola_common.client.connection import Connection, page_size
from cola_common.client.downloads import IncomingFolder
from cola_common.client.pages import AsyncPage
from cola_common.convert import checkpoint_from_wire
from cola_common.jobs import Checkpoint
from cola_common.wire import checkpoints_pb2
from cola_common.wire.checkpoints_pb2_grpc import CheckpointsStub


@final
class AsyncCheckpoints:
    """`client.fine_tuning.jobs.checkpoints`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = CheckpointsStub(connection.channel)

    async def list(self, job_id: str, *, after: str | None = None, limit: int | None = None) -> AsyncPage[Checkpoint]:
        """A job's checkpoints, `limit` a page, from behind the checkpoint `after`. Raises: `ColaError(UNKNOWN_JOB)`."""
        request = checkpoints_pb2.ListCheckpointsRequest(job=job_id, after=after, limit=page_size(limit))
        answer = await self._connection.call(self._stub.List, request)
        data = [checkpoint_from_wire(checkpoint) for checkpoint in answer.data]
        if not answer.has_more or not data:
            return AsyncPage(data)
        return AsyncPage(data, lambda: self.list(job_id, after=data[-1].id, limit=limit))

    async def download(self, checkpoint_id: str, folder: str | os.PathLike[str], *, merged: bool = False) -> Path:
        """Downloads an adapter to a new folder, which appears when all of it is there, and returns the folder.

        Of a family that PEFT knows, `peft.PeftModel.from_pretrained` loads it. With `merged` it is the whole base model
        with the adapter in its weights, for `from_pretrained` of transformers.

        Raises: `ColaError(UNKNOWN_CHECKPOINT)`, `ColaError(CHECKSUM_MISMATCH)`, `ColaError(NOT_MERGEABLE)`; `OSError`,
            such as `FileExistsError` for a folder that is not empty.
        """
        return await self._connection.repeat(lambda: self._download(checkpoint_id, Path(folder), merged))

    async def _download(self, checkpoint_id: str, target: Path, merged: bool) -> Path:
        incoming = await asyncio.to_thread(IncomingFolder, target)
        try:
            request = checkpoints_pb2.DownloadCheckpointRequest(id=checkpoint_id, merged=merged)
            async with aclosing(self._connection.stream(self._stub.Download, request)) as chunks:
                async for c in chunks:
                    await asyncio.to_thread(incoming.take, c.path, c.file_bytes, c.offset, c.data, c.checksum)
            return await asyncio.to_thread(incoming.finish)
        finally:
            incoming.discard()
