"""A stream in both directions: whole messages in, whole messages out, and its three ends kept apart.

`cola_common.rpc.fleet` makes one on either side of `Fleet.Attend`.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.message import DecodeError

from cola_common.errors import ColaError, Reason
from cola_common.messages import Assign, Capture, Delta, Goodbye, Message, Snapshot, payload
from cola_common.rpc import frames
from cola_common.rpc.limits import CHUNK_BYTES, MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES

_LAST_WORDS_SECONDS = 2.0  # what is buffered is read in milliseconds, unless its reader is busy elsewhere

Sent = TypeVar("Sent", bound=Message)
Received = TypeVar("Received", bound=Message)


class StreamEnded(Exception):
    """No more can be sent or received."""


class StreamClosed(StreamEnded):
    """This side closed it, or said Goodbye."""


class StreamFinished(StreamEnded):
    """The peer said Goodbye."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StreamBroken(StreamEnded):
    """It ended without a Goodbye. `error` is what the peer or the transport gave as the reason, where one did."""

    def __init__(self, error: ColaError | None) -> None:
        super().__init__(error.message if error else "the stream ended without a Goodbye")
        self.error = error


class MessageRefused(Exception):
    """`admit` refused a message with tensors. Their bytes were thrown away as they came; the stream goes on.

    `message` is without its tensors' data.
    """

    def __init__(self, message: Message, error: ColaError) -> None:
        super().__init__(error.message)
        self.message = message
        self.error = error


def admit_small(message: Message) -> None:
    """The bound where nobody says what to expect.

    Raises: `ColaError(PROTOCOL_VIOLATION)` for a message whose tensors are larger than `MAX_PAYLOAD_BYTES` together.
    """
    size = sum(tensor.nbytes for tensor in payload(message))
    if size > MAX_PAYLOAD_BYTES:
        raise ColaError(Reason.PROTOCOL_VIOLATION, problem=f"{size} bytes in a message, {MAX_PAYLOAD_BYTES} allowed")


class Transport(Protocol):
    """What a call is on both sides; whatever goes wrong raises `StreamBroken`."""

    async def read(self) -> bytes | None:
        """The next envelope; None at an end without an error."""

    async def write(self, envelope: bytes) -> None: ...

    async def finish(self) -> None:
        """Nothing will be written any more."""

    def close(self) -> None: ...


