"""fp16 with one power of two for the whole tensor.

fp16 has 11 significant bits but few exponents, and gradients of 1e-6 and less would flush to zero in it. So the values
are divided by 2^e first, with e such that the largest magnitude comes to lie in [2¹⁴, 2¹⁵): it cannot overflow, also
not by rounding, and 28 octaves below it keep all their bits. A power of two costs no bits itself.
"""

import math
from typing import final

import torch

from cola_common.messages import Buffer
from cola_common.tensor.codec import Codec, elements, values


@final
class Fp16(Codec):
    """|error| ≤ max(2⁻¹¹·|v|, 2⁻³⁹·m), m the largest magnitude, give or take the last bit of an fp32 denormal (2⁻¹⁴⁹).

    Magnitudes of 2¹²⁸·(1 - 2⁻¹²) and more become infinite, as they round to 2¹²⁸. What is infinite or NaN stays so, and
    then nothing is divided: others of 65,520 and more become infinite too, and those of 2⁻²⁵ and less zero.
    """

    name = "fp16"
    exponents = range(-126, 114)
    """2^-e must be an fp32 number, and frexp of the largest fp32 gives 128 = 113 + 15."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return 2 * elements(shape)

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        exponent = self._exponent(tensor)
        return (tensor.to(torch.float32) * 2.0**-exponent).to(torch.float16).contiguous(), exponent

    def unpack(self, data: Buffer, shape: tuple[int, ...], exponent: int) -> torch.Tensor:
        return values(data, torch.float16).view(shape).to(torch.float32).mul_(2.0**exponent)

    def _exponent(self, tensor: torch.Tensor) -> int:
        if tensor.numel() == 0:
            return 0
        low, high = torch.aminmax(tensor)
        largest = max(-float(low), float(high))
        if not math.isfinite(largest):
            return 0
        return max(math.frexp(largest)[1] - 15, self.exponents.start)
