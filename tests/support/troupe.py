"""A server and two workers for fault after fault: what one test broke is whole again for the next."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cola_common.client import Client
from cola_common.jobs import Job
from tests.end_to_end.jobs import finish, until
from tests.support.cluster import Cluster, Daemon
from tests.support.disk import SmallDisk
from tests.support.outcome import Outcome, begin, outcome
from tests.support.proxy import Proxy

FLAGS = ("--snapshot-steps=10", "--snapshot-ratio=0", "--split-jobs=1")
"""A snapshot every ten steps, and a job is on one worker. Leases are the default's."""


class Troupe:
    """A context manager. Workers go by name, and each reaches the server through a proxy of its own."""

    def __init__(
        self, root: Path, model: Path, names: tuple[str, ...] = ("a", "b"), *, disk: SmallDisk | None = None
    ) -> None:
        self.cluster = Cluster(root, {"llama": model}, workers=0, flags=FLAGS, disk=disk)
        self.proxies: dict[str, Proxy] = {}
        self.daemons: dict[str, Daemon] = {}
        self._names = names
        self._known: dict[str, Outcome] = {}

    def __enter__(self) -> Self:
        self.cluster.__enter__()
        self.proxies = {name: Proxy(self.cluster.address).__enter__() for name in self._names}
        self.mend()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cluster.__exit__(kind, error, trace)
        for proxy in self.proxies.values():
            proxy.__exit__(kind, error, trace)

    def mend(self) -> None:
        """Server and workers run, the network is well, and no job is left over."""
        self.mend_daemons()
        with self.cluster.client() as client:
            for job in client.fine_tuning.jobs.list():
                if not job.status.terminal:
                    client.fine_tuning.jobs.cancel(job.id)
        self.cluster.await_workers(len(self.proxies))

    def mend_daemons(self) -> None:
        """Starts what has ended, and nothing misbehaves; jobs go on."""
        if self.cluster.server.process.poll() is not None:
            self.cluster.start_server()
        for name, proxy in self.proxies.items():
            proxy.latency, proxy.rate = 0.0, None
            proxy.restore()
            self.cluster.misbehave(name, "")
            if name not in self.daemons or self.daemons[name].process.poll() is not None:
                self.start(name)

    def start(self, name: str) -> None:
        """Starts a worker, in place of one that has ended."""
        if name in self.daemons:
            self.cluster.workers.remove(self.daemons[name])
        self.daemons[name] = self.cluster.start_worker(name, via=self.proxies[name].address, faulty=True)

    def renew(self) -> None:
        """Workers of whose speed nothing is known, whatever tests before have made of it."""
        for name in self.proxies:
            self.kill(name)
        with self.cluster.client() as client:
            until(lambda: all(worker.status != "attending" for worker in client.workers.list()))
        for name in self.proxies:
            self.start(name)
        self.cluster.await_workers(len(self.proxies))

    def kill(self, name: str) -> None:
        """SIGKILL to a worker."""
        self.daemons[name].kill()

    def owner(self, client: Client, job: Job) -> str:
        """The name of the worker that has the shards of the one job that runs, once it has taken some steps."""
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).step > 15)
        (id,) = (worker.id for worker in client.workers.list() if worker.shards)
        return next(name for name in self.proxies if self.cluster.worker_id(name) == id)

    def other(self, name: str) -> str:
        """The name of the other one of two."""
        (other,) = self.proxies.keys() - {name}
        return other

    def undisturbed(self, client: Client, steps: int, **fields: Any) -> Outcome:
        """What `begin` with the same arguments gives where nothing fails; to be asked for while all is well."""
        key = repr((steps, fields))
        if key not in self._known:
            job = finish(client, begin(client, steps, **fields))
            self._known[key] = outcome(client, job, self.cluster.root / "adapters")
            assert job.epoch == 1, "the reference was disturbed"
        return self._known[key]

    def outcome(self, client: Client, job: Job) -> Outcome:
        """Waits for a job's end; see `tests.support.outcome`."""
        return outcome(client, finish(client, job), self.cluster.root / "adapters")
