"""Rows `exact`: no rows, but what a worker would make of them. For `lora` alone.

From Y = s X Aᵀ Bᵀ (Hu et al. 2021, arXiv 2106.09685) the chain rule makes a shard's gradient of two thin products,
as derived in `LoraAdapter.vjp`, which makes them, or `LoraStack.vjp` for many jobs at once. With U = s A Xᵀ and
V = s Bᵀ Gᵀ, both R×N:

    ∂L/∂A = V X        ∂L/∂B = (U G)ᵀ

That is R·(D + O) numbers whatever N is, and nothing of them is an estimate. They are sums over rows, and A and B stand
still until the step ends: so the gradients of calls and of an interval's batches add up as rows would have.

What it changes is where the gradient is made: here, and the worker is left with the optimizer.

Legend: N rows, D = d_in, O = d_out, R = rank.
"""

from cola_common.adapters import Adapter
from cola_common.adapters.head import HeadAdapter
from cola_common.adapters.linear import LinearAdapter
from cola_common.adapters.lora import LoraAdapter
from cola_common.adapters.mlp import MlpAdapter


def valid_for(adapter: Adapter) -> str | None:
    """None, or why this adapter's rows cannot be reduced so."""
    match adapter:
        case LoraAdapter():
            return None
        case LinearAdapter():
            return "the gradient of a linear adapter is a whole matrix, d_in·d_out numbers"
        case MlpAdapter():
            return "the gradient of an mlp adapter is as large as its layers, and takes a pass through all of them"
        case HeadAdapter():
            return "the gradient of a head is as large as the head, and its rows are few"
        case _:
            return "it is only known for lora adapters"
