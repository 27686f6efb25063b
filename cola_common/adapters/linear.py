"""A full matrix: f(x) = W x.

Legend: N rows, D = d_in, O = d_out.
"""

from typing import final

import torch
from torch.nn import functional

from cola_common.adapters.base import Adapter, Cost, Parameters
from cola_common.families import Linear


@final
class LinearAdapter(Adapter):
    """`W` (O×D), zero at first, no bias."""

    linear_in_x = True

    def __init__(self, family: Linear, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.scale = family.scale

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"W": (self.d_out, self.d_in)}

    def initial(self, seed: int, site: str) -> Parameters:
        return {"W": torch.zeros(self.d_out, self.d_in)}

    def forward(self, parameters: Parameters, x: torch.Tensor) -> torch.Tensor:
        W_OD = parameters["W"]
        return (functional.linear(x.to(W_OD.dtype), W_OD) * self.scale).to(x.dtype)

    def pull(self, parameters: Parameters, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        # <G, s dX Wᵀ> = <s G W, dX>.
        W_OD = parameters["W"]
        return (g.to(W_OD.dtype) @ W_OD).mul_(self.scale).to(x.dtype)

    def vjp(self, parameters: Parameters, x_ND: torch.Tensor, g_NO: torch.Tensor) -> Parameters:
        # Y = s X Wᵀ and dL = <G, s X dWᵀ> = <s Gᵀ X, dW>.
        dtype = parameters["W"].dtype
        return {"W": (g_NO.to(dtype).T @ x_ND.to(dtype)).mul_(self.scale)}

    def delta_weight(self, parameters: Parameters) -> torch.Tensor:
        return parameters["W"] * self.scale

    def cost(self, rows: int) -> Cost:
        product = 2 * rows * self.d_in * self.d_out
        return Cost(forward_flops=product, vjp_flops=product, parameter_bytes=4 * self.d_in * self.d_out)
