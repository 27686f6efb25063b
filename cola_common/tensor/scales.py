"""The scales of codecs that write whole numbers: a value is a whole number, its level, times the scale of its row or
block.

A scale keeps 16 significant bits. Then its product with a level of at most 8 bits is an fp32 number, and so is its
product with the middle between two such levels: to decode rounds nothing, an fp32 quotient lies on the same side of
that middle as the true one, and what was decoded encodes to the same bits again.
"""

import math

import torch

BITS = 16

SMALLEST = 2.0**-141
"""The least fp32 of which all multiples by 16 bits are fp32 too; the scale of zeros as well, so that one can divide."""

_DROPPED = (1 << (24 - BITS)) - 1
"""The bits of an fp32 that a scale does not have."""


def scales(magnitudes: torch.Tensor, level: int) -> torch.Tensor:
    """The fp32 scales with which these magnitudes come to lie at `level`; NaN where a magnitude is not finite.

    They are rounded up; but where `level` times the scale would be infinite, it is the largest with which it is not: at
    most 2⁻¹⁵ too small.
    """
    steps = (magnitudes / level).view(torch.int32).add_(_DROPPED).bitwise_and_(~_DROPPED).view(torch.float32)
    return torch.where(magnitudes.isfinite(), steps.clamp_(SMALLEST, _largest(level)), torch.nan)


def _largest(level: int) -> float:
    fraction, exponent = math.frexp(torch.finfo(torch.float32).max / level)
    return math.ldexp(math.floor(math.ldexp(fraction, BITS)), exponent - BITS)
