"""What a job takes, from its spec and the model alone: told before the job is made, and what admission counts.

Memory is an upper bound: of batches of `batch_size` rows, each `max_length` long.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cola_common.adapters import build
from cola_common.jobs import Hyperparameters, JobSpec
from cola_common.tensor import nbytes
from cola_server.model import Site
from cola_server.training.data import PAD_MULTIPLE

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
    delta: int
    """What comes back for each step."""


def sizes(spec: JobSpec, sites: Sequence[Site], room: Room, *, window_bytes: int, buffer_bytes: int) -> Sizes:
    """Of a job of that spec. `window_bytes` and `buffer_bytes` bound what a worker has not accumulated, and what waits
    for it as well.
    """
    h = spec.hyperparameters
    rows = h.batch_size * math.ceil(h.max_length / PAD_MULTIPLE) * PAD_MULTIPLE
    parameters = parameter_bytes(sites)
    weights = sum(FP32 * s.d_in * s.d_out for s in sites if s.kind != "head") if spec.fold == "merged" else 0
    batch = capture_bytes(sites, spec.wire.values, tokens=rows, examples=h.batch_size)
    captures = min(h.adaptation_interval * batch, max(batch, buffer_bytes))
    state = state_bytes(sites, h)
    token_bytes = room.token_bytes[spec.model]
    beyond = max(0, rows - room.cohort_tokens) * token_bytes
    on_host = captures + 2 * state if room.device.type == "cpu" else 0
    # The gradient and the delta are as large as the parameters; a tensor is decoded to fp32 beside what it came as.
    decoded = 2 * FP32 * rows * max(max(s.d_in, s.d_out) for s in sites)
    return Sizes(
        adapter=parameters + weights,
        captures=captures,
        snapshot=state,
        passing=rows * token_bytes,
        server=parameters + weights + on_host + beyond,
        worker=state + 2 * parameters + min(captures, window_bytes) + decoded,
        delta=parameters,
    )


def parameter_bytes(sites: Sequence[Site]) -> int:
    """The adapter's, in fp32."""
    return sum(build(site.family, site.d_in, site.d_out).cost(0).parameter_bytes for site in sites)


def state_bytes(sites: Sequence[Site], hyperparameters: Hyperparameters) -> int:
    """What a snapshot weighs: fp32 parameters and what the optimizer keeps of them."""
    moments = MOMENTS[hyperparameters.optimizer] + (hyperparameters.momentum > 0)
    return (1 + moments) * parameter_bytes(sites)


def capture_bytes(sites: Sequence[Site], values: str, *, tokens: int, examples: int) -> int:
    """What the captures of a batch weigh on the wire: x once for a group and call, g for every site and call."""
    seen: set[int] = set()
    total = 0
    for site in sites:
        rows = site.rows(tokens=tokens, examples=examples)
        total += site.calls * nbytes(values, (rows, site.d_out))
        if site.group not in seen:
            seen.add(site.group)
            total += site.calls * nbytes(values, (rows, site.d_in))
    return total
