"""Addresses, `HOST:PORT`: which of them never leave the machine."""

import ipaddress

from cola_common.errors import ColaError, Reason


def split(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[IPV6]:PORT`.

    Raises: `ColaError(INVALID_CONFIG)`.
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed):
        raise ColaError(Reason.INVALID_CONFIG, setting="address", problem=f"{address!r} is not HOST:PORT")
    if not (port.isascii() and port.isdigit() and int(port) < 2**16):
        raise ColaError(Reason.INVALID_CONFIG, setting="address", problem=f"{port!r} is no port, 0 to 65535")
    return host[1:-1] if bracketed else host, int(port)


def is_loopback(address: str) -> bool:
    """Whether `HOST:PORT` is this machine only. A name other than `localhost` is taken to be outside."""
    host, _ = split(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
