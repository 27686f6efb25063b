"""A perceptron with ReLU: f(x) = W_L ρ(… ρ(W_0 x + b_0) …) + b_L.

Legend: N rows, D = d_in, O = d_out. Layer i maps widths[i] to widths[i + 1].
"""

import math
from itertools import pairwise
from typing import final

import torch
from torch.nn import functional

from cola_common.adapters.base import Adapter, Cost, Parameters
from cola_common.adapters.seeding import generator
from cola_common.errors import ColaError, Reason
from cola_common.families import Mlp


@final
class MlpAdapter(Adapter):
    """`W0`, `b0`, `W1`, `b1`, …: hidden layers start as `torch.nn.Linear` does, the last one as zero."""

    linear_in_x = False

    def __init__(self, family: Mlp, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.scale = family.scale
        self.widths = (d_in, *family.hidden_sizes, d_out)
        self.last = len(family.hidden_sizes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (width, next_width) in enumerate(pairwise(self.widths)):
            shapes[f"W{layer}"] = (next_width, width)
            shapes[f"b{layer}"] = (next_width,)
        return shapes

    def initial(self, seed: int, site: str) -> Parameters:
        parameters = {name: torch.zeros(shape) for name, shape in self.shapes().items()}
        source = generator(seed, site)
        for layer in range(self.last):
            torch.nn.init.kaiming_uniform_(parameters[f"W{layer}"], a=math.sqrt(5), generator=source)
            bound = 1 / math.sqrt(self.widths[layer])
            torch.nn.init.uniform_(parameters[f"b{layer}"], -bound, bound, generator=source)
        return parameters

    def forward(self, parameters: Parameters, x: torch.Tensor) -> torch.Tensor:
        output = self._layer(parameters, self.last, self._inputs(parameters, x)[-1])
        return (output * self.scale).to(x.dtype)

    def pull(self, parameters: Parameters, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        # E_0 W_0 with the errors E_i of `vjp`, one step further back.
        inputs = self._inputs(parameters, x)
        error = g.to(parameters["W0"].dtype) * self.scale
        for layer in range(self.last, 0, -1):
            error = (error @ parameters[f"W{layer}"]).mul_(inputs[layer] > 0)
        return (error @ parameters["W0"]).to(x.dtype)

    def vjp(self, parameters: Parameters, x_ND: torch.Tensor, g_NO: torch.Tensor) -> Parameters:
        # Z_0 = X, P_i = Z_i W_iᵀ + 1 b_iᵀ, Z_{i+1} = ρ(P_i), Y = s P_L. With E_i = ∂L/∂P_i (N rows):
        #   E_L = s G,  E_i = (E_{i+1} W_{i+1}) ⊙ ρ'(P_i),  ∂L/∂W_i = E_iᵀ Z_i,  ∂L/∂b_i = E_iᵀ 1.
        # ρ'(P_i) is 1 exactly where Z_{i+1} > 0, and 0 at 0 as in torch.
        inputs = self._inputs(parameters, x_ND)
        error = g_NO.to(parameters["W0"].dtype) * self.scale
        gradient: Parameters = {}
        for layer in range(self.last, -1, -1):
            gradient[f"W{layer}"] = error.T @ inputs[layer]
            gradient[f"b{layer}"] = error.sum(0)
            if layer > 0:
                error = (error @ parameters[f"W{layer}"]).mul_(inputs[layer] > 0)
        return {name: gradient[name] for name in self.shapes()}

    def delta_weight(self, parameters: Parameters) -> torch.Tensor:
        raise ColaError(Reason.NOT_MERGEABLE, family="mlp")

    def cost(self, rows: int) -> Cost:
        layers = [width * next_width for width, next_width in pairwise(self.widths)]
        weights = sum(layers)
        # The VJP runs the hidden layers forward, makes every layer's gradient, and goes back through all but the first.
        return Cost(
            forward_flops=2 * rows * weights,
            vjp_flops=2 * rows * ((weights - layers[-1]) + weights + (weights - layers[0])),
            parameter_bytes=4 * (weights + sum(self.widths[1:])),
        )

    def _inputs(self, parameters: Parameters, x: torch.Tensor) -> list[torch.Tensor]:
        """What each layer sees, x first."""
        inputs = [x.to(parameters["W0"].dtype)]
        for layer in range(self.last):
            inputs.append(functional.relu(self._layer(parameters, layer, inputs[-1])))
        return inputs

    @staticmethod
    def _layer(parameters: Parameters, layer: int, z: torch.Tensor) -> torch.Tensor:
        return functional.linear(z, parameters[f"W{layer}"], parameters[f"b{layer}"])
