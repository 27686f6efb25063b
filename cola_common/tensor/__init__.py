"""Tensors as bytes: value codecs, the finite check, and digests of what a shard holds."""

from cola_common.tensor import digest
from cola_common.tensor.encoded import CODECS, decode, encode, nbytes
from cola_common.tensor.finite import is_finite
from cola_common.tensor.parameters import decode_parameter, encode_parameter, encoded_shape

__all__ = [
    "CODECS",
    "decode",
    "decode_parameter",
    "digest",
    "encode",
    "encode_parameter",
    "encoded_shape",
    "is_finite",
    "nbytes",
]
