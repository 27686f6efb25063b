"""A job as it is prepared, made by hand."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from cola_common import ids
from cola_common.jobs import Hyperparameters, JobSpec, Wire
from cola_server.model import Site

NAMED = Wire(rows="all", values="fp32", deltas="fp32")


def prepared(
    sites: Sequence[Site],
    *,
    batch: int = 4,
    length: int = 16,
    interval: int = 1,
    batches: int = 100,
    max_length: int | None = None,
    wire: Wire = NAMED,
) -> Any:
    """As `Prepared`, of examples of one length."""
    hyperparameters = Hyperparameters(batch_size=batch, max_length=max_length or length, adaptation_interval=interval)
    return SimpleNamespace(
        job=ids.new("ftjob"),
        spec=JobSpec(model="m", training_file="f", hyperparameters=hyperparameters, wire=wire),
        base=SimpleNamespace(name="m", parameters=1_000_000),
        wire_plan=None,
        sites=tuple(sites),
        mean_batch=(batch * length, batch),
        total_batches=batches,
    )
