"""What a server has: base models and workers."""

from typing import final

from cola_common.client.connection import Connection
from cola_common.client.pages import AsyncPage
from cola_common.convert import model_from_wire, worker_from_wire
from cola_common.jobs import ModelCard, WorkerCard
from cola_common.wire import models_pb2, workers_pb2
from cola_common.wire.models_pb2_grpc import ModelsStub
from cola_common.wire.workers_pb2_grpc import WorkersStub


@final
class AsyncModels:
    """`client.models`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = ModelsStub(connection.channel)

    async def list(self) -> AsyncPage[ModelCard]:
        """The base models that jobs can name, all on one page."""
        answer = await self._connection.call(self._stub.List, models_pb2.ListModelsRequest())
        return AsyncPage([model_from_wire(model) for model in answer.data])


@final
class AsyncWorkers:
    """`client.workers`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = WorkersStub(connection.channel)

    async def list(self) -> AsyncPage[WorkerCard]:
        """The workers that the server knows, all on one page."""
        answer = await self._connection.call(self._stub.List, workers_pb2.ListWorkersRequest())
        return AsyncPage([worker_from_wire(worker) for worker in answer.data])

    async def drain(self, worker_id: str) -> WorkerCard:
        """Empties a worker: its jobs go on elsewhere from the step that they are at. Draining twice is no error.

        Raises: `ColaError(UNKNOWN_WORKER)`.
        """
        request = workers_pb2.DrainWorkerRequest(id=worker_id)
        return worker_from_wire(await self._connection.call(self._stub.Drain, request))
