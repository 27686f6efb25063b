"""Working together: several users' data for one adapter, and several users' adapters in one forward pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_common.adapters import peft_format
from cola_common.client import Client
from cola_common.jobs import Job
from cola_common.messages import OptimizerPlan
from cola_common.schedules import warmup_steps
from cola_server.model import JobAdapter, load, probe
from cola_server.training import data
from tests.end_to_end.jobs import finish, last_checkpoint, messages, submit, texts, until
from tests.support.cluster import Cluster
from tests.support.group_oracle import Oracle
from tests.support.in_process import Batch
from tests.support.outcome import log_of, outcome

# --- joint ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
def test_joint_files_train_one_adapter_as_one_file_with_all_their_rows(
    whole: Cluster, tmp_path: Path, shuffle: bool
) -> None:
    rows = texts(20).split(b"\n")
    with whole.client() as client:
        parts = [
            client.files.create(file=("part.jsonl", b"\n".join(part)), purpose="fine-tune").id
            for part in (rows[7:8], rows[8:])
        ]
        fields: dict[str, Any] = {"hyperparameters": {"max_steps": 8, "shuffle": shuffle, "batch_size": 3}}
        joint = submit(client, rows=b"\n".join(rows[:7]), joint_files=parts, **fields)
        one = submit(client, rows=b"\n".join(rows), **fields)
        finish(client, joint)
        finish(client, one)
        assert outcome(client, joint, tmp_path) == outcome(client, one, tmp_path)
        assert "Files validated: 20 examples" in messages(client, joint)[0]


def test_a_joint_classification_knows_the_labels_of_all(whole: Cluster, tmp_path: Path) -> None:
    rows = [f'{{"text": "w{number} w{number}", "label": "{label}"}}'.encode() for number, label in enumerate("aabbcc")]
    with whole.client() as client:
        other = client.files.create(file=("part.jsonl", b"\n".join(rows[2:])), purpose="fine-tune").id
        fields: dict[str, Any] = {"model": "bert", "adapter": {"target_modules": ["query"]}}
        joint = submit(client, rows=b"\n".join(rows[:2]), joint_files=[other], **fields)
        one = submit(client, rows=b"\n".join(rows), **fields)
        finish(client, joint)
        finish(client, one)
        assert outcome(client, joint, tmp_path) == outcome(client, one, tmp_path)


# --- collaboration --------------------------------------------------------------------------------------------------

INTERVAL = 2
MEMBERS: list[dict[str, Any]] = [
    {
        "adapter": {"type": "lora", "r": 3, "lora_alpha": 5.0, "target_modules": ["q_proj", "v_proj"]},
        "hyperparameters": {"max_steps": 9, "optimizer": "adamw", "learning_rate": 0.003, "weight_decay": 0.01},
    },
    {
        "adapter": {"type": "linear", "scale": 0.6, "target_modules": ["v_proj", "down_proj"]},
        "hyperparameters": {"max_steps": 5, "momentum": 0.9, "learning_rate": 0.02, "batch_size": 3},
    },
    {
        "adapter": {"type": "mlp", "hidden_sizes": [5], "scale": 1.2, "target_modules": ["gate_proj", "v_proj"]},
        "hyperparameters": {"max_steps": 7, "learning_rate": 0.02, "batch_size": 1, "max_length": 16},
    },
]


def begin(client: Client, members: Sequence[dict[str, Any]], name: str = "ours", **shared: Any) -> list[Job]:
    """A group of such members, each with data of its own."""
    return [
        submit(
            client,
            rows=texts(11, seed=number),
            seed=number,
            collaboration={"group": name, "size": len(members)},
            **{
                **member,
                "hyperparameters": {"adaptation_interval": INTERVAL, **member["hyperparameters"]},
                **shared,
            },
        )
        for number, member in enumerate(members)
    ]


def test_members_train_as_autograd_has_it_each_to_its_own_end(
    split: Cluster, models: dict[str, Path], tmp_path: Path
) -> None:
    """And what one's validation sees is all adapters after the same step."""
    with split.client() as client:
        seen = client.files.create(file=("valid.jsonl", texts(5, seed=9)), purpose="fine-tune").id
        watched = {**MEMBERS[0], "validation_file": seen}
        jobs = [finish(client, job) for job in begin(client, [watched, *MEMBERS[1:]], wire={"values": "fp32"})]
        assert [job.status for job in jobs] == ["succeeded"] * 3, [job.error for job in jobs]
        assert {job.group_id for job in jobs} == {jobs[0].id}
        ends = [job.finished_at or 0.0 for job in jobs]
        assert ends[1] < ends[2] < ends[0]
        adapters, losses = [], []
        for job in jobs:
            client.fine_tuning.jobs.checkpoints.download(last_checkpoint(client, job), tmp_path / job.id)
            adapters.append(peft_format.load(tmp_path / job.id).parameters)
            losses.append([step.train_loss for step in client.fine_tuning.jobs.metrics(job.id)])
        valid_losses = [step.valid_loss for step in client.fine_tuning.jobs.metrics(jobs[0].id)]
        assert sum(loss is not None for loss in valid_losses) >= 4
    base = load("llama", str(models["llama"]), device="cpu")
    starts = []
    for number, job in enumerate(jobs):
        sites = probe(base, job.spec.adapter, labels=None, fold="unmerged")
        starts.append(JobAdapter.initial(sites, number, torch.device("cpu")))
    batches = [batches_of(job, number, tmp_path, base) for number, job in enumerate(jobs)]
    (tmp_path / "valid.jsonl").write_bytes(texts(5, seed=9))
    unseen = data.read(tmp_path / "valid.jsonl", "causal-lm", base.tokenizer, 32).examples
    oracle = Oracle(base.module, starts, [plan_of(job) for job in jobs])
    for step in range(9):
        going_on = {
            number: batches[number][step * INTERVAL : (step + 1) * INTERVAL]
            for number, job in enumerate(jobs)
            if step < (job.total_steps or 0)
        }
        for number, of_batches in oracle.step(going_on).items():
            assert losses[number][step] == pytest.approx(sum(of_batches) / INTERVAL, rel=1e-4), (number, step)
        if valid_losses[step] is not None:
            with torch.no_grad():
                sums = [oracle.loss(Batch(*data.collate([e], 0))).item() * (len(e.ids) - 1) for e in unseen]
            assert valid_losses[step] == pytest.approx(sum(sums) / sum(len(e.ids) - 1 for e in unseen), rel=1e-4), step
    for number, trained in enumerate(adapters):
        wanted = oracle.parameters(number)
        assert trained.keys() == wanted.keys()
        ours = torch.cat([p.flatten() for site in sorted(trained) for p in trained[site].values()])
        theirs = torch.cat([wanted[site][name].flatten() for site in sorted(trained) for name in trained[site]])
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < (1e-4 if number == 0 else 1e-5), (number, error)


