"""What travels of a job: as it names it, or as the planner chooses; told, counted, refused where it is not valid."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cola_common.client import Client, ColaError
from cola_common.jobs import Job, StepMetrics
from cola_common.tensor import CODECS
from tests.end_to_end.jobs import finish, messages, submit, texts, until, weights
from tests.support.cluster import Cluster
from tests.support.outcome import begin, outcome
from tests.support.proxy import Proxy

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 2, "target_modules": "all-linear"},
    "linear": {"type": "linear", "target_modules": ["q_proj", "down_proj"]},
    "mlp": {"type": "mlp", "hidden_sizes": [5], "target_modules": ["q_proj", "down_proj"]},
}
MODES = [
    *itertools.product(["lora"], ["all", "exact", "sketch"], CODECS, ["fp32", "int8"]),
    *itertools.product(["linear"], ["sketch"], ["fp32", "int8"], ["bf16", "int4"]),
    *itertools.product(["mlp"], ["all"], ["fp16", "int4"], ["fp16", "int4"]),
]


@pytest.fixture(scope="module")
def client(split: Cluster) -> Iterator[Client]:
    with split.client() as client:
        yield client


@pytest.mark.parametrize(("family", "rows", "values", "deltas"), MODES, ids="-".join)
def test_both_sides_hold_the_same_bits_in_every_mode(
    family: str, rows: str, values: str, deltas: str, client: Client
) -> None:
    """A digest that did not match would end the epoch."""
    wire = {"rows": rows, "values": values, "deltas": deltas, "sketch_rows": 8}
    job = finish(client, submit(client, adapter=ADAPTERS[family], wire=wire))
    assert (job.status, job.epoch) == ("succeeded", 1), (job.error, messages(client, job))
    assert job.wire_plan is not None
    assert (job.wire_plan.rows, job.wire_plan.values, job.wire_plan.deltas) == (rows, values, deltas)
    for step in client.fine_tuning.jobs.metrics(job.id):
        assert 0 < step.sent_bytes <= step.raw_bytes
        assert 0 < step.received_bytes <= step.raw_delta_bytes
        assert step.sent_rows <= step.rows
        assert 0 < step.decode_seconds <= step.worker_seconds
        assert (step.reduce_seconds > 0) is (rows != "all")


def test_exact_rows_train_the_same_adapter_as_all_rows_in_fp32(client: Client, tmp_path: Path) -> None:
    named = {"values": "fp32", "deltas": "fp32"}
    jobs = [submit(client, adapter=ADAPTERS["lora"], wire={"rows": rows, **named}) for rows in ("all", "exact")]
    one, other = [weights(client, finish(client, job), tmp_path / job.id) for job in jobs]
    assert one == other


@pytest.mark.parametrize(("family", "rows"), [("lora", "exact"), ("linear", "all"), ("mlp", "all")])
def test_by_itself_a_job_loses_nothing_and_says_what_travels(family: str, rows: str, client: Client) -> None:
    job = finish(client, submit(client, adapter=ADAPTERS[family]))
    plan = job.wire_plan
    assert plan is not None and (plan.rows, plan.values, plan.deltas, plan.error) == (rows, "fp32", "fp32", 0.0)
    assert "nothing is lost" in plan.reason
    (told,) = [line for line in messages(client, job) if line.startswith("On the wire")]
    assert told == f"On the wire: {rows} rows in fp32, deltas in fp32: {plan.reason}."


@pytest.mark.parametrize(
    ("family", "rows", "because"),
    [("mlp", "exact", "mlp"), ("mlp", "sketch", "linear in x"), ("linear", "exact", "whole matrix")],
)
def test_a_reduction_that_is_not_valid_is_refused_before_there_is_a_job(
    family: str, rows: str, because: str, client: Client
) -> None:
    before = len(client.fine_tuning.jobs.list().data)
    with pytest.raises(ColaError) as refused:
        submit(client, adapter=ADAPTERS[family], wire={"rows": rows})
    assert refused.value.reason == "INVALID_JOB"
    assert "wire.rows" in str(refused.value) and because in str(refused.value)
    assert len(client.fine_tuning.jobs.list().data) == before


def test_an_estimate_tells_what_would_travel(client: Client) -> None:
    file = client.files.create(file=("rows.jsonl", texts(16)), purpose="fine-tune")
    fields: dict[str, Any] = {
        "model": "llama",
        "training_file": file.id,
        "adapter": ADAPTERS["lora"],
        "hyperparameters": {"max_steps": 2, "max_length": 32, "shuffle": False},
    }
    for wire in ("auto", {"rows": "exact", "values": "int8", "deltas": "bf16"}):
        estimate = client.fine_tuning.jobs.estimate(**fields, wire=wire)
        job = finish(client, client.fine_tuning.jobs.create(**fields, wire=wire))
        assert job.wire_plan is not None
        assert estimate.wire_plan.model_copy(update={"reason": job.wire_plan.reason}) == job.wire_plan
        step = client.fine_tuning.jobs.metrics(job.id)[0]
        assert (estimate.sent_bytes, estimate.received_bytes) == (step.sent_bytes, step.received_bytes)


# --- who knows less, and who is far away ------------------------------------------------------------------------------


def test_a_worker_that_knows_less_gets_what_it_knows(models: dict[str, Path], tmp_path: Path) -> None:
    with Cluster(tmp_path / "cluster", {"llama": models["llama"]}, workers=0) as cluster, cluster.client() as client:
        cluster.start_worker("plain", plain=True)
        cluster.await_workers(1)
        wires: dict[str, Any] = {
            "auto": "auto",
            "exact": {"rows": "exact", "values": "int4", "deltas": "fp32"},
            "rows": {"rows": "all", "values": "fp32", "deltas": "fp32"},
            "bf16": {"rows": "all", "values": "bf16", "deltas": "fp32"},
        }
        jobs = {name: submit(client, adapter=ADAPTERS["lora"], wire=wire) for name, wire in wires.items()}
        found = {name: weights(client, finish(client, job), tmp_path / name) for name, job in jobs.items()}
        assert found["auto"] == found["rows"], "nothing but rows in fp32 loses nothing there"
        assert found["exact"] == found["bf16"] != found["rows"], "of what it knows, the nearest that loses less"


@pytest.fixture
def distant(models: dict[str, Path], tmp_path: Path) -> Iterator[Client]:
    """Of a server whose one worker is behind a slow link."""
    with (
        Cluster(tmp_path / "cluster", {"llama": models["llama"]}, workers=0) as cluster,
        Proxy(cluster.address, rate=200_000.0) as proxy,
        cluster.client() as client,
    ):
        cluster.start_worker("far", via=proxy.address)
        cluster.await_workers(1)
        yield client


def test_a_slow_link_makes_jobs_lose_what_they_allow_and_no_more(distant: Client) -> None:
    def run(steps: int, wire: dict[str, float]) -> tuple[list[str], Job, StepMetrics]:
        job = submit(distant, adapter=ADAPTERS["linear"], hyperparameters={"max_steps": steps}, wire=wire)
        job = finish(distant, job)
        assert job.status == "succeeded", job.error
        metrics = distant.fine_tuning.jobs.metrics(job.id)
        assert [step.step for step in metrics] == list(range(1, steps + 1))
        return [line for line in messages(distant, job) if line.startswith("On the wire")], job, metrics[-1]

    told, first, _ = run(100, {"max_error": 0.2})  # nothing is known of the link when it begins
    assert told[0].startswith("On the wire: all rows in fp32, deltas in fp32")
    assert len(told) == first.epoch > 1, "it did not plan anew, or started again for something else"
    told, second, small = run(5, {"max_error": 0.2})
    assert len(told) == 1 and second.wire_plan is not None
    assert 0.0 < second.wire_plan.error <= 0.2 and "is expected" in second.wire_plan.reason
    _, strict, large = run(5, {})
    assert strict.wire_plan is not None and strict.wire_plan.error == 0.0
    assert small.sent_bytes + small.received_bytes < (large.sent_bytes + large.received_bytes) / 4


# --- what is lost is not lost to a fault ------------------------------------------------------------------------------

LOSSY = [{"rows": "exact", "values": "int8", "deltas": "int8"}, {"rows": "sketch", "values": "bf16", "deltas": "int4"}]


@pytest.mark.parametrize("wire", LOSSY, ids=lambda wire: wire["rows"])
def test_what_codecs_have_not_let_through_outlives_a_worker_and_a_server(
    wire: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    flags = ["--threads=1", "--snapshot-steps=5"]
    wire = {**wire, "sketch_rows": 8}
    with Cluster(tmp_path / "well", {"llama": models["llama"]}, flags=flags) as well, well.client() as client:
        expected = outcome(client, finish(client, begin(client, 60, wire=wire)), tmp_path / "adapters")
    with Cluster(tmp_path / "ill", {"llama": models["llama"]}, flags=flags) as ill, ill.client() as client:
        job = begin(client, 60, wire=wire)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step >= 12)
        ill.workers[0].kill()
        ill.start_worker("another")
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step >= 30)
        ill.server.kill()
        ill.start_server()
        assert outcome(client, finish(client, job), tmp_path / "adapters") == expected
        assert client.fine_tuning.jobs.retrieve(job.id).epoch >= 3
