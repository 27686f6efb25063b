"""The server's side of a worker's conversation, played by hand, and an oracle that knows only autograd and torch.optim.

Legend: N rows, D = d_in, O = d_out.
"""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from cola_common import ids
from cola_common.adapters import Parameters, build
from cola_common.families import Family, Head, Linear, Lora, Mlp
from cola_common.messages import (
    Ack,
    Assign,
    Calls,
    Capture,
    Credit,
    Delta,
    EncodedTensor,
    Norm,
    NormTotal,
    OptimizerPlan,
    Part,
    Refusal,
    Revoke,
    ShardPlan,
    Snapshot,
    SnapshotRequest,
    StepEnd,
    ToServer,
)
from cola_common.tensor import decode, decode_parameter, digest, encode, encode_parameter
from cola_worker.trainer import Trainer

T = TypeVar("T")

FAMILIES: dict[str, Family] = {
    "lora": Lora(r=3, scale=2.0),
    "linear": Linear(scale=0.5),
    "mlp": Mlp(hidden_sizes=(7,), scale=1.5),
    "head": Head(bias=True),
}

PLAN = OptimizerPlan(
    optimizer="sgd",
    learning_rate=0.1,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.0,
    max_grad_norm=0.0,
    lr_scheduler_type="constant",
    warmup_steps=0,
    total_steps=10,
)


def shard_plans(family: Family, rows: str = "all") -> tuple[ShardPlan, ...]:
    """Two sites that share their input, and a third of other widths."""
    return (
        ShardPlan(index=0, site="layers.0.q", family=family, d_in=6, d_out=5, group=0, rows=rows),
        ShardPlan(index=1, site="layers.0.k", family=family, d_in=6, d_out=4, group=0, rows=rows),
        ShardPlan(index=2, site="layers.0.o", family=family, d_in=5, d_out=6, group=1, rows=rows),
    )


def parameters_of(plans: Iterable[ShardPlan], seed: int = 3) -> dict[int, Parameters]:
    """Values that are nowhere zero, so that every parameter has a gradient."""
    made = torch.Generator().manual_seed(seed)
    return {
        plan.index: {
            name: torch.randn(shape, generator=made) * 0.3
            for name, shape in build(plan.family, plan.d_in, plan.d_out).shapes().items()
        }
        for plan in plans
    }


@dataclass(frozen=True)
class Call:
    """What one site saw in one call of one batch."""

    index: int
    call: int
    x_ND: torch.Tensor
    g_NO: torch.Tensor


def random_batch(plans: Sequence[ShardPlan], seed: int, *, calls: int = 1, rows: int = 9) -> list[Call]:
    """Calls in backward order: the last site, and of a site the last call, first."""
    made = torch.Generator().manual_seed(seed)
    xs = {(p.group, c): torch.randn(rows + c, p.d_in, generator=made) for p in plans for c in range(calls)}
    return [
        Call(p.index, c, xs[p.group, c], torch.randn(rows + c, p.d_out, generator=made))
        for p in reversed(plans)
        for c in reversed(range(calls))
    ]


@dataclass(frozen=True)
class Kept:
    """A job as its last snapshot has it."""

    step: int
    parameters: dict[int, Parameters]
    optimizer: dict[tuple[int, str], EncodedTensor]
    digests: dict[int, str]


