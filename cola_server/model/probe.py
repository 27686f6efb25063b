"""The probe: one tiny forward pass that finds out, for each site of a job, what its inputs look like.

It answers, before anything trains, what the taps and the packer rely on: how a site sees rows, how often it is called,
which sites share their input (query, key and value do: x is sent once), and whose weight is tied. What it does not
know it refuses by name.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cola_common.errors import ColaError, Reason
from cola_common.families import Family, Head, Linear, Lora, Mlp
from cola_common.jobs import AdapterSpec, LinearAdapter, LoraAdapter, MlpAdapter
from cola_server.model.base import BaseModel
from cola_server.model.site import Layout, Site

# Two examples of three tokens: 2, 3 and 6 differ, so that a shape tells the layout.
EXAMPLES, TOKENS = 2, 3

LAYOUTS: dict[tuple[int, ...], Layout] = {
    (EXAMPLES, TOKENS): "tokens",
    (EXAMPLES * TOKENS,): "flat",
    (EXAMPLES,): "examples",
}


@dataclass
class _Seen:
    """A module's inputs, call by call. Kept, so that no two tensors of the pass can have one address."""

    inputs: list[Any] = field(default_factory=list)

    def key(self) -> tuple[object, ...]:
        """Equal for two modules that got the same tensors, unchanged in between, at the same calls."""
        return tuple((x.data_ptr(), tuple(x.shape), x.stride(), x._version) for x in self.inputs)


def probe(
    base: BaseModel, adapter: AdapterSpec, *, labels: int | None, fold: Literal["unmerged", "merged"]
) -> tuple[Site, ...]:
    """The sites of a job with that adapter, in model order, the head last.

    `labels` is the label count of a classification job, None for a causal one.
    Raises: `ColaError` UNKNOWN_TARGET with the nearest names, RANK_TOO_LARGE, UNKNOWN_LAYOUT; TIED_WEIGHTS for a
    merged job.
    """
    assert (labels is None) == (base.head_name is None), "labels are for models with a head"
    names = _targets(base, adapter)
    modules: dict[str, nn.Module] = {name: base.module.get_submodule(name) for name in names}
    if base.head_name is not None:
        modules[base.head_name] = base.module.get_submodule(base.head_name)
    seen = _run(base, modules)
    ties = _ties(base.module)
    groups: dict[tuple[object, ...], int] = {}
    sites = []
    for index, (name, module) in enumerate(modules.items()):
        head = name == base.head_name
        d_in, d_out = _widths(module)
        family: Family = Head(bias=_bias(module) is not None) if head else _family(adapter)
        if isinstance(family, Lora) and family.r > min(d_in, d_out):
            raise ColaError(Reason.RANK_TOO_LARGE, r=family.r, site=name, d_in=d_in, d_out=d_out)
        tied = ties.get(name)
        if fold == "merged" and tied is not None and not head:
            raise ColaError(Reason.TIED_WEIGHTS, site=name, other=tied)
        sites.append(
            Site(
                index=index,
                name=name,
                kind="head" if head else "conv1d" if isinstance(module, Conv1D) else "linear",
                family=family,
                d_in=d_in,
                d_out=labels if head and labels is not None else d_out,
                layout=_layout(name, seen[name], d_in),
                calls=len(seen[name].inputs),
                group=groups.setdefault(seen[name].key(), len(groups)),
                tied=tied,
            )
        )
    return tuple(sites)


# --- which modules --------------------------------------------------------------------------------------------------


