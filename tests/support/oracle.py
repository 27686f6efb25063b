"""Ordinary back-propagation, which knows nothing of ColA: `peft` for LoRA, modules wrapped by hand for the others;
torch's optimizers, `clip_grad_norm_` and transformers' schedules; the loss as transformers makes it from labels.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, get_scheduler
from transformers.pytorch_utils import Conv1D

from cola_common.families import Family, Head, Linear, Lora, Mlp
from cola_common.messages import OptimizerPlan
from tests.support.in_process import Batch

Parameters = dict[str, torch.Tensor]


@dataclass
class Trained:
    """Parameters by site, and the course of the run."""

    parameters: dict[str, Parameters]
    losses: list[float] = field(default_factory=list)
    """By batch."""
    norms: list[float] = field(default_factory=list)
    """By step, before clipping."""


class _Wrapped(nn.Module):
    """A module with an adapter beside it, or a head in its place, written as plainly as can be."""

    def __init__(self, module: nn.Module, family: Family, start: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.inner = module
        self.family = family
        self.own = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in start.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.family:
            case Lora(scale=scale):
                return self.inner(x) + scale * ((x @ self.own["A"].T) @ self.own["B"].T)
            case Linear(scale=scale):
                return self.inner(x) + scale * (x @ self.own["W"].T)
            case Mlp(hidden_sizes=hidden, scale=scale):
                z = x
                for layer in range(len(hidden)):
                    z = functional.relu(z @ self.own[f"W{layer}"].T + self.own[f"b{layer}"])
                last = len(hidden)
                return self.inner(x) + scale * (z @ self.own[f"W{last}"].T + self.own[f"b{last}"])
            case Head(bias=bias):
                return x @ self.own["W"].T + (self.own["b"] if bias else 0.0)


def wrap(
    module: PreTrainedModel, families: Mapping[str, Family], start: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, dict[str, nn.Parameter]]:
    """Wraps the sites in place. Returns: their parameters."""
    module.requires_grad_(False)
    found = {}
    for path, family in families.items():
        parent, _, name = path.rpartition(".")
        wrapped = _Wrapped(module.get_submodule(path), family, start[path])
        setattr(module.get_submodule(parent), name, wrapped)
        found[path] = dict(wrapped.own.items())
    return found


def wrap_peft(
    module: PreTrainedModel, families: Mapping[str, Family], start: Mapping[str, Mapping[str, torch.Tensor]]
) -> tuple[nn.Module, dict[str, dict[str, nn.Parameter]]]:
    """The same with `peft`, for LoRA of one rank and at most one head."""
    lora = {path: family for path, family in families.items() if isinstance(family, Lora)}
    heads = [path for path in families if path not in lora]
    rank, scale = next((family.r, family.scale) for family in lora.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank * scale,
        target_modules=list(lora),
        modules_to_save=heads or None,
        lora_dropout=0.0,
        fan_in_fan_out=isinstance(module.get_submodule(next(iter(lora))), Conv1D),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers renamed
        wrapped = get_peft_model(module, config)
    found: dict[str, dict[str, nn.Parameter]] = {}
    for path in lora:
        layer = wrapped.base_model.model.get_submodule(path)
        found[path] = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    for path in heads:
        head = wrapped.base_model.model.get_submodule(path).modules_to_save["default"]
        found[path] = {"W": head.weight, "b": head.bias}
    with torch.no_grad():
        for path, parameters in found.items():
            for name, parameter in parameters.items():
                parameter.copy_(start[path][name])
    return wrapped.eval(), found


def back_propagate(
    module: PreTrainedModel,
    families: Mapping[str, Family],
    start: Mapping[str, Mapping[str, torch.Tensor]],
    plan: OptimizerPlan,
    steps: Sequence[Sequence[Batch]],
    *,
    peft: bool,
) -> Trained:
    """Trains `module`, which is used up, from `start` over intervals of batches."""
    whole: nn.Module = module
    if peft:
        whole, found = wrap_peft(module, families, start)
    else:
        found = wrap(module, families, start)
    parameters = [p for of_site in found.values() for p in of_site.values()]
    optimizer: torch.optim.Optimizer
    if plan.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            parameters,
            lr=plan.learning_rate,
            momentum=plan.momentum,
            nesterov=plan.nesterov,
            weight_decay=plan.weight_decay,
        )
    schedule = get_scheduler(plan.lr_scheduler_type, optimizer, plan.warmup_steps, plan.total_steps)
    run = Trained({})
    for batches in steps:
        for parameter in parameters:  # zero, not None: a batch without targets has a gradient, which is zero
            parameter.grad = torch.zeros_like(parameter)
        for batch in batches:
            labels = batch.labels
            if not (labels[..., 1:] if labels.dim() == 2 else labels).ne(-100).any():
                run.losses.append(0.0)  # transformers' mean over no targets is NaN
                continue
            loss = whole(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
            (loss / len(batches)).backward()
            run.losses.append(loss.item())
        limit = plan.max_grad_norm or float("inf")
        run.norms.append(float(nn.utils.clip_grad_norm_(parameters, limit)))
        optimizer.step()
        schedule.step()
    run.parameters = {
        path: {name: p.detach().clone() for name, p in of_site.items()} for path, of_site in found.items()
    }
    return run
