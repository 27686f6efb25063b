"""Digests that prove that server and worker hold the same bits. xxh3-128, hex: against accidents, not against malice.

A shard's digest starts as `state` of its parameters when it is assigned and is chained over the deltas folded since:
to compare it costs a delta's bytes and not the whole state. A worker's digest combines its shards' in index order.
"""

from collections.abc import Mapping, Sequence

import torch
import xxhash

from cola_common.messages import EncodedTensor
from cola_common.tensor.encoded import encode


def state(parameters: Mapping[str, torch.Tensor]) -> str:
    """Of names, shapes and fp32 values; the mapping's order does not matter."""
    names = sorted(parameters)
    return chain("", names, [encode(parameters[name], "fp32") for name in names])


def chain(previous: str, names: Sequence[str], tensors: Sequence[EncodedTensor]) -> str:
    """The digest after a delta of these parameters is folded onto `previous`; the order of the tensors matters."""
    digest = xxhash.xxh3_128()
    # Each text ends with a line feed and each tensor's length follows from its header: no two inputs look alike.
    digest.update(f"{previous}\n".encode())
    for name, tensor in zip(names, tensors, strict=True):
        digest.update(f"{name}\n{tensor.codec} {tensor.shape} {tensor.exponent} {tensor.nbytes}\n".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


def combine(digests: Sequence[str]) -> str:
    """One digest of many; their order matters."""
    return xxhash.xxh3_128_hexdigest("\n".join(digests).encode())
