"""The synchronous client is the asynchronous one: the same methods, the same answers, from any thread."""

import asyncio
import inspect
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cola_common import ids
from cola_common.client import Client, ColaError, Reason, aio, sync
from cola_common.client.aio import AsyncFineTuning
from cola_common.client.background import BackgroundLoop
from cola_common.client.catalogue import AsyncModels, AsyncWorkers
from cola_common.client.checkpoints import AsyncCheckpoints
from cola_common.client.files import AsyncFiles
from cola_common.client.jobs import AsyncJobs
from cola_common.jobs import JobStatus
from tests.support.fake_server import running


@pytest.fixture
def served():
    with running() as server:
        yield server


TWINS = [
    (aio.AsyncClient, sync.Client),
    (AsyncFineTuning, sync.FineTuning),
    (AsyncFiles, sync.Files),
    (AsyncJobs, sync.Jobs),
    (AsyncCheckpoints, sync.Checkpoints),
    (AsyncModels, sync.Models),
    (AsyncWorkers, sync.Workers),
]


@pytest.mark.parametrize(("asynchronous", "synchronous"), TWINS)
def test_twins_have_the_same_methods_with_the_same_parameters(asynchronous, synchronous):
    def methods(kind):
        functions = inspect.getmembers(kind, inspect.isfunction)
        public = {name: function for name, function in functions if not name.startswith("_")}
        return {name: list(inspect.signature(f).parameters.values()) for name, f in public.items()}

    assert methods(asynchronous) == methods(synchronous)


def test_a_job_from_upload_to_adapter(served, tmp_path):
    with Client(served.address) as client:
        file = client.files.create(file=("train.jsonl", b"row\n"), purpose="fine-tune")
        assert client.files.content(file.id) == b"row\n"
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, adapter={"type": "lora", "r": 4})
        served.state.become(job.id, JobStatus.RUNNING)
        for _ in range(10):
            served.state.step(job.id)
        served.state.checkpoint(job.id, {"adapter_config.json": b"{}"})
        served.state.become(job.id, JobStatus.SUCCEEDED)
        assert list(client.fine_tuning.jobs.stream_events(job.id)) == served.state.events[job.id]
        assert list(client.fine_tuning.jobs.list_events(job.id)) == served.state.events[job.id]
        assert client.fine_tuning.jobs.wait(job.id).status is JobStatus.SUCCEEDED
        assert len(client.fine_tuning.jobs.metrics(job.id)) == 10
        (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
        folder = client.fine_tuning.jobs.checkpoints.download(checkpoint.id, tmp_path / "out")
        assert (folder / "adapter_config.json").read_bytes() == b"{}"
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert len(client.workers.list().data) == 2
        client.files.delete(file.id)
        assert list(client.files.list()) == []


def test_errors_arrive_as_the_asynchronous_client_raises_them(served):
    with Client(served.address) as client, pytest.raises(ColaError) as caught:
        client.fine_tuning.jobs.retrieve(ids.new("ftjob"))
    assert caught.value.reason is Reason.UNKNOWN_JOB


def test_many_threads_share_one_client(served):
    with Client(served.address) as client, ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda i: client.files.create(file=b"%d" % i, purpose="fine-tune"), range(40)))
        assert list(pool.map(lambda file: client.files.content(file.id), files)) == [b"%d" % i for i in range(40)]


def test_a_stream_that_is_left_early_ends_on_the_server_as_well(served):
    with Client(served.address) as client:
        job = client.fine_tuning.jobs.create(model="tiny", training_file=ids.new("file"))
        for event in client.fine_tuning.jobs.stream_events(job.id):
            assert event.id == 1
            break
        assert client.fine_tuning.jobs.retrieve(job.id).status is JobStatus.QUEUED


def test_a_closed_client_says_so_and_closes_twice(served):
    client = Client(served.address)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.models.list()


def test_a_call_that_waits_ends_when_the_client_is_closed(served):
    client = Client(served.address)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=ids.new("file"))
    caught = []

    def wait():
        try:
            client.fine_tuning.jobs.wait(job.id)
        except (RuntimeError, ColaError) as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not served.state.calls["Jobs.StreamEvents"]:
        time.sleep(0.005)
    client.close()
    waiting.join(10)
    assert not waiting.is_alive()
    assert len(caught) == 1


def test_an_interrupt_cancels_the_call(monkeypatch):
    loop = BackgroundLoop()
    state = []

    async def forever():
        try:
            await asyncio.Event().wait()
        finally:
            state.append("cancelled")

    def interrupted(_future):
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run(forever())
    monkeypatch.undo()
    assert state == ["cancelled"]

    loop.close()


def test_a_client_that_is_dropped_takes_its_thread_along(served):
    before = set(threading.enumerate())
    client = Client(served.address)
    client.models.list()
    (thread,) = (thread for thread in set(threading.enumerate()) - before if thread.name == "cola-client")
    del client
    thread.join(10)
    assert not thread.is_alive()


def test_a_client_that_cannot_be_made_leaves_no_thread():
    before = set(threading.enumerate())
    with pytest.raises(ColaError, match="HOST:PORT") as caught:
        Client("nonsense")
    assert caught.value.reason is Reason.INVALID_CONFIG
    assert set(threading.enumerate()) <= before


def test_a_script_that_never_closes_its_client_ends_quietly(served):
    script = f"from cola_common.client import Client; c = Client({served.address!r}); print(c.models.list().data[0].id)"
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "tiny\n", "")


@pytest.mark.parametrize("module", ["cola_common.client", "cola_common.client.cli"])
def test_importing_the_client_loads_none_of_the_heavy_libraries(module):
    heavy = ["torch", "transformers", "numpy", "safetensors", "peft", "matplotlib", "cola_server", "cola_worker"]
    script = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "[]\n"


def test_the_packages_face_is_what_users_import():
    import cola_common.client

    assert set(cola_common.client.__all__) == {
        "AsyncClient",
        "AsyncPage",
        "Client",
        "ColaError",
        "JobFailedError",
        "Page",
        "Reason",
    }