def plan_of(job: Job) -> OptimizerPlan:
    h = job.spec.hyperparameters
    assert h.max_steps is not None
    return OptimizerPlan(
        optimizer=h.optimizer,
        learning_rate=h.learning_rate,
        momentum=h.momentum,
        nesterov=h.nesterov,
        weight_decay=h.weight_decay,
        max_grad_norm=h.max_grad_norm,
        lr_scheduler_type=h.lr_scheduler_type,
        warmup_steps=warmup_steps(h.warmup_ratio, h.max_steps),
        total_steps=h.max_steps,
    )


def batches_of(job: Job, number: int, folder: Path, base: Any) -> list[Batch]:
    h = job.spec.hyperparameters
    path = folder / f"{number}.jsonl"
    path.write_bytes(texts(11, seed=number))
    dataset = data.read(path, "causal-lm", base.tokenizer, h.max_length)
    batches = data.Batches(dataset, h.batch_size, number, shuffle=True)
    count = (job.total_steps or 0) * INTERVAL
    return [Batch(*data.collate([dataset.examples[i] for i in batches.indices(n)], 0)) for n in range(count)]


PAIR: list[dict[str, Any]] = [
    {"hyperparameters": {"max_steps": 60, "optimizer": "adamw", "learning_rate": 0.01}},
    {"hyperparameters": {"max_steps": 90, "learning_rate": 0.02}, "adapter": {"r": 4, "target_modules": ["v_proj"]}},
]


