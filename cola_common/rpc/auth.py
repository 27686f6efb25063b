"""Who may call what: bearer tokens, checked before a call's body is read."""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc

from cola_common.errors import ColaError, Reason
from cola_common.rpc.status import abort

HEADER = "authorization"
_SCHEME = "Bearer "

# The one table: the start of a method's path -> whose token it needs. The first that fits counts.
CLIENT, WORKER, ANYONE = "client", "worker", "anyone"
ROLES: tuple[tuple[str, str], ...] = (
    ("/cola.v1.Fleet/", WORKER),
    ("/grpc.health.v1.Health/Check", ANYONE),  # probes of an orchestrator hold no token, and learn one word
    ("/", CLIENT),
)


def header(token: str) -> tuple[str, str]:
    """The metadata that shows `token`."""
    return HEADER, _SCHEME + token


def role(method: str) -> str:
    """Whose token a call of `method` (`/package.Service/Method`) needs."""
    return next(role for start, role in ROLES if method.startswith(start))


class TokenAuth(grpc.aio.ServerInterceptor):
    """Refuses calls without their role's token: UNAUTHENTICATED, or PERMISSION_DENIED for the other role's token.

    A role whose token is None is open to all: for servers on loopback.
    """

    def __init__(self, client_token: str | None, worker_token: str | None) -> None:
        self._tokens = {CLIENT: client_token, WORKER: worker_token}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "Awaitable[grpc.RpcMethodHandler[Any, Any] | None]"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Runs when a call's headers are here, before its body."""
        error = self._check(handler_call_details)
        return await continuation(handler_call_details) if error is None else _refuse(error)

    def _check(self, details: grpc.HandlerCallDetails) -> ColaError | None:
        wanted = role(details.method)
        needed = self._tokens.get(wanted)
        if needed is None:
            return None
        shown = [value for key, value in details.invocation_metadata or () if key == HEADER]
        if len(shown) != 1 or not isinstance(shown[0], str) or not shown[0].startswith(_SCHEME):
            return ColaError(Reason.UNAUTHENTICATED)
        token = shown[0].removeprefix(_SCHEME)
        fitting = {role for role, known in self._tokens.items() if known is not None and _same(token, known)}
        if wanted in fitting:
            return None
        return (
            ColaError(Reason.PERMISSION_DENIED, method=details.method) if fitting else ColaError(Reason.UNAUTHENTICATED)
        )


def _same(shown: str, known: str) -> bool:
    """Compares in constant time."""
    return hmac.compare_digest(shown.encode(), known.encode())


def _refuse(error: ColaError) -> "grpc.RpcMethodHandler[Any, Any]":
    async def refuse(_requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        await abort(context, error)

    # A handler of streams starts before any request is read, whatever the call's own kind; one of single requests
    # would read the body first.
    return grpc.stream_stream_rpc_method_handler(refuse)
