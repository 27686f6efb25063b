"""Jobs through the SDK: specs arrive as given, streams outlive broken connections, waiting ends with the job."""

import asyncio
import time

import pytest

from cola_common import ids
from cola_common.client import AsyncClient, ColaError, JobFailedError, Reason
from cola_common.client import connection as connection_module
from cola_common.client import jobs as jobs_module
from cola_common.jobs import JobSpec, JobStatus
from tests.support.fake_server import PAGE, running


@pytest.fixture
def served():
    with running() as server:
        yield server


@pytest.fixture
async def client(served):
    async with AsyncClient(served.address) as client:
        yield client


@pytest.fixture
def hasty(monkeypatch):
    """Pauses of milliseconds in place of seconds."""
    monkeypatch.setattr(jobs_module, "REOPEN_SECONDS", 0.01)
    monkeypatch.setattr(connection_module, "LAST_PAUSE_SECONDS", 0.05)


FILE = ids.new("file")


async def create(client, **fields):
    return await client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": FILE} | fields)


SPECS = [
    {},
    {"adapter": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}},
    {"adapter": {"type": "linear", "scale": 0.5, "target_modules": "all-linear"}, "fold": "merged"},
    {"adapter": {"type": "mlp", "hidden_sizes": [16, 8]}, "wire": {"values": "fp16"}},
    {"hyperparameters": {"n_epochs": "auto", "max_steps": 7, "optimizer": "sgd", "momentum": 0.9, "nesterov": True}},
    {"seed": 2**62, "suffix": "mine", "metadata": {"a": "b"}, "method": {"type": "supervised"}},
    {"validation_file": FILE, "adapter": {"type": "lora", "init_from": FILE}},
    {"joint_files": [FILE, ids.new("file")], "collaboration": {"group": "ours", "size": 3}},
    {"wire": "auto"},
    {"wire": {"rows": "sketch", "values": "int8", "deltas": "bf16", "sketch_rows": 32, "max_error": 0.1}},
]


@pytest.mark.parametrize("fields", SPECS)
async def test_a_spec_arrives_as_it_was_given_with_defaults_elsewhere(client, fields):
    job = await create(client, **fields)
    assert job.spec == JobSpec.parse({"model": "tiny", "training_file": FILE} | fields)
    assert job == await client.fine_tuning.jobs.retrieve(job.id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"hyperparameters": {"learning_rat": 1}}, "hyperparameters.learning_rat"),
        ({"adapter": {"type": "lora", "r": 0}}, "adapter.lora.r"),
        ({"fold": "half"}, "fold"),
        ({"wire": {"rows": "most"}}, "wire.rows"),
        ({"wire": {"delta": "int8"}}, "wire.delta"),
        ({"wire": "best"}, "wire"),
    ],
)
async def test_a_wrong_field_is_named_before_anything_is_sent(client, served, fields, param):
    with pytest.raises(ColaError) as caught:
        await create(client, **fields)
    assert (caught.value.reason, caught.value.details["param"]) == (Reason.INVALID_JOB, param)
    assert not served.state.calls


async def test_an_error_of_the_server_arrives_with_its_reason_and_details(client):
    with pytest.raises(ColaError) as caught:
        await create(client, model="large")
    assert caught.value.reason is Reason.UNKNOWN_MODEL
    assert caught.value.details == {"model": "large", "known": "tiny"}


async def test_a_create_whose_answer_is_lost_is_repeated_and_makes_one_job(client, served):
    served.state.faults["Jobs.Create"] = [Reason.UNAVAILABLE, Reason.SERVER_DRAINING]
    job = await create(client)
    assert list(served.state.jobs) == [job.id]
    assert served.state.calls["Jobs.Create"] == 3
    assert (await create(client)).id != job.id


