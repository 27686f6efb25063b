"""`Fleet.Attend` on gRPC: the worker's side, the server's side, and what each of them makes of an end."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from cola_common import convert
from cola_common.messages import ToServer, ToWorker
from cola_common.rpc import auth
from cola_common.rpc.duplex import Duplex, StreamBroken, StreamEnded, admit_small
from cola_common.rpc.status import from_rpc, translated
from cola_common.wire import fleet_pb2

_SERVICE, _METHOD = "cola.v1.Fleet", "Attend"

Context = grpc.aio.ServicerContext[Any, Any]
Attend = Callable[[Duplex[ToWorker, ToServer], Context], Awaitable[None]]


def attend(
    channel: grpc.aio.Channel, *, token: str | None = None, admit: Callable[[ToWorker], None] = admit_small
) -> Duplex[ToServer, ToWorker]:
    """A worker's stream to the server. A server that cannot be reached shows at the first `send` or `receive`."""
    metadata = () if token is None else (auth.header(token),)
    call: Any = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")(metadata=metadata)
    return Duplex(
        _WorkerSide(call),
        lambda message: convert.to_server_to_wire(message).SerializeToString(),
        lambda head: convert.to_worker_from_wire(fleet_pb2.FromServer.FromString(head)),
        admit,
    )


def add_fleet(server: grpc.aio.Server, attend: Attend) -> None:
    """Serves `Fleet.Attend`: `attend` runs for each worker's stream, which ends when it returns.

    A `ColaError` that it raises becomes the stream's status, and so does the error of a `StreamBroken`; any other
    `StreamEnded` may leave it too. A worker that goes away shows as `StreamBroken` in `receive` and `send` and in no
    other way: `attend` must do one of them, and is not cancelled.

    Its duplex admits as `admit_small` does, until `attend` sets another rule.
    """

    async def talk(context: Context) -> None:
        duplex = Duplex[ToWorker, ToServer](
            _ServerSide(context),
            lambda message: convert.to_worker_to_wire(message).SerializeToString(),
            lambda head: convert.to_server_from_wire(fleet_pb2.FromWorker.FromString(head)),
            admit_small,
        )
        async with translated(context):
            try:
                await attend(duplex, context)
            except StreamBroken as broken:
                if broken.error is not None:
                    raise broken.error from None
            except StreamEnded:
                pass

    async def handle(_requests: Any, context: Context) -> None:
        # gRPC cancels a handler whose peer has gone, at whatever it waits for. A task of its own lets `attend` finish
        # what it does, and learn of the end in one place; the cancellation itself must not be swallowed.
        talking = asyncio.create_task(talk(context))
        try:
            await asyncio.shield(talking)
        except asyncio.CancelledError:
            await asyncio.wait({talking})
            raise

    # Without (de)serializers: `frames` packs and unpacks envelopes itself.
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(handle)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),))


class _WorkerSide:
    def __init__(self, call: Any) -> None:
        self._call = call

    async def read(self) -> bytes | None:
        with self._named():
            envelope: bytes | object = await self._call.read()
        return envelope if isinstance(envelope, bytes) else None

    async def write(self, envelope: bytes) -> None:
        with self._named():
            await self._call.write(envelope)

    async def finish(self) -> None:
        with self._named():
            await self._call.done_writing()

    def close(self) -> None:
        self._call.cancel()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise StreamBroken(from_rpc(error)) from None
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            raise StreamBroken(None) from None
        except asyncio.CancelledError:
            # gRPC raises it in every task that waits for a call which was cancelled, not only in a task that was.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise StreamBroken(None) from None


class _ServerSide:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def read(self) -> bytes | None:
        try:
            envelope: bytes | object = await self._context.read()
        except grpc.aio.BaseError:
            raise StreamBroken(None) from None
        return envelope if isinstance(envelope, bytes) else None

    async def write(self, envelope: bytes) -> None:
        try:
            await self._context.write(envelope)
        except grpc.aio.BaseError:
            raise StreamBroken(None) from None

    async def finish(self) -> None:
        """A server's side ends with the handler."""

    def close(self) -> None:
        """As `finish`."""