@dataclass
class Driver:
    """One job on some trainers: sends what a server would, and folds what comes back."""

    plan: OptimizerPlan
    plans: tuple[ShardPlan, ...]
    trainers: Sequence[Trainer]
    owners: Mapping[int, int]
    parameters: dict[int, Parameters]
    values: str = "fp32"
    max_rows: int = 64
    deltas: str = "fp32"
    job: str = field(default_factory=lambda: ids.new("ftjob"))
    epoch: int = 1
    step: int = 0
    batch: int = 0
    credited: int = 0
    captured: int = 0
    kept: Kept | None = None

    @classmethod
    def of(
        cls,
        plan: OptimizerPlan,
        plans: tuple[ShardPlan, ...],
        *trainers: Trainer,
        values: str = "fp32",
        deltas: str = "fp32",
    ) -> "Driver":
        owners = dealt(plans, len(trainers))
        return cls(plan, plans, trainers, owners, parameters_of(plans), values, deltas=deltas)

    def assign(self, *, owned: Collection[int] = ()) -> None:
        """The next epoch's assignment; of `owned` shards the optimizer state is not sent."""
        self.digests = {index: digest.state(values) for index, values in self.parameters.items()}
        for worker, trainer in enumerate(self.trainers):
            assert trainer.handle(self.assignment(worker, owned=owned)) == []

    def assignment(self, worker: int = 0, *, owned: Collection[int] = ()) -> Assign:
        mine = tuple(p for p in self.plans if self.owners[p.index] == worker)
        names = tuple((p.index, name) for p in mine for name in self.parameters[p.index])
        start = self.kept if self.kept is not None and self.kept.step == self.step else None
        state = {
            (index, entry): tensor
            for (index, entry), tensor in (start.optimizer if start else {}).items()
            if self.owners[index] == worker and index not in owned
        }
        return Assign(
            job=self.job,
            epoch=self.epoch,
            step=self.step,
            plan=self.plan,
            values=self.values,
            max_rows=self.max_rows,
            shards=mine,
            digests=tuple((p.index, start.digests[p.index]) for p in mine) if start else (),
            names=(*names, *state),
            tensors=(*(encode(self.parameters[index][name], "fp32") for index, name in names), *state.values()),
            deltas=self.deltas,
        )

    def snapshot(self) -> list[Snapshot]:
        """Takes a snapshot, which must be of the server's own parameters, and keeps it as `kept`."""
        request = SnapshotRequest(self.job, self.epoch, self.step)
        halves = [only(trainer.handle(request), Snapshot) for trainer in self.trainers]
        optimizer: dict[tuple[int, str], EncodedTensor] = {}
        digests: dict[int, str] = {}
        for worker, half in enumerate(halves):
            assert (half.job, half.epoch, half.step) == (self.job, self.epoch, self.step)
            state = dict(zip(half.names, half.tensors, strict=True))
            assert len(state) == len(half.names)
            for index, told in half.digests:
                assert self.owners[index] == worker
                entries = {entry: decode(tensor) for (of, entry), tensor in state.items() if of == index}
                assert told == digest.state({**self.parameters[index], **entries})
            optimizer |= state
            digests |= dict(half.digests)
        assert digests.keys() == self.owners.keys()
        self.kept = Kept(self.step, copy.deepcopy(self.parameters), optimizer, digests)
        return halves

    def go_on(self, *trainers: Trainer, owned: Collection[int] = ()) -> None:
        """A new epoch from the last snapshot, on these trainers, or on those that it was on."""
        self.go_back()
        if trainers:
            self.trainers, self.owners = trainers, dealt(self.plans, len(trainers))
        self.assign(owned=owned)

    def go_back(self) -> None:
        """What a server does to its own copy when it begins a new epoch from the last snapshot."""
        assert self.kept is not None
        self.epoch += 1
        self.step, self.batch = self.kept.step, 0
        self.parameters = copy.deepcopy(self.kept.parameters)

    def train(self, batches: Sequence[Sequence[Call]]) -> list[Delta]:
        """One step of so many batches."""
        answers: list[list[ToServer]] = []
        for number, batch in enumerate(batches):
            answers = self.send_batch(batch, len(batches) if number == len(batches) - 1 else 0)
        if self.plan.max_grad_norm > 0:
            norms = [only(a, Norm) for a in answers]
            total = sum(s for _, s in sorted(pair for n in norms for pair in n.squares)) ** 0.5
            total_message = NormTotal(self.job, self.epoch, self.step, total)
            answers = [trainer.handle(total_message) for trainer in self.trainers]
        deltas = [only(a, Delta) for a in answers]
        self.fold(deltas)
        return deltas

    def send_batch(self, batch: Sequence[Call], batches: int) -> list[list[ToServer]]:
        """Captures and the StepEnd; `batches` as in it. Returns: what each trainer says to the StepEnd."""
        for worker, trainer in enumerate(self.trainers):
            for capture in self.captures(batch, worker):
                (credit,) = trainer.handle(capture)
                assert isinstance(credit, Credit)
                self.credited += credit.bytes
        answers = [trainer.handle(self.step_end(batch, batches, w)) for w, trainer in enumerate(self.trainers)]
        self.batch += 1
        return answers

    def captures(self, batch: Sequence[Call], worker: int = 0) -> list[Capture]:
        """A frame for each call: a g with its x where the worker lacks it, or the gradient that they make."""
        shards = {p.index: p for p in self.plans}
        sent: set[tuple[int, int]] = set()
        frames = []
        for call in batch:
            if self.owners[call.index] != worker:
                continue
            shard = shards[call.index]
            key = (shard.group, call.call)
            if shard.rows == "exact":
                made = build(shard.family, shard.d_in, shard.d_out).vjp(
                    self.parameters[call.index], call.x_ND, call.g_NO
                )
                parts = [Part("w", call.index, call.call, name) for name in reversed(made)]  # their order is free
                tensors = [encode_parameter(made[part.name], self.values) for part in parts]
            else:
                parts, tensors = [Part("g", call.index, call.call)], [encode(call.g_NO, self.values)]
                if key not in sent:  # behind its g in the frame: the order within a frame is free
                    parts.append(Part("x", *key))
                    tensors.append(encode(call.x_ND, self.values))
                    sent.add(key)
            self.captured += sum(t.nbytes for t in tensors)
            frames.append(Capture(self.job, self.epoch, self.batch, tuple(parts), tuple(tensors)))
        return frames

    def step_end(self, batch: Sequence[Call], batches: int, worker: int = 0) -> StepEnd:
        mine = [c for c in batch if self.owners[c.index] == worker]
        exact = {p.index for p in self.plans if p.rows == "exact"}
        calls = tuple(
            Calls(i, sum(c.index == i for c in mine), sum(len(c.x_ND) for c in mine if c.index == i and i not in exact))
            for i in sorted({c.index for c in mine})
        )
        return StepEnd(self.job, self.epoch, self.batch, self.step, batches, calls)

    def fold(self, deltas: Sequence[Delta]) -> None:
        """Adds the deltas to the server's copy, and acknowledges them."""
        for worker, delta in enumerate(deltas):
            assert (delta.job, delta.epoch, delta.step) == (self.job, self.epoch, self.step)
            of_shard: dict[int, list[tuple[str, int]]] = {}
            for at, (index, name) in enumerate(delta.names):
                assert self.owners[index] == worker
                of_shard.setdefault(index, []).append((name, at))
            for index, named in of_shard.items():
                tensors = [delta.tensors[at] for _, at in named]
                for (name, _), tensor in zip(named, tensors, strict=True):
                    assert tensor.codec == self.deltas
                    parameter = self.parameters[index][name]
                    parameter += decode_parameter(tensor, tuple(parameter.shape))
                self.digests[index] = digest.chain(self.digests[index], [name for name, _ in named], tensors)
            ack = Ack(self.job, self.epoch, self.step, self.digest(worker))
            assert ack.digest == delta.digest
            assert self.trainers[worker].handle(ack) == []
        self.step += 1

    def digest(self, worker: int = 0) -> str:
        return digest.combine([self.digests[i] for i in sorted(self.digests) if self.owners[i] == worker])

    def revoke(self, *, keep: bool) -> None:
        for trainer in self.trainers:
            assert trainer.handle(Revoke(self.job, self.epoch, "a test", keep)) == []


