"""int8: whole numbers from -127 to 127, with a scale for each row.

A row is what the last dimension counts through, and its scale is its largest magnitude divided by 127. In the bytes the
scales of all rows come first, in fp32, then the values.

Legend: N rows, D values in each.
"""

from typing import final

import torch

from cola_common.messages import Buffer
from cola_common.tensor.codec import Codec, elements, values
from cola_common.tensor.scales import scales

LEVEL = 127
"""The largest; -128 stays unused, so that a row and its negative are coded alike."""

CHUNK = 1 << 17
"""Values that are coded at a time: what one pass leaves for the next is then still in a core's own cache (512 KiB)."""


@final
class Int8(Codec):
    """|error| ≤ scale/2, with scale ≤ m/127·(1 + 2⁻¹⁵) + 2⁻¹⁴¹ and m the largest magnitude in the row.

    Nothing finite becomes infinite. A row with a value that is not finite becomes NaN throughout.
    """

    name = "int8"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return 4 * _rows(shape) + elements(shape)

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        shape = tuple(tensor.shape)
        rows = _rows(shape)
        data = torch.empty(self.nbytes(shape), dtype=torch.uint8)
        if rows == 0:
            return data, 0
        x_ND = tensor.to(torch.float32).reshape(rows, -1)
        scales_N1 = data[: 4 * rows].view(torch.float32).view(rows, 1)
        levels_ND = data[4 * rows :].view(torch.int8).view(rows, -1)
        largest_N1 = torch.maximum(x_ND.amax(1, keepdim=True), -x_ND.amin(1, keepdim=True))
        scales_N1.copy_(scales(largest_N1, LEVEL))
        lost_N1 = scales_N1.isnan()
        if lost_N1.any():  # their levels are decided, not left to a cast of NaN
            x_ND = x_ND.masked_fill(lost_N1, 0.0)
        for part in _parts(rows, x_ND.shape[1]):
            levels_ND[part] = torch.div(x_ND[part], scales_N1[part]).round_()
        return data, 0

    def unpack(self, data: Buffer, shape: tuple[int, ...], exponent: int) -> torch.Tensor:
        rows = _rows(shape)
        decoded = torch.empty(shape, dtype=torch.float32)
        if rows > 0:
            whole = memoryview(data)
            scales_N1 = values(whole[: 4 * rows], torch.float32).view(rows, 1)
            levels_ND = values(whole[4 * rows :], torch.int8).view(rows, -1)
            x_ND = decoded.view(rows, -1)
            for part in _parts(rows, x_ND.shape[1]):
                x_ND[part].copy_(levels_ND[part]).mul_(scales_N1[part])
        return decoded


def _rows(shape: tuple[int, ...]) -> int:
    return elements(shape[:-1]) if elements(shape) else 0


def _parts(rows: int, width: int) -> list[slice]:
    step = max(1, CHUNK // width)
    return [slice(first, first + step) for first in range(0, rows, step)]
