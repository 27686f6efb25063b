"""From a family, which is plain data, to the adapter that computes."""

from typing import assert_never

from cola_common.adapters.base import Adapter
from cola_common.adapters.head import HeadAdapter
from cola_common.adapters.linear import LinearAdapter
from cola_common.adapters.lora import LoraAdapter
from cola_common.adapters.mlp import MlpAdapter
from cola_common.families import Family, Head, Linear, Lora, Mlp


def build(family: Family, d_in: int, d_out: int) -> Adapter:
    """The adapter of this family at a site with `d_in` inputs and `d_out` outputs."""
    match family:
        case Lora():
            return LoraAdapter(family, d_in, d_out)
        case Linear():
            return LinearAdapter(family, d_in, d_out)
        case Mlp():
            return MlpAdapter(family, d_in, d_out)
        case Head():
            return HeadAdapter(family, d_in, d_out)
        case _:
            assert_never(family)