async def test_a_folder_to_continue_from_is_uploaded_and_named_by_its_id(client, served, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    adapter = {"type": "lora", "r": 4, "init_from": tmp_path}
    job = await create(client, adapter=adapter)
    (file,) = served.state.files.values()
    assert job.spec.adapter.init_from == file.id
    assert file.purpose == "adapter"
    assert adapter["init_from"] is tmp_path  # the caller's own mapping is left alone


async def test_one_key_makes_one_job_with_one_upload(client, served, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    adapter = {"type": "lora", "init_from": tmp_path}
    made = [await create(client, adapter=adapter, idempotency_key=key) for key in ("a", "a", "b")]
    assert made[0] == made[1]
    assert list(served.state.jobs) == [made[0].id, made[2].id]
    assert len(served.state.files) == 2


async def test_a_folder_is_not_uploaded_for_a_spec_that_is_wrong(client, served, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ColaError) as caught:
        await create(client, adapter={"type": "lora", "r": -1, "init_from": str(tmp_path)})
    assert caught.value.reason is Reason.INVALID_JOB
    assert not served.state.files


async def test_what_is_neither_id_nor_folder_cannot_be_continued_from(client):
    with pytest.raises(ColaError, match="no folder on this machine") as caught:
        await create(client, adapter={"type": "lora", "init_from": "no/such/folder"})
    assert caught.value.reason is Reason.INVALID_ADAPTER


async def test_an_estimate_makes_no_job_and_keeps_no_adapter(client, served, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    for source in (None, tmp_path):
        fields = {"model": "tiny", "training_file": FILE, "adapter": {"type": "lora", "r": 4, "init_from": source}}
        assert await client.fine_tuning.jobs.estimate(**fields, seed=None) == served.state.estimate
    plain, from_folder = served.state.estimated
    assert plain == JobSpec.parse({**fields, "adapter": {"type": "lora", "r": 4}})
    assert from_folder.adapter.init_from is not None
    assert served.state.calls["Files.Create"] == served.state.calls["Files.Delete"] == 1
    assert not served.state.jobs
    assert not served.state.files


async def test_an_adapter_that_was_sent_for_an_estimate_goes_also_where_that_is_refused(client, served, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    served.state.faults["Jobs.Estimate"] = [Reason.UNAUTHENTICATED]
    with pytest.raises(ColaError):
        await client.fine_tuning.jobs.estimate(
            model="tiny", training_file=FILE, adapter={"type": "lora", "init_from": tmp_path}
        )
    assert not served.state.files


async def test_iterating_jobs_and_events_runs_over_all_pages(client, served):
    created = [(await create(client)).id for _ in range(2 * PAGE + 1)]
    assert [job.id async for job in await client.fine_tuning.jobs.list()] == created
    assert [job.id async for job in await client.fine_tuning.jobs.list(after=created[2], limit=2)] == created[3:]
    for _ in range(2 * PAGE):
        served.state.event(created[0], "hello")
    events = await client.fine_tuning.jobs.list_events(created[0])
    assert events.has_more
    assert [event.id async for event in events] == list(range(1, 2 * PAGE + 2))
    later = await client.fine_tuning.jobs.list_events(created[0], after=4, limit=1)
    assert [event.id async for event in later] == list(range(5, 2 * PAGE + 2))


async def test_a_job_is_steered_once_though_answers_are_lost(client, served):
    jobs = client.fine_tuning.jobs
    job = await create(client)
    for call, status in (
        ("pause", JobStatus.PAUSED),
        ("resume", JobStatus.QUEUED),
        ("pause", JobStatus.PAUSED),
        ("cancel", JobStatus.CANCELLED),
    ):
        served.state.faults[f"Jobs.{call.title()}"] = [Reason.UNAVAILABLE, Reason.SERVER_DRAINING]
        assert (await getattr(jobs, call)(job.id)).status is status
    told = [event.message.split()[-1] for event in served.state.events[job.id]]
    assert told == ["queued.", "paused.", "queued.", "paused.", "cancelled."]
    with pytest.raises(ColaError) as caught:
        await jobs.pause(job.id)
    assert caught.value.reason is Reason.ILLEGAL_TRANSITION


async def test_metrics_come_in_step_order_from_behind_a_step(client, served):
    job = await create(client)
    given = [served.state.step(job.id) for _ in range(5)]
    assert await client.fine_tuning.jobs.metrics(job.id) == given
    assert await client.fine_tuning.jobs.metrics(job.id, after_step=3) == given[3:]
    assert await client.fine_tuning.jobs.metrics(job.id, after_step=5) == []


# --- streams ---------------------------------------------------------------------------------------------------------


async def run(served, job, steps):
    served.state.become(job, JobStatus.RUNNING)
    for _ in range(steps):
        served.state.step(job)
        await asyncio.sleep(0.002)
    served.state.become(job, JobStatus.SUCCEEDED)


@pytest.mark.parametrize("breaks", [None, 1, 2, 7])
@pytest.mark.parametrize("after", [0, 3])
async def test_a_stream_gives_each_event_once_in_order_however_often_it_breaks(client, served, hasty, breaks, after):
    served.state.break_events_after = breaks
    job = await create(client)
    async with asyncio.TaskGroup() as group:
        group.create_task(run(served, job.id, 20))
        seen = [event async for event in client.fine_tuning.jobs.stream_events(job.id, after=after)]
    assert seen == served.state.events[job.id][after:]


async def test_a_stream_goes_on_after_the_server_restarted(client, served, hasty):
    job = await create(client)
    events = client.fine_tuning.jobs.stream_events(job.id)
    seen = [await anext(events)]
    rest = asyncio.ensure_future(anext(events))
    await asyncio.to_thread(served.stop)
    served.state.become(job.id, JobStatus.RUNNING)
    await asyncio.sleep(0.1)
    await asyncio.to_thread(served.start_again)
    served.state.become(job.id, JobStatus.SUCCEEDED)
    seen += [await rest, *[event async for event in events]]
    assert seen == served.state.events[job.id]


async def test_a_stream_gives_up_on_a_server_that_stays_away(client, served, hasty, monkeypatch):
    monkeypatch.setattr(jobs_module, "OUTAGE_SECONDS", 0.2)
    job = await create(client)
    events = client.fine_tuning.jobs.stream_events(job.id)
    await anext(events)
    await asyncio.to_thread(served.stop)
    with pytest.raises(ColaError) as caught:
        await anext(events)
    assert caught.value.reason is Reason.UNAVAILABLE
    await asyncio.to_thread(served.start_again)  # for the fixture to stop


async def test_a_stream_of_an_unknown_job_ends_with_its_reason(client):
    with pytest.raises(ColaError) as caught:
        await anext(client.fine_tuning.jobs.stream_events(ids.new("ftjob")))
    assert caught.value.reason is Reason.UNKNOWN_JOB


# --- waiting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("breaks", [None, 3])
async def test_waiting_returns_the_job_as_it_ended(client, served, hasty, breaks):
    served.state.break_events_after = breaks
    job = await create(client)
    async with asyncio.TaskGroup() as group:
        group.create_task(run(served, job.id, 10))
        ended = await client.fine_tuning.jobs.wait(job.id)
    assert (ended.status, ended.step) == (JobStatus.SUCCEEDED, 10)
    assert await client.fine_tuning.jobs.wait(job.id, raise_on_failure=True) == ended


async def test_waiting_for_a_failure_returns_it_or_raises_it(client, served):
    job = await create(client)
    served.state.fail(job.id)
    assert (await client.fine_tuning.jobs.wait(job.id)).status is JobStatus.FAILED
    with pytest.raises(JobFailedError, match="the loss of step 7 is not finite") as caught:
        await client.fine_tuning.jobs.wait(job.id, raise_on_failure=True)
    assert caught.value.job == served.state.jobs[job.id]


async def test_waiting_is_bounded_and_leaves_the_job_alone(client, served):
    job = await create(client)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=job.id):
        await client.fine_tuning.jobs.wait(job.id, timeout=0.1)
    assert time.monotonic() - began < 5
    assert served.state.jobs[job.id].status is JobStatus.QUEUED


# --- reaching a server -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "wrong"])
async def test_a_token_is_needed_for_every_call_and_the_right_one_opens_all(token):
    with running(token="secret") as served:
        async with AsyncClient(served.address, token=token) as client:
            calls = [
                client.models.list(),
                client.files.create(file=b"row", purpose="fine-tune"),
                client.fine_tuning.jobs.metrics(ids.new("ftjob")),
            ]
            for call in calls:
                with pytest.raises(ColaError) as caught:
                    await call
                assert caught.value.reason is Reason.UNAUTHENTICATED
        assert not served.state.calls
        async with AsyncClient(served.address, token="secret") as client:
            file = await client.files.create(file=b"row", purpose="fine-tune")
            job = await create(client, training_file=file.id)
            assert await client.fine_tuning.jobs.metrics(job.id) == []
            assert [worker.status async for worker in await client.workers.list()] == ["attending", "lost"]


async def test_plaintext_off_this_machine_must_be_asked_for():
    with pytest.raises(ColaError) as caught:
        AsyncClient("192.0.2.1:50051")
    assert caught.value.reason is Reason.INVALID_CONFIG
    async with AsyncClient("192.0.2.1:50051", insecure=True):
        pass
