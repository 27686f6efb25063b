"""Value codecs: what they may lose, for every dtype, shape and magnitude; what they refuse; and the finite check."""

import dataclasses
import math
import struct

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from cola_common.errors import ColaError, Reason
from cola_common.messages import EncodedTensor
from cola_common.tensor import CODECS, decode, encode, is_finite, nbytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (7,), (3, 0, 5), (33, 65), (2, 3, 5, 7)]
MAGNITUDES = [1e-45, 1e-41, 1e-38, 1e-20, 1e-8, 1.0, 1e4, 1e10, 1e38]

FIRST_INFINITE = {"bf16": 2.0**128 * (1 - 2.0**-9), "fp16": 2.0**128 * (1 - 2.0**-12)}
"""The smallest magnitude that the codec rounds up to 2^128, which fp32 has not."""

INT4_LEVELS = (-96, -77, -60, -45, -32, -21, -12, -5, 0, 5, 12, 21, 32, 45, 60, 77)

every_codec = pytest.mark.parametrize("codec", CODECS)
every_codec_with_levels = pytest.mark.parametrize("codec", ["int8", "int4"])


def groups(codec: str, tensor: torch.Tensor) -> torch.Tensor:
    """The values that share a scale, in rows."""
    if codec == "int8":
        return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    return functional.pad(tensor.flatten(), (0, -tensor.numel() % 64)).view(-1, 64)


def stored_scales(codec: str, encoded: EncodedTensor) -> torch.Tensor:
    """In fp64, one a group; without int4's sign."""
    count = len(groups(codec, torch.empty(encoded.shape)))
    return torch.tensor(struct.unpack(f"<{count}f", bytes(encoded.data[: 4 * count])), dtype=torch.float64).abs()


