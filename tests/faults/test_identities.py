"""Two workers with one identity, and clients that vanish: who is who after a fault."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.end_to_end.jobs import finish, until
from tests.support.outcome import ROWS, begin, outcome
from tests.support.troupe import Troupe

STEPS = 50


def test_of_two_workers_with_one_identity_the_newer_stays_and_the_older_is_told_why(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        job = begin(client, STEPS)
        owner = troupe.owner(client, job)
        shutil.copytree(troupe.cluster.root / owner, troupe.cluster.root / "copy")
        copy = troupe.cluster.start_worker("copy")
        older = troupe.daemons[owner]
        assert older.process.wait(20) == 1
        assert "another process attended as worker" in older.tail()
        assert troupe.outcome(client, job) == expected
        assert copy.process.poll() is None
        assert [worker.status for worker in client.workers.list()] == ["attending", "attending"]
        time.sleep(1)
        assert copy.process.poll() is None, "the two take turns"
        copy.kill()
        troupe.cluster.workers.remove(copy)
        shutil.rmtree(troupe.cluster.root / "copy")


SUBMIT = """
import sys, time
from cola_common.client import Client
address, rows, key = sys.argv[1:]
client = Client(address)
file = client.files.create(file=rows, purpose="fine-tune", idempotency_key=key + "-file")
job = client.fine_tuning.jobs.create(
    model="llama",
    training_file=file.id,
    adapter={"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]},
    hyperparameters={"max_steps": 50, "max_length": 32, "optimizer": "adamw", "learning_rate": 0.01},
    idempotency_key=key,
)
print(job.id, flush=True)
for event in client.fine_tuning.jobs.stream_events(job.id):
    pass
"""


def test_a_client_that_is_killed_finds_its_job_again_by_its_key(troupe: Troupe, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(ROWS)
    with troupe.cluster.client() as client:
        expected = troupe.undisturbed(client, STEPS)
        first = _submit(troupe, rows, "one")
        assert first.stdout is not None
        id = first.stdout.readline().strip()
        until(lambda: client.fine_tuning.jobs.retrieve(id).step > 5)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        again = _submit(troupe, rows, "one")
        assert again.stdout is not None and again.stdout.readline().strip() == id
        again.kill()
        again.communicate()
        jobs = [job for job in client.fine_tuning.jobs.list() if not job.status.terminal]
        assert [job.id for job in jobs] == [id], "the job goes on, and it is one"
        assert outcome(client, finish(client, jobs[0]), troupe.cluster.root / "adapters") == expected


def _submit(troupe: Troupe, rows: Path, key: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SUBMIT, troupe.cluster.address, str(rows), key]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
