"""The packer: what of the captures arrives, in which order, in frames of which size, at whose door."""

import pytest
import torch

from cola_common.errors import ColaError, Reason
from cola_common.jobs import Codec
from cola_common.messages import Calls, Part
from cola_common.tensor import CODECS
from cola_server.reduce import keep
from cola_server.training.captures import FRAME_BYTES
from tests.server.capturing import captured, packer, site, values
from tests.support.wires import wire

SITES = [site(0, 0), site(1, 0, d_out=3), site(2, 1, d_in=5)]
ONE = {0: "w"}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("padded", [False, True])
def test_what_arrives_is_every_row_that_is_no_padding(codec: Codec, padded: bool) -> None:
    rows = torch.tensor([0, 1, 2, 5, 8, 9, 15]) if padded else None
    sink, received = packer(SITES, wire("all", codec), ONE)
    x, g = values(0, 6), values(1, 4) * 1e-6
    sink.capture(captured(SITES[0], 0, x, g, rows))
    sink.finish()
    tensors = received.tensors("w")
    picked = slice(None) if rows is None else rows
    tolerance = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11, "int8": 1 / 253, "int4": 1 / 8}[codec]  # of all
    for part, sent in ((Part("x", 0, 0), x.view(-1, 6)[picked]), (Part("g", 0, 0), g.view(-1, 4)[picked])):
        torch.testing.assert_close(tensors[part], sent, rtol=0, atol=tolerance * float(sent.abs().max()))


@pytest.mark.parametrize("owners", [{0: "a", 1: "a", 2: "a"}, {0: "a", 1: "b", 2: "b"}])
def test_an_input_goes_once_to_each_worker_of_its_group_and_never_after_its_gradient(owners: dict[int, str]) -> None:
    sink, received = packer(SITES, wire(), owners)
    shared = [values(10, 6), values(11, 6)]
    other = [values(12, 5), values(13, 5)]
    for call in range(2):
        sink.capture(captured(SITES[2], call, other[call], values(20 + call, 4)))
        sink.capture(captured(SITES[1], call, shared[call], values(30 + call, 3)))
        sink.capture(captured(SITES[0], call, shared[call], values(40 + call, 4)))
    sink.finish()
    for worker in set(owners.values()):
        parts = received.parts(worker)
        mine = [s for s in SITES if owners[s.index] == worker]
        wanted = {Part("g", s.index, call) for s in mine for call in range(2)}
        wanted |= {Part("x", s.group, call) for s in mine for call in range(2)}
        assert set(parts) == wanted
        assert len(parts) == len(wanted)
        for s in mine:
            for call in range(2):
                assert parts.index(Part("x", s.group, call)) < parts.index(Part("g", s.index, call))
                x = shared[call] if s.group == 0 else other[call]
                assert torch.equal(received.tensors(worker)[Part("x", s.group, call)], x.view(-1, s.d_in))


def test_small_parts_are_packed_and_a_full_frame_leaves_at_once() -> None:
    sink, received = packer(SITES, wire("all", "bf16"), ONE)
    each = 2 * 1024 * 6 + 2 * 1024 * 4  # bytes of one call's x and g
    calls = 3 * FRAME_BYTES // each
    for call in range(calls):
        before = sum(len(f.parts) for f in received.frames["w"])
        sink.capture(captured(SITES[0], call, values(call, 6, 2, 512), values(call, 4, 2, 512)))
        assert 2 * (call + 1) - sum(len(f.parts) for f in received.frames["w"]) <= 2 * (FRAME_BYTES // each + 1)
        assert before <= 2 * call
    sink.finish()
    sizes = [sum(t.nbytes for t in frame.tensors) for frame in received.frames["w"]]
    assert all(FRAME_BYTES - each < size <= FRAME_BYTES for size in sizes[:-1])
    assert sum(sizes) == calls * each == sink.sent["w"]
    for frame in received.frames["w"]:
        assert (frame.job, frame.epoch, frame.batch) == ("job", 2, 7)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["x", "g"])
def test_what_is_not_finite_is_told_of_and_not_sent(codec: Codec, bad: float, which: str) -> None:
    sink, received = packer(SITES, wire("all", codec), {0: "w", 2: "w"})
    x, g = values(0, 6), values(1, 4)
    (x if which == "x" else g)[1, 3, 2] = bad
    sink.capture(captured(SITES[0], 0, x, g))
    sink.capture(captured(SITES[2], 0, values(2, 5), values(3, 4)))
    with pytest.raises(ColaError) as failed:
        sink.finish()
    assert failed.value.reason == Reason.NON_FINITE_CAPTURE
    assert failed.value.details == {"tensor": which, "site": "site0", "step": "3", "job": "job"}
    assert received.frames == {}, "neither that nor anything after it"


def test_what_bf16_has_no_number_for_is_told_of() -> None:
    sink, _ = packer(SITES, wire("all", "bf16"), ONE)
    x = torch.full((2, 8, 6), 3.4e38)
    assert bool(torch.isfinite(x).all())
    sink.capture(captured(SITES[0], 0, x, values(1, 4)))
    with pytest.raises(ColaError, match="wider values"):
        sink.finish()


def test_padding_that_is_not_finite_harms_nobody() -> None:
    sink, received = packer(SITES, wire("all", "bf16"), ONE)
    x, g = values(0, 6), values(1, 4)
    x[1, 7] = float("nan")
    sink.capture(captured(SITES[0], 0, x, g, torch.arange(15)))
    sink.finish()
    assert received.tensors("w")[Part("x", 0, 0)].shape == (15, 6)


def test_the_rows_of_a_batch_are_told_as_they_were_sent() -> None:
    sink, _ = packer(SITES, wire())
    for call in range(2):
        sink.capture(captured(SITES[2], call, values(1, 5), values(2, 4)))
    sink.capture(captured(SITES[0], 0, values(3, 6), values(4, 4), torch.arange(11)))
    sink.finish()
    passed = [Calls(0, 1, 11), Calls(2, 2, 32)]
    assert sink.sent_calls(passed) == tuple(passed)
    assert sink.sent_rows == 11 + 32
    assert sink.reduce_seconds == 0.0 < sink.encode_seconds


def test_nothing_captured_sends_nothing() -> None:
    sink, received = packer(SITES, wire(), {0: "a", 1: "b"})
    sink.finish()
    assert not received.frames
    assert sink.sent == {"a": 0, "b": 0}


@pytest.mark.parametrize("shape", [(2, 8, 6), (16, 6), (3, 6), (1, 1, 6)])
def test_keep_numbers_the_rows_of_the_flattened_tensor(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    flat = x.reshape(-1, 6)
    assert torch.equal(keep(x, None), flat)
    assert keep(x, None).data_ptr() == x.data_ptr()
    rows = torch.arange(0, len(flat), 2)
    assert torch.equal(keep(x, rows), flat[::2])
