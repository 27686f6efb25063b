"""A worker that becomes slow while it has a job: the job goes where it is done sooner, and to the same end."""

from tests.end_to_end.jobs import finish, until
from tests.support.outcome import begin
from tests.support.throttle import Throttle
from tests.support.troupe import Troupe

STEPS = 80
BF16 = {"values": "bf16"}
HEAVY = {"type": "mlp", "hidden_sizes": [1024], "target_modules": ["q_proj", "v_proj"]}  # for workers, that is


def test_a_job_leaves_a_worker_that_slows_down_and_ends_with_the_same_adapter(troupe: Troupe) -> None:
    with troupe.cluster.client() as client:
        for name in troupe.daemons:
            troupe.cluster.misbehave(name, "honest")
        # A busy machine may disturb this one, too; the outcome is the same whatever happens.
        reference = finish(client, begin(client, STEPS, adapter=HEAVY, wire=BF16))
        expected = troupe.outcome(client, reference)
        job = begin(client, STEPS, adapter=HEAVY, wire=BF16)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step > 10)

        def shares() -> dict[str, int]:
            return {worker.id: worker.shards for worker in client.workers.list()}

        before = shares()
        slow = max(troupe.daemons, key=lambda name: before[troupe.cluster.worker_id(name)])  # it has something to lose
        id = troupe.cluster.worker_id(slow)

        def less() -> bool:
            now = shares()
            return sum(now.values()) > 0 and now[id] < before[id]

        with Throttle(troupe.daemons[slow].process, 16):
            until(less, 50)
            assert not client.fine_tuning.jobs.retrieve(job.id).status.terminal
        assert troupe.outcome(client, job) == expected
        assert client.fine_tuning.jobs.retrieve(job.id).epoch >= 2
