"""Training in one process and one thread, without sockets: the model's step, the packer, workers' trainers, the fold.

The very parts that server and workers are made of; what stands in for the stream and the exchange is a few lines that
pass messages on, so that the numerics can be tested over a large product.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from cola_common.jobs import WirePlan
from cola_common.messages import (
    Ack,
    Assign,
    Calls,
    Capture,
    Credit,
    Delta,
    Norm,
    NormTotal,
    OptimizerPlan,
    Refusal,
    ShardPlan,
    StepEnd,
    ToServer,
)
from cola_common.tensor import encode
from cola_server.model import BaseModel, BatchResult, JobAdapter, JobBatch, Mean, Merging, Site, train
from cola_server.training.captures import CapturePacker
from cola_server.training.traffic import rows_of
from cola_worker.shards import Shards
from cola_worker.trainer import ToTrainer, Trainer
from tests.support.wires import wire

ALL = wire()
JOB = "ftjob-0123456789abcdef01234567"
EPOCH = 1


@dataclass(frozen=True)
class Batch:
    """(B, T) ids and mask; labels (B, T) or (B,)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


class Refused(AssertionError):
    """A worker refused a message."""


class InProcess:
    """One job from its assignment on. `adapter` is the server's copy; digests are compared at every fold. A member of a
    collaboration has a `mean`; all members `pass_through` the model before one of them may `fold`.
    """

    def __init__(
        self,
        base: BaseModel,
        sites: Sequence[Site],
        adapter: JobAdapter,
        plan: OptimizerPlan,
        folder: Path,
        *,
        owners: Mapping[int, str] | None = None,
        travels: WirePlan = ALL,
        fold: str = "unmerged",
        mean: Mean | None = None,
        seed: int = 0,
    ) -> None:
        self.base = base
        self.mean = mean
        self.adapter = adapter
        self.owners = dict(owners) if owners is not None else dict.fromkeys(range(len(sites)), "only")
        self.norms: list[float] = []
        self.bytes = 0
        """Of captures, so far."""
        self._sent: Sequence[Calls] = ()
        self._plan = plan
        self._seed = seed
        self._sites = sites
        self._wires = dict.fromkeys(self.owners.values(), travels)
        self._merging = Merging(base, adapter) if fold == "merged" else None
        self._step = 0
        self._batch = 0
        self._answers: dict[str, list[ToServer]] = {}
        self._trainers = {worker: Trainer(Shards(folder / worker)) for worker in sorted(set(self.owners.values()))}
        state = adapter.state()
        for worker, trainer in self._trainers.items():
            mine = [site for site in sites if self.owners[site.index] == worker]
            names = tuple((site.index, name) for site in mine for name in state[site.index])
            assign = Assign(
                job=JOB,
                epoch=EPOCH,
                step=0,
                plan=plan,
                values=travels.values,
                deltas=travels.deltas,
                max_rows=4096,
                shards=tuple(
                    ShardPlan(s.index, s.name, s.family, s.d_in, s.d_out, s.group, rows_of(s, travels.rows))
                    for s in mine
                ),
                digests=(),
                names=names,
                tensors=tuple(encode(state[index][name], "fp32") for index, name in names),
            )
            assert _handle(trainer, assign) == []

    def __enter__(self) -> Self:
        if self._merging is not None:
            self._merging.merge()
        return self

    def __exit__(self, *_: object) -> None:
        if self._merging is not None:
            self._merging.restore()

    def step(self, batches: Sequence[Batch]) -> list[BatchResult]:
        """One optimizer step over an interval of batches."""
        results = self.pass_through(batches)
        self.fold()
        return results

    def pass_through(self, batches: Sequence[Batch]) -> list[BatchResult]:
        """A step's first half: its batches through the model, their captures to the workers."""
        results = []
        for number, batch in enumerate(batches):
            result = self._train(batch)
            results.append(result)
            closes = len(batches) if number + 1 == len(batches) else 0
            for worker, trainer in self._trainers.items():
                mine = tuple(calls for calls in self._sent if self.owners[calls.index] == worker)
                end = StepEnd(JOB, EPOCH, self._batch, self._step, closes, mine)
                self._answers[worker] = _handle(trainer, end)
            self._batch += 1
        return results

    def fold(self) -> None:
        """A step's second half."""
        answers = self._answers
        if self._plan.max_grad_norm > 0:
            total = self._norm([norm.squares for (norm,) in answers.values() if isinstance(norm, Norm)])
            for worker, trainer in self._trainers.items():
                answers[worker] = _handle(trainer, NormTotal(JOB, EPOCH, self._step, total))
        self._fold({worker: delta for worker, (delta,) in answers.items() if isinstance(delta, Delta)})

    def _train(self, batch: Batch) -> BatchResult:
        def emit(worker: str, capture: Capture) -> None:
            answers = _handle(self._trainers[worker], capture)
            assert [type(answer) for answer in answers] == [Credit]

        packer = CapturePacker(
            job=JOB,
            epoch=EPOCH,
            batch=self._batch,
            step=self._step,
            seed=self._seed,
            sites=self._sites,
            wires=self._wires,
            owners=self.owners,
            emit=emit,
        )
        (result,) = train(
            self.base,
            [
                JobBatch(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    labels=batch.labels,
                    adapter=self.adapter,
                    merged=self._merging is not None,
                    mean=self.mean,
                    sink=packer,
                    job=JOB,
                    step=self._step,
                )
            ],
        )
        packer.finish()
        self._sent = packer.sent_calls(result.calls)
        self.bytes += sum(packer.sent.values())
        return result

    def _fold(self, deltas: Mapping[str, Delta]) -> None:
        assert deltas.keys() == self._trainers.keys()
        for worker, delta in deltas.items():
            for index in sorted({index for index, _ in delta.names}):
                mine = [
                    (name, tensor)
                    for (owner, name), tensor in zip(delta.names, delta.tensors, strict=True)
                    if owner == index
                ]
                self.adapter.fold(index, [name for name, _ in mine], [tensor for _, tensor in mine])
            digest = self.adapter.digest([i for i, owner in self.owners.items() if owner == worker])
            assert digest == delta.digest, "server and worker hold different bits"
            assert _handle(self._trainers[worker], Ack(JOB, EPOCH, self._step, digest)) == []
        if self._plan.max_grad_norm == 0:
            self._norm([delta.squares for delta in deltas.values()])
        if self._merging is not None:
            self._merging.merge()
        self._step += 1

    def _norm(self, squares: Sequence[Sequence[tuple[int, float]]]) -> float:
        by_site = dict(pair for of_worker in squares for pair in of_worker)
        self.norms.append(math.sqrt(sum(by_site[index] for index in sorted(by_site))))
        return self.norms[-1]


def called(result: BatchResult) -> dict[int, Calls]:
    """A batch's calls by shard."""
    return {calls.index: calls for calls in result.calls}


def dealt(sites: Sequence[Site], workers: Sequence[str]) -> dict[int, str]:
    """Owners: the groups of sites dealt out in turn."""
    return {site.index: workers[site.group % len(workers)] for site in sites}


def _handle(trainer: Trainer, message: ToTrainer) -> list[ToServer]:
    answers = trainer.handle(message)
    for answer in answers:
        if isinstance(answer, Refusal):
            raise Refused(answer.message)
    return answers
