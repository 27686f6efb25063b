"""The client for asyncio."""

from pathlib import Path
from types import TracebackType
from typing import Self, final

from cola_common.client.catalogue import AsyncModels, AsyncWorkers
from cola_common.client.connection import Connection
from cola_common.client.files import AsyncFiles
from cola_common.client.jobs import AsyncJobs


@final
class AsyncFineTuning:
    """`client.fine_tuning`."""

    def __init__(self, connection: Connection, files: AsyncFiles) -> None:
        self.jobs = AsyncJobs(connection, files)


@final
class AsyncClient:
    """A server's files, jobs, models and workers. To be made on the event loop that uses it, and closed.

    Args:
        address: `HOST:PORT`.
        token: the client token of a server that asks for one.
        root_certificates: a PEM file; given, the connection is TLS.
        insecure: allows plaintext to an address that is not loopback.

    Raises: `ColaError(INVALID_CONFIG)`. The connection is made by the first call.
    """

    def __init__(
        self,
        address: str,
        token: str | None = None,
        root_certificates: str | Path | None = None,
        insecure: bool = False,
    ) -> None:
        self._connection = Connection(address, token=token, root_certificates=root_certificates, insecure=insecure)
        self.files = AsyncFiles(self._connection)
        self.fine_tuning = AsyncFineTuning(self._connection, self.files)
        self.models = AsyncModels(self._connection)
        self.workers = AsyncWorkers(self._connection)

    async def close(self) -> None:
        """Ends all calls and closes the connection."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
