"""`cola.v1.Workers`: convert, call, translate."""

from typing import Any

import grpc

from cola_common import convert
from cola_common.rpc.status import translated
from cola_common.wire import types_pb2, workers_pb2, workers_pb2_grpc
from cola_server.rpc.backend import Fleet

Context = grpc.aio.ServicerContext[Any, Any]


class Workers(workers_pb2_grpc.WorkersServicer):
    """See the proto."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def List(  # noqa: N802 - gRPC's name
        self, request: workers_pb2.ListWorkersRequest, context: Context
    ) -> workers_pb2.ListWorkersResponse:
        async with translated(context):
            return workers_pb2.ListWorkersResponse(data=[convert.worker_to_wire(card) for card in self._fleet.cards()])

    async def Drain(  # noqa: N802
        self, request: workers_pb2.DrainWorkerRequest, context: Context
    ) -> types_pb2.WorkerCard:
        async with translated(context):
            return convert.worker_to_wire(self._fleet.drain(request.id))