class Oracle:
    """Ordinary training of the same adapters: autograd for gradients, torch for clipping, steps and schedules."""

    def __init__(self, plan: OptimizerPlan, plans: Sequence[ShardPlan], parameters: Mapping[int, Parameters]) -> None:
        self.plan = plan
        self.parameters = {
            i: {name: p.clone().requires_grad_() for name, p in of_shard.items()} for i, of_shard in parameters.items()
        }
        self.adapters = {p.index: build(p.family, p.d_in, p.d_out) for p in plans}
        leaves = self.leaves()
        self.optimizer: torch.optim.Optimizer
        if plan.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(leaves, lr=plan.learning_rate, weight_decay=plan.weight_decay)
        else:
            self.optimizer = torch.optim.SGD(
                leaves,
                lr=plan.learning_rate,
                momentum=plan.momentum,
                nesterov=plan.nesterov,
                weight_decay=plan.weight_decay,
            )

    def leaves(self) -> list[torch.Tensor]:
        return [p for of_shard in self.parameters.values() for p in of_shard.values()]

    def train(self, batches: Sequence[Sequence[Call]], rate: float) -> float:
        """One step at `rate`. Returns: the gradient's norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            for call in batch:
                out = self.adapters[call.index].forward(self.parameters[call.index], call.x_ND)
                (out * call.g_NO / len(batches)).sum().backward()
        limit = self.plan.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.leaves(), limit if limit > 0 else float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return float(norm)


def dealt(plans: Sequence[ShardPlan], count: int) -> dict[int, int]:
    """Shard number -> number of its owner: the groups of sites dealt out in turn."""
    groups = sorted({p.group for p in plans})
    return {p.index: groups.index(p.group) % count for p in plans}


def changed(plan: OptimizerPlan = PLAN, **fields: object) -> OptimizerPlan:
    return replace(plan, **fields)  # type: ignore[arg-type]


def only(answers: Sequence[ToServer], kind: type[T]) -> T:
    (answer,) = answers
    assert isinstance(answer, kind), answer
    return answer


def refused(answers: Sequence[ToServer]) -> Refusal:
    """The refusal among the answers, which may also credit a capture."""
    (refusal,) = [a for a in answers if not isinstance(a, Credit)]
    assert isinstance(refusal, Refusal), refusal
    return refusal
