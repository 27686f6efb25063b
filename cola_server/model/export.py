"""A whole model with an adapter in its weights, for who does not want to carry the two."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from cola_common.adapters import Parameters, build
from cola_server.model.base import BaseModel
from cola_server.model.load import load
from cola_server.model.site import Site


def export_merged(base: BaseModel, sites: Sequence[Site], adapter: Mapping[str, Parameters], folder: Path) -> None:
    """Writes W₀ + s·ΔW at each site, made in fp32 and kept in the base's dtype, a head in its module's place, the rest
    of the model, and the tokenizer.

    Reads the model from its files again: the one that jobs run on may have another adapter in its weights. Any thread.
    Raises: `ColaError(NOT_MERGEABLE)` for a family that is not linear in x.
    """
    fresh = load(
        base.name,
        base.path,
        dtype="fp32" if base.dtype == torch.float32 else "bf16",
        device="cpu",
        task=base.task,
    )
    for site in sites:
        form, parameters = build(site.family, site.d_in, site.d_out), adapter[site.name]
        if site.kind == "head":
            _replace_head(fresh, site, parameters)
            continue
        module = fresh.module.get_submodule(site.name)
        assert isinstance(module.weight, nn.Parameter)
        delta = form.delta_weight(parameters)
        merged = module.weight.float() + (delta.T if site.kind == "conv1d" else delta)
        module.weight = nn.Parameter(merged.to(base.dtype), requires_grad=False)
    fresh.module.save_pretrained(folder)
    fresh.tokenizer.save_pretrained(folder)


def _replace_head(base: BaseModel, site: Site, parameters: Parameters) -> None:
    head = nn.Linear(site.d_in, site.d_out, bias="b" in parameters)
    with torch.no_grad():
        head.weight.copy_(parameters["W"])
        if "b" in parameters:
            head.bias.copy_(parameters["b"])
    base.module.set_submodule(site.name, head.to(base.dtype))
    base.module.config.num_labels = site.d_out
