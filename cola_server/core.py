"""The composition root: everything behind the listening socket. Importing it imports torch."""

import asyncio
import gc
from collections.abc import Mapping

import structlog
import torch
from transformers.utils import logging as transformers_logging

from cola_server.config import ServerConfig
from cola_server.fleet import Fleet
from cola_server.jobs import Artefacts, JobService, JobStore
from cola_server.model import BaseModel, load
from cola_server.model.footprint import token_bytes
from cola_server.tenants import Quotas
from cola_server.training.admission import COHORT_TOKENS, SHARE, Admission, free_bytes, share_out
from cola_server.training.cadence import SnapshotLimits
from cola_server.training.catalogue import Catalogue
from cola_server.training.cohorts import Cohorts
from cola_server.training.estimate import Room
from cola_server.training.numerics import Numerics
from cola_server.training.observed import Observed
from cola_server.training.queue import JobQueue
from cola_server.training.services import Services
from cola_server.training.shares import Shares

log = structlog.get_logger(__name__)


class Core:
    """Store, models and queue of one server."""

    def __init__(self, config: ServerConfig, quotas: Quotas, fleet: Fleet, numerics: Numerics) -> None:
        """Opens the data folder. Raises: `ColaError(INVALID_CONFIG)`."""
        self._config = config
        self._quotas = quotas
        self._fleet = fleet
        self._numerics = numerics
        self._artefacts = Artefacts(config.data_dir)
        self._store: JobStore | None = None
        self._queue: JobQueue | None = None

    async def start(self) -> JobService:
        """Loads the models and goes on with unfinished jobs. Raises: `ColaError`."""
        config = self._config
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        url = config.database_url or f"sqlite:///{config.data_dir.absolute() / 'cola.db'}"
        store = self._store = await asyncio.to_thread(JobStore, url, create=not self._artefacts.ids())
        if config.threads is not None:
            await self._numerics.run(torch.set_num_threads, config.threads)
        models = {}
        for name, path in config.models.items():
            models[name] = await self._numerics.run(
                load,
                name,
                path,
                dtype=config.dtype,
                device=config.device,
                task=config.task,
                gradient_checkpointing=config.gradient_checkpointing,
            )
            log.info("model loaded", model=name, task=models[name].task, device=str(models[name].device))
        room = await self._room(models)
        observed = Observed()
        catalogue = Catalogue(
            models,
            self._numerics,
            self._artefacts,
            buffer_bytes=config.buffer_bytes,
            window_bytes=config.window_bytes,
            room=room,
            observed=observed,
        )
        weights = {tenant: quota.weight for tenant, quota in self._quotas.named.items()}
        cohorts = Cohorts(self._numerics, Shares(weights), room.cohort_tokens)
        services = Services(
            store,
            self._artefacts,
            catalogue,
            self._fleet,
            self._numerics,
            cohorts,
            split=config.split_jobs,
            snapshots=SnapshotLimits(config.snapshot_steps, config.snapshot_seconds, config.snapshot_ratio),
            quotas=self._quotas,
            admission=Admission(room.job_bytes),
            observed=observed,
        )
        queue = self._queue = JobQueue(services)
        jobs = JobService(store, self._artefacts, catalogue, queue, quotas=self._quotas)
        await asyncio.to_thread(jobs.recover)
        gc.freeze()  # modules and models live as long as the process: the collector need not walk them at every step
        return jobs

    async def _room(self, models: Mapping[str, BaseModel]) -> Room:
        """Divides the memory that the loaded models have left."""
        config = self._config
        device = next(iter(models.values())).device
        memory = config.memory_bytes or int(SHARE * free_bytes(device))
        each = {name: await self._numerics.run(token_bytes, model) for name, model in models.items()}
        wanted = config.cohort_tokens or COHORT_TOKENS[device.type]
        tokens, job_bytes = share_out(memory, wanted, each.values())
        if tokens < wanted:
            log.warning("cohorts are smaller than asked for: memory is short", tokens=tokens, memory_bytes=memory)
        log.info("memory", job_bytes=job_bytes, pass_bytes=memory - job_bytes, token_bytes=each)
        return Room(job_bytes, tokens, each, device)

    async def drain(self) -> None:
        """Ends running jobs, at a snapshot where that is soon enough; they keep their status."""
        if self._queue is not None:
            await self._queue.drain()
            await self._queue.close()

    async def close(self) -> None:
        """Waits for the numerics thread, then closes what it writes to."""
        if self._queue is not None:
            await self._queue.close()
        await asyncio.to_thread(self._numerics.close)
        if self._store is not None:
            await asyncio.to_thread(self._store.close)
        self._artefacts.close()
