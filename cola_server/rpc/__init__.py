"""The gRPC edge: thin servicers that convert, call and translate. They stand on the interfaces of `backend`."""

from cola_server.rpc.backend import Pending
from cola_server.rpc.listener import Listener

__all__ = ["Listener", "Pending"]
