"""Who may call what, and whose objects a call sees: bearer tokens, checked before a call's body is read."""

import hmac
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from cola_common.errors import ColaError, Reason
from cola_common.jobs import DEFAULT_TENANT
from cola_common.rpc.status import abort

HEADER = "authorization"
_SCHEME = "Bearer "

CLIENT, OPERATOR, WORKER, ANYONE = "client", "operator", "worker", "anyone"
OWN = "its tenant's"
"""Of files, jobs and what is made of them a call sees its tenant's; others are answered as if they were not there."""
SHARED = "the server's"

# The one table: the start of a method's path -> whose token it needs -> whose objects it sees. The first that fits
# counts. The servicers of what is `OWN` ask `Access.tenant`, and nothing else, for the tenant.
RULES: tuple[tuple[str, str, str], ...] = (
    ("/cola.v1.Files/", CLIENT, OWN),
    ("/cola.v1.Jobs/", CLIENT, OWN),
    ("/cola.v1.Checkpoints/", CLIENT, OWN),
    ("/cola.v1.Models/", CLIENT, SHARED),
    ("/cola.v1.Workers/Drain", OPERATOR, SHARED),  # it moves the jobs of all tenants
    ("/cola.v1.Workers/", CLIENT, SHARED),
    ("/cola.v1.Fleet/", WORKER, SHARED),  # of the jobs that the server assigned to it: `NOT_OWNER` otherwise
    ("/grpc.health.v1.Health/Check", ANYONE, SHARED),  # probes of an orchestrator hold no token, and learn one word
    ("/", CLIENT, SHARED),  # unknown methods are not told apart without a token
)

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Holder:
    """Who holds a token. An operator is a client who may do more."""

    role: str
    tenant: str = DEFAULT_TENANT

    def may(self, role: str) -> bool:
        """Whether the holder may call what needs this role."""
        return role == self.role or (role, self.role) == (CLIENT, OPERATOR)


def header(token: str) -> tuple[str, str]:
    """The metadata that shows `token`."""
    return HEADER, _SCHEME + token


def role(method: str) -> str:
    """Whose token a call of `method` (`/package.Service/Method`) needs."""
    return next(role for start, role, _ in RULES if method.startswith(start))


class Access:
    """All tokens, and who holds them. Without any the server is open, and everybody is `default`: for loopback."""

    def __init__(self, holders: Mapping[str, Holder]) -> None:
        self._holders = dict(holders)

    def refusal(self, method: str, metadata: Metadata | None) -> ColaError | None:
        """Why a call may not be: UNAUTHENTICATED, or PERMISSION_DENIED for a token that is good for other calls."""
        wanted = role(method)
        if not self._holders or wanted == ANYONE:
            return None
        holder = self._holder(metadata)
        if holder is None:
            return ColaError(Reason.UNAUTHENTICATED)
        return None if holder.may(wanted) else ColaError(Reason.PERMISSION_DENIED, method=method)

    def tenant(self, metadata: Metadata | None) -> str:
        """Whose objects a call with this metadata sees. Raises: `ColaError(UNAUTHENTICATED)`."""
        if not self._holders:
            return DEFAULT_TENANT
        holder = self._holder(metadata)
        if holder is None:
            raise ColaError(Reason.UNAUTHENTICATED)
        return holder.tenant

    def _holder(self, metadata: Metadata | None) -> Holder | None:
        shown = [value for key, value in metadata or () if key == HEADER]
        if len(shown) != 1 or not isinstance(shown[0], str) or not shown[0].startswith(_SCHEME):
            return None
        token = shown[0].removeprefix(_SCHEME)
        # Each in constant time, and all of them: how long it takes tells nothing about any.
        fitting = [holder for known, holder in self._holders.items() if _same(token, known)]
        return fitting[0] if fitting else None


class TokenAuth(grpc.aio.ServerInterceptor):
    """Refuses the calls that `access` does."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "Awaitable[grpc.RpcMethodHandler[Any, Any] | None]"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Runs when a call's headers are here, before its body."""
        error = self._access.refusal(handler_call_details.method, handler_call_details.invocation_metadata)
        return await continuation(handler_call_details) if error is None else _refuse(error)


def _same(shown: str, known: str) -> bool:
    """Compares in constant time."""
    return hmac.compare_digest(shown.encode(), known.encode())


def _refuse(error: ColaError) -> "grpc.RpcMethodHandler[Any, Any]":
    async def refuse(_requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        await abort(context, error)

    # A handler of streams starts before any request is read, whatever the call's own kind; one of single requests
    # would read the body first.
    return grpc.stream_stream_rpc_method_handler(refuse)
