"""Channels to a server: TLS and the limits. Tokens go with each call, see `cola_common.rpc.auth.header`."""

from pathlib import Path

import grpc

from cola_common.errors import ColaError, Reason
from cola_common.rpc.addresses import is_loopback
from cola_common.rpc.limits import CHANNEL_OPTIONS


def connect(
    address: str,
    *,
    root_certificates: str | Path | None = None,
    insecure: bool = False,
) -> grpc.aio.Channel:
    """A channel to the server at `address`, for the event loop that runs now. It connects when it is used.

    Args:
        address: `HOST:PORT`.
        root_certificates: a PEM file; given, the channel is TLS and the server's certificate must lead to one of them.
        insecure: allows plaintext to an address that is not loopback.

    Raises: `ColaError(INVALID_CONFIG)` for a wrong address, a file that cannot be read, or plaintext not allowed.
    """
    local = is_loopback(address)
    if root_certificates is not None:
        credentials = grpc.ssl_channel_credentials(_read(root_certificates))
        return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
    if not local and not insecure:
        raise ColaError(
            Reason.INVALID_CONFIG,
            setting="root_certificates",
            problem=f"{address} is not loopback: give the server's root certificates, or ask for insecure",
        )
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ColaError(Reason.INVALID_CONFIG, setting="root_certificates", problem=error) from None
