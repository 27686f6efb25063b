"""Tensors to `EncodedTensor` and back, by the name of a codec."""

from math import prod

import torch
import xxhash

from cola_common.errors import ColaError, Reason
from cola_common.messages import EncodedTensor
from cola_common.tensor.bf16 import Bf16
from cola_common.tensor.codec import Codec
from cola_common.tensor.fp16 import Fp16
from cola_common.tensor.fp32 import Fp32
from cola_common.tensor.int4 import Int4
from cola_common.tensor.int8 import Int8

_CODECS: dict[str, Codec] = {codec.name: codec for codec in (Fp32(), Bf16(), Fp16(), Int8(), Int4())}

CODECS: tuple[str, ...] = tuple(_CODECS)
"""The codecs that this side can write and read."""


def nbytes(codec: str, shape: tuple[int, ...]) -> int:
    """How long the encoding of a tensor of this shape is. Raises: `ColaError(UNSUPPORTED_CODEC)`."""
    return _codec(codec).nbytes(shape)


def encode(tensor: torch.Tensor, codec: str) -> EncodedTensor:
    """The values of an fp32, bf16 or fp16 tensor, in a codec's bytes.

    Values that are not finite stay so, with some codecs their neighbours too; see the codecs for what is lost of the
    others. Where the tensor already is as the codec writes it (on the CPU, contiguous, of its dtype) nothing is copied:
    `data` is the tensor's own memory, which it keeps alive and which must not change until the bytes are sent.

    Raises: `ColaError(UNSUPPORTED_CODEC)`.
    """
    chosen = _codec(codec)
    assert tensor.dtype in (torch.float32, torch.bfloat16, torch.float16), tensor.dtype
    packed, exponent = chosen.pack(tensor.detach().cpu())
    data = packed.reshape(-1).view(torch.uint8).numpy().data.toreadonly()
    return EncodedTensor(
        codec=codec,
        shape=tuple(tensor.shape),
        exponent=exponent,
        nbytes=data.nbytes,
        checksum=xxhash.xxh3_64_intdigest(data),
        data=data,
    )


def decode(encoded: EncodedTensor, *, what: str = "a tensor") -> torch.Tensor:
    """The values as an fp32 tensor on the CPU, with memory of its own. `what` names the tensor in errors.

    Raises: `ColaError(UNSUPPORTED_CODEC)`; `ColaError(PROTOCOL_VIOLATION)` if shape, size and exponent do not go
    together; `ColaError(CHECKSUM_MISMATCH)` if the bytes are not those that were encoded.
    """
    codec = _codec(encoded.codec)
    data = memoryview(encoded.data)
    _check_shape(encoded.shape, what)
    wanted = codec.nbytes(encoded.shape)
    if not wanted == encoded.nbytes == data.nbytes:
        shape = f"{encoded.shape} in {encoded.codec}"
        raise _violation(f"{what} has {data.nbytes} bytes and says {encoded.nbytes}, {shape} takes {wanted}")
    if encoded.exponent not in codec.exponents:
        raise _violation(f"{what} has exponent {encoded.exponent}, which {encoded.codec} does not know")
    if xxhash.xxh3_64_intdigest(data) != encoded.checksum:
        raise ColaError(Reason.CHECKSUM_MISMATCH, what=what)
    return codec.unpack(data, encoded.shape, encoded.exponent)


def _codec(name: str) -> Codec:
    try:
        return _CODECS[name]
    except KeyError:
        raise ColaError(Reason.UNSUPPORTED_CODEC, codec=name, known=", ".join(CODECS)) from None


def _check_shape(shape: tuple[int, ...], what: str) -> None:
    # Without a negative size, and with strides that fit torch's 64 bits also where another size is 0 and hides them.
    if min(shape, default=0) < 0 or prod(max(1, size) for size in shape) >= 2**63:
        raise _violation(f"{what} has the impossible shape {shape}")


def _violation(problem: str) -> ColaError:
    return ColaError(Reason.PROTOCOL_VIOLATION, problem=problem)
