"""Files: upload, list, read, delete."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal, final

from cola_common.client.connection import Connection, new_key, page_size
from cola_common.client.pages import AsyncPage
from cola_common.client.uploads import FileSource, Upload, opened
from cola_common.convert import file_from_wire
from cola_common.errors import ColaError, Reason
from cola_common.jobs import FileObject
from cola_common.rpc.limits import CHUNK_BYTES
from cola_common.wire import files_pb2
from cola_common.wire.files_pb2_grpc import FilesStub

Purpose = Literal["fine-tune", "adapter"]


@final
class AsyncFiles:
    """`client.files`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = FilesStub(connection.channel)

    async def create(self, *, file: FileSource, purpose: Purpose, idempotency_key: str | None = None) -> FileObject:
        """Uploads a file.

        Args:
            file: a path, bytes, (name, bytes), a binary file that can seek, or the folder of an adapter.
            purpose: `"fine-tune"` for JSONL, `"adapter"` for an adapter to continue from.
            idempotency_key: the same key finds the same file, even from another process; None makes a new one.

        Raises: `OSError` for a file that cannot be read; `ColaError`, such as INVALID_FILE, UNSAFE_FORMAT and
            FILE_TOO_LARGE.
        """
        key = idempotency_key or new_key()
        with opened(file) as upload:
            return await self._connection.repeat(lambda: self._send(upload, purpose, key))

    async def _send(self, upload: Upload, purpose: Purpose, key: str) -> FileObject:
        digest = hashlib.sha256()

        async def requests() -> AsyncGenerator[files_pb2.CreateFileRequest, None]:
            header = files_pb2.CreateFileHeader(filename=upload.name, purpose=purpose, idempotency_key=key)
            yield files_pb2.CreateFileRequest(header=header)
            await asyncio.to_thread(upload.file.seek, upload.start)
            while chunk := await asyncio.to_thread(upload.file.read, CHUNK_BYTES):
                digest.update(chunk)
                yield files_pb2.CreateFileRequest(chunk=chunk)

        file = file_from_wire(await self._connection.send(self._stub.Create, requests()))
        if file.digest != digest.hexdigest():
            raise ColaError(Reason.CHECKSUM_MISMATCH, what=upload.name)
        return file

    async def retrieve(self, file_id: str) -> FileObject:
        """A file's record. Raises: `ColaError(UNKNOWN_FILE)`."""
        request = files_pb2.RetrieveFileRequest(id=file_id)
        return file_from_wire(await self._connection.call(self._stub.Retrieve, request))

    async def list(self, *, after: str | None = None, limit: int | None = None) -> AsyncPage[FileObject]:
        """Files, `limit` a page, from behind the file `after`."""
        request = files_pb2.ListFilesRequest(after=after, limit=page_size(limit))
        answer = await self._connection.call(self._stub.List, request)
        data = [file_from_wire(file) for file in answer.data]
        if not answer.has_more or not data:
            return AsyncPage(data)
        return AsyncPage(data, lambda: self.list(after=data[-1].id, limit=limit))

    async def delete(self, file_id: str) -> None:
        """Deletes a file. Raises: `ColaError(UNKNOWN_FILE)`; `ColaError(FILE_IN_USE)` while a job needs it."""
        await self._connection.call(self._stub.Delete, files_pb2.DeleteFileRequest(id=file_id), patience=0)

    async def content(self, file_id: str) -> bytes:
        """A file's bytes. Raises: `ColaError(UNKNOWN_FILE)`."""

        async def attempt() -> bytes:
            parts = self._connection.stream(self._stub.Content, files_pb2.FileContentRequest(id=file_id))
            async with aclosing(parts):
                return b"".join([part.data async for part in parts])

        return await self._connection.repeat(attempt)
