"""One step of the base model for a cohort: forward, every job's own loss, backward. Parameters get no gradient here and
there is no optimizer.

A job's loss is the mean over its own target tokens, as if it ran alone: who shares the batch does not matter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from cola_common.errors import ColaError, Reason
from cola_common.messages import Calls
from cola_server.model.adapted import JobAdapter, Mean
from cola_server.model.base import BaseModel
from cola_server.model.cohort import Member, Sink
from cola_server.model.taps import Taps

IGNORED = -100
"""The label of what is no target, as in transformers and torch."""


@dataclass(frozen=True, kw_only=True)
class JobBatch:
    """One batch of one job: right-padded and on the CPU, padding by the mask and never by token id."""

    input_ids: torch.Tensor
    """(B, T), int64."""
    attention_mask: torch.Tensor
    """(B, T), int64: 0 is padding."""
    labels: torch.Tensor
    """(B, T) with -100 for what is no target, shifted here as transformers does; (B,) for classification."""
    adapter: JobAdapter
    merged: bool = False
    mean: Mean | None = None
    """In a collaboration: what the rows see in the place of `adapter` alone; it is one of them."""
    sink: Sink | None = None
    """Where captures go; `train` needs one, `evaluate` does not look at it."""
    job: str = ""
    step: int = 0
    """Named in errors."""


@dataclass(frozen=True)
class BatchResult:
    """What a batch was."""

    loss: float
    """Mean over target tokens (examples for classification); 0 where there are none."""
    tokens: int
    """That are no padding."""
    target_tokens: int
    calls: tuple[Calls, ...]
    """Of the shards whose site was called, in site order."""


def train(base: BaseModel, cohort: Sequence[JobBatch]) -> list[BatchResult | ColaError]:
    """One forward and backward pass; every job's captures are in its sink when it returns, in backward order.

    All batches have one padded length. A merged job is a cohort of its own, and `Merging` has merged it before.
    Returns: for each job its result, or what is wrong with it and does not concern the others: NON_FINITE_LOSS, and
    nothing of it is captured; or what its sink says at its end.
    """
    with _taps(base, cohort, capture=True) as taps:
        sums, targets = _losses(base, cohort)
        losses = [total / max(count, 1) for total, count in zip(sums, targets, strict=True)]
        values = torch.stack([loss.detach() for loss in losses]).tolist()
        assert all(loss.requires_grad for loss in losses), "a loss does not depend on any site"
        for number, value in enumerate(values):
            if not math.isfinite(value):
                taps.mute(number)
        sound = [loss for loss, value in zip(losses, values, strict=True) if math.isfinite(value)]
        if sound:
            torch.autograd.backward(sound)
        return [
            _result(batch, BatchResult(value, member.tokens, count, taps.calls(number)))
            for number, (batch, value, member, count) in enumerate(
                zip(cohort, values, taps.cohort, targets, strict=True)
            )
        ]


def _result(batch: JobBatch, result: BatchResult) -> BatchResult | ColaError:
    if not math.isfinite(result.loss):
        return ColaError(Reason.NON_FINITE_LOSS, step=batch.step, job=batch.job)
    assert batch.sink is not None
    try:
        batch.sink.finish()
    except ColaError as error:
        return error
    return result


def evaluate(base: BaseModel, cohort: Sequence[JobBatch]) -> list[tuple[float, int]]:
    """The sum of every job's losses over its targets, and how many targets there are. Captures nothing."""
    with torch.no_grad(), _taps(base, cohort, capture=False):
        sums, targets = _losses(base, cohort)
    return list(zip(torch.stack(sums).tolist(), targets, strict=True))


def _taps(base: BaseModel, cohort: Sequence[JobBatch], *, capture: bool) -> Taps:
    length = cohort[0].input_ids.shape[1]
    assert all(batch.input_ids.shape[1] == length for batch in cohort), "batches of a cohort have one padded length"
    assert len(cohort) == 1 or not any(batch.merged for batch in cohort), "a merged job is a cohort of its own"
    return Taps(base.module, _members(base, cohort), length, capture=capture)


def _members(base: BaseModel, cohort: Sequence[JobBatch]) -> list[Member]:
    members = []
    for batch in cohort:
        tokens = int(batch.attention_mask.sum())
        padded = tokens < batch.attention_mask.numel()
        members.append(
            Member(
                adapter=batch.adapter,
                merged=batch.merged,
                examples=len(batch.input_ids),
                rows=batch.attention_mask.flatten().nonzero().flatten().to(base.device) if padded else None,
                tokens=tokens,
                sink=batch.sink,
                mean=batch.mean,
            )
        )
    return members


def _losses(base: BaseModel, cohort: Sequence[JobBatch]) -> tuple[list[torch.Tensor], list[int]]:
    """Every job's loss, summed over its targets, and the number of those."""
    input_ids = torch.cat([batch.input_ids for batch in cohort]).to(base.device)
    attention_mask = torch.cat([batch.attention_mask for batch in cohort]).to(base.device)
    logits = base.module(input_ids=input_ids, attention_mask=attention_mask).logits
    labels = [_targets(base, batch) for batch in cohort]
    classes = [_classes(base, batch) for batch in cohort]
    if len(set(classes)) == 1:
        # In one: the gradient of a split would be a copy of all logits.
        parts = torch.split(_losses_of_rows(logits, torch.cat(labels), classes[0]), [w.numel() for w in labels])
    else:
        split = torch.split(logits, [len(batch.input_ids) for batch in cohort])
        parts = tuple(_losses_of_rows(*each) for each in zip(split, labels, classes, strict=True))
    return [part.sum() for part in parts], [int((wanted != IGNORED).sum()) for wanted in labels]


def _losses_of_rows(logits: torch.Tensor, wanted: torch.Tensor, classes: int | None) -> torch.Tensor:
    """Cross-entropy over the first `classes`; 0 where there is no target."""
    rows = logits.reshape(-1, logits.shape[-1])[:, :classes].float()
    return functional.cross_entropy(rows, wanted.flatten().to(rows.device), ignore_index=IGNORED, reduction="none")


def _targets(base: BaseModel, batch: JobBatch) -> torch.Tensor:
    """What each row of the logits is to predict."""
    if base.task == "sequence-classification":
        return batch.labels
    # Position t predicts token t + 1; the last predicts nothing. Logits stay whole, a slice would be a copy.
    return functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)


def _classes(base: BaseModel, batch: JobBatch) -> int | None:
    """How many of the logits are the job's own: a cohort's heads may differ in width. None: all."""
    return None if base.head_name is None else batch.adapter.sites[-1].d_out