class Duplex(Generic[Sent, Received]):
    """One worker's stream, from either side. Any number of tasks may send; one receives.

    Sends take turns, so that chunks of two messages never interleave. Cancelling a task in `receive`, or in `send`
    after it has begun to write, breaks the stream.

    `admit` is called with each message that carries tensors while their data are still empty; it raises `ColaError`
    to refuse it. Only then is memory taken. It may be set anew as long as the stream lives; so may `chunk_bytes`, the
    tensor bytes in one envelope.
    """

    def __init__(
        self,
        transport: Transport,
        encode: Callable[[Any], bytes],
        decode: Callable[[bytes], Received],
        admit: Callable[[Received], None],
    ) -> None:
        self.admit: Callable[[Received], None] = admit
        self.chunk_bytes = CHUNK_BYTES
        self._transport = transport
        self._encode = encode
        self._decode: Callable[[bytes], Received] = decode
        self._turn = asyncio.Lock()
        self._end: StreamEnded | None = None
        self._over = asyncio.Event()
        self._unwritable = False
        self._said_goodbye = False
        self.heard = time.monotonic()
        """When the peer's last envelope came: a long message is a sign of life all along, not only when it is whole."""

    @property
    def sending(self) -> bool:
        """Whether a message is being written."""
        return self._turn.locked()

    async def send(self, message: Sent) -> None:
        """Returns when the transport has taken the whole message, which waits for the peer to read.

        Raises: `StreamEnded`.
        """
        await self._send(message)

    async def receive(self) -> Received:
        """The next message; a Goodbye ends the stream instead.

        Raises: `StreamEnded`; `MessageRefused`, after which the next message may be received.
        """
        if self._end is not None:
            raise self._end
        try:
            message = await self._receive()
        except StreamBroken as broken:
            raise self._ended(broken) from None
        except ColaError as error:
            raise self._ended(StreamBroken(error)) from None
        if isinstance(message, Goodbye):
            raise self._ended(StreamFinished(message.reason))
        return message

    async def goodbye(self, reason: str) -> None:
        """Says Goodbye, as the last thing that is sent. `receive` still gives what the peer says until it ends too.

        On a stream that has ended it does nothing.
        """
        if self._end is None and not self._said_goodbye:
            with suppress(StreamEnded):
                await self._send(Goodbye(reason))
                await self._transport.finish()

    def close(self) -> None:
        """Ends the stream at once, without a Goodbye unless one was said: to the peer it is broken.

        On the server the stream ends when its handler returns.
        """
        self._ended(StreamClosed())
        self._transport.close()

    async def _send(self, message: Message) -> None:
        head = self._encode(message)
        assert len(head) + self.chunk_bytes < MAX_MESSAGE_BYTES, f"{type(message).__name__} is too large an envelope"
        tensors = payload(message)
        assert all(memoryview(tensor.data).nbytes == tensor.nbytes for tensor in tensors)
        async with self._turn:
            self._check_open()
            try:
                for frame in frames.pack(head, [tensor.data for tensor in tensors], self.chunk_bytes):
                    await self._transport.write(frame)
                self._said_goodbye = isinstance(message, Goodbye)
            except StreamBroken as broken:
                self._unwritable = True
                raise await self._last_words(broken) from None
            except asyncio.CancelledError:
                self._unwritable = True  # the peer may hold half a message
                raise

    async def _receive(self) -> Received:
        head, data = await self._envelope()
        if not head:
            raise ColaError(Reason.PROTOCOL_VIOLATION, problem="data without a message")
        try:
            message = self._decode(head)
        except DecodeError:
            raise ColaError(Reason.PROTOCOL_VIOLATION, problem="an envelope that cannot be read") from None
        tensors = payload(message)
        sizes = [tensor.nbytes for tensor in tensors]
        if not tensors:
            if data:
                raise ColaError(Reason.PROTOCOL_VIOLATION, problem="data without tensors")
            return message
        try:
            self.admit(message)
        except ColaError as error:
            await self._payload(data, sum(sizes), lambda _: None)
            raise MessageRefused(message, error) from error
        chunks: list[memoryview] = []
        await self._payload(data, sum(sizes), chunks.append)
        # Joined, not copied into a buffer made beforehand: Python would fill that with zeros first.
        whole = chunks[0] if len(chunks) == 1 else memoryview(bytearray().join(chunks))
        filled = tuple(
            dataclasses.replace(tensor, data=whole[end - tensor.nbytes : end])
            for tensor, end in zip(tensors, accumulate(sizes), strict=True)
        )
        assert isinstance(message, Assign | Capture | Delta | Snapshot)
        return dataclasses.replace(message, tensors=filled)

    async def _payload(self, data: memoryview, size: int, take: Callable[[memoryview], None]) -> None:
        """Takes a message's tensor bytes as they come: `data`, then what the following envelopes hold."""
        while True:
            if len(data) > size:
                raise ColaError(Reason.PROTOCOL_VIOLATION, problem="more data than the headers tell of")
            take(data)
            size -= len(data)
            if size == 0:
                return
            head, data = await self._envelope()
            if head or not data:
                raise ColaError(Reason.PROTOCOL_VIOLATION, problem=f"{size} bytes of a message did not follow it")

    async def _envelope(self) -> tuple[bytes, memoryview]:
        frame = await self._transport.read()
        if frame is None:
            raise StreamBroken(None)
        self.heard = time.monotonic()
        return frames.unpack(frame)

    def _check_open(self) -> None:
        if self._end is not None:
            raise self._end
        if self._said_goodbye:
            raise StreamClosed
        if self._unwritable:
            raise StreamBroken(None)

    def _ended(self, end: StreamEnded) -> StreamEnded:
        """Notes how the stream ended, unless it had before, and tells how."""
        if self._end is None:
            self._end = StreamClosed() if self._said_goodbye and isinstance(end, StreamBroken) else end
            self._over.set()
        return self._end

    async def _last_words(self, broken: StreamBroken) -> StreamEnded:
        """How the stream ended, after a write that failed. What the peer said last, a Goodbye or an error, may not have
        been received yet: whoever receives finds it.
        """
        if broken.error is None:
            over = asyncio.ensure_future(self._over.wait())
            await asyncio.wait({over}, timeout=_LAST_WORDS_SECONDS)
            over.cancel()
        return self._end or broken
