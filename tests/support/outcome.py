"""What no fault may change of a job: O1, its adapters bit for bit, and O2, its steps one by one."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_common.client import Client
from cola_common.jobs import Job, JobEvent
from tests.end_to_end.jobs import submit, texts

ROWS = texts(64)  # sixteen batches, so that a checkpoint comes every sixteen steps


def begin(client: Client, steps: int, **fields: Any) -> Job:
    """A job whose optimizer has something to lose: AdamW, clipped by a norm over all sites."""
    given = fields.pop("hyperparameters", {})
    hyperparameters = {"max_steps": steps, "optimizer": "adamw", "learning_rate": 0.01, **given}
    return submit(client, rows=ROWS, hyperparameters=hyperparameters, **fields)


@dataclass(frozen=True)
class Outcome:
    """What a job gave."""

    adapters: dict[int, str]
    """SHA-256 of each checkpoint's weights, by step."""
    losses: list[float]


def outcome(client: Client, job: Job, folder: Path) -> Outcome:
    """The outcome of a job that has succeeded, with O2 asserted, and that its last adapter is what its record says."""
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    metrics = client.fine_tuning.jobs.metrics(job.id)
    assert [each.step for each in metrics] == list(range(1, (job.total_steps or 0) + 1))
    epochs = [each.epoch for each in metrics]
    assert epochs == sorted(epochs) and epochs[-1] <= job.epoch
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    adapters = {each.step_number: each.digest for each in checkpoints}
    assert len(adapters) == len(checkpoints), "two checkpoints of one step"
    last = max(checkpoints, key=lambda each: each.step_number)
    client.fine_tuning.jobs.checkpoints.download(last.id, folder / job.id)
    (weights,) = (folder / job.id).glob("*.safetensors")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == last.digest
    return Outcome(adapters, [each.train_loss for each in metrics])


def log_of(client: Client, job: Job) -> list[JobEvent]:
    """All events of a job so far."""
    return list(client.fine_tuning.jobs.list_events(job.id))


def folds(log: list[JobEvent]) -> list[JobEvent]:
    """The events of its steps, repeated ones too."""
    return [event for event in log if event.type == "metrics"]


def lost(log: list[JobEvent], worker: str, after: float = 0.0) -> JobEvent:
    """The first event later than the time `after` that says that a worker is lost."""
    return next(e for e in log if e.message.startswith(f"Worker {worker} is lost") and e.created_at > after)


def next_fold(log: list[JobEvent], event: JobEvent) -> JobEvent:
    """The first fold behind an event."""
    return next(e for e in folds(log) if e.id > event.id)
