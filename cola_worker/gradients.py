"""The gradient of a job's step on this worker, from its captures: summed over calls and batches, then their mean.

A capture holds rows, of which a shard's adapter makes the gradient of a call, or that gradient itself (`exact` rows).

Legend: N rows of one call, D = d_in, O = d_out.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cola_common.adapters.base import Parameters
from cola_common.messages import Calls, Capture, EncodedTensor, Part
from cola_common.tensor import decode, decode_parameter
from cola_worker.expected import violation
from cola_worker.shard import Shard


@dataclass
class _Input:
    """An x, as long as shards of its group lack their g for that call."""

    x: torch.Tensor
    waiting: set[int]


class Gradients:
    """Takes captures in the order in which the server's backward pass made them.

    Each g meets its x as soon as it is here, and is summed up at once: only inputs that further shards of their group
    need stay in memory. Every product has the shape of one call of one site, and a site's terms are added in the order
    of the backward pass, so a gradient's bits do not depend on which worker it is made on.
    """

    def __init__(self, shards: Mapping[int, Shard]) -> None:
        self._shards = shards
        self._groups: dict[int, set[int]] = {}
        """Of shards that are sent rows: no x waits for the others."""
        for index, shard in shards.items():
            if shard.plan.rows != "exact":
                self._groups.setdefault(shard.plan.group, set()).add(index)
        self._sums: dict[int, Parameters] = {}
        self._inputs: dict[tuple[int, int], _Input] = {}
        self._calls: Counter[int] = Counter()
        self._rows: Counter[int] = Counter()
        self._made: set[Part] = set()
        """Gradients that have come in the open batch."""
        self.decode_seconds = 0.0

    def add(self, capture: Capture) -> None:
        """Adds a capture of the open batch. Raises: `ColaError` (CHECKSUM_MISMATCH, PROTOCOL_VIOLATION)."""
        began = time.perf_counter()
        parts = [(p, self._decoded(p, t)) for p, t in zip(capture.parts, capture.tensors, strict=True)]
        self.decode_seconds += time.perf_counter() - began
        for part, x_ND in parts:
            if part.kind == "x":
                self._keep(part, x_ND)
        for part, values in parts:
            if part.kind == "g":
                self._accumulate(part, values)
            elif part.kind == "w":
                self._take(part, values)

    def end_batch(self, calls: Sequence[Calls]) -> None:
        """Closes the open batch. Raises: `ColaError(PROTOCOL_VIOLATION)` unless it was exactly `calls`."""
        came = {index: (self._calls[index], self._rows[index]) for index in self._calls}
        came |= self._made_calls()
        announced = {c.index: (c.calls, c.rows) for c in calls}
        self._inputs.clear()
        self._calls.clear()
        self._rows.clear()
        self._made.clear()
        if came != announced:
            raise violation(f"captures of (shard: calls, rows) {came} came, {announced} were announced")

    def mean(self, batches: int) -> dict[int, Parameters]:
        """The mean over `batches` batches for each shard that was called in any, in site order. The last call."""
        for gradient in self._sums.values():
            for values in gradient.values():
                values.div_(batches)
        return {
            index: {name: self._sums[index][name] for name in self._shards[index].parameters}
            for index in sorted(self._sums)
        }

    def _decoded(self, part: Part, tensor: EncodedTensor) -> torch.Tensor:
        if part.kind == "w":
            return decode_parameter(tensor, self._shards[part.index].adapter.shapes()[part.name], what=str(part))
        return decode(tensor, what=str(part))

    def _take(self, part: Part, values: torch.Tensor) -> None:
        """A gradient that the server has made."""
        if part in self._made:
            raise violation(f"{part} came twice")
        self._made.add(part)
        so_far = self._sums.setdefault(part.index, {}).setdefault(part.name, values)
        if so_far is not values:
            so_far.add_(values)

    def _made_calls(self) -> dict[int, tuple[int, int]]:
        """Calls of shards whose gradients came as they are. Raises: `ColaError(PROTOCOL_VIOLATION)` for half of one."""
        made: dict[int, Counter[int]] = {}
        for part in self._made:
            made.setdefault(part.index, Counter())[part.call] += 1
        for index, calls in made.items():
            if set(calls.values()) != {len(self._shards[index].parameters)}:
                raise violation(f"a gradient of shard {index} lacks a parameter")
        return {index: (len(calls), 0) for index, calls in made.items()}

    def _keep(self, part: Part, x_ND: torch.Tensor) -> None:
        group = self._groups.get(part.index)
        if group is None or (part.index, part.call) in self._inputs:
            raise violation(f"{part} came twice or is of no shard here")
        self._inputs[part.index, part.call] = _Input(x_ND, set(group))

    def _accumulate(self, part: Part, g_NO: torch.Tensor) -> None:
        shard = self._shards[part.index]
        key = (shard.plan.group, part.call)
        kept = self._inputs.get(key)
        if kept is None or part.index not in kept.waiting:
            raise violation(f"{part} came twice or before its x")
        if len(kept.x) != len(g_NO):
            raise violation(f"{part} has {len(g_NO)} rows, its x {len(kept.x)}")
        kept.waiting.remove(part.index)
        if not kept.waiting:
            del self._inputs[key]
        self._calls[part.index] += 1
        self._rows[part.index] += len(g_NO)
        gradient = shard.adapter.vjp(shard.parameters, kept.x, g_NO)
        so_far = self._sums.setdefault(part.index, gradient)
        if so_far is not gradient:
            for name, values in gradient.items():
                so_far[name].add_(values)


def square(gradient: Parameters) -> float:
    """The squared Euclidean norm in fp64; finite if and only if the gradient is: an fp32 squared cannot overflow it."""
    return math.fsum(_square(values) for values in gradient.values())


def clip(gradients: Iterable[Parameters], limit: float, norm: float) -> None:
    """Scales in place as `torch.nn.utils.clip_grad_norm_` does, given the global norm."""
    factor = limit / (norm + 1e-6)
    if factor < 1.0:
        for gradient in gradients:
            for values in gradient.values():
                values.mul_(factor)


def _square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
