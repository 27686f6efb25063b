"""`cola.v1.Models`: convert, call, translate."""

from typing import Any

import grpc

from cola_common import convert
from cola_common.rpc.status import translated
from cola_common.wire import models_pb2, models_pb2_grpc
from cola_server.rpc.backend import Pending, blocking

Context = grpc.aio.ServicerContext[Any, Any]


class Models(models_pb2_grpc.ModelsServicer):
    """See the proto."""

    def __init__(self, backend: Pending) -> None:
        self._backend = backend

    async def List(  # noqa: N802 - gRPC's name
        self, request: models_pb2.ListModelsRequest, context: Context
    ) -> models_pb2.ListModelsResponse:
        async with translated(context):
            jobs = await self._backend.jobs(context)
            cards = await blocking(jobs.models)
            return models_pb2.ListModelsResponse(data=[convert.model_to_wire(card) for card in cards])
