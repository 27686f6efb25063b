"""fp32: four bytes a value."""

from typing import final

import torch

from cola_common.messages import Buffer
from cola_common.tensor.codec import Codec, elements, values


@final
class Fp32(Codec):
    """Loses nothing, whatever the values are."""

    name = "fp32"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return 4 * elements(shape)

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        return tensor.to(torch.float32).contiguous(), 0

    def unpack(self, data: Buffer, shape: tuple[int, ...], exponent: int) -> torch.Tensor:
        # Into memory of torch's own: an optimizer writes there, and matrix kernels see the same alignment everywhere.
        return torch.empty(shape, dtype=torch.float32).copy_(values(data, torch.float32).view(shape))
