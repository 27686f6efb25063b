"""The packer where rows are reduced: gradients and sketches in the place of rows, and what becomes of trouble."""

import itertools

import pytest
import torch

from cola_common.errors import ColaError, Reason
from cola_common.families import Head, Linear, Lora, Mlp
from cola_common.jobs import Codec, Rows
from cola_common.messages import Calls, Capture, Part
from cola_common.tensor import CODECS, decode
from cola_server.model import Captured, Site
from cola_server.training.captures import REDUCED_FRAME_BYTES
from tests.server.capturing import Received, captured, kept, packer, site, values, vjp
from tests.support.wires import wire

K = 4
LOSS = {"fp32": 1e-6, "bf16": 2.0**-8, "fp16": 2.0**-11, "int8": 1 / 200, "int4": 1 / 8}  # of a tensor's largest value
PADDED = torch.tensor([0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13])
SHARED = [site(0, 0, Linear(0.5)), site(1, 0, Linear(2.0), d_out=3), site(2, 1, Linear(1.0), d_in=5)]
"""Two that share x, and one more."""

every_codec = pytest.mark.parametrize("codec", CODECS)


def low_rank(seed: int, of: Site, rank: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    """x and g whose product a sketch of `rank` rows keeps."""
    x = values(seed, of.d_in)
    g = values(seed + 1, rank) @ torch.randn(rank, of.d_out, generator=torch.Generator().manual_seed(seed))
    return x, g


def near(found: torch.Tensor, wanted: torch.Tensor, relative: float) -> bool:
    return float(torch.linalg.vector_norm(found - wanted)) <= relative * float(torch.linalg.vector_norm(wanted))


# --- exact ----------------------------------------------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("rows", [None, PADDED], ids=["whole", "padded"])
def test_exact_sends_the_gradient_that_a_worker_would_make_of_the_rows_that_are_no_padding(
    codec: Codec, rows: torch.Tensor | None
) -> None:
    sites = [site(0, 0, Lora(3, 1.5)), site(1, 0, Lora(3, 1.5), d_out=70)]
    sink, received = packer(sites, wire("exact", codec))
    x = values(0, 6)
    gs = [values(1, 4) * 1e-6, values(2, 70)]
    for each, g in reversed(list(zip(sites, gs, strict=True))):
        sink.capture(captured(each, 0, x, g, rows))
    sink.finish()
    assert received.parts("w") == [Part("w", index, 0, name) for index in (1, 0) for name in ("A", "B")]
    tensors = received.tensors("w")
    for each, g in zip(sites, gs, strict=True):
        for name, wanted in vjp(each, x, g, rows).items():
            found = tensors[Part("w", each.index, 0, name)]
            if codec == "fp32":
                assert torch.equal(found, wanted)
            torch.testing.assert_close(found, wanted, rtol=0, atol=LOSS[codec] * float(wanted.abs().max()))


def test_exact_sends_a_gradient_for_each_call_and_no_rows_but_a_heads() -> None:
    twice, head = site(0, 0, calls=2), site(1, 1, Head(bias=True), d_out=2, kind="head", layout="examples")
    sink, received = packer([twice, head], wire("exact"))
    sink.capture(captured(head, 0, values(0, 6, 2, 1), values(1, 2, 2, 1)))
    for call in range(2):
        sink.capture(captured(twice, call, values(2 + call, 6), values(4 + call, 4)))
    sink.finish()
    gradients = [Part("w", 0, call, name) for call in range(2) for name in ("A", "B")]
    assert received.parts("w") == [Part("x", 1, 0), Part("g", 1, 0), *gradients]
    assert sink.sent_calls([Calls(0, 2, 32), Calls(1, 1, 2)]) == (Calls(0, 2, 0), Calls(1, 1, 2))
    assert sink.sent_rows == 2 + 2 * 2, "a gradient counts as its rank"
    assert sink.reduce_seconds == 0.5, "as each capture says"


def test_frames_of_gradients_leave_before_they_fill_a_chunk() -> None:
    sites = [site(i, i, Lora(8, 1.0), d_in=512, d_out=512) for i in range(24)]
    sink, received = packer(sites, wire("exact"))
    each = 2 * 4 * 8 * 512
    for index, of in enumerate(sites):
        sink.capture(captured(of, 0, values(0, 512, 1, 4), values(1, 512, 1, 4)))
        left = 2 * (index + 1) - len(received.parts("w"))
        assert left * each / 2 <= REDUCED_FRAME_BYTES
    sink.finish()
    sizes = [sum(t.nbytes for t in frame.tensors) for frame in received.frames["w"]]
    assert all(REDUCED_FRAME_BYTES - each < size <= REDUCED_FRAME_BYTES for size in sizes[:-1])
    assert sum(sizes) == 24 * each == sink.sent["w"]


def test_each_worker_gets_what_it_knows() -> None:
    sites = [site(0, 0), site(1, 1), site(2, 2)]
    owners = {0: "a", 1: "b", 2: "c"}
    wires = {"a": wire("exact", "bf16"), "b": wire("all", "int8"), "c": wire("sketch", sketch_rows=K)}
    sink, received = packer(sites, wires, owners)
    for of in sites:
        sink.capture(captured(of, 0, values(0, 6), values(1, 4)))
    sink.finish()
    assert [p.kind for p in received.parts("a")] == ["w", "w"]
    assert received.tensors("b")[Part("x", 1, 0)].shape == (16, 6)
    assert received.tensors("c")[Part("x", 2, 0)].shape == (K, 6)
    codecs = {worker: {t.codec for f in received.frames[worker] for t in f.tensors} for worker in "abc"}
    assert codecs == {"a": {"bf16"}, "b": {"int8"}, "c": {"fp32"}}
    assert sink.sent_calls([Calls(i, 1, 16) for i in range(3)]) == (Calls(0, 1, 0), Calls(1, 1, 16), Calls(2, 1, K))


# --- sketch ---------------------------------------------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("rows", [None, PADDED], ids=["whole", "padded"])
def test_a_sketch_sends_one_x_and_a_g_for_each_site_that_make_nearly_the_same_gradient(
    codec: Codec, rows: torch.Tensor | None
) -> None:
    sink, received = packer(SHARED, wire("sketch", codec, sketch_rows=K))
    x, g = low_rank(0, SHARED[0], rank=2)
    other = low_rank(5, SHARED[1], rank=2)[1]
    sink.capture(captured(SHARED[1], 0, x, other, rows))
    sink.capture(captured(SHARED[0], 0, x, g, rows))
    sink.finish()
    tensors = received.tensors("w")
    assert set(received.parts("w")) == {Part("x", 0, 0), Part("g", 0, 0), Part("g", 1, 0)}
    assert received.parts("w")[0] == Part("x", 0, 0) and len(received.parts("w")) == 3
    for index, of_site in ((0, g), (1, other)):
        few_x, few_g = tensors[Part("x", 0, 0)], tensors[Part("g", index, 0)]
        assert few_x.shape == (K, 6) and few_g.shape == (K, of_site.shape[-1])
        assert near(few_g.T @ few_x, kept(of_site, rows).T @ kept(x, rows), 4 * LOSS[codec] + 1e-5)


def test_a_sketch_waits_for_all_sites_of_its_group_and_for_no_other_call_or_group() -> None:
    sink, received = packer(SHARED, wire("sketch", sketch_rows=K))
    xs = [low_rank(10 * call, SHARED[0])[0] for call in range(2)]
    seen = []
    for of, call in ((SHARED[1], 0), (SHARED[1], 1), (SHARED[2], 0), (SHARED[0], 1), (SHARED[0], 0)):
        x = values(3, 5) if of.group else xs[call]
        sink.capture(captured(of, call, x, values(of.index + 20 * call, of.d_out)))
        seen.append(sink.sent_rows)
    assert seen == [0, 0, K, 3 * K, 5 * K]
    sink.finish()
    calls = [part.call for part in received.parts("w") if part.index == 0 and part.kind == "x"]
    assert calls == [1, 0], "as their last site came"
    assert sink.sent_calls([Calls(0, 2, 32), Calls(1, 2, 32), Calls(2, 1, 16)]) == (
        Calls(0, 2, 2 * K),
        Calls(1, 2, 2 * K),
        Calls(2, 1, K),
    )


def test_a_group_of_which_a_site_was_not_called_is_sent_at_the_end() -> None:
    sink, received = packer(SHARED, wire("sketch", sketch_rows=K))
    x, g = low_rank(0, SHARED[1], rank=2)
    sink.capture(captured(SHARED[1], 0, x, g))
    assert sink.sent_rows == 0
    sink.finish()
    assert received.parts("w") == [Part("x", 0, 0), Part("g", 1, 0)]
    tensors = received.tensors("w")
    assert near(tensors[Part("g", 1, 0)].T @ tensors[Part("x", 0, 0)], kept(g, None).T @ kept(x, None), 1e-5)
    assert sink.sent_calls([Calls(1, 1, 16)]) == (Calls(1, 1, 3),), "as few as the site is wide"


def sketched(seed: int = 0, batch: int = 7, call: int = 0, of: Site = SHARED[2]) -> torch.Tensor:
    sink, received = packer(SHARED, wire("sketch", sketch_rows=K), seed=seed, batch=batch)
    sink.capture(captured(of, call, values(0, of.d_in), values(1, of.d_out)))
    sink.finish()
    return received.tensors("w")[Part("x", of.group, call)]


def test_a_batch_that_is_computed_again_has_the_same_sketch_and_any_other_another() -> None:
    assert torch.equal(sketched(), sketched())
    elsewhere = site(2, 2, Linear(1.0), d_in=5)
    all_of_them = [sketched(), sketched(seed=1), sketched(batch=8), sketched(call=1), sketched(of=elsewhere)]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(all_of_them, 2))


