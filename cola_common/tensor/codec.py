"""The codec interface: how a tensor's values become bytes, and back. One codec a file."""

from abc import ABC, abstractmethod
from math import prod

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from cola_common.messages import Buffer


class Codec(ABC):
    """One way to write values down. Subclasses are final, without state, and say in their docstring what they lose."""

    name: str
    exponents: range = range(1)
    """The exponents that `unpack` takes; only 0 where the codec has none."""

    @abstractmethod
    def nbytes(self, shape: tuple[int, ...]) -> int:
        """The exact number of bytes of a tensor of this shape."""

    @abstractmethod
    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        """A contiguous CPU tensor whose memory is the encoding, and the exponent.

        `tensor` is fp32, bf16 or fp16 on the CPU. The result may share memory with it.
        """

    @abstractmethod
    def unpack(self, data: Buffer, shape: tuple[int, ...], exponent: int) -> torch.Tensor:
        """An fp32 CPU tensor with memory of its own. `data` is `nbytes(shape)` long, `exponent` one of `exponents`."""


def elements(shape: tuple[int, ...]) -> int:
    """How many values a tensor of this shape has."""
    return prod(shape)


def values(data: Buffer, dtype: torch.dtype) -> torch.Tensor:
    """The values in `data`, in one dimension: a view, which must not be written to. `data` may start at any address.

    By way of DLPack, which knows read-only memory: `torch.frombuffer` does not, and warns.
    """
    return from_dlpack(np.frombuffer(data, np.uint8)).view(dtype)
