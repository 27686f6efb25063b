"""Channels to a server: TLS, the token, and the limits."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from cola_common.errors import ColaError, Reason
from cola_common.rpc import auth
from cola_common.rpc.addresses import is_loopback
from cola_common.rpc.limits import CHANNEL_OPTIONS


def connect(
    address: str,
    *,
    token: str | None = None,
    root_certificates: str | Path | None = None,
    insecure: bool = False,
) -> grpc.aio.Channel:
    """A channel to the server at `address`, for the event loop that runs now. It connects when it is used.

    Args:
        address: `HOST:PORT`.
        token: shown with every call, but not with streams in both directions: `duplex.attend` takes its own.
        root_certificates: a PEM file; given, the channel is TLS and the server's certificate must lead to one of them.
        insecure: allows plaintext to an address that is not loopback.

    Raises: `ColaError(INVALID_CONFIG)` for a wrong address, a file that cannot be read, or plaintext not allowed.
    """
    local = is_loopback(address)
    interceptors: list[grpc.aio.ClientInterceptor] = []
    if token is not None:
        interceptors = [_UnaryUnary(token), _UnaryStream(token), _StreamUnary(token)]
    if root_certificates is not None:
        credentials = grpc.ssl_channel_credentials(_read(root_certificates))
        return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS, interceptors=interceptors)
    if not local and not insecure:
        raise ColaError(
            Reason.INVALID_CONFIG,
            setting="root_certificates",
            problem=f"{address} is not loopback: give the server's root certificates, or ask for insecure",
        )
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS, interceptors=interceptors)


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ColaError(Reason.INVALID_CONFIG, setting="root_certificates", problem=error) from None


# gRPC files an interceptor under one kind of call by its class, hence three classes that do one thing. Streams in both
# directions have none: an intercepted one reads its requests from a queue, which is slower and loses errors.

Continuation = Callable[[grpc.aio.ClientCallDetails, Any], Awaitable[Any]]


class _Token:
    def __init__(self, token: str) -> None:
        self._header = auth.header(token)

    def _with(self, call: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        metadata = grpc.aio.Metadata(*(call.metadata or ()), self._header)
        return grpc.aio.ClientCallDetails(call.method, call.timeout, metadata, call.credentials, call.wait_for_ready)


class _UnaryUnary(_Token, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Continuation, client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(self._with(client_call_details), request)


class _UnaryStream(_Token, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Continuation, client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(self._with(client_call_details), request)


class _StreamUnary(_Token, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Continuation, client_call_details: grpc.aio.ClientCallDetails, request_iterator: Any
    ) -> Any:
        return await continuation(self._with(client_call_details), request_iterator)
