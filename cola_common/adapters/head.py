"""A classification head of the job's own: W x + b in place of the model's head.

Legend: N rows, D = d_in, O = labels.
"""

from typing import final

import torch
from torch.nn import functional

from cola_common.adapters.base import Adapter, Cost, Parameters
from cola_common.adapters.seeding import generator
from cola_common.errors import ColaError, Reason
from cola_common.families import Head

INITIAL_STD = 0.02
"""`initializer_range` of BERT, GPT-2 and Llama: how transformers starts the heads that this one takes the place of."""


@final
class HeadAdapter(Adapter):
    """`W` (O×D), normal at first, and `b` (O), zero at first, if there is a bias.

    Unlike the others it starts with an output: with a zero W no gradient would reach the sites below it.
    """

    linear_in_x = False
    replaces = True

    def __init__(self, family: Head, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.bias = family.bias

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"W": (self.d_out, self.d_in)}
        if self.bias:
            shapes["b"] = (self.d_out,)
        return shapes

    def initial(self, seed: int, site: str) -> Parameters:
        parameters = {name: torch.zeros(shape) for name, shape in self.shapes().items()}
        torch.nn.init.normal_(parameters["W"], std=INITIAL_STD, generator=generator(seed, site))
        return parameters

    def forward(self, parameters: Parameters, x: torch.Tensor) -> torch.Tensor:
        W_OD = parameters["W"]
        return functional.linear(x.to(W_OD.dtype), W_OD, parameters["b"] if self.bias else None).to(x.dtype)

    def pull(self, parameters: Parameters, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        # <G, dX Wᵀ> = <G W, dX>.
        W_OD = parameters["W"]
        return (g.to(W_OD.dtype) @ W_OD).to(x.dtype)

    def vjp(self, parameters: Parameters, x_ND: torch.Tensor, g_NO: torch.Tensor) -> Parameters:
        # Y = X Wᵀ + 1 bᵀ: <G, X dWᵀ> = <Gᵀ X, dW> and <G, 1 dbᵀ> = <Gᵀ 1, db>.
        dtype = parameters["W"].dtype
        x_ND, g_NO = x_ND.to(dtype), g_NO.to(dtype)
        gradient = {"W": g_NO.T @ x_ND}
        if self.bias:
            gradient["b"] = g_NO.sum(0)
        return gradient

    def delta_weight(self, parameters: Parameters) -> torch.Tensor:
        raise ColaError(Reason.NOT_MERGEABLE, family="head")

    def cost(self, rows: int) -> Cost:
        product = 2 * rows * self.d_in * self.d_out
        return Cost(
            forward_flops=product,
            vjp_flops=product,
            parameter_bytes=4 * (self.d_in * self.d_out + (self.d_out if self.bias else 0)),
        )
