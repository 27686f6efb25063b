"""The client's edge: a channel, errors translated, and what may be repeated repeated."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from time import monotonic
from typing import TypeVar, final

import grpc

from cola_common.errors import ColaError, Reason
from cola_common.rpc import auth
from cola_common.rpc.channels import connect
from cola_common.rpc.status import from_rpc

Request = TypeVar("Request")
Response = TypeVar("Response")
T = TypeVar("T")

CALL_SECONDS = 60.0
"""A call's deadline. The longest one creates a job, for which the server may run a small forward pass."""

PATIENCE_SECONDS = 3.0
"""How long a call that may be repeated is: a blip of the network passes, a wrong address is told soon."""

FIRST_PAUSE_SECONDS = 0.1
LAST_PAUSE_SECONDS = 5.0  # of a server that is back, many clients learn within this time, and not at once

_TRANSIENT = frozenset({Reason.UNAVAILABLE, Reason.SERVER_DRAINING})
_random = secrets.SystemRandom()


def transient(error: ColaError) -> bool:
    """Whether the same call may succeed later without anybody's doing."""
    return error.reason in _TRANSIENT


@final
class Connection:
    """One server as this client reaches it. To be made on the event loop that uses it."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        root_certificates: str | Path | None = None,
        insecure: bool = False,
    ) -> None:
        self.address = address
        # The token goes with each call. As an interceptor it would leave a task behind for each upload that is refused:
        # gRPC's intercepted streams wait for requests that no longer come.
        self.channel = connect(address, root_certificates=root_certificates, insecure=insecure)
        self._metadata = () if token is None else (auth.header(token),)

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        patience: float = PATIENCE_SECONDS,
    ) -> Response:
        """One request, one answer; repeated for `patience` seconds while the server cannot be reached.

        A call that must not happen twice is given no patience.

        Raises: `ColaError`.
        """

        async def attempt() -> Response:
            with self.translated():
                return await method(request, timeout=CALL_SECONDS, metadata=self._metadata)

        return await self.repeat(attempt, patience=patience)

    async def stream(
        self, method: grpc.aio.UnaryStreamMultiCallable[Request, Response], request: Request
    ) -> AsyncGenerator[Response, None]:
        """One request, many answers. Closing the generator cancels the call.

        Raises: `ColaError`.
        """
        with self.translated():
            call = method(request, metadata=self._metadata)
            try:
                async for response in call:
                    yield response
            finally:
                call.cancel()

    async def send(
        self, method: grpc.aio.StreamUnaryMultiCallable[Request, Response], requests: AsyncGenerator[Request, None]
    ) -> Response:
        """Many requests, one answer. An answer that comes before the last request ends the sending.

        Raises: `ColaError`; what `requests` raises, which cancels the call.
        """
        with self.translated():
            call = method(metadata=self._metadata)
            first: list[grpc.aio.AioRpcError] = []
            call.add_done_callback(lambda ended: first.extend(_ended(ended)))
            try:
                # Explicit writes: gRPC loses the errors of a generator that it runs itself.
                async with aclosing(requests):
                    async for request in requests:
                        await call.write(request)
                await call.done_writing()
            except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
                pass  # the server has answered already: the answer says why
            except BaseException:
                call.cancel()
                raise
            try:
                return await call
            except grpc.aio.AioRpcError as last:
                # A write that meets the answer fails, and gRPC puts INTERNAL in the place of the answer's status, be it
                # there already or still to come: so either the first status or the last is the server's own.
                raise next((one for one in first if one.code() is not grpc.StatusCode.INTERNAL), last) from None

    async def repeat(self, attempt: Callable[[], Awaitable[T]], *, patience: float = PATIENCE_SECONDS) -> T:
        """What `attempt` returns; it is made again, after growing pauses of random length, while its error is transient
        and `patience` seconds are not over.
        """
        end = monotonic() + patience
        ceiling = FIRST_PAUSE_SECONDS
        while True:
            try:
                return await attempt()
            except ColaError as error:
                if not transient(error) or monotonic() >= end:
                    raise
            await pause(min(ceiling, end - monotonic()))
            ceiling = min(2 * ceiling, LAST_PAUSE_SECONDS)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Errors of gRPC become `ColaError`s."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self.address) from None

    async def close(self) -> None:
        """Ends all calls and closes the channel."""
        await self.channel.close()


def _ended(call: grpc.aio.Call) -> list[grpc.aio.AioRpcError]:
    """The status of a call that has one, as an error: read at once, for gRPC may put another in its place."""

    async def read() -> grpc.aio.AioRpcError:
        initial, trailing = await call.initial_metadata(), await call.trailing_metadata()
        return grpc.aio.AioRpcError(await call.code(), initial, trailing, await call.details())

    reading = read()
    try:
        reading.send(None)
    except StopIteration as end:  # nothing to wait for, as there is a status
        return [end.value]
    reading.close()
    return []


async def pause(ceiling: float) -> None:
    """Sleeps for a random time of up to `ceiling` seconds: clients that failed together do not return together."""
    await asyncio.sleep(_random.uniform(0, max(ceiling, 0)))


def new_key() -> str:
    """A fresh idempotency key: one for each create call, kept through its repeats."""
    return secrets.token_hex(16)


def part_key(key: str | None, part: str) -> str | None:
    """The key of an upload that belongs to a job of this key: a job that is found again names the same files."""
    return None if key is None else f"{key}/{part}"


def page_size(limit: int | None) -> int:
    """`limit` as the wire has it: 0 asks for the server's default.

    Raises: `ValueError`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; ask for 1 or more")
    return limit or 0
