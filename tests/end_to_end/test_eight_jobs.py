"""Eight jobs that share their passes, while others come and go: each has the adapter that it has alone."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_common.adapters import Parameters, peft_format
from cola_common.client import Client
from cola_common.jobs import Job
from cola_server.model import JobAdapter, load, probe
from tests.end_to_end import test_groups as groups
from tests.end_to_end.jobs import finish, last_checkpoint, submit, texts, until
from tests.support.cluster import Cluster
from tests.support.group_oracle import Oracle

LORA = {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]}
# No two have the same of anything: families, ranks, sites, intervals, optimizers, lengths of rows and of the run.
ALONE: dict[str, dict[str, Any]] = {
    "lora": {
        "adapter": LORA,
        "hyperparameters": {"max_steps": 30, "learning_rate": 0.05, "lr_scheduler_type": "constant"},
    },
    "lora everywhere": {
        "adapter": {"type": "lora", "r": 6, "lora_alpha": 9.0, "target_modules": "all-linear"},
        "hyperparameters": {"max_steps": 16, "adaptation_interval": 3, "optimizer": "adamw", "learning_rate": 0.003},
    },
    "linear": {
        "adapter": {"type": "linear", "scale": 0.6, "target_modules": ["v_proj", "down_proj"]},
        "hyperparameters": {
            "max_steps": 14,
            "adaptation_interval": 4,
            "learning_rate": 0.02,
            "momentum": 0.9,
            "nesterov": True,
            "batch_size": 2,
        },
    },
    "mlp": {
        "adapter": {"type": "mlp", "hidden_sizes": [5], "scale": 1.2, "target_modules": ["gate_proj", "o_proj"]},
        "hyperparameters": {
            "max_steps": 13,
            "adaptation_interval": 5,
            "optimizer": "adamw",
            "learning_rate": 0.005,
            "weight_decay": 0.1,
            "batch_size": 3,
            "lr_scheduler_type": "cosine",
        },
    },
    "deep mlp": {
        "adapter": {"type": "mlp", "hidden_sizes": [6, 4], "target_modules": ["up_proj", "k_proj"]},
        "hyperparameters": {
            "max_steps": 12,
            "adaptation_interval": 6,
            "learning_rate": 0.03,
            "momentum": 0.8,
            "max_grad_norm": 0.05,
            "max_length": 12,
        },
    },
    "head": {
        "model": "bert",
        "adapter": {"type": "lora", "r": 3, "target_modules": ["query", "pooler.dense"]},
        "hyperparameters": {"max_steps": 15, "adaptation_interval": 2, "learning_rate": 0.02, "weight_decay": 0.01},
    },
}
PAIR: list[dict[str, Any]] = [
    {
        "adapter": {"type": "lora", "r": 4, "target_modules": ["q_proj", "o_proj", "down_proj"]},
        "hyperparameters": {"max_steps": 18, "optimizer": "adamw", "learning_rate": 0.003, "weight_decay": 0.01},
    },
    {
        "adapter": {"type": "linear", "scale": 0.8, "target_modules": ["v_proj", "up_proj"]},
        "hyperparameters": {"max_steps": 20, "learning_rate": 0.02, "momentum": 0.7, "batch_size": 5},
    },
]
PAUSED: dict[str, Any] = {
    "adapter": {"type": "lora", "r": 3, "target_modules": ["v_proj", "lm_head"]},
    "hyperparameters": {"max_steps": 25, "learning_rate": 0.05},
}
LATE: dict[str, Any] = {
    "model": "bert",
    "adapter": {"type": "linear", "target_modules": ["value"]},
    "hyperparameters": {"max_steps": 20, "optimizer": "adamw", "learning_rate": 0.003},
}


class NotingCluster(Cluster):
    """It knows who was in which pass."""

    server_module = "tests.support.noting_server"

    def passes(self) -> list[set[str]]:
        return [set(line.split()) for line in self.data.with_suffix(".passes").read_text().splitlines()]


@pytest.fixture
def cluster(models: dict[str, Path], tmp_path: Path) -> Iterator[NotingCluster]:
    """A server that runs all jobs at once, and a worker that can be far away."""
    served = {name: models[name] for name in ("llama", "bert")}
    with NotingCluster(tmp_path / "cluster", served, workers=0, flags=["--max-running-jobs=11"]) as cluster:
        cluster.start_worker("worker", faulty=True)
        cluster.await_workers(1)
        yield cluster


def start(client: Client, seed: int, fields: dict[str, Any]) -> Job:
    """A job with data of its own; one of a classifier has `seed` labels."""
    rows = texts(14, seed=seed)
    if fields.get("model") == "bert":
        labelled = [{**json.loads(row), "label": f"c{number % seed}"} for number, row in enumerate(rows.splitlines())]
        rows = "\n".join(map(json.dumps, labelled)).encode()
    return submit(client, rows=rows, seed=seed, wire={"values": "fp32"}, **fields)


def adapter_of(client: Client, job: Job, folder: Path) -> dict[str, Parameters]:
    """What it is in the end."""
    done = finish(client, job)
    assert done.status == "succeeded", done.error
    client.fine_tuning.jobs.checkpoints.download(last_checkpoint(client, job), folder / job.id)
    return peft_format.load(folder / job.id).parameters


def check(job: Job, ours: dict[str, Parameters], theirs: dict[str, Parameters]) -> None:
    assert ours.keys() == theirs.keys()
    pairs = [(ours[site][name].flatten(), value.flatten()) for site in theirs for name, value in theirs[site].items()]
    our, their = (torch.cat(values) for values in zip(*pairs, strict=True))
    error = float((our - their).norm() / their.norm())
    assert error < (1e-5 if job.spec.hyperparameters.optimizer == "sgd" else 1e-4), (error, job.spec.adapter)


def by_autograd(jobs: Sequence[Job], model: Path, folder: Path) -> list[dict[str, Parameters]]:
    """What the members of the collaboration are trained to."""
    base = load("llama", str(model), device="cpu")
    sites = [probe(base, job.spec.adapter, labels=None, fold="unmerged") for job in jobs]
    starts = [JobAdapter.initial(of_job, number, torch.device("cpu")) for number, of_job in enumerate(sites)]
    batches = [groups.batches_of(job, number, folder, base) for number, job in enumerate(jobs)]
    oracle = Oracle(base.module, starts, [groups.plan_of(job) for job in jobs])
    for first in range(0, max(map(len, batches)), groups.INTERVAL):
        oracle.step({n: own[first : first + groups.INTERVAL] for n, own in enumerate(batches) if first < len(own)})
    return [oracle.parameters(number) for number in range(len(jobs))]


@pytest.mark.timeout(180)
def test_each_has_the_adapter_that_it_has_alone_whoever_comes_and_goes(
    cluster: NotingCluster, models: dict[str, Path], tmp_path: Path
) -> None:
    specs = [*ALONE.values(), PAUSED, LATE]
    with cluster.client() as client:
        api = client.fine_tuning.jobs
        alone = [adapter_of(client, start(client, seed, fields), tmp_path) for seed, fields in enumerate(specs)]
        before = cluster.passes()
        assert all(len(jobs) == 1 for jobs in before)

        cluster.misbehave("worker", "far=0.5")  # nothing ends before the others have come and gone
        jobs = [start(client, seed, fields) for seed, fields in enumerate(specs[:-1])]
        pair = groups.begin(client, PAIR, wire={"values": "fp32"})
        gone = start(client, len(specs), {"adapter": LORA, "hyperparameters": {"max_steps": 5000}})
        until(lambda: all(api.retrieve(job.id).step > 0 for job in (*jobs, *pair, gone)), 40)
        *own, paused = jobs
        api.pause(paused.id)
        api.cancel(gone.id)
        jobs.append(start(client, len(jobs), LATE))
        until(lambda: api.retrieve(jobs[-1].id).step > 0)
        api.resume(paused.id)
        until(lambda: api.retrieve(paused.id).epoch == 2)
        eight = [*own, *pair]
        assert [api.retrieve(job.id).status for job in eight] == ["running"] * 8
        cluster.misbehave("worker", "")

        together = [adapter_of(client, job, tmp_path) for job in jobs]
        members = [adapter_of(client, job, tmp_path) for job in pair]
        pair = [api.retrieve(job.id) for job in pair]
    passes = cluster.passes()[len(before) :]
    for job in eight:
        shared = [others for others in passes if job.id in others and len(others) > 1]
        assert job.spec.model == "bert" or len(shared) >= 5, "it was as good as alone"
    for job, ours, theirs in zip(jobs, together, alone, strict=True):
        check(job, ours, theirs)
    for job, ours, theirs in zip(pair, members, by_autograd(pair, models["llama"], tmp_path), strict=True):
        check(job, ours, theirs)
