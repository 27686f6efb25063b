"""Frames are protobuf: packed by hand they parse as envelopes, and envelopes made by protobuf unpack."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_common.errors import ColaError
from cola_common.rpc import frames
from cola_common.wire import fleet_pb2

SIZES = st.lists(st.integers(0, 300), max_size=8)


def envelope(count: int = 1) -> fleet_pb2.FromServer:
    headers = [fleet_pb2.TensorHeader(codec="bf16", shape=[n, 3], nbytes=6 * n) for n in range(count)]
    return fleet_pb2.FromServer(capture=fleet_pb2.Capture(job="j" * 200, epoch=1), tensors=headers)


def tensors(sizes: list[int]) -> list[bytes]:
    return [bytes((17 * index + place) % 256 for place in range(size)) for index, size in enumerate(sizes)]


@settings(deadline=None)
@given(SIZES, st.integers(1, 400))
def test_packed_envelopes_are_protobuf_and_hold_the_bytes_in_order(sizes: list[int], chunk: int) -> None:
    data = tensors(sizes)
    packed = [
        fleet_pb2.FromServer.FromString(frame) for frame in frames.pack(envelope().SerializeToString(), data, chunk)
    ]
    first = fleet_pb2.FromServer.FromString(packed[0].SerializeToString())
    first.ClearField("data")
    assert first == envelope()
    assert b"".join(frame.data for frame in packed) == b"".join(data)
    assert all(len(frame.data) == chunk for frame in packed[:-1])
    assert all(frame == fleet_pb2.FromServer(data=frame.data) and frame.data for frame in packed[1:])


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 5))
def test_what_protobuf_packs_unpacks(data: bytes, headers: int) -> None:
    whole = envelope(headers)
    whole.data = data
    head, view = frames.unpack(whole.SerializeToString())
    assert fleet_pb2.FromServer.FromString(head) == envelope(headers)
    assert bytes(view) == data


@settings(deadline=None)
@given(st.integers(0, 600))
def test_an_envelope_that_is_cut_short_is_a_violation(length: int) -> None:
    whole = envelope(3)
    whole.data = bytes(100)
    frame = whole.SerializeToString()
    cut = frame[: min(length, len(frame) - 1)]
    starts = [fleet_pb2.FromServer(capture=whole.capture, tensors=whole.tensors[:count]) for count in range(4)]
    between_fields = [0, *(len(start.SerializeToString()) for start in starts)]
    if len(cut) in between_fields:  # what is left is an envelope of its own
        assert frames.unpack(cut) == (cut, b"")
    else:
        with pytest.raises(ColaError, match="cannot be read"):
            frames.unpack(cut)


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_garbage_is_refused_or_taken_apart(garbage: bytes) -> None:
    with suppress(ColaError):
        head, data = frames.unpack(garbage)
        assert garbage.startswith(head)
        assert garbage.endswith(bytes(data))


def test_data_that_is_not_the_last_field_is_a_violation() -> None:
    data_first = fleet_pb2.FromServer(data=b"abc").SerializeToString() + envelope().SerializeToString()
    with pytest.raises(ColaError, match="cannot be read"):
        frames.unpack(data_first)