@pytest.mark.parametrize(("max_error", "reduced"), [(0.0, True), (0.02, False), (0.9, True)])
def test_all_rows_are_sent_where_a_sketch_would_be_further_off_than_it_may(max_error: float, reduced: bool) -> None:
    sink, received = packer(SHARED, wire("sketch", sketch_rows=2, max_error=max_error))
    x, g, other = values(0, 6), values(1, 4), values(2, 3)
    sink.capture(captured(SHARED[1], 0, x, other))
    sink.capture(captured(SHARED[0], 0, x, g))
    sink.finish()
    tensors = received.tensors("w")
    rows = 2 if reduced else 16
    assert {len(tensor) for tensor in tensors.values()} == {rows}
    assert sink.sent_calls([Calls(0, 1, 16), Calls(1, 1, 16)]) == (Calls(0, 1, rows), Calls(1, 1, rows))
    if not reduced:
        for part, whole in ((Part("x", 0, 0), x), (Part("g", 0, 0), g), (Part("g", 1, 0), other)):
            assert torch.equal(tensors[part], kept(whole, None))


@pytest.mark.parametrize("rows", ["exact", "sketch"])
def test_an_adapter_that_cannot_be_reduced_sends_all_of_its_rows(rows: Rows) -> None:
    of = site(0, 0, Mlp((3,), 1.0))
    sink, received = packer([of], wire(rows, sketch_rows=K))
    x, g = values(0, 6), values(1, 4)
    sink.capture(captured(of, 0, x, g))
    sink.finish()
    tensors = received.tensors("w")
    assert torch.equal(tensors[Part("x", 0, 0)], kept(x, None)) and torch.equal(tensors[Part("g", 0, 0)], kept(g, None))


