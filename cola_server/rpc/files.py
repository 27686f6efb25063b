"""`cola.v1.Files`: convert, call, translate."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from cola_common import convert
from cola_common.errors import ColaError, Reason
from cola_common.rpc.limits import CHUNK_BYTES
from cola_common.rpc.status import translated
from cola_common.wire import files_pb2, files_pb2_grpc, types_pb2
from cola_server.rpc.backend import Pending, blocking

Context = grpc.aio.ServicerContext[Any, Any]
PAGE = 20
MAX_PAGE = 100


def page(limit: int) -> int:
    """How many records a page has that was asked for with `limit`; 0 means the default."""
    return min(limit or PAGE, MAX_PAGE)


async def read_chunks(path: Path) -> AsyncIterator[tuple[int, bytes]]:
    """A file's chunks with their offsets; an empty file has one empty chunk."""
    with path.open("rb") as file:
        offset = 0
        while (data := await blocking(file.read, CHUNK_BYTES)) or not offset:
            yield offset, data
            if not data:
                return
            offset += len(data)


class Files(files_pb2_grpc.FilesServicer):
    """See the proto."""

    def __init__(self, backend: Pending) -> None:
        self._backend = backend

    async def Create(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[files_pb2.CreateFileRequest], context: Context
    ) -> types_pb2.FileObject:
        async with translated(context):
            jobs = await self._backend.jobs(context)
            first = await anext(aiter(request_iterator), None)
            if first is None or first.WhichOneof("part") != "header":
                raise ColaError(Reason.PROTOCOL_VIOLATION, problem="a file begins with its header")
            header = first.header
            upload = await blocking(jobs.upload, header.filename, header.purpose, header.idempotency_key or None)
            with upload:
                async for request in request_iterator:
                    if request.WhichOneof("part") != "chunk":
                        raise ColaError(Reason.PROTOCOL_VIOLATION, problem="a file has one header")
                    await blocking(upload.write, request.chunk)
                return convert.file_to_wire(await blocking(upload.finish))

    async def Retrieve(  # noqa: N802
        self, request: files_pb2.RetrieveFileRequest, context: Context
    ) -> types_pb2.FileObject:
        async with translated(context):
            jobs = await self._backend.jobs(context)
            return convert.file_to_wire(await blocking(jobs.file, request.id))

    async def List(  # noqa: N802
        self, request: files_pb2.ListFilesRequest, context: Context
    ) -> files_pb2.ListFilesResponse:
        async with translated(context):
            jobs = await self._backend.jobs(context)
            size = page(request.limit)
            after = request.after if request.HasField("after") else None
            found = await blocking(jobs.files, after, size + 1)
            return files_pb2.ListFilesResponse(
                data=[convert.file_to_wire(file) for file in found[:size]], has_more=len(found) > size
            )

    async def Delete(  # noqa: N802
        self, request: files_pb2.DeleteFileRequest, context: Context
    ) -> files_pb2.DeleteFileResponse:
        async with translated(context):
            jobs = await self._backend.jobs(context)
            await blocking(jobs.delete_file, request.id)
            return files_pb2.DeleteFileResponse()

    async def Content(  # noqa: N802
        self, request: files_pb2.FileContentRequest, context: Context
    ) -> AsyncIterator[files_pb2.FileChunk]:
        async with translated(context):
            jobs = await self._backend.jobs(context)
            async for _, data in read_chunks(await blocking(jobs.file_path, request.id)):
                yield files_pb2.FileChunk(data=data)
