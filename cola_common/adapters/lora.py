"""The paper's Low Rank: f(x) = B A x.

Legend: N rows, D = d_in, O = d_out, R = rank.
"""

import math
from typing import final

import torch

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
        # s goes onto the thin product: R numbers a row instead of O. It lies down, R rows of N, as all of them here: as
        # columns the same products took 1.5 to 3 times as long on a CPU, over all shapes of SmolLM2's sites.
        u_RN = (A_RD @ _rows(x.to(A_RD.dtype)).T) * self.scale
        return (u_RN.T @ B_OR.T).to(x.dtype).view(*x.shape[:-1], self.d_out)

    def pull(self, parameters: Parameters, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        # <G, s dX Aᵀ Bᵀ> = <s G B A, dX>.
        A_RD, B_OR = parameters["A"], parameters["B"]
        v_RN = (B_OR.T @ _rows(g.to(A_RD.dtype)).T).mul_(self.scale)
        return (v_RN.T @ A_RD).to(x.dtype).view(x.shape)

    def vjp(self, parameters: Parameters, x_ND: torch.Tensor, g_NO: torch.Tensor) -> Parameters:
        # Y = s X Aᵀ Bᵀ and dL = <G, dY>. With U = s A Xᵀ and V = s Bᵀ Gᵀ, both R×N:
        #   <G, Uᵀ dBᵀ>      = <(U G)ᵀ, dB>   so  ∂L/∂B = (U G)ᵀ
        #   <G, s X dAᵀ Bᵀ>  = <V X, dA>      so  ∂L/∂A = V X
        # No product is wider than X and G themselves.
        A_RD, B_OR = parameters["A"], parameters["B"]
        x_ND, g_NO = x_ND.to(A_RD.dtype), g_NO.to(A_RD.dtype)
        u_RN = (A_RD @ x_ND.T).mul_(self.scale)
        v_RN = (B_OR.T @ g_NO.T).mul_(self.scale)
        return {"A": v_RN @ x_ND, "B": (u_RN @ g_NO).T.contiguous()}

    def delta_weight(self, parameters: Parameters) -> torch.Tensor:
        return (parameters["B"] @ parameters["A"]).mul_(self.scale)

    def cost(self, rows: int) -> Cost:
        thin = 2 * rows * self.r * (self.d_in + self.d_out)
        return Cost(forward_flops=thin, vjp_flops=2 * thin, parameter_bytes=4 * self.r * (self.d_in + self.d_out))


def _rows(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, values.shape[-1])