# --- trouble --------------------------------------------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", ["exact", "sketch"])
@pytest.mark.parametrize("which", ["x", "g"])
def test_what_is_not_finite_is_told_of_and_not_sent(codec: Codec, bad: float, rows: Rows, which: str) -> None:
    sites = [site(0, 0), site(1, 1)]
    sink, received = packer(sites, wire(rows, codec, sketch_rows=K, max_error=0.5))
    x, g = values(0, 6), values(1, 4)
    (x if which == "x" else g)[1, 3, 2] = bad
    sink.capture(captured(sites[1], 0, x, g))
    sink.capture(captured(sites[0], 0, values(2, 6), values(3, 4)))
    with pytest.raises(ColaError) as failed:
        sink.finish()
    assert failed.value.reason == Reason.NON_FINITE_CAPTURE
    told = failed.value.details
    assert (told["site"], told["step"], told["job"]) == ("site1", "3", "job")
    if rows == "exact":
        assert told["tensor"] == "the gradient" and "the gradient" in failed.value.message
    assert received == Received(sites), "neither that nor anything after it"


@pytest.mark.parametrize("rows", ["exact", "sketch"])
def test_padding_that_is_not_finite_harms_nobody(rows: Rows) -> None:
    of = site(0, 0)
    sink, received = packer([of], wire(rows, sketch_rows=K))
    x, g = values(0, 6), values(1, 4)
    x[1, 7] = g[1, 6] = float("nan")
    sink.capture(captured(of, 0, x, g, torch.arange(14)))
    sink.finish()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in received.tensors("w").values())


def test_nothing_is_asked_for_a_gradient_that_nobody_is_sent() -> None:
    """It takes a product: with rows, or once the job's captures are known to be bad, there is none."""
    asked: list[int] = []

    def counted(of: Site, x: torch.Tensor) -> Captured:
        plain = captured(of, 0, x, values(1, 4))
        return Captured(of, 0, plain.x, plain.g, None, lambda: (asked.append(of.index), plain.gradient())[1])

    sites = [site(0, 0), site(1, 1), site(2, 2)]
    rows_sink, _ = packer(sites, wire("all"))
    rows_sink.capture(counted(sites[0], values(0, 6)))
    assert asked == []
    sink, _ = packer(sites, wire("exact"))
    sink.capture(counted(sites[2], values(0, 6)))
    sink.capture(counted(sites[1], values(0, 6) * float("nan")))
    sink.capture(counted(sites[0], values(0, 6)))
    assert asked == [2, 1]


def test_an_x_is_never_in_a_later_frame_than_its_gradients() -> None:
    of = [site(i, 0, Linear(1.0), d_in=64, d_out=8192) for i in range(3)]
    frames: list[Capture] = []
    sink, _ = packer(of, wire("sketch", sketch_rows=16), emit=lambda _, frame: frames.append(frame))
    for call in range(2):
        for each in of:
            sink.capture(captured(each, call, values(call, 64, 1, 40), values(each.index, 8192, 1, 40)))
    sink.finish()
    assert len(frames) > 1
    parts = [part for frame in frames for part in frame.parts]
    for call in range(2):
        assert all(parts.index(Part("x", 0, call)) < parts.index(Part("g", i, call)) for i in range(3))
    assert all(decode(tensor).shape[0] == 16 for frame in frames for tensor in frame.tensors)
