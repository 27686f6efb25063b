"""Merging: a job's adapter inside the base's own weights, for families linear in x.

W = W₀ + s·ΔW is made from the pristine W₀ every time, never by adding and subtracting in place, which drifts. W₀ of a
merged site stays in host memory and goes back untouched, so that it is restored to the bit. With a base narrower than
fp32 a merged weight is fp32, or a young ΔW would round away, and the module casts around it.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from cola_common.adapters import Adapter, Parameters
from cola_common.families import Lora
from cola_server.model.adapted import JobAdapter
from cola_server.model.base import BaseModel
from cola_server.model.site import Site


@dataclass
class _Place:
    """A site's module and its two weights."""

    site: Site
    adapter: Adapter
    parameters: Parameters
    module: nn.Linear | Conv1D
    pristine: nn.Parameter = field(init=False)
    """W₀, in host memory, while W is in its place."""
    weight: nn.Parameter | None = None
    """W, fp32, on the device. On the CPU it outlives a `restore`: fresh pages cost more than the products."""


class Merging:
    """One job's adapter in one base model. Its batches are a cohort of their own and run between `merge` and `restore`.

    A classification head is not merged: it takes its module's place, as in an unmerged job.
    """

    def __init__(self, base: BaseModel, adapter: JobAdapter) -> None:
        """Changes nothing yet. The base must hold its pristine weights at every first `merge`: `Seat` sees to that."""
        self._device = base.device
        self._merged = False
        self._places = []
        for site, form, parameters in zip(adapter.sites, adapter.adapters, adapter.parameters, strict=True):
            if site.kind != "head":
                module = base.module.get_submodule(site.name)
                assert isinstance(module, nn.Linear | Conv1D)
                self._places.append(_Place(site, form, parameters, module))

    def merge(self) -> None:
        """Makes the sites' weights W₀ + s·ΔW of the adapter as it is now; to be called again after every fold.

        Raises: `ColaError(NOT_MERGEABLE)`, with the base as it was.
        """
        if not self._merged:
            for place in self._places:
                _enter(place, self._device)
            self._merged = True
        try:
            for place in self._places:
                _make(place)
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Puts the pristine weights back, to the bit. Harmless where they are back already."""
        if self._merged:
            for place in self._places:
                _leave(place, self._device)
            self._merged = False


def _enter(place: _Place, device: torch.device) -> None:
    pristine = place.module.weight  # only now: at any other time another job's W may be in this place
    assert isinstance(pristine, nn.Parameter)
    place.pristine = pristine if device.type == "cpu" else nn.Parameter(pristine.cpu(), requires_grad=False)
    if place.weight is None:
        fresh = torch.empty_like(pristine, dtype=torch.float32)
        place.weight = nn.Parameter(fresh, requires_grad=False)
    place.module.weight = place.weight
    if place.pristine.dtype != torch.float32:
        place.module.forward = partial(_forward_in_fp32, place.module)  # type: ignore[method-assign]


def _leave(place: _Place, device: torch.device) -> None:
    if place.pristine.dtype != torch.float32:
        del place.module.forward  # the instance's; the class has its own
    if device.type == "cpu":
        place.module.weight = place.pristine
    else:
        place.module.weight = nn.Parameter(place.pristine.to(device), requires_grad=False)
        place.weight = None


def _make(place: _Place) -> None:
    assert place.weight is not None
    weight = place.weight.detach()
    pristine = place.pristine.detach().to(weight.device, torch.float32)
    transposed = place.site.kind == "conv1d"
    if isinstance(place.site.family, Lora):  # in one pass over the weight, without ΔW
        left, right = place.parameters["B"], place.parameters["A"]
        if transposed:
            left, right = right.T, left.T
        torch.addmm(pristine, left, right, alpha=place.site.family.scale, out=weight)
    else:
        delta = place.adapter.delta_weight(place.parameters)
        torch.add(pristine, delta.T if transposed else delta, out=weight)


def _forward_in_fp32(module: nn.Linear | Conv1D, x: torch.Tensor) -> torch.Tensor:
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    bias = dict(module.named_parameters(recurse=False)).get("bias")
    return functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
