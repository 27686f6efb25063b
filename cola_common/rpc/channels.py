"""Channels to a server: TLS, the token, and the limits."""

from collections.abc import Callable
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
    """A channel to the server at `address` (`HOST:PORT`), for the event loop that runs now. It connects when it is used.

    Args:
        token: shown with every call, apart from streams in both directions: `cola_common.rpc.duplex.attend` takes its own.
        root_certificates: a PEM file; given, the channel is TLS and the server's certificate must lead to one of these.
        insecure: allows plaintext to an address that is not loopback.

    Raises: `ColaError(INVALID_CONFIG)` for a wrong address, a file that cannot be read, or plaintext that is not allowed.
    """
    local = is_loopback(address)
    interceptors = [] if token is None else [_UnaryUnary(token), _UnaryStream(token), _StreamUnary(token)]
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


# gRPC files an interceptor under one kind of call by its class, hence three classes with one body. Streams in both
# directions have none: an intercepted one reads its requests from a queue, which is slower and loses errors.


class _Token:
    def __init__(self, token: str) -> None:
        self._header = auth.header(token)

    async def _call(self, continuation: Callable[..., Any], details: grpc.aio.ClientCallDetails, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), self._header)
        return await continuation(details._replace(metadata=metadata), request)


class _UnaryUnary(_Token, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    intercept_unary_unary = _Token._call


class _UnaryStream(_Token, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
    intercept_unary_stream = _Token._call


class _StreamUnary(_Token, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[misc]
    intercept_stream_unary = _Token._call
