"""What a user gets wrong is told at once and by name, and changes nothing: no file, no job, no harm to others."""

import zipfile
from io import BytesIO
from typing import Any

import pytest

from cola_common.errors import ColaError, Reason
from tests.end_to_end.jobs import finish, submit, texts
from tests.support.cluster import Cluster


def zipped(**members: bytes) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "purpose", "reason"),
    [
        ("rows.jsonl", b"\x80\x04\x95\x10\x00\x00\x00", "fine-tune", Reason.UNSAFE_FORMAT),
        ("model.pt", zipped(data__pkl=b"x"), "fine-tune", Reason.UNSAFE_FORMAT),
        ("rows.npz", zipped(arr_0_npy=b"x"), "adapter", None),
        ("../rows.jsonl", texts(2), "fine-tune", Reason.UNSAFE_NAME),
        ("a/b.jsonl", texts(2), "fine-tune", Reason.UNSAFE_NAME),
        ("a\0b", texts(2), "fine-tune", Reason.UNSAFE_NAME),
        ("rows.jsonl", b"", "fine-tune", None),
        ("adapter.zip", zipped(evil__adapter_config=b"{}"), "adapter", None),
    ],
)
def test_a_file_that_is_not_safe_is_refused(
    name: str, data: bytes, purpose: Any, reason: Reason | None, whole: Cluster
) -> None:
    with whole.client() as client:
        before = {file.id for file in client.files.list(limit=100)}
        with pytest.raises(ColaError) as refused:
            client.files.create(file=(name, data), purpose=purpose)
        assert refused.value.status == "INVALID_ARGUMENT"
        assert reason is None or refused.value.reason == reason
        assert {file.id for file in client.files.list(limit=100)} == before


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (texts(2) + b"\n{", 3),
        (b'{"text": "w1"}\n{"txet": "w2"}', 2),
        (b'{"text": "w1"}\n{"prompt": "w1", "completion": "w2"}', 2),
        (b'{"text": "\xff"}', 1),
        (b"[" * 100_000, 1),
        (b'{"text": 7}', 1),
    ],
)
def test_a_dataset_that_cannot_be_read_is_refused_with_its_line(rows: bytes, line: int, whole: Cluster) -> None:
    with whole.client() as client:
        jobs = {job.id for job in client.fine_tuning.jobs.list(limit=100)}
        with pytest.raises(ColaError) as refused:
            submit(client, rows=rows)
        assert refused.value.reason == Reason.INVALID_DATASET
        assert f"line {line}" in str(refused.value)
        assert {job.id for job in client.fine_tuning.jobs.list(limit=100)} == jobs


@pytest.mark.parametrize(
    ("fields", "reason", "told"),
    [
        ({"model": "lama"}, Reason.UNKNOWN_MODEL, "llama"),
        ({"adapter": {"target_modules": ["q_prj"]}}, Reason.UNKNOWN_TARGET, "q_proj"),
        ({"adapter": {"target_modules": "("}}, Reason.INVALID_JOB, "regular expression"),
        ({"adapter": {"r": 0}}, Reason.INVALID_JOB, "adapter.lora.r"),
        ({"adapter": {"r": 1000}}, Reason.RANK_TOO_LARGE, "r=1000"),
        ({"adapter": {"init_from": "ftckpt-" + "0" * 24}}, Reason.UNKNOWN_CHECKPOINT, "ftckpt-"),
        ({"hyperparameters": {"optimizer": "adamx"}}, Reason.INVALID_JOB, "adamw"),
        ({"hyperparameters": {"learning_rate": -1.0}}, Reason.INVALID_JOB, "learning_rate"),
        ({"hyperparameters": {"learning_rat": 1.0}}, Reason.INVALID_JOB, "learning_rate"),
        ({"hyperparameters": {"batch_size": 10**6}}, Reason.JOB_TOO_LARGE, "batch_size"),
        ({"hyperparameters": {"batch_size": 10**6}, "wire": {"rows": "all"}}, Reason.BATCH_TOO_LARGE, "batch_size"),
        ({"wire": {"values": "int1"}}, Reason.INVALID_JOB, "bf16"),
        ({"fold": "merged", "adapter": {"type": "mlp", "r": "auto"}}, Reason.INVALID_JOB, "r"),
        ({"fold": "merged", "adapter": {"type": "mlp"}}, Reason.NOT_MERGEABLE, "unmerged"),
        ({"validation_file": "file-" + "0" * 24}, Reason.UNKNOWN_FILE, "file-"),
        ({"seed": -1}, Reason.INVALID_JOB, "seed"),
    ],
)
def test_a_job_that_cannot_run_is_refused_when_it_is_created(
    fields: dict[str, Any], reason: Reason, told: str, whole: Cluster
) -> None:
    with whole.client() as client:
        jobs = {job.id for job in client.fine_tuning.jobs.list(limit=100)}
        with pytest.raises(ColaError) as refused:
            submit(client, **fields)
        assert refused.value.reason == reason, refused.value
        assert told in str(refused.value)
        assert {job.id for job in client.fine_tuning.jobs.list(limit=100)} == jobs


def test_a_job_that_makes_nan_fails_by_name_and_no_worker_is_blamed(whole: Cluster) -> None:
    with whole.client() as client:
        reckless = {"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 20}
        job = finish(client, submit(client, hyperparameters=reckless))
        assert job.status == "failed"
        assert job.error is not None and job.error.code in (Reason.NON_FINITE_LOSS, Reason.NON_FINITE_CAPTURE)
        assert "lower the learning rate" in job.error.message
        assert [worker.status for worker in client.workers.list()] == ["attending"]
        assert finish(client, submit(client)).status == "succeeded"
