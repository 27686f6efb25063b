"""One shard in its owner's memory: parameters, optimizer and digest."""

from collections.abc import Mapping

import torch

from cola_common.adapters import build
from cola_common.adapters.base import Parameters
from cola_common.errors import ColaError, Reason
from cola_common.messages import EncodedTensor, OptimizerPlan, ShardPlan
from cola_common.tensor import decode_parameter, digest, encode_parameter

REMAINDER = "remainder"
"""The entry of a parameter's state that no optimizer has: what the codec has not let through so far."""

_ENTRIES: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}
"""What torch keeps for a parameter that it has stepped; `step` is a number, the rest as large as the parameter."""


class Shard:
    """Parameters and optimizer state are fp32 on the CPU; `parameters` must be this object's own. `deltas` is a codec.

    What that codec loses of a delta is kept and added to the next one (error feedback; Seide et al. 2014): parameters
    stay within one delta's loss of where the optimizer wants them, instead of drifting off.
    """

    def __init__(self, plan: ShardPlan, parameters: Parameters, optimizer: OptimizerPlan, deltas: str = "fp32") -> None:
        self.plan = plan
        self.adapter = build(plan.family, plan.d_in, plan.d_out)
        self.parameters = {name: parameters[name] for name in self.adapter.shapes()}
        self.digest = digest.state(self.parameters)
        """Chained over the deltas since the shard was assigned."""
        self._optimizer = _optimizer(self.parameters, optimizer)
        self._codec = deltas
        self._remainders: Parameters = {}
        """None of fp32, which loses nothing."""

    def step(self, gradient: Parameters, rate: float) -> tuple[EncodedTensor, ...]:
        """One optimizer step at learning rate `rate`. Returns: the delta of each parameter, in their order.

        The parameters end as old + decoded delta, which is what the server's fold makes of them, and not as the
        optimizer left them: the two can differ in the last bit.
        """
        old = {name: p.clone() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.grad = gradient[name]
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        deltas = []
        for name, p in self.parameters.items():
            p.grad = None
            wanted = p - old[name]
            if name in self._remainders:
                wanted += self._remainders.pop(name)
            deltas.append(encode_parameter(wanted, self._codec))
            delta = decode_parameter(deltas[-1], tuple(p.shape))
            if self._codec != "fp32":
                self._remainders[name] = wanted - delta
            torch.add(old[name], delta, out=p)
        self.digest = digest.chain(self.digest, tuple(self.parameters), deltas)
        return tuple(deltas)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors as `<parameter>.<entry>`, and remainders; none before the first step."""
        state = {
            f"{name}.{entry}": value
            for name, p in self.parameters.items()
            for entry, value in self._optimizer.state[p].items()
            if isinstance(value, torch.Tensor)  # SGD without momentum keeps a None
        }
        return state | {f"{name}.{REMAINDER}": value for name, value in self._remainders.items()}

    def state_digest(self) -> str:
        """Of parameters and optimizer state together: what a snapshot proves."""
        return digest.state({**self.parameters, **self.optimizer_state()})

    def take_up(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from what `optimizer_state` returned; the tensors become this object's own.

        Raises: `ColaError(PROTOCOL_VIOLATION)` for what is no state of this optimizer.
        """
        for name, p in self.parameters.items():
            entries = {key.rpartition(".")[2]: value for key, value in state.items() if key.startswith(f"{name}.")}
            remainder = entries.pop(REMAINDER, None)
            if remainder is not None:
                if remainder.shape != p.shape:
                    raise ColaError(Reason.PROTOCOL_VIOLATION, problem=f"a remainder of {name} of another shape")
                self._remainders[name] = remainder
            shapes = {entry: () if entry == "step" else p.shape for entry in _ENTRIES[type(self._optimizer)]}
            if entries and {entry: value.shape for entry, value in entries.items()} != shapes:
                raise ColaError(Reason.PROTOCOL_VIOLATION, problem=f"{sorted(entries)} is no state of this optimizer")
            self._optimizer.state[p].update(entries)


def _optimizer(parameters: Parameters, plan: OptimizerPlan) -> torch.optim.Optimizer:
    """One of torch's own, with its defaults for what the plan does not say; the rate is set at each step."""
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(parameters.values(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    if plan.optimizer == "sgd":
        return torch.optim.SGD(
            parameters.values(),
            lr=plan.learning_rate,
            momentum=plan.momentum,
            nesterov=plan.nesterov,
            weight_decay=plan.weight_decay,
        )
    raise ColaError(Reason.PROTOCOL_VIOLATION, problem=f"optimizer {plan.optimizer!r} is not known here")