def test_nobody_starts_before_all_are_there_and_one_that_pauses_holds_all(whole: Cluster, tmp_path: Path) -> None:
    with whole.client() as client:
        jobs_api = client.fine_tuning.jobs
        undisturbed = [outcome(client, finish(client, job), tmp_path) for job in begin(client, PAIR)]
        pair = first, second = begin(client, PAIR)
        until(lambda: all(jobs_api.retrieve(job.id).step > 10 for job in pair))
        jobs_api.pause(second.id)
        until(lambda: jobs_api.retrieve(first.id).status == "queued")
        assert messages(client, first)[-1] == "Waiting for the group 'ours': 1 of 2."
        assert jobs_api.retrieve(second.id).status == "paused"
        stranger = finish(client, submit(client))
        assert stranger.status == "succeeded"
        jobs_api.resume(second.id)
        assert [outcome(client, finish(client, job), tmp_path) for job in pair] == undisturbed
        steps = [e for e in log_of(client, first) if e.type == "metrics"]
        assert len(steps) == 60, "a pause loses no step"


def test_a_group_that_is_not_complete_waits(whole: Cluster) -> None:
    with whole.client() as client:
        jobs_api = client.fine_tuning.jobs
        first = submit(client, collaboration={"group": "later", "size": 2})
        until(lambda: "Waiting for the group 'later': 1 of 2." in messages(client, first))
        assert finish(client, submit(client)).status == "succeeded"
        assert jobs_api.retrieve(first.id).status == "queued"
        second = submit(client, collaboration={"group": "later", "size": 2})
        assert [finish(client, job).status for job in (first, second)] == ["succeeded"] * 2


@pytest.mark.parametrize("state", ["running", "waiting", "paused"])
def test_one_that_is_cancelled_fails_the_others_by_name(whole: Cluster, state: str) -> None:
    with whole.client() as client:
        jobs_api = client.fine_tuning.jobs
        size = 3 if state == "waiting" else 2
        long = {"hyperparameters": {"max_steps": 5000}}
        one, other = [submit(client, collaboration={"group": "broken", "size": size}, **long) for _ in range(2)]
        if state == "waiting":
            until(lambda: "Waiting for the group 'broken': 2 of 3." in messages(client, other) + messages(client, one))
        else:
            until(lambda: all(jobs_api.retrieve(job.id).step > 3 for job in (one, other)))
        if state == "paused":
            jobs_api.pause(other.id)
        jobs_api.cancel(one.id)
        failed = finish(client, other)
        assert failed.status == "failed"
        assert failed.error is not None
        assert failed.error.code == "GROUP_BROKEN"
        assert one.id in failed.error.message
        until(lambda: not any(worker.shards for worker in client.workers.list()))
        assert finish(client, submit(client)).status == "succeeded"


def test_one_that_fails_fails_the_others_by_name(whole: Cluster) -> None:
    with whole.client() as client:
        wild = {"max_steps": 5000, "learning_rate": 1e30, "warmup_ratio": 0.0}
        bad = submit(client, collaboration={"group": "wild", "size": 2}, hyperparameters=wild)
        good = submit(client, collaboration={"group": "wild", "size": 2}, hyperparameters={"max_steps": 5000})
        errors = {job.id: finish(client, job).error for job in (bad, good)}
        codes = {job: error.code for job, error in errors.items() if error is not None}
        blamed = next(job for job, code in codes.items() if code != "GROUP_BROKEN")
        (broken,) = codes.keys() - {blamed}
        assert blamed in errors[broken].message  # type: ignore[union-attr]
