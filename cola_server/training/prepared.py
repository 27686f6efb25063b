"""What a job is made of once its files are read: data, sites, plan, and where its adapter starts."""

from collections.abc import Mapping, Sequence

from cola_common.adapters import Parameters
from cola_common.errors import ColaError, Reason
from cola_common.jobs import FileObject, Job
from cola_common.messages import OptimizerPlan
from cola_common.schedules import warmup_steps
from cola_server.jobs import Artefacts
from cola_server.model import BaseModel
from cola_server.training import data
from cola_server.training.catalogue import Catalogue
from cola_server.training.estimate import state_bytes
from cola_server.training.examples import Example


class Prepared:
    """Reads and checks all that a job needs; `files` are its uploads. May wait for the numerics thread.

    Raises: `ColaError`.
    """

    def __init__(self, job: Job, files: Sequence[FileObject], catalogue: Catalogue, artefacts: Artefacts) -> None:
        spec, h = job.spec, job.spec.hyperparameters
        self.job = job.id
        self.tenant = job.tenant
        self.spec = spec
        self.wire_plan = job.wire_plan
        """As chosen in an earlier epoch; None where there was none."""
        self.base: BaseModel = catalogue.model(spec.model)
        for record in files:
            artefacts.verify_file(record)
        read = artefacts.file_path
        self.training = data.read(
            read(spec.training_file),
            self.base.task,
            self.base.tokenizer,
            h.max_length,
            joint=[read(id) for id in spec.joint_files],
            folder=artefacts.tmp,
        )
        self.validation = (
            data.read(
                read(spec.validation_file),
                self.base.task,
                self.base.tokenizer,
                h.max_length,
                self.training.label_names,
                folder=artefacts.tmp,
            )
            if spec.validation_file is not None
            else None
        )
        labels = len(self.training.label_names) if self.training.label_names else None
        self.sites = catalogue.sites(spec, labels)
        self.need = catalogue.need(spec, self.sites)
        """The memory that admission counts."""
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
        self._catalogue = catalogue
        self.start()

    def start(self) -> Mapping[str, Parameters] | None:
        """Where the adapter starts, as `Catalogue.start`: read when it is needed, which is once as a rule."""
        return self._catalogue.start(self.spec, self.sites)

    def _without_target(self) -> int:
        """Examples whose targets were all cut off: they count as batches, and teach nothing.

        Raises: `ColaError(INVALID_JOB)` where no example has a target left.
        """
        if self.base.task != "causal-lm":
            return 0
        count = sum(
            all(label == data.NO_TARGET for label in example.labels[1:])
            for example in self.training.examples
            if not isinstance(example.labels, int)
        )
        if count == len(self.training.examples):
            length = self.spec.hyperparameters.max_length
            problem = f"every example's targets are cut off at {length} tokens; raise it"
            raise ColaError(Reason.INVALID_JOB, param="hyperparameters.max_length", problem=problem)
        return count

    def batch(self, number: int) -> list[Example]:
        """The examples of a batch, read from the disk."""
        return [self.training.examples[place] for place in self.batches.indices(number)]

    @property
    def pad_id(self) -> int:
        """What fills padding; masks tell it apart, not this."""
        return int(self.base.tokenizer.pad_token_id)

    @property
    def max_positions(self) -> int | None:
        """The longest row that the model takes, where it says so."""
        return getattr(self.base.module.config, "max_position_embeddings", None)

    @property
    def mean_batch(self) -> tuple[int, int]:
        """Tokens that are no padding, and examples."""
        examples, batches = self.training.examples, self.batches.per_epoch
        return round(examples.tokens / batches), len(examples) // batches

    @property
    def state_bytes(self) -> int:
        """What a snapshot weighs."""
        return state_bytes(self.sites, self.spec)
