"""Small jobs for the tests of this folder."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cola_common.client import Client
from cola_common.jobs import Job

TERMINAL_SECONDS = 50.0


def texts(count: int, seed: int = 0) -> bytes:
    """JSONL of `count` texts in the tiny models' words."""
    random_ = random.Random(seed)
    texts_ = [" ".join(f"w{random_.randrange(50)}" for _ in range(random_.randint(4, 20))) for _ in range(count)]
    return "\n".join(json.dumps({"text": text}) for text in texts_).encode()


def submit(client: Client, *, rows: bytes | None = None, model: str = "llama", **fields: Any) -> Job:
    """A job on a few texts: LoRA r=2 on q_proj and v_proj, SGD, unless `fields` say otherwise."""
    file = client.files.create(file=("rows.jsonl", rows if rows is not None else texts(16)), purpose="fine-tune")
    hyperparameters = {"max_steps": 4, "max_length": 32, "optimizer": "sgd", **fields.pop("hyperparameters", {})}
    adapter = {"target_modules": ["q_proj", "v_proj"], **fields.pop("adapter", {})}
    if adapter.setdefault("type", "lora") == "lora":
        adapter.setdefault("r", 2)
    return client.fine_tuning.jobs.create(
        model=model, training_file=file.id, adapter=adapter, hyperparameters=hyperparameters, **fields
    )


def finish(client: Client, job: Job) -> Job:
    """Waits for the job's end."""
    return client.fine_tuning.jobs.wait(job.id, timeout=TERMINAL_SECONDS)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for a condition that other processes bring about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def last_checkpoint(client: Client, job: Job) -> str:
    """The id of a job's latest checkpoint."""
    return max(client.fine_tuning.jobs.checkpoints.list(job.id), key=lambda c: c.step_number).id


def messages(client: Client, job: Job) -> list[str]:
    """What the job's log says."""
    return [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]


def weights(client: Client, job: Job, folder: Path) -> bytes:
    """The adapter of a job's latest checkpoint, as it is on the disk; `folder` is where it goes."""
    client.fine_tuning.jobs.checkpoints.download(last_checkpoint(client, job), folder)
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


def courses(client: Client, job: Job) -> list[list[int]]:
    """The steps that each epoch of a job took, as its log tells of them; one that goes on from a snapshot is told to do
    so, and its first step is the one after.
    """
    taken: list[list[int]] = [[]]
    starts = [0]
    for event in client.fine_tuning.jobs.list_events(job.id, limit=100):
        if event.type == "metrics":
            taken[-1].append(int(event.data["step"]))
        elif event.message.startswith(("Going on from the snapshot after step", "Starting again")):
            taken.append([])
            starts.append(int(event.data["step"]))
    for start, steps in zip(starts, taken, strict=True):
        assert steps == list(range(start + 1, start + 1 + len(steps)))
    return taken
