"""Value codecs: what they may lose, for every dtype, shape and magnitude; what they refuse; and the finite check."""

import dataclasses
import math
import struct

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_common.errors import ColaError, Reason
from cola_common.messages import EncodedTensor
from cola_common.tensor import CODECS, decode, encode, is_finite, nbytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (7,), (3, 0, 5), (33, 65), (2, 3, 5, 7)]
MAGNITUDES = [1e-45, 1e-41, 1e-38, 1e-20, 1e-8, 1.0, 1e4, 1e10, 1e38]

FIRST_INFINITE = {"fp32": math.inf, "bf16": 2.0**128 * (1 - 2.0**-9), "fp16": 2.0**128 * (1 - 2.0**-12)}
"""The smallest magnitude that the codec rounds up to 2^128, which fp32 has not."""

every_codec = pytest.mark.parametrize("codec", CODECS)


def bound(codec: str, tensor: torch.Tensor) -> torch.Tensor:
    """How far each value may move, in fp64."""
    size = tensor.double().abs()
    if codec == "fp32":
        return torch.zeros_like(size)
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
    held = [edge for edge in edges if abs(edge) < FIRST_INFINITE[codec]]
    for edge in held:
        assert_within_bound(codec, torch.tensor([edge], dtype=dtype))
    assert_within_bound(codec, torch.tensor(held, dtype=dtype))


@settings(max_examples=300, deadline=None)
@given(codec=st.sampled_from(CODECS), values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_error_is_bounded_for_any_mix_of_values(codec: str, values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    if not values or tensor.abs().max() < FIRST_INFINITE[codec]:
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
    first = torch.tensor(FIRST_INFINITE[codec])
    largest = torch.nextafter(first, torch.tensor(0.0))
    assert_within_bound(codec, torch.stack([largest, -largest]))
    assert decode(encode(first, codec)) == math.inf
    assert decode(encode(-first, codec)) == -math.inf


@every_codec
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_stay_so(codec: str, bad: float) -> None:
    decoded = decode(encode(torch.tensor([1.0, bad, 3e38, -1e-40]), codec))
    assert not math.isfinite(decoded[1])


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


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_codecs_without_a_scale_take_no_exponent(codec: str) -> None:
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