def within_half_a_gap(codec: str, size: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """How far a magnitude may move, from the scale of its group."""
    if codec == "int8":
        return (scale / 2).expand_as(size)
    return torch.minimum(scale / 2 + (4 * scale**2 + size * scale).sqrt(), 9.5 * scale) * (1 + 2.0**-16)


def bound(codec: str, tensor: torch.Tensor) -> torch.Tensor:
    """How far each value may move, in fp64."""
    size = tensor.double().abs()
    if codec == "fp32":
        return torch.zeros_like(size)
    if codec in ("int8", "int4"):
        by_group = groups(codec, size)
        step = by_group.amax(1, keepdim=True) / (127 if codec == "int8" else 77)
        scale = step * (1 + 2.0**-15) + 2.0**-141
        return within_half_a_gap(codec, by_group, scale).flatten()[: size.numel()].view(size.shape)
    if codec == "bf16":
        return torch.maximum(size * 2.0**-8, torch.full_like(size, 2.0**-134))
    return torch.maximum(size * 2.0**-11, size.max() * 2.0**-39) + 2.0**-149


def assert_within_bound(codec: str, tensor: torch.Tensor) -> None:
    decoded = decode(encode(tensor, codec))
    assert (decoded.dtype, decoded.shape, decoded.device.type) == (torch.float32, tensor.shape, "cpu")
    if tensor.numel():
        assert ((decoded.double() - tensor.double()).abs() <= bound(codec, tensor)).all()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_codec
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_bounded_for_every_dtype_and_shape(codec: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_within_bound(codec, normal(*shape).to(dtype))


@every_codec
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_error_is_bounded_at_every_magnitude(codec: str, magnitude: float) -> None:
    assert_within_bound(codec, normal(50, 20).clamp(-3, 3) * magnitude)


@every_codec
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_bounded_at_the_edges_of_a_dtype(codec: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    edges = [0.0, -0.0, info.tiny, -info.tiny, info.smallest_normal * info.eps, 1.0, 1 + info.eps, info.max, info.min]
    held = [edge for edge in edges if abs(edge) < FIRST_INFINITE.get(codec, math.inf)]
    for edge in held:
        assert_within_bound(codec, torch.tensor([edge], dtype=dtype))
    assert_within_bound(codec, torch.tensor(held, dtype=dtype))


@every_codec
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_bounded_for_denormals_alone_and_beside_other_values(codec: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    denormals = torch.cat([torch.arange(-20, 21) * least, normal(87).clamp(-0.99, 0.99) * info.smallest_normal])
    tensor = denormals.to(dtype)
    assert tensor.count_nonzero() > 100
    assert (tensor.abs() < info.smallest_normal).all()
    for scale in (None, info.smallest_normal, 1.0):
        assert_within_bound(codec, tensor if scale is None else torch.cat([tensor, normal(9).to(dtype) * scale]))


@every_codec
@pytest.mark.parametrize(
    "shape", [(131_071,), (131_073,), (3, 70_001), (70_001, 3), (131_073, 1), (1, 262_145)], ids=str
)
def test_error_is_bounded_for_tensors_that_are_coded_in_parts(codec: str, shape: tuple[int, ...]) -> None:
    assert_within_bound(codec, normal(*shape) * torch.linspace(0.1, 10, shape[-1]))


@every_codec
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeros_of_either_sign_are_zeros(codec: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for zeros in (torch.zeros(shape, dtype=dtype), -torch.zeros(shape, dtype=dtype)):
        assert torch.equal(decode(encode(zeros, codec)), torch.zeros(shape))


@settings(max_examples=300, deadline=None)
@given(codec=st.sampled_from(CODECS), values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_error_is_bounded_for_any_mix_of_values(codec: str, values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    if not values or tensor.abs().max() < FIRST_INFINITE.get(codec, math.inf):
        assert_within_bound(codec, tensor)


@every_codec
def test_what_the_codec_can_hold_comes_back_bit_for_bit(codec: str) -> None:
    once = decode(encode(normal(40, 30), codec))
    again = decode(encode(once, codec))
    assert torch.equal(once.view(torch.int32), again.view(torch.int32))


def test_fp32_keeps_every_bit_of_any_pattern() -> None:
    patterns = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    tensor = patterns.to(torch.int32).view(torch.float32)  # NaNs with payloads, denormals and negative zeros among them
    assert torch.equal(decode(encode(tensor, "fp32")).view(torch.int32), tensor.view(torch.int32))


@pytest.mark.parametrize("magnitude", [1e-6, 1e-9, 1e-12, 1e-30])
def test_small_gradients_do_not_flush_to_zero_in_fp16(magnitude: float) -> None:
    gradient = normal(64, 64) * magnitude
    decoded = decode(encode(gradient, "fp16"))
    assert torch.linalg.vector_norm((decoded - gradient).double()) < 4e-4 * torch.linalg.vector_norm(gradient.double())
    assert bool(gradient.to(torch.float16).count_nonzero() < 0.9 * gradient.numel()) is (magnitude < 1e-6)


@every_codec
def test_values_become_infinite_only_where_the_codec_says(codec: str) -> None:
    first = torch.tensor(FIRST_INFINITE.get(codec, math.inf))
    largest = torch.nextafter(first, torch.tensor(0.0))
    for share in (0.0, 0.5, 0.79, 0.81, 0.88, 0.9, 1.0):  # of the largest, on the other side
        for values in ([largest, -share * largest], [-largest, share * largest]):
            assert_within_bound(codec, torch.stack(values))
            assert decode(encode(torch.stack(values), codec)).isfinite().all()
    if codec in FIRST_INFINITE:
        assert decode(encode(first, codec)) == math.inf
        assert decode(encode(-first, codec)) == -math.inf


@every_codec
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_stay_so(codec: str, bad: float) -> None:
    decoded = decode(encode(torch.tensor([1.0, bad, 3e38, -1e-40]), codec))
    assert not math.isfinite(decoded[1])
    for dtype in DTYPES:
        alone = decode(encode(torch.tensor([bad, -bad], dtype=dtype), codec))
        assert not alone.isfinite().any()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_casts_keep_what_is_not_finite_and_fp16_then_divides_nothing(bad: float) -> None:
    others = [1.0, -3e-5, 65_519.0, 65_520.0, 1e-8, -1e30]
    expected = {
        "fp32": torch.tensor(others),
        "bf16": torch.tensor(others, dtype=torch.bfloat16).float(),
        "fp16": torch.tensor(others, dtype=torch.float16).float(),
    }
    assert expected["fp16"].isinf().tolist() == [False, False, False, True, False, True]
    assert expected["fp16"][4] == 0
    for codec, kept in expected.items():
        decoded = decode(encode(torch.tensor([*others, bad]), codec))
        assert torch.equal(decoded[:-1], kept)
        assert torch.equal(decoded[-1:], torch.tensor([bad])) or (math.isnan(bad) and math.isnan(decoded[-1]))


@every_codec
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_size_is_known_from_the_shape(codec: str, shape: tuple[int, ...]) -> None:
    encoded = encode(normal(*shape), codec)
    assert encoded.nbytes == memoryview(encoded.data).nbytes == nbytes(codec, shape)
    assert encoded.checksum == xxhash.xxh3_64_intdigest(bytes(encoded.data))


@every_codec
def test_strided_tensors_and_tensors_with_a_graph_are_encoded_by_value(codec: str) -> None:
    base = normal(12, 10)
    for view in (base.T, base[::2, 1::3], base.expand(2, 12, 10), base.clone().requires_grad_() * 1):
        wanted = encode(view.detach().contiguous().clone(), codec)
        found = encode(view, codec)
        assert bytes(found.data) == bytes(wanted.data)
        assert dataclasses.replace(found, data=b"") == dataclasses.replace(wanted, data=b"")


@pytest.mark.parametrize(("codec", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_tensor_that_is_as_the_codec_writes_it_is_not_copied_and_kept_alive(codec: str, dtype: torch.dtype) -> None:
    tensor = torch.zeros(4, dtype=dtype)
    encoded = encode(tensor, codec)
    tensor[0] = 1.0
    del tensor
    assert decode(dataclasses.replace(encoded, checksum=xxhash.xxh3_64_intdigest(encoded.data)))[0] == 1.0


@every_codec
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_any_buffer_at_any_address_decodes_the_same_without_a_warning(codec: str, kind: type, offset: int) -> None:
    encoded = encode(normal(5, 7), codec)
    buffer = bytearray(offset + encoded.nbytes)
    buffer[offset:] = encoded.data
    part = memoryview(buffer)[offset:]
    moved = dataclasses.replace(encoded, data=part if kind is memoryview else kind(part))
    assert torch.equal(decode(moved), decode(encoded))


@every_codec
def test_decoded_tensors_have_memory_of_their_own_that_may_be_written(codec: str) -> None:
    encoded = encode(normal(5, 7), codec)
    buffer = bytearray(encoded.data)
    received = dataclasses.replace(encoded, data=buffer)
    decode(received).add_(1.0)
    decode(encoded).add_(1.0)
    assert buffer == bytes(encoded.data)
    assert torch.equal(decode(received), decode(encoded))


@every_codec
@pytest.mark.parametrize("position", [0, 17, -1])
def test_any_flipped_bit_is_found(codec: str, position: int) -> None:
    encoded = encode(normal(5, 7), codec)
    data = bytearray(encoded.data)
    data[position] ^= 1
    with pytest.raises(ColaError, match="x of group 3") as caught:
        decode(dataclasses.replace(encoded, data=data), what="x of group 3")
    assert caught.value.reason == Reason.CHECKSUM_MISMATCH


def tampered(encoded: EncodedTensor, **fields: object) -> EncodedTensor:
    return dataclasses.replace(encoded, **fields)  # type: ignore[arg-type]


@every_codec
@pytest.mark.parametrize(
    "fields",
    [
        {"shape": (5, 8)},
        {"shape": (5,)},
        {"shape": (-5, -7)},
        {"shape": ()},
        {"shape": (0, 2**70)},
        {"shape": (2**40, 2**40, 0)},
        {"shape": (2**62,)},
        {"nbytes": 1},
        {"data": b""},
        {"data": b"\0" * 139},
        {"exponent": 200},
        {"exponent": -200},
    ],
    ids=str,
)
def test_headers_that_do_not_go_together_are_refused(codec: str, fields: dict[str, object]) -> None:
    with pytest.raises(ColaError) as caught:
        decode(tampered(encode(normal(5, 7), codec), **fields))
    assert caught.value.reason == Reason.PROTOCOL_VIOLATION


@every_codec
def test_empty_tensors_with_impossible_sizes_are_refused(codec: str) -> None:
    empty = encode(torch.empty(0), codec)
    for shape in ((0, 2**70), (2**40, 2**40, 0), (-1, 0)):
        with pytest.raises(ColaError) as caught:
            decode(tampered(empty, shape=shape))
        assert caught.value.reason == Reason.PROTOCOL_VIOLATION


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "fp16"])
def test_codecs_other_than_fp16_take_no_exponent(codec: str) -> None:
    with pytest.raises(ColaError) as caught:
        decode(tampered(encode(normal(3), codec), exponent=1))
    assert caught.value.reason == Reason.PROTOCOL_VIOLATION


@pytest.mark.parametrize("exponent", [-126, 113])
def test_the_whole_range_of_exponents_decodes(exponent: int) -> None:
    decoded = decode(tampered(encode(torch.tensor([0.5]), "fp16"), exponent=exponent))
    assert decoded.item() == 2.0**14 * 2.0**exponent  # 0.5 is stored as 2^14


@pytest.mark.parametrize("codec", ["", "fp8", "FP32"])
def test_unknown_codecs_are_refused_by_name(codec: str) -> None:
    for call in (
        lambda: encode(normal(3), codec),
        lambda: decode(tampered(encode(normal(3), "fp32"), codec=codec)),
        lambda: nbytes(codec, (3,)),
    ):
        with pytest.raises(ColaError, match="fp32, bf16, fp16") as caught:
            call()
        assert caught.value.reason == Reason.UNSUPPORTED_CODEC


def test_bytes_are_little_endian_on_the_wire() -> None:
    assert bytes(encode(torch.tensor([1.5, -2.0]), "fp32").data) == struct.pack("<2f", 1.5, -2.0)
    assert bytes(encode(torch.tensor([1.5]), "bf16").data) == struct.pack("<f", 1.5)[2:]
    scaled = encode(torch.tensor([1.5, -2.0]), "fp16")
    assert bytes(scaled.data) == struct.pack("<2e", 1.5 / 2.0**scaled.exponent, -2.0 / 2.0**scaled.exponent)
    assert bytes(encode(torch.tensor([[-127.0, 63.4], [0.0, 254.0]]), "int8").data) == struct.pack(
        "<2f4b", 1.0, 2.0, -127, 63, 0, 127
    )
    # The first half, -96 and 12, is in the low halves of the bytes, 21 and nothing in the high ones: q = -8, 2, 3.
    assert bytes(encode(torch.tensor([-96.0, 12.0, 21.0]), "int4").data) == struct.pack("<f2B", 1.0, 0x38, 0x02)
    assert bytes(encode(torch.tensor([96.0, -12.0, -21.0]), "int4").data) == struct.pack("<f2B", -1.0, 0x38, 0x02)


# --- levels and scales ----------------------------------------------------------------------------------------------


@every_codec_with_levels
@settings(max_examples=300, deadline=None)
@given(
    exponents=st.lists(st.integers(-150, 126), min_size=1, max_size=6),
    width=st.integers(1, 130),
    seed=st.integers(0, 99),
)
def test_no_value_moves_further_than_half_a_gap_of_its_own_scale(
    codec: str, exponents: list[int], width: int, seed: int
) -> None:
    sizes = torch.tensor([2.0**e for e in exponents], dtype=torch.float64)[:, None]
    tensor = (normal(len(exponents), width, seed=seed).double().clamp(-3.9, 3.9) * sizes).float()
    encoded = encode(tensor, codec)
    error = groups(codec, (decode(encoded).double() - tensor.double()).abs())
    scale = stored_scales(codec, encoded)[:, None]
    assert (error <= within_half_a_gap(codec, groups(codec, tensor.double().abs()), scale)).all()


@every_codec_with_levels
def test_scales_are_as_small_as_they_may_be_and_have_16_bits(codec: str) -> None:
    tensor = normal(200, 64)
    encoded = encode(tensor, codec)
    count = len(tensor)
    scale = torch.frombuffer(bytearray(encoded.data[: 4 * count]), dtype=torch.float32)
    assert not (scale.view(torch.int32) & 0xFF).any()
    down, up = -tensor.amin(1).double(), tensor.amax(1).double()
    if codec == "int8":
        smallest = torch.maximum(down, up) / 127
        assert (scale > 0).all()
    else:
        smallest = torch.maximum(torch.maximum(down, up) / 96, torch.minimum(down, up) / 77)
        assert ((scale > 0) == (down >= up)).all()
    ratio = scale.double().abs() / smallest
    assert ((ratio > 1 - 2.0**-23) & (ratio < 1 + 2.0**-15)).all()


def test_every_int4_value_is_the_nearest_of_its_block_s_levels() -> None:
    kinds = [normal(50, 64), normal(50, 64, seed=1).exp(), normal(50, 64, seed=2) ** 5, -normal(9, 64).abs()]
    tensor = torch.cat(kinds)
    encoded = encode(tensor, "int4")
    signed = torch.frombuffer(bytearray(encoded.data[: 4 * len(tensor)]), dtype=torch.float32).double()
    levels = torch.tensor(INT4_LEVELS).double() * signed[:, None]
    distance = (tensor.double()[:, :, None] - levels[:, None, :]).abs()
    moved = (decode(encoded).double() - tensor.double()).abs()
    assert (moved <= distance.amin(-1) + 2.0**-18 * signed.abs()[:, None]).all()
    assert (distance.gather(-1, distance.argmin(-1, keepdim=True)).squeeze(-1) <= moved).all()


@every_codec_with_levels
def test_a_tensor_and_its_negative_are_coded_alike(codec: str) -> None:
    for tensor in (normal(40, 65), normal(40, 65).abs(), torch.tensor([[-2.0, 2.0, 1.0]])):
        assert torch.equal(decode(encode(-tensor, codec)), -decode(encode(tensor, codec)))


@every_codec_with_levels
def test_zeros_stay_zeros(codec: str) -> None:
    for tensor in (torch.zeros(3, 70), -torch.zeros(3, 70), normal(30, 65).relu(), -normal(30, 65).relu()):
        decoded = decode(encode(tensor, codec))
        assert (decoded[tensor == 0].view(torch.int32) == 0).all()


@pytest.mark.parametrize(("codec", "shape"), [("int8", (9, 70)), ("int4", (10, 64)), ("int4", (5, 128))])
@pytest.mark.parametrize("bad", [0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, -1], ids=hex)  # ±∞ and NaNs
def test_what_shares_no_scale_does_not_matter(codec: str, shape: tuple[int, int], bad: int) -> None:
    tensor = normal(*shape)
    wanted = groups(codec, decode(encode(tensor, codec)))
    spoilt = groups(codec, tensor.clone())
    spoilt.view(torch.int32)[3, 5] = bad
    spoilt[4] *= 1e30
    found = groups(codec, decode(encode(spoilt.view(shape), codec)))
    assert found[3].isnan().all()
    others = [row for row in range(len(wanted)) if row not in (3, 4)]
    assert torch.equal(found[others], wanted[others])
    assert bytes(encode(spoilt.view(shape), codec).data) == bytes(encode(spoilt.view(shape), codec).data)


def heavy_tailed(rows: int, width: int, freedom: int) -> torch.Tensor:
    """Student's t."""
    squares = normal(freedom, rows, width, seed=7).square().mean(0)
    return normal(rows, width, seed=8) / squares.sqrt()


@pytest.mark.parametrize(
    ("codec", "least", "tensor"),
    [
        ("int8", 0.9997, normal(256, 576)),
        ("int8", 0.9997, normal(256, 4096)),
        ("int4", 0.994, normal(256, 576)),
        ("int4", 0.985, heavy_tailed(256, 576, 2)),
        ("int4", 0.985, heavy_tailed(256, 576, 5)),
        ("int4", 0.985, normal(256, 576).exp() * normal(256, 576, seed=1).sign()),
        ("int4", 0.985, normal(256, 576).relu()),
    ],
    ids=["int8", "int8-wide", "gauss", "t2", "t5", "lognormal", "relu"],
)
def test_rows_keep_their_direction(codec: str, least: float, tensor: torch.Tensor) -> None:
    cosines = functional.cosine_similarity(decode(encode(tensor, codec)), tensor, dim=1)
    assert cosines.min() >= least


def test_a_value_takes_8_or_4_bits_and_its_share_of_a_scale() -> None:
    assert nbytes("int8", (1024, 576)) == 1024 * (576 + 4)
    assert nbytes("int8", ()) == 5
    assert nbytes("int4", (1024, 576)) == 1024 * 576 // 64 * (32 + 4)
    assert nbytes("int4", (3, 43)) == 3 * 4 + 65
    assert nbytes("int8", (4, 0)) == nbytes("int4", (4, 0)) == 0


# --- the finite check -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("position", [0, 1, 500, 998])
def test_one_bad_value_anywhere_is_found(dtype: torch.dtype, bad: float, position: int) -> None:
    tensor = normal(999).to(dtype)
    assert is_finite(tensor)
    tensor[position] = bad
    assert not is_finite(tensor)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_finite_values_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    tensor = torch.full((4096,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(tensor)
    assert is_finite(-tensor)
    tensor[-1] = math.nan
    assert not is_finite(tensor)


def test_infinities_do_not_cancel() -> None:
    assert not is_finite(torch.tensor([math.inf, -math.inf]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_finite_check_takes_any_shape(shape: tuple[int, ...]) -> None:
    assert is_finite(normal(*shape))
