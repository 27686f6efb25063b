"""bf16: the upper half of an fp32, rounded to nearest even."""

from typing import final

import torch

from cola_common.messages import Buffer
from cola_common.tensor.codec import Codec, elements, values


@final
class Bf16(Codec):
    """|error| ≤ max(2⁻⁸·|v|, 2⁻¹³⁴). Magnitudes of 2¹²⁸·(1 - 2⁻⁹) and more become infinite.

    What is infinite or NaN stays so, and touches no other value.
    """

    name = "bf16"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return 2 * elements(shape)

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        return tensor.to(torch.bfloat16).contiguous(), 0

    def unpack(self, data: Buffer, shape: tuple[int, ...], exponent: int) -> torch.Tensor:
        return values(data, torch.bfloat16).view(shape).to(torch.float32)
