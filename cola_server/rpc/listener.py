"""The listening socket with all services on it."""

import resource
from collections.abc import Callable
from pathlib import Path

import grpc

from cola_common.errors import ColaError, Reason
from cola_common.messages import Heartbeat
from cola_common.rpc.auth import Access, TokenAuth
from cola_common.rpc.fleet import add_fleet
from cola_common.rpc.limits import SERVER_OPTIONS
from cola_common.wire import checkpoints_pb2_grpc, files_pb2_grpc, jobs_pb2_grpc, models_pb2_grpc, workers_pb2_grpc
from cola_server.rpc.backend import Fleet, Pending
from cola_server.rpc.checkpoints import Checkpoints
from cola_server.rpc.files import Files
from cola_server.rpc.fleet import FleetDoor
from cola_server.rpc.jobs import Jobs
from cola_server.rpc.models import Models
from cola_server.rpc.workers import Workers


class Listener:
    """A gRPC server. Calls about jobs wait until `backend` is set."""

    def __init__(
        self,
        fleet: Fleet,
        backend: Pending,
        pulse: Callable[[], Heartbeat],
        *,
        access: Access,
        tls_cert: Path | None,
        tls_key: Path | None,
    ) -> None:
        self._tls = (tls_cert, tls_key)
        self._server = grpc.aio.server(interceptors=[TokenAuth(access)], options=SERVER_OPTIONS)
        files_pb2_grpc.add_FilesServicer_to_server(Files(backend), self._server)
        jobs_pb2_grpc.add_JobsServicer_to_server(Jobs(backend), self._server)
        checkpoints_pb2_grpc.add_CheckpointsServicer_to_server(Checkpoints(backend), self._server)
        models_pb2_grpc.add_ModelsServicer_to_server(Models(backend), self._server)
        workers_pb2_grpc.add_WorkersServicer_to_server(Workers(fleet), self._server)
        add_fleet(self._server, FleetDoor(fleet, pulse).attend)

    async def start(self, address: str) -> str:
        """Listens. Returns: the bound address, which tells the port where 0 was asked for.

        Raises: `ColaError(INVALID_CONFIG)`.
        """
        cert, key = self._tls
        # Each connection takes a descriptor, and many systems give a process 1,024 until it asks for what it may have.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        try:
            if cert is not None and key is not None:
                pair = (key.read_bytes(), cert.read_bytes())
                port = self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
            else:
                port = self._server.add_insecure_port(address)
        except (OSError, RuntimeError) as error:
            raise ColaError(Reason.INVALID_CONFIG, setting="listen", problem=f"{address}: {error}") from None
        await self._server.start()
        return f"{address.rpartition(':')[0]}:{port}"

    async def stop(self, grace: float) -> None:
        """Takes no more calls, and gives those under way `grace` seconds."""
        await self._server.stop(grace)
