"""How `cola-worker` starts and stops.

Start: read the identity, measure the machine, connect. Stop, on SIGINT or SIGTERM: the server takes the jobs away and
says Goodbye, the trainer ends, what it holds is kept on disk. A second signal ends the process.
"""

import asyncio
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
import torch

from cola_common.logs import configure
from cola_common.messages import ToServer, ToWorker
from cola_common.rpc.channels import connect
from cola_common.rpc.duplex import Duplex
from cola_common.rpc.fleet import attend
from cola_common.rpc.malloc import tune
from cola_worker import capacity
from cola_worker.config import WorkerConfig
from cola_worker.identity import identity
from cola_worker.shards import Shards
from cola_worker.supervisor import Supervisor

log = structlog.get_logger(__name__)


async def run(config: WorkerConfig) -> None:
    """Attends until it is drained. Raises: `ColaError` where it cannot start, or is told not to come again."""
    boot = time.time_ns()
    configure(config.log_format)
    tune()
    token = config.token()
    threads = config.threads or capacity.available_cores()
    torch.set_num_threads(threads)

    @asynccontextmanager
    async def stream() -> AsyncIterator[Duplex[ToServer, ToWorker]]:
        # A channel of its own for each life: one that has failed would wait for gRPC's backoff on top of ours.
        channel = connect(config.server, root_certificates=config.root_certificates, insecure=config.insecure)
        async with channel:
            yield attend(channel, token=token)

    supervisor = Supervisor(
        stream,
        worker=identity(config.data_dir),
        boot=boot,
        capacity=capacity.measure(threads),
        shards=Shards(config.data_dir / "shards"),
    )
    _on_signals(supervisor.drain)
    gc.freeze()  # what is imported lives as long as the process: the collector need not walk it at every step
    log.info("starting", server=config.server, threads=threads)
    await supervisor.run()
    log.info("stopped")


def _on_signals(drain: Callable[[], None]) -> None:
    loop, asked = asyncio.get_running_loop(), False

    def on_signal() -> None:
        nonlocal asked
        if asked:
            os._exit(1)
        asked = True
        drain()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
