"""What a job takes, from its spec and the model alone: told before the job is made, and what admission counts.

Memory is an upper bound: of batches of `batch_size` rows, each `max_length` long.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cola_common.adapters import build
from cola_common.errors import ColaError, Reason
from cola_common.jobs import Hyperparameters, JobSpec, WirePlan
from cola_common.tensor import nbytes
from cola_server.model import Site
from cola_server.training import planner
from cola_server.training.data import PAD_MULTIPLE
from cola_server.training.traffic import capture_bytes, rows_of

MOMENTS = {"adamw": 2, "sgd": 0}
FP32 = 4


@dataclass(frozen=True)
class Room:
    """The server's memory for training, as it is divided."""

    job_bytes: int
    """For what jobs keep."""
    cohort_tokens: int
    """Padded tokens that may pass at once; there is room for these apart from `job_bytes`."""
    token_bytes: Mapping[str, int]
    """What each takes in a pass, by model."""
    device: torch.device
    """Whose memory it is."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of a job."""

    adapter: int
    """The server's copy; of a merged job with the weights that it is merged into. On the model's device."""
    captures: int
    """What is on its way to the workers; in host memory."""
    snapshot: int
    """Parameters and optimizer state; while it is made, in host memory twice."""
    passing: int
    """What its largest batch takes in the model."""
    server: int
    """What admission counts: what the job keeps on the device, and what of `passing` is beyond the room for that."""
    worker: int
    """On the worker, or on all of its workers together."""


@dataclass(frozen=True)
class Bounds:
    """Of what may be on its way to a worker."""

    buffer_bytes: int
    """With what waits for it."""
    window_bytes: int
    """That it has not accumulated."""

    def problem(self, spec: JobSpec, sites: Sequence[Site], plan: WirePlan) -> ColaError | None:
        """BATCH_TOO_LARGE where the job's largest batch does not fit."""
        rows = largest_rows(spec.hyperparameters)
        examples = spec.hyperparameters.batch_size
        total = capture_bytes(sites, plan, tokens=rows, examples=examples, bound=True)
        if total > self.buffer_bytes:
            return ColaError(Reason.BATCH_TOO_LARGE, bytes=total, limit=self.buffer_bytes)
        widths = [max(s.d_in, s.d_out) for s in sites if rows_of(s, plan.rows) != "exact"]
        largest = nbytes(plan.values, (rows, max(widths, default=0)))
        if largest > self.window_bytes:
            return ColaError(Reason.BATCH_TOO_LARGE, bytes=largest, limit=self.window_bytes)
        return None


def largest_rows(hyperparameters: Hyperparameters) -> int:
    """Padded tokens of the largest batch."""
    return hyperparameters.batch_size * math.ceil(hyperparameters.max_length / PAD_MULTIPLE) * PAD_MULTIPLE


def heaviest_plan(spec: JobSpec, sites: Sequence[Site]) -> WirePlan:
    """The one, of all that the planner may choose for the job, whose batches weigh most."""
    rows, examples = largest_rows(spec.hyperparameters), spec.hyperparameters.batch_size
    return planner.largest(
        spec.wire, sites, lambda plan: capture_bytes(sites, plan, tokens=rows, examples=examples, bound=True)
    )


def sizes(spec: JobSpec, sites: Sequence[Site], room: Room, plan: WirePlan, bounds: Bounds) -> Sizes:
    """Of a job of that spec, whose largest batches are those of `plan`."""
    h = spec.hyperparameters
    rows = largest_rows(h)
    parameters = parameter_bytes(sites)
    weights = sum(FP32 * s.d_in * s.d_out for s in sites if s.kind != "head") if spec.fold == "merged" else 0
    batch = capture_bytes(sites, plan, tokens=rows, examples=h.batch_size, bound=True)
    captures = min(h.adaptation_interval * batch, max(batch, bounds.buffer_bytes))
    state = state_bytes(sites, spec)
    token_bytes = room.token_bytes[spec.model]
    beyond = max(0, rows - room.cohort_tokens) * token_bytes
    on_host = captures + 2 * state if room.device.type == "cpu" else 0
    # The gradient and the delta are as large as the parameters; a tensor is decoded to fp32 beside what it came as.
    # A worker that lacks a reduction gets all rows.
    decoded = 2 * FP32 * rows * max(max(s.d_in, s.d_out) for s in sites)
    return Sizes(
        adapter=parameters + weights,
        captures=captures,
        snapshot=state,
        passing=rows * token_bytes,
        server=parameters + weights + on_host + beyond,
        worker=state + 2 * parameters + min(captures, bounds.window_bytes) + decoded,
    )


def parameter_bytes(sites: Sequence[Site]) -> int:
    """The adapter's, in fp32."""
    return sum(build(site.family, site.d_in, site.d_out).cost(0).parameter_bytes for site in sites)


def state_bytes(sites: Sequence[Site], spec: JobSpec) -> int:
    """What a snapshot weighs: fp32 parameters, what the optimizer keeps of them, and what a codec of deltas may."""
    h, wire = spec.hyperparameters, spec.wire
    remainders = wire.max_error > 0 if wire.deltas == "auto" else wire.deltas != "fp32"
    return (1 + MOMENTS[h.optimizer] + (h.momentum > 0) + remainders) * parameter_bytes(sites)
