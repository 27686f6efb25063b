"""What has a parameter's shape lies down where that makes it smaller, and comes back as it was."""

import pytest
import torch

from cola_common.errors import ColaError, Reason
from cola_common.tensor import CODECS, decode, decode_parameter, encode, encode_parameter, encoded_shape, nbytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (7,), (1, 1), (8, 576), (576, 8), (3, 5), (5, 3), (65, 1), (1, 65), (9, 0), (0, 9), (5, 3, 2)]

LOSS = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11, "int8": 0.5 / 127 * (1 + 2.0**-14), "int4": 9.5 / 77 * 1.001}
"""What a codec may lose of a value, of the largest magnitude in the tensor; see `test_codecs` for their true bounds."""

every_codec = pytest.mark.parametrize("codec", CODECS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normal(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_codec
@every_shape
def test_only_an_int8_matrix_that_is_higher_than_wide_lies_down(codec: str, shape: tuple[int, ...]) -> None:
    high = len(shape) == 2 and shape[0] > shape[1]
    assert encoded_shape(shape, codec) == ((shape[1], shape[0]) if codec == "int8" and high else shape)


@every_codec
@every_shape
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_come_back_in_their_places_within_the_codec_s_loss(
    codec: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    values = normal(shape).to(dtype)
    encoded = encode_parameter(values, codec)
    assert (encoded.shape, encoded.nbytes) == (encoded_shape(shape, codec), nbytes(codec, encoded_shape(shape, codec)))
    decoded = decode_parameter(encoded, shape)
    assert (decoded.shape, decoded.dtype, decoded.is_contiguous()) == (shape, torch.float32, True)
    if values.numel():
        largest = float(values.double().abs().max())
        assert float((decoded.double() - values.double()).abs().max()) <= LOSS[codec] * largest + 2.0**-140
    # As if it had been written as it lies: the values and their places are all that there is.
    lying = values.T if encoded.shape != shape else values
    assert torch.equal(decode(encode(lying.contiguous(), codec)), decode(encoded))


@every_codec
@every_shape
def test_what_the_codec_can_hold_comes_back_bit_for_bit_and_may_be_written(codec: str, shape: tuple[int, ...]) -> None:
    once = decode_parameter(encode_parameter(normal(shape), codec), shape)
    encoded = encode_parameter(once, codec)
    again = decode_parameter(encoded, shape)
    assert torch.equal(once.view(torch.int32), again.view(torch.int32))
    again.add_(1.0)
    assert torch.equal(decode_parameter(encoded, shape), once)


@pytest.mark.parametrize(("height", "width"), [(576, 8), (4096, 16), (3, 2)])
def test_an_int8_matrix_has_the_scales_of_its_shorter_side(height: int, width: int) -> None:
    for shape in ((height, width), (width, height)):
        assert encode_parameter(normal(shape), "int8").nbytes == height * width + 4 * width


@every_codec
@pytest.mark.parametrize("told", [(5, 3, 1), (15,), (), (5, 2), (2, 5)], ids=str)
def test_a_tensor_of_another_shape_is_refused_by_name(codec: str, told: tuple[int, ...]) -> None:
    with pytest.raises(ColaError, match="B of shard 3") as refused:
        decode_parameter(encode_parameter(normal((5, 3)), codec), told, what="B of shard 3")
    assert refused.value.reason is Reason.PROTOCOL_VIOLATION
