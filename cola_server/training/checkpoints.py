"""What a user downloads: the adapter at a step, in PEFT's format or the project's own, and merged as a full model."""

import time

from cola_common import failpoints, ids
from cola_common.adapters import peft_format
from cola_common.jobs import Checkpoint, Job, StepMetrics
from cola_server.model import JobAdapter
from cola_server.training.prepared import Prepared
from cola_server.training.services import Services


def write_checkpoint(
    services: Services, prepared: Prepared, job: str, adapter: JobAdapter, metrics: StepMetrics
) -> Checkpoint:
    """Writes the files, then the record that makes them visible."""
    shards = [
        peft_format.Shard(site.name, site.family, parameters)
        for site, parameters in zip(prepared.sites, adapter.state(), strict=True)
    ]
    id = ids.new("ftckpt")
    digest = services.artefacts.write_checkpoint(
        id,
        lambda folder: peft_format.export(
            folder,
            shards,
            base_model=prepared.base.path,
            task=prepared.base.task,
            head_name=prepared.base.head_name,
            fan_in_fan_out=any(site.kind == "conv1d" for site in prepared.sites),
        ),
    )
    losses = {"train_loss": metrics.train_loss}
    if metrics.valid_loss is not None:
        losses["valid_loss"] = metrics.valid_loss
    record = Checkpoint(
        id=id,
        job=job,
        step_number=metrics.step,
        created_at=time.time(),
        metrics=losses,
        digest=digest,
    )
    failpoints.hit("checkpoint.before_record")
    kept = services.store.add_checkpoint(record)
    failpoints.hit("checkpoint.after_record")
    if kept.id != id:  # the job came to this step before, under an earlier epoch
        services.artefacts.remove(id)
    return kept


def last_adapter(services: Services, job: Job) -> JobAdapter:
    """The adapter of a job that has succeeded. May wait for the numerics thread: not for that thread.

    Raises: `ColaError(INVALID_FILE)`.
    """
    (checkpoint,) = services.store.checkpoints(job.id, limit=1)
    imported = peft_format.load(services.artefacts.verify_checkpoint(checkpoint))
    sites = services.catalogue.sites(job.spec, None)
    device = services.catalogue.model(job.spec.model).device
    return JobAdapter.initial(sites, job.spec.seed, device, imported.parameters, source=checkpoint.id)
