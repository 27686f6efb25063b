"""Rows `exact`: no rows, but what a worker would make of them. For `lora` alone.

From Y = s X Aᵀ Bᵀ (Hu et al. 2021, arXiv 2106.09685) the chain rule makes a shard's gradient of two thin products,
as derived in `LoraAdapter.vjp`. With U = s X Aᵀ and V = s G B, both N×R:

    ∂L/∂A = Vᵀ X        ∂L/∂B = Gᵀ U

That is R·(D + O) numbers whatever N is, and nothing of them is an estimate. They are sums over rows, and A and B stand
still until the step ends: so the gradients of calls and of an interval's batches add up as rows would have.

What it changes is where the gradient is made: here, and the worker is left with the optimizer.

Legend: J shards, N rows of each, D = d_in, O = d_out, R = rank.
"""

from collections.abc import Sequence

import torch

from cola_common.adapters import Adapter, Parameters
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


def gradient(adapter: LoraAdapter, parameters: Parameters, x_ND: torch.Tensor, g_NO: torch.Tensor) -> Parameters:
    """What the worker's VJP of these rows would be, where x and g are; fp32, as the parameters."""
    return adapter.vjp(parameters, x_ND, g_NO)


def gradients(
    adapters: Sequence[LoraAdapter], parameters: Sequence[Parameters], x_JND: torch.Tensor, g_JNO: torch.Tensor
) -> list[Parameters]:
    """`gradient` of many shards with equal N, D, O and R in four products; scales may differ.

    Agrees with one at a time up to rounding: a cohort's make-up can show in the last bits.
    """
    A_JRD = torch.stack([p["A"] for p in parameters])
    B_JOR = torch.stack([p["B"] for p in parameters])
    scale_J11 = A_JRD.new_tensor([adapter.scale for adapter in adapters]).view(-1, 1, 1)
    x_JND, g_JNO = x_JND.to(A_JRD.dtype), g_JNO.to(A_JRD.dtype)
    # The thin factors lie down, R rows of N: as columns the same products took up to 7 times as long on a CPU.
    u_JRN = torch.bmm(A_JRD, x_JND.mT).mul_(scale_J11)
    v_JRN = torch.bmm(B_JOR.mT, g_JNO.mT).mul_(scale_J11)
    of_A_JRD = torch.bmm(v_JRN, x_JND)
    of_B_JOR = torch.bmm(u_JRN, g_JNO).mT.contiguous()
    return [{"A": a_RD, "B": b_OR} for a_RD, b_OR in zip(of_A_JRD, of_B_JOR, strict=True)]
