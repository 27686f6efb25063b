"""What goes wrong in one job, from its first step to a worker that it shares with others, is its own affair."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from cola_common.client import Client
from cola_common.errors import ColaError, Reason
from cola_common.jobs import Job
from tests.end_to_end.jobs import finish, submit, until, weights
from tests.support.cluster import Cluster

STEPS = 150
ROWS = "\n".join(f'{{"text": "{" ".join(f"w{(i * j) % 50}" for j in range(8))}"}}' for i in range(16)).encode()
"""Equally long, so that any two jobs may share a pass."""
RECKLESS = {"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 200, "batch_size": 4}


def steady(client: Client) -> Job:
    hyperparameters = {"max_steps": STEPS, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.1}
    return submit(client, rows=ROWS, hyperparameters=hyperparameters, wire={"values": "fp32"})


def test_jobs_that_break_beside_another_change_nothing_of_it(whole: Cluster, tmp_path: Path) -> None:
    with whole.client() as client:
        alone = load(weights(client, finish(client, steady(client)), tmp_path / "alone"))
        job = steady(client)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step > 2)
        broken = []
        while client.fine_tuning.jobs.retrieve(job.id).step < STEPS - 10:
            burst = [submit(client, rows=ROWS, hyperparameters=RECKLESS) for _ in range(2)]
            with pytest.raises(ColaError):
                submit(client, rows=ROWS, adapter={"target_modules": ["q_prj"]})
            client.fine_tuning.jobs.cancel(steady(client).id)
            broken += [finish(client, each) for each in burst]
        done = finish(client, job)
        assert done.status == "succeeded"
        assert done.epoch == 1
        codes = [each.error.code for each in broken if each.error is not None]
        assert len(codes) > 1 and set(codes) <= {Reason.NON_FINITE_LOSS, Reason.NON_FINITE_CAPTURE}
        beside = load(weights(client, done, tmp_path / "beside"))
        for name, values in alone.items():
            assert torch.linalg.norm(beside[name] - values) <= 1e-5 * torch.linalg.norm(values), name
        assert [worker.status for worker in client.workers.list()] == ["attending"]
