"""A collaboration by autograd: all members' parameters in one model, each differentiated in its own loss."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel, get_scheduler

from cola_common.adapters import Adapter, Parameters, build
from cola_common.messages import OptimizerPlan
from cola_server.model import JobAdapter
from tests.support.in_process import Batch


class Mixed(nn.Module):
    """A module with the mean of some members' adapters beside it, written as plainly as can be."""

    def __init__(self, module: nn.Module, members: int) -> None:
        super().__init__()
        self.inner = module
        self.members = members
        self.added: list[tuple[Adapter, dict[str, nn.Parameter]]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + sum(f.forward(w, x) for f, w in self.added) / self.members


class Oracle:
    """The members' own parameters in one model, and torch's optimizers."""

    def __init__(self, module: PreTrainedModel, adapters: Sequence[JobAdapter], plans: Sequence[OptimizerPlan]) -> None:
        self.module = module.requires_grad_(False)
        self.own: list[dict[str, dict[str, nn.Parameter]]] = []
        mixed: dict[str, Mixed] = {}
        for adapter in adapters:
            self.own.append({})
            for site, shard in zip(adapter.sites, adapter.state(), strict=True):
                if site.name not in mixed:
                    parent, _, name = site.name.rpartition(".")
                    mixed[site.name] = Mixed(module.get_submodule(site.name), len(adapters))
                    setattr(module.get_submodule(parent), name, mixed[site.name])
                own = {name: nn.Parameter(value.clone()) for name, value in shard.items()}
                mixed[site.name].added.append((build(site.family, site.d_in, site.d_out), own))
                self.own[-1][site.name] = own
        self.flat = [[p for shard in own.values() for p in shard.values()] for own in self.own]
        self.optimizers = [_optimizer(plan, own) for plan, own in zip(plans, self.flat, strict=True)]
        self.schedules = [
            get_scheduler(plan.lr_scheduler_type, optimizer, plan.warmup_steps, plan.total_steps)
            for plan, optimizer in zip(plans, self.optimizers, strict=True)
        ]
        self.limits = [plan.max_grad_norm or float("inf") for plan in plans]

    def step(self, batches: dict[int, Sequence[Batch]]) -> dict[int, list[float]]:
        """One step of these members, all from the same parameters. Returns their losses."""
        losses: dict[int, list[float]] = {}
        gradients = {}
        for member, of_member in batches.items():
            values = [self.loss(batch) for batch in of_member]
            losses[member] = [value.item() for value in values]
            gradients[member] = torch.autograd.grad(sum(values) / len(values), self.flat[member])
        for member, of_member in gradients.items():
            for parameter, gradient in zip(self.flat[member], of_member, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(self.flat[member], self.limits[member])
            self.optimizers[member].step()
            self.schedules[member].step()
        return losses

    def loss(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.module(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        return loss

    def parameters(self, member: int) -> dict[str, Parameters]:
        return {site: {n: p.detach().clone() for n, p in own.items()} for site, own in self.own[member].items()}


def _optimizer(plan: OptimizerPlan, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    return torch.optim.SGD(parameters, lr=plan.learning_rate, momentum=plan.momentum)
