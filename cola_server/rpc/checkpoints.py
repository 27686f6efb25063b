"""`cola.v1.Checkpoints`: convert, call, translate."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import xxhash

from cola_common import convert
from cola_common.rpc.status import translated
from cola_common.wire import checkpoints_pb2, checkpoints_pb2_grpc
from cola_server.rpc.backend import Pending, blocking
from cola_server.rpc.files import page, read_chunks

Context = grpc.aio.ServicerContext[Any, Any]


class Checkpoints(checkpoints_pb2_grpc.CheckpointsServicer):
    """See the proto."""

    def __init__(self, backend: Pending) -> None:
        self._backend = backend

    async def List(  # noqa: N802 - gRPC's name
        self, request: checkpoints_pb2.ListCheckpointsRequest, context: Context
    ) -> checkpoints_pb2.ListCheckpointsResponse:
        async with translated(context):
            jobs = await self._backend.jobs(context)
            size = page(request.limit)
            after = request.after if request.HasField("after") else None
            found = await blocking(jobs.checkpoints, request.job, after, size + 1)
            return checkpoints_pb2.ListCheckpointsResponse(
                data=[convert.checkpoint_to_wire(each) for each in found[:size]], has_more=len(found) > size
            )

    async def Download(  # noqa: N802
        self, request: checkpoints_pb2.DownloadCheckpointRequest, context: Context
    ) -> AsyncIterator[checkpoints_pb2.CheckpointChunk]:
        async with translated(context):
            jobs = await self._backend.jobs(context)
            if not request.merged:
                async for chunk in _chunks(await blocking(jobs.checkpoint_files, request.id)):
                    yield chunk
                return
            merged = jobs.merged_files(request.id)
            files = await blocking(merged.__enter__)
            try:
                async for chunk in _chunks(files):
                    yield chunk
            finally:
                await blocking(merged.__exit__, None, None, None)


async def _chunks(files: list[tuple[str, Path]]) -> AsyncIterator[checkpoints_pb2.CheckpointChunk]:
    for name, path in files:
        size = path.stat().st_size
        async for offset, data in read_chunks(path):
            yield checkpoints_pb2.CheckpointChunk(
                path=name,
                file_bytes=size,
                offset=offset,
                data=data,
                checksum=xxhash.xxh3_64_intdigest(data),
            )
