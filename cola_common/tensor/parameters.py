"""What has a parameter's shape, a gradient or a delta, in a codec's bytes.

`int8` keeps a scale for each row, and a LoRA's B (d_out×r) has rows of r values: with r = 8 the scales of these would
take half as many bytes as the values. So a matrix that is higher than wide lies down for it.
"""

import torch

from cola_common.errors import ColaError, Reason
from cola_common.messages import EncodedTensor
from cola_common.tensor.encoded import decode, encode


def encoded_shape(shape: tuple[int, ...], codec: str) -> tuple[int, ...]:
    """The shape in which a parameter's values are written."""
    return shape[::-1] if codec == "int8" and len(shape) == 2 and shape[0] > shape[1] else shape


def encode_parameter(values: torch.Tensor, codec: str) -> EncodedTensor:
    """As `encode`."""
    lies = encoded_shape(tuple(values.shape), codec) != tuple(values.shape)
    return encode(values.T if lies else values, codec)


def decode_parameter(encoded: EncodedTensor, shape: tuple[int, ...], *, what: str = "a tensor") -> torch.Tensor:
    """The values of a parameter of this shape: contiguous, fp32, on the CPU. Raises: as `decode`."""
    if encoded.shape != encoded_shape(shape, encoded.codec):
        problem = f"{what} is {encoded.shape} in {encoded.codec}, of a parameter {shape}"
        raise ColaError(Reason.PROTOCOL_VIOLATION, problem=problem)
    values = decode(encoded, what=what)
    return values if tuple(values.shape) == shape else values.T.contiguous()
