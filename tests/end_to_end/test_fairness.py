"""Tenants share the model by weight, and nobody's flood keeps another's job from it."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cola_common.client import Client
from cola_common.jobs import Job, StepMetrics
from tests.end_to_end.jobs import finish, until
from tests.support.cluster import Cluster

WEIGHTS = {"one": 1, "two": 2, "four": 4}
WORKER = "worker-token-0123456789"
RUNNING = 8  # of each tenant: with fewer, one may have none that waits for the model when its turn comes
FLOOD, JOBS = 100, 200
BATCH, LENGTH = 16, 64  # a pass takes longer than what else a step is


def token(tenant: str) -> str:
    return f"token-of-tenant-{tenant}"


class Noted(Cluster):
    """Its server notes who is in each pass, and who asks for one when."""

    server_module = "tests.support.noting_server"

    def waits(self, job: str) -> list[int]:
        """The passes of others that began between each time that a job asked for one and its own."""
        passes = [line.split() for line in self.data.with_suffix(".passes").read_text().splitlines()]
        asks = [line.split() for line in self.data.with_suffix(".asks").read_text().splitlines()]
        own = [number for number, jobs in enumerate(passes) if job in jobs]
        return [at - int(begun) for at, (_, begun) in zip(own, (ask for ask in asks if ask[0] == job), strict=False)]


@pytest.fixture
def cluster(models: dict[str, Path], tmp_path: Path) -> Iterator[Noted]:
    tables = [
        f'[tenants.{tenant}]\ntoken = "{token(tenant)}"\nweight = {weight}\nmax_running = {RUNNING}\n'
        for tenant, weight in WEIGHTS.items()
    ]
    tables.append(f'[tenants.flood]\ntoken = "{token("flood")}"\nmax_running = {FLOOD}\n')
    (tmp_path / "tokens.toml").write_text(f'worker = "{WORKER}"\n' + "".join(tables))
    (tmp_path / "worker.token").write_text(WORKER)
    flags = [f"--token-file={tmp_path / 'tokens.toml'}", "--threads=1", f"--cohort-tokens={BATCH * LENGTH}"]
    with Noted(tmp_path, {"llama": models["llama"]}, workers=0, flags=flags) as cluster:
        yield cluster


def start_worker(cluster: Noted) -> None:
    cluster.start_worker("worker", [f"--token-file={cluster.root / 'worker.token'}", "--threads=1"])


def create(client: Client, count: int, **hyperparameters: int) -> list[Job]:
    rows = b"\n".join([b'{"text": "' + b" ".join([b"w1"] * LENGTH) + b'"}'] * BATCH)
    file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune").id
    return [
        client.fine_tuning.jobs.create(
            model="llama",
            training_file=file,
            adapter={"type": "lora", "r": 2, "target_modules": ["q_proj"]},
            hyperparameters={"max_length": LENGTH, "optimizer": "sgd", "batch_size": BATCH, **hyperparameters},
        )
        for _ in range(count)
    ]


def test_200_queued_jobs_of_three_tenants_get_model_time_by_weight(cluster: Noted) -> None:
    with ExitStack() as stack:
        clients = {tenant: stack.enter_context(Client(cluster.address, token=token(tenant))) for tenant in WEIGHTS}
        counts = {
            tenant: JOBS // len(WEIGHTS) + (number < JOBS % len(WEIGHTS)) for number, tenant in enumerate(WEIGHTS)
        }
        assert sum(counts.values()) == JOBS
        made = {tenant: create(clients[tenant], count, max_steps=4) for tenant, count in counts.items()}

        def place(tenant: str) -> int | None:
            """Of its last job."""
            return clients[tenant].fine_tuning.jobs.retrieve(made[tenant][-1].id).queue_place

        until(lambda: all(place(tenant) == counts[tenant] - RUNNING for tenant in WEIGHTS))
        start_worker(cluster)
        until(lambda: any(place(tenant) is None for tenant in WEIGHTS), seconds=50)
        done = {tenant: list(client.fine_tuning.jobs.list()) for tenant, client in clients.items()}
        metrics = {tenant: list(steps(clients[tenant], done[tenant])) for tenant in WEIGHTS}
    began = max(min(step.created_at for step in of) for of in metrics.values())
    # From there on one of them may have nothing to do now and then.
    ended = min(max(job.started_at or 0.0 for job in of if job.step) for of in done.values())
    had = {
        tenant: sum(step.model_seconds + step.encode_seconds for step in of if began <= step.created_at <= ended)
        for tenant, of in metrics.items()
    }
    per_weight = [had[tenant] / weight for tenant, weight in WEIGHTS.items()]
    assert max(per_weight) <= 1.1 * min(per_weight), had


def steps(client: Client, jobs: list[Job]) -> Iterator[StepMetrics]:
    for job in jobs:
        if job.step:
            yield from client.fine_tuning.jobs.metrics(job.id)


def test_a_flood_delays_anothers_first_step_by_one_cohort_at_most(cluster: Noted) -> None:
    with (
        Client(cluster.address, token=token("flood")) as flooding,
        Client(cluster.address, token=token("one")) as other,
    ):
        flood = create(flooding, FLOOD, max_steps=100_000)
        start_worker(cluster)
        until(lambda: all(job.step for job in flooding.fine_tuning.jobs.list()), seconds=50)
        waits = []
        for _ in range(5):
            (job,) = create(other, 1, max_steps=2)
            assert finish(other, job).status == "succeeded"
            waits.append(cluster.waits(job.id)[0])
        assert max(waits) <= 1
        floods = cluster.waits(flood[0].id)
        assert max(floods) > FLOOD / 10  # there was something to wait for
