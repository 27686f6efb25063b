"""The paper's Low Rank: f(x) = B A x.

Legend: N rows, D = d_in, O = d_out, R = rank.
"""

import math
from typing import final

import torch
from torch.nn import functional

from cola_common.adapters.base import Adapter, Cost, Parameters
from cola_common.adapters.seeding import generator
from cola_common.families import Lora


@final
class LoraAdapter(Adapter):
    """`A` (R×D) and `B` (O×R). Initial values as in PEFT and Hu et al., arXiv 2106.09685: A Kaiming-uniform, B zero."""

    linear_in_x = True

    def __init__(self, family: Lora, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.r = family.r
        self.scale = family.scale

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"A": (self.r, self.d_in), "B": (self.d_out, self.r)}

    def initial(self, seed: int, site: str) -> Parameters:
        A_RD = torch.empty(self.r, self.d_in)
        torch.nn.init.kaiming_uniform_(A_RD, a=math.sqrt(5), generator=generator(seed, site))
        return {"A": A_RD, "B": torch.zeros(self.d_out, self.r)}

    def forward(self, parameters: Parameters, x: torch.Tensor) -> torch.Tensor:
        A_RD, B_OR = parameters["A"], parameters["B"]
        # s goes onto the thin product: R numbers a row instead of O.
        return functional.linear(functional.linear(x.to(A_RD.dtype), A_RD) * self.scale, B_OR).to(x.dtype)

    def pull(self, parameters: Parameters, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        # <G, s dX Aᵀ Bᵀ> = <s G B A, dX>.
        A_RD, B_OR = parameters["A"], parameters["B"]
        return ((g.to(A_RD.dtype) @ B_OR).mul_(self.scale) @ A_RD).to(x.dtype)

    def vjp(self, parameters: Parameters, x_ND: torch.Tensor, g_NO: torch.Tensor) -> Parameters:
        # Y = s X Aᵀ Bᵀ and dL = <G, dY>. With U = s X Aᵀ and V = s G B, both N×R:
        #   <G, U dBᵀ>       = <Gᵀ U, dB>   so  ∂L/∂B = Gᵀ U
        #   <G, s X dAᵀ Bᵀ>  = <Vᵀ X, dA>   so  ∂L/∂A = Vᵀ X
        # No product is wider than X and G themselves.
        A_RD, B_OR = parameters["A"], parameters["B"]
        x_ND, g_NO = x_ND.to(A_RD.dtype), g_NO.to(A_RD.dtype)
        u_NR = (x_ND @ A_RD.T).mul_(self.scale)
        v_NR = (g_NO @ B_OR).mul_(self.scale)
        return {"A": v_NR.T @ x_ND, "B": g_NO.T @ u_NR}

    def delta_weight(self, parameters: Parameters) -> torch.Tensor:
        return (parameters["B"] @ parameters["A"]).mul_(self.scale)

    def cost(self, rows: int) -> Cost:
        thin = 2 * rows * self.r * (self.d_in + self.d_out)
        return Cost(forward_flops=thin, vjp_flops=2 * thin, parameter_bytes=4 * self.r * (self.d_in + self.d_out))
