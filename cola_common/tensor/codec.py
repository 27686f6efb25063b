"""The codec interface: how a tensor's values become bytes, and back. One codec a file."""

from abc import ABC, abstractmethod
from math import prod

import torch

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
    """The values in `data`, in one dimension: a view on a writable buffer, a copy of a read-only one.

    torch has no read-only tensors and warns when it must make one; nobody needs to hear that for bytes that are
    about to be widened into fresh memory. `data` may start at any address.
    """
    view = memoryview(data)
    if view.nbytes == 0:  # torch.frombuffer refuses it
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=dtype)
