"""Envelopes with tensors' data, packed and unpacked around protobuf.

An envelope (`FromWorker`, `FromServer` in fleet.proto) ends with `bytes data = 15`. Protobuf's Python would copy that
field twice on each side; here it is written behind the serialized rest, and read as a view, in protobuf's own encoding:
a tag byte, the length as a varint, the bytes. It is the same message to any other implementation.
"""

from collections.abc import Iterator, Sequence

from cola_common.errors import ColaError, Reason
from cola_common.messages import Buffer

_DATA_TAG = 15 << 3 | 2
_LENGTH_DELIMITED = 2


def pack(head: bytes, tensors: Sequence[Buffer], chunk_bytes: int) -> Iterator[bytes]:
    """The serialized envelopes of a message: `head`, which is the first one without its data, and all tensors' bytes,
    `chunk_bytes` in an envelope.
    """
    pieces: list[memoryview] = []
    free = chunk_bytes
    for tensor in tensors:
        view = memoryview(tensor)
        if view.nbytes == 0:
            continue
        view = view.cast("B")
        while len(view) >= free:
            yield _envelope(head, [*pieces, view[:free]])
            head, pieces, view, free = b"", [], view[free:], chunk_bytes
        if view:
            pieces.append(view)
            free -= len(view)
    if head or pieces:
        yield _envelope(head, pieces)


def unpack(envelope: bytes) -> tuple[bytes, memoryview]:
    """A serialized envelope as (itself without data, its data).

    Raises: `ColaError(PROTOCOL_VIOLATION)` where it is cut short, or where data is not its last field.
    """
    position, end = 0, len(envelope)
    while position < end:
        tag, start = envelope[position], position
        length, position = _read_varint(envelope, position + 1)
        if tag == _DATA_TAG and position + length == end:
            return envelope[:start], memoryview(envelope)[position:]
        if tag == _DATA_TAG or tag & 7 != _LENGTH_DELIMITED:
            raise _unreadable()
        position += length
    if position > end:
        raise _unreadable()
    return envelope, memoryview(b"")


def _unreadable() -> ColaError:
    return ColaError(Reason.PROTOCOL_VIOLATION, problem="an envelope that cannot be read")


def _envelope(head: bytes, pieces: list[memoryview]) -> bytes:
    if not pieces:
        return head
    length = sum(map(len, pieces))
    return b"".join((head, bytes((_DATA_TAG,)), _varint(length), *pieces))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and the position behind it; past the end of `data` where it is cut short."""
    number = 0
    for place, byte in enumerate(data[position : position + 10]):
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number, position + place + 1
    return 0, len(data) + 1
