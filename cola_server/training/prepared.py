"""What a job is made of once its files are read: data, sites, plan, and where its adapter starts."""

from collections.abc import Sequence

from cola_common.adapters import build
from cola_common.errors import ColaError, Reason
from cola_common.jobs import FileObject, Job
from cola_common.messages import OptimizerPlan
from cola_common.schedules import warmup_steps
from cola_server.jobs import Artefacts
from cola_server.model import BaseModel, Site
from cola_server.training import data
from cola_server.training.catalogue import Catalogue


class Prepared:
    """Reads and checks all that a job needs; `files` are its uploads. May wait for the numerics thread.

    Raises: `ColaError`.
    """

    def __init__(self, job: Job, files: Sequence[FileObject], catalogue: Catalogue, artefacts: Artefacts) -> None:
        spec, h = job.spec, job.spec.hyperparameters
        self.job = job.id
        self.spec = spec
        self.base: BaseModel = catalogue.model(spec.model)
        for record in files:
            artefacts.verify_file(record)
        read = artefacts.file_path
        self.training = data.read(read(spec.training_file), self.base.task, self.base.tokenizer, h.max_length)
        self.validation = (
            data.read(
                read(spec.validation_file),
                self.base.task,
                self.base.tokenizer,
                h.max_length,
                self.training.label_names,
            )
            if spec.validation_file is not None
            else None
        )
        labels = len(self.training.label_names) if self.training.label_names else None
        self.sites = catalogue.sites(spec, labels)
        self.without_target = self._without_target()
        self.batches = data.Batches(self.training, h.batch_size, spec.seed, h.shuffle)
        self.total_steps = data.total_steps(len(self.training.examples), h)
        self.total_batches = data.total_batches(len(self.training.examples), h)
        self.plan = OptimizerPlan(
            optimizer=h.optimizer,
            learning_rate=h.learning_rate,
            momentum=h.momentum,
            nesterov=h.nesterov,
            weight_decay=h.weight_decay,
            max_grad_norm=h.max_grad_norm,
            lr_scheduler_type=h.lr_scheduler_type,
            warmup_steps=warmup_steps(h.warmup_ratio, self.total_steps),
            total_steps=self.total_steps,
        )
        self.start = catalogue.start(spec, self.sites)

    def _without_target(self) -> int:
        """Examples whose targets were all cut off: they count as batches, and teach nothing.

        Raises: `ColaError(INVALID_JOB)` where no example has a target left.
        """
        if self.base.task != "causal-lm":
            return 0
        labels = [e.labels for e in self.training.examples if not isinstance(e.labels, int)]
        count = sum(all(label == data.NO_TARGET for label in of_example[1:]) for of_example in labels)
        if count == len(labels):
            length = self.spec.hyperparameters.max_length
            problem = f"every example's targets are cut off at {length} tokens; raise it"
            raise ColaError(Reason.INVALID_JOB, param="hyperparameters.max_length", problem=problem)
        return count

    @property
    def pad_id(self) -> int:
        """What fills padding; masks tell it apart, not this."""
        return int(self.base.tokenizer.pad_token_id)

    @property
    def max_positions(self) -> int | None:
        """The longest row that the model takes, where it says so."""
        return getattr(self.base.module.config, "max_position_embeddings", None)

    @property
    def state_bytes(self) -> int:
        """What a snapshot weighs: fp32 parameters and what the optimizer keeps of them."""
        copies = {"adamw": 2, "sgd": 1 if self.plan.momentum else 0}[self.plan.optimizer]
        return (1 + copies) * sum(self.parameter_bytes(site) for site in self.sites)

    @staticmethod
    def parameter_bytes(site: Site) -> int:
        """The fp32 bytes of a site's shard."""
        return build(site.family, site.d_in, site.d_out).cost(0).parameter_bytes