def _targets(base: BaseModel, adapter: AdapterSpec) -> list[str]:
    """Paths of the modules that `target_modules` names, as PEFT reads it, in model order. The head is never one."""
    modules = {
        name: part
        for name, part in base.module.named_modules()
        if isinstance(part, nn.Linear | Conv1D) and name != base.head_name
    }
    wanted = adapter.target_modules
    if wanted == "all-linear":
        output = base.module.get_output_embeddings()  # type: ignore[no-untyped-call]
        return [name for name, part in modules.items() if part is not output]
    if isinstance(wanted, str):
        matched = [name for name in modules if re.fullmatch(wanted, name)]
        if not matched:
            raise _unknown(wanted, modules)
        return matched
    for target in wanted:
        if not any(_is_suffix(target, name) for name in modules):
            raise _unknown(target, modules)
    return [name for name in modules if any(_is_suffix(target, name) for target in wanted)]


def _is_suffix(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _unknown(target: str, modules: Mapping[str, nn.Module]) -> ColaError:
    short = sorted({name.rpartition(".")[2] for name in modules})
    near = difflib.get_close_matches(target.rpartition(".")[2], short, n=3, cutoff=0.3) or short[:8]
    return ColaError(Reason.UNKNOWN_TARGET, target=target, nearest=", ".join(near))


def _family(adapter: AdapterSpec) -> Family:
    match adapter:
        case LoraAdapter():
            return Lora(r=adapter.r, scale=adapter.lora_alpha / adapter.r)
        case LinearAdapter():
            return Linear(scale=adapter.scale)
        case MlpAdapter():
            return Mlp(hidden_sizes=adapter.hidden_sizes, scale=adapter.scale)


# --- what they look like --------------------------------------------------------------------------------------------


def _weight(module: nn.Module) -> torch.Tensor:
    assert isinstance(module, nn.Linear | Conv1D)
    return module.weight


def _bias(module: nn.Module) -> torch.Tensor | None:
    assert isinstance(module, nn.Linear | Conv1D)
    return module.bias


def _widths(module: nn.Module) -> tuple[int, int]:
    rows, columns = _weight(module).shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _run(base: BaseModel, modules: Mapping[str, nn.Module]) -> dict[str, _Seen]:
    """The inputs of each module in a forward pass of two examples of three tokens."""
    seen = {name: _Seen() for name in modules}

    def note(name: str) -> Any:
        return lambda _module, args: seen[name].inputs.append(args[0] if args else None)

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    vocabulary = base.module.config.get_text_config().vocab_size
    ids = (1 + torch.arange(EXAMPLES * TOKENS, device=base.device)).remainder(vocabulary).view(EXAMPLES, TOKENS)
    try:
        with torch.no_grad():
            base.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    for name, inputs in seen.items():
        if not inputs.inputs:
            raise ColaError(Reason.UNKNOWN_LAYOUT, site=name, problem="a forward pass does not call it")
        if not all(isinstance(x, torch.Tensor) for x in inputs.inputs):
            raise ColaError(Reason.UNKNOWN_LAYOUT, site=name, problem="its input is no plain tensor")
    return seen


def _layout(name: str, seen: _Seen, d_in: int) -> Layout:
    shapes = {tuple(x.shape) for x in seen.inputs}
    if len(shapes) > 1:
        raise ColaError(Reason.UNKNOWN_LAYOUT, site=name, problem="its calls differ in shape")
    (shape,) = shapes
    layout = LAYOUTS.get(shape[:-1])
    if layout is None or shape[-1] != d_in:
        problem = f"shape {shape} for {EXAMPLES} examples of {TOKENS} tokens, {d_in} wide"
        raise ColaError(Reason.UNKNOWN_LAYOUT, site=name, problem=problem)
    return layout


def _ties(module: nn.Module) -> dict[str, str]:
    """Modules whose weight shares its memory with another module's, and that other one."""
    holders: dict[int, list[str]] = {}
    for path, part in module.named_modules():
        for parameter in part.parameters(recurse=False):
            owners = holders.setdefault(parameter.untyped_storage().data_ptr(), [])
            if path not in owners:
                owners.append(path)
    return {
        path: next(other for other in owners if other != path)
        for owners in holders.values()
        if len(owners) > 1
        for path in owners
    }
