"""Many adapters of one family at one site, computed as one: a batched product in place of a product a job.

Legend: J jobs, N rows of each, D = d_in, O = d_out, R = the largest rank. Scales go into the last factor, and a smaller
rank is filled up with zeros, which add nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import final

import torch
from torch.nn import functional

from cola_common.adapters.base import Adapter, Parameters
from cola_common.adapters.linear import LinearAdapter
from cola_common.adapters.lora import LoraAdapter
from cola_common.adapters.mlp import MlpAdapter


class Stack(ABC):
    """What `Adapter` is for one job; fp32 parameters, x and g in the base's dtype."""

    @abstractmethod
    def add(self, h_JNO: torch.Tensor, x_JND: torch.Tensor, out: torch.Tensor) -> None:
        """Makes `out` h + s·f_w(x), each job's rows with its own w."""

    @abstractmethod
    def pull(self, x_JND: torch.Tensor, g_JNO: torch.Tensor, out: torch.Tensor) -> None:
        """Makes `out` the gradient in x."""


@final
class LoraStack(Stack):
    """The products of `LoraAdapter`, batched."""

    def __init__(self, adapters: Sequence[LoraAdapter], parameters: Sequence[Parameters]) -> None:
        self._ranks = [adapter.r for adapter in adapters]
        rank = max(self._ranks)
        self._A_JRD = torch.stack([functional.pad(p["A"], (0, 0, 0, rank - len(p["A"]))) for p in parameters])
        self._B_JOR = torch.stack([functional.pad(p["B"], (0, rank - p["B"].shape[1])) for p in parameters])
        self._scale_J11 = _scales(adapters, self._A_JRD)

    def add(self, h_JNO: torch.Tensor, x_JND: torch.Tensor, out: torch.Tensor) -> None:
        _add(h_JNO, self._thin_x(x_JND.to(self._A_JRD.dtype)).mT, self._B_JOR.mT, out)

    def pull(self, x_JND: torch.Tensor, g_JNO: torch.Tensor, out: torch.Tensor) -> None:
        _product(self._thin_g(g_JNO.to(self._A_JRD.dtype)).mT, self._A_JRD, out)

    def vjp(self, x_JND: torch.Tensor, g_JNO: torch.Tensor) -> list[Parameters]:
        """Each adapter's gradient, as its own `vjp` makes it up to rounding."""
        x_JND, g_JNO = x_JND.to(self._A_JRD.dtype), g_JNO.to(self._A_JRD.dtype)
        of_A_JRD = torch.bmm(self._thin_g(g_JNO), x_JND)
        of_B_JRO = torch.bmm(self._thin_x(x_JND), g_JNO)
        each = zip(self._ranks, of_A_JRD, of_B_JRO, strict=True)
        return [{"A": of_A_RD[:r], "B": of_B_RO[:r].T.contiguous()} for r, of_A_RD, of_B_RO in each]

    def _thin_x(self, x_JND: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self._A_JRD, x_JND.mT).mul_(self._scale_J11)

    def _thin_g(self, g_JNO: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self._B_JOR.mT, g_JNO.mT).mul_(self._scale_J11)


@final
class LinearStack(Stack):
    """g sW and x (sW)ᵀ, batched."""

    def __init__(self, adapters: Sequence[LinearAdapter], parameters: Sequence[Parameters]) -> None:
        self._W_JOD = torch.stack([p["W"] for p in parameters])
        self._W_JOD.mul_(_scales(adapters, self._W_JOD))

    def add(self, h_JNO: torch.Tensor, x_JND: torch.Tensor, out: torch.Tensor) -> None:
        _add(h_JNO, x_JND.to(self._W_JOD.dtype), self._W_JOD.mT, out)

    def pull(self, x_JND: torch.Tensor, g_JNO: torch.Tensor, out: torch.Tensor) -> None:
        _product(g_JNO.to(self._W_JOD.dtype), self._W_JOD, out)


@final
class MlpStack(Stack):
    """The layers of `MlpAdapter`, batched."""

    def __init__(self, adapters: Sequence[MlpAdapter], parameters: Sequence[Parameters]) -> None:
        self._last = adapters[0].last
        self._W = [torch.stack([p[f"W{layer}"] for p in parameters]) for layer in range(self._last + 1)]
        self._b = [torch.stack([p[f"b{layer}"] for p in parameters]).unsqueeze(1) for layer in range(self._last + 1)]
        for values in (self._W[-1], self._b[-1]):
            values.mul_(_scales(adapters, values))

    def add(self, h_JNO: torch.Tensor, x_JND: torch.Tensor, out: torch.Tensor) -> None:
        _add(h_JNO + self._b[-1].to(h_JNO.dtype), self._inputs(x_JND)[-1], self._W[-1].mT, out)

    def pull(self, x_JND: torch.Tensor, g_JNO: torch.Tensor, out: torch.Tensor) -> None:
        inputs = self._inputs(x_JND)
        error = g_JNO.to(self._W[0].dtype)
        for layer in range(self._last, 0, -1):
            error = torch.bmm(error, self._W[layer]).mul_(inputs[layer] > 0)
        _product(error, self._W[0], out)

    def _inputs(self, x_JND: torch.Tensor) -> list[torch.Tensor]:
        inputs = [x_JND.to(self._W[0].dtype)]
        for layer in range(self._last):
            inputs.append(torch.baddbmm(self._b[layer], inputs[-1], self._W[layer].mT).relu_())
        return inputs


def alike(adapter: Adapter) -> Hashable | None:
    """Adapters at one site whose keys are equal can be stacked; None: this one cannot."""
    match adapter:
        case LoraAdapter() | LinearAdapter():
            return type(adapter)
        case MlpAdapter():
            return type(adapter), adapter.widths
        case _:
            return None


def stack(adapters: Sequence[Adapter], parameters: Sequence[Parameters]) -> Stack:
    """Adapters that are `alike`, as one. Copies their parameters."""
    if loras := [adapter for adapter in adapters if isinstance(adapter, LoraAdapter)]:
        return LoraStack(loras, parameters)
    if linears := [adapter for adapter in adapters if isinstance(adapter, LinearAdapter)]:
        return LinearStack(linears, parameters)
    return MlpStack([adapter for adapter in adapters if isinstance(adapter, MlpAdapter)], parameters)


def _scales(adapters: Sequence[LoraAdapter | LinearAdapter | MlpAdapter], like: torch.Tensor) -> torch.Tensor:
    return like.new_tensor([adapter.scale for adapter in adapters]).view(-1, *[1] * (like.dim() - 1))


def _add(h_JNO: torch.Tensor, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    if h_JNO.dtype == left.dtype:
        torch.baddbmm(h_JNO, left, right, out=out)
    else:
        torch.add(h_JNO, torch.bmm(left, right).to(h_JNO.dtype), out=out)


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    if out.dtype == left.dtype:
        torch.bmm(left, right, out=out)
    else:
        out.copy_(torch.bmm(left, right))
