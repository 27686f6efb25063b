"""A job's life as its user drives it: events, cancel, pause, continue from an adapter, validation, a client gone."""

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cola_common.errors import ColaError, Reason
from tests.end_to_end.jobs import courses, finish, last_checkpoint, messages, submit, texts, until, weights
from tests.support.cluster import Cluster

LONG = {"max_steps": 2000, "lr_scheduler_type": "constant"}


def test_events_are_streamed_as_they_come_and_resume_after_an_id(whole: Cluster) -> None:
    with whole.client() as client:
        job = submit(client)
        events = list(client.fine_tuning.jobs.stream_events(job.id))
        assert [event.id for event in events] == list(range(events[0].id, events[-1].id + 1))
        assert events[-1].message == "The job has succeeded."
        steps = [event.data["step"] for event in events if event.type == "metrics"]
        assert steps == [1, 2, 3, 4]
        middle = events[len(events) // 2].id
        assert list(client.fine_tuning.jobs.stream_events(job.id, after=middle)) == [e for e in events if e.id > middle]


def test_a_client_that_goes_away_does_not_disturb_its_job(whole: Cluster) -> None:
    with whole.client() as client:
        job = submit(client, hyperparameters={"max_steps": 30})
        next(iter(client.fine_tuning.jobs.stream_events(job.id)))
    with whole.client() as another:
        assert finish(another, job).status == "succeeded"


def test_a_cancelled_job_ends_in_mid_step_and_lets_the_next_one_run(whole: Cluster) -> None:
    with whole.client() as client:
        job = submit(client, hyperparameters=LONG)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step > 2)
        began = time.monotonic()
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        assert finish(client, submit(client)).status == "succeeded"
        assert time.monotonic() - began < 10
        step = client.fine_tuning.jobs.retrieve(job.id).step
        time.sleep(0.3)
        assert client.fine_tuning.jobs.retrieve(job.id).step == step
        assert [worker.shards for worker in client.workers.list()] == [0]
        with pytest.raises(ColaError) as refused:
            client.fine_tuning.jobs.resume(job.id)
        assert refused.value.reason == Reason.ILLEGAL_TRANSITION


@pytest.mark.parametrize("fold", ["unmerged", "merged"])
def test_a_paused_job_lets_others_run_and_goes_on_as_if_nothing_had_been(
    fold: str, whole: Cluster, tmp_path: Path
) -> None:
    many = {"max_steps": 60, "optimizer": "adamw"}
    with whole.client() as client:
        steady = finish(client, submit(client, fold=fold, hyperparameters=many))
        job = submit(client, fold=fold, hyperparameters=many)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step > 2)
        client.fine_tuning.jobs.pause(job.id)
        assert finish(client, submit(client)).status == "succeeded"
        held = client.fine_tuning.jobs.retrieve(job.id)
        assert held.status == "paused" and 2 < held.step < 60
        client.fine_tuning.jobs.resume(job.id)
        done = finish(client, job)
        assert done.status == "succeeded" and done.epoch == 2
        before, after = courses(client, job)
        assert (after[0], after[-1]) == (before[-1] + 1, 60), "a pause repeats nothing"
        losses = [
            [metrics.train_loss for metrics in client.fine_tuning.jobs.metrics(each.id)] for each in (steady, job)
        ]
        assert losses[0] == losses[1]
        assert weights(client, job, tmp_path / "a") == weights(client, steady, tmp_path / "b")


def test_a_pause_that_is_taken_back_at_once_costs_no_step_and_leaves_the_job_running(whole: Cluster) -> None:
    with whole.client() as client:
        job = submit(client, hyperparameters={"max_steps": 150})
        for step in (5, 20, 40):
            until(lambda step=step: client.fine_tuning.jobs.retrieve(job.id).step > step)
            client.fine_tuning.jobs.pause(job.id)
            client.fine_tuning.jobs.resume(job.id)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running")
        assert finish(client, job).status == "succeeded"
        taken = courses(client, job)
        assert [step for steps in taken for step in steps] == list(range(1, 151))
        assert len(taken) == 4


@pytest.mark.parametrize("source", ["checkpoint", "folder"])
def test_a_job_continues_from_an_adapter(source: str, whole: Cluster, tmp_path: Path) -> None:
    with whole.client() as client:
        first = finish(client, submit(client, hyperparameters={"learning_rate": 0.05}))
        checkpoint = last_checkpoint(client, first)
        client.fine_tuning.jobs.checkpoints.download(checkpoint, tmp_path / "first")
        init = checkpoint if source == "checkpoint" else str(tmp_path / "first")
        still = submit(client, adapter={"init_from": init}, hyperparameters={"learning_rate": 0.0})
        assert finish(client, still).status == "succeeded"
        client.fine_tuning.jobs.checkpoints.download(last_checkpoint(client, still), tmp_path / "still")
        before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "still"))
        assert before.keys() == after.keys()
        assert all((before[key] == after[key]).all() for key in before)
        assert any(value.abs().sum() > 0 for key, value in after.items() if "lora_B" in key)
        with pytest.raises(ColaError) as refused:
            submit(client, adapter={"init_from": init, "r": 3})
        assert refused.value.reason == Reason.INVALID_ADAPTER


def test_the_validation_file_is_evaluated_at_each_epoch_and_at_the_end(whole: Cluster) -> None:
    with whole.client() as client:
        held_out = client.files.create(file=("held-out.jsonl", texts(6, seed=1)), purpose="fine-tune")
        job = submit(
            client,
            rows=texts(8),
            validation_file=held_out.id,
            hyperparameters={"max_steps": 5, "batch_size": 4, "learning_rate": 0.1},
        )
        assert finish(client, job).status == "succeeded"
        losses = [metrics.valid_loss for metrics in client.fine_tuning.jobs.metrics(job.id)]
        assert [loss is not None for loss in losses] == [False, True, False, True, True]
        steps = {c.step_number: c.metrics["valid_loss"] for c in client.fine_tuning.jobs.checkpoints.list(job.id)}
        assert steps == {2: losses[1], 4: losses[3], 5: losses[4]}


def test_the_log_says_what_happened(whole: Cluster) -> None:
    with whole.client() as client:
        job = finish(client, submit(client))
        said = messages(client, job)
        assert said[:2] == ["Files validated: 16 examples, 4 steps. Queued.", "Running."]
        assert said[2].startswith("On the wire: exact rows in fp32")
        assert said[3].startswith("Step 1/4: training loss=")


def test_targets_that_are_cut_off_are_told(whole: Cluster) -> None:
    long, short = ({"prompt": " ".join(["w1"] * n), "completion": " w2 w3"} for n in (60, 4))
    with whole.client() as client:
        some = submit(client, rows=json.dumps(long).encode() + b"\n" + json.dumps(short).encode())
        assert finish(client, some).status == "succeeded"
        assert "1 examples have no target left within max_length=32." in messages(client, some)
        none = finish(client, submit(client, rows=json.dumps(long).encode()))
        assert none.error is not None
        assert (none.error.code, none.error.param) == (Reason.INVALID_JOB, "hyperparameters.max_length")
