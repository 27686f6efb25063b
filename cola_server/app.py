"""How `cola-server` starts and stops.

Start: listen, then import torch and load the models while workers are let in and early calls wait, then go on with
unfinished jobs.
Stop: running jobs take a snapshot at their next step and keep their status; workers hear Goodbye; calls get a grace;
the numerics thread ends; store and artefacts close. A second signal ends the process.
"""

import asyncio
import importlib
import os
import signal
from pathlib import Path

import structlog

from cola_common.jobs import DEFAULT_TENANT
from cola_common.logs import configure
from cola_common.rpc.auth import CLIENT, OPERATOR, WORKER, Access, Holder
from cola_common.rpc.malloc import tune
from cola_server.config import ServerConfig, Tokens
from cola_server.fleet import Fleet, FleetLimits
from cola_server.rpc import Listener, Pending
from cola_server.training.numerics import Numerics

log = structlog.get_logger(__name__)

HEARTBEATS = 5  # in a lease: one that is late, or two, cost no worker its jobs
GRACE_SECONDS = 2.0  # for client calls under way: event streams never end by themselves


async def run(config: ServerConfig) -> None:
    """Serves until SIGINT or SIGTERM. Raises: `ColaError` where it cannot start."""
    configure(config.log_format)
    tune()
    stop = _stop_signal()
    fleet = Fleet(
        FleetLimits(
            lease_seconds=config.lease_seconds,
            heartbeat_seconds=config.lease_seconds / HEARTBEATS,
            window_bytes=config.window_bytes,
            buffer_bytes=config.buffer_bytes,
        )
    )
    tokens = config.tokens()
    quotas = config.quotas(tokens)
    access = _access(tokens)
    backend = Pending(access)
    numerics = Numerics()
    listener = Listener(fleet, backend, numerics.pulse, access=access, tls_cert=config.tls_cert, tls_key=config.tls_key)
    address = await listener.start(config.listen)
    log.info("listening", address=address)
    try:
        module = await asyncio.to_thread(importlib.import_module, "cola_server.core")
        core = module.Core(config, quotas, fleet, numerics)
        try:
            backend.set(await core.start())
            _publish(config.data_dir, address)
            log.info("serving", address=address, models=sorted(config.models))
            await stop.wait()
            log.info("stopping")
            await core.drain()
            fleet.close()
            await listener.stop(GRACE_SECONDS)
        finally:
            await core.close()
    finally:
        await listener.stop(0)
        numerics.close()
    log.info("stopped")


def _access(tokens: Tokens | None) -> Access:
    if tokens is None:
        return Access({})
    holders = {tokens.worker: Holder(WORKER)}
    for name, tenant in tokens.clients.items():
        holders[tenant.token] = Holder(OPERATOR if name == DEFAULT_TENANT else CLIENT, name)
    return Access(holders)


def _publish(data_dir: Path, address: str) -> None:
    """Tells who starts servers on port 0 where this one is; whoever reads the file reads all of it."""
    partial = data_dir / "address.partial"
    try:
        partial.write_text(address)
        partial.rename(data_dir / "address")
    except OSError as error:  # a full disk pauses jobs; it does not keep the server from telling them so
        log.warning("the address is not written down", file=str(data_dir / "address"), error=str(error))


def _stop_signal() -> asyncio.Event:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    return stop
