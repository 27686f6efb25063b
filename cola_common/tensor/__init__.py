"""Tensors as bytes: value codecs, the finite check, and digests of what a shard holds."""

from cola_common.tensor import digest
from cola_common.tensor.encoded import CODECS, decode, encode, nbytes
from cola_common.tensor.finite import is_finite

__all__ = ["CODECS", "decode", "digest", "encode", "is_finite", "nbytes"]
