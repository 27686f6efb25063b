"""The rules of what users ask for: which job may be made, and what cancel, pause and resume mean.

Statuses are committed first and then told to whoever runs the jobs, so that what a user was answered stays true after
a crash. Every call that changes something may be repeated: asking again for what has been done is no error.

Synchronous; any thread may call.
"""

import copy
import difflib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import structlog

from cola_common.errors import ColaError, Reason
from cola_common.jobs import (
    Checkpoint,
    Estimate,
    FileObject,
    Job,
    JobEvent,
    JobSpec,
    JobStatus,
    ModelCard,
    StepMetrics,
)
from cola_server.jobs import jsonl
from cola_server.jobs.artefacts import Artefacts
from cola_server.jobs.files import Limits, Upload
from cola_server.jobs.rows import sources_of
from cola_server.jobs.store import JobStore
from cola_server.tenants import Quotas

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Catalogue(Protocol):
    """The base models."""

    def cards(self) -> Sequence[ModelCard]:
        """All models."""

    def digest(self, model: str) -> str:
        """The digest of a model's weights. Raises: `ColaError(UNKNOWN_MODEL)`."""

    def check(self, spec: JobSpec) -> None:
        """Raises: `ColaError` if the spec's model cannot be adapted as it asks, or the job is too large."""

    def estimate(self, spec: JobSpec, examples: int, labels: Sequence[str]) -> Estimate:
        """What a job would take, on so many examples. Raises: as `check`, but for a job that is too large."""

    def write_merged(self, spec: JobSpec, adapter: Path, folder: Path) -> None:
        """Writes the model with the adapter of that folder in its weights. Raises: `ColaError(NOT_MERGEABLE)`."""


class Scheduler(Protocol):
    """Who runs jobs. Each is told after the job's status was committed."""

    def submit(self, job: Job) -> None:
        """The job is new, or was under way when the server stopped."""

    def cancel(self, job: Job) -> None:
        """The job is cancelled, and needs its snapshots no more."""

    def pause(self, job: Job) -> None:
        """The job is paused: no step begins."""

    def resume(self, job: Job) -> None:
        """The job is queued again."""

    def place(self, job: str) -> int | None:
        """The job's place among its tenant's that wait for their turn, from 1; None for one that does not wait."""


class JobService:
    """What clients can ask for; `of` is for those of one tenant."""

    def __init__(
        self,
        store: JobStore,
        artefacts: Artefacts,
        catalogue: Catalogue,
        scheduler: Scheduler,
        limits: Limits | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        """Removes artefacts without a record, which a crash between the two left, and snapshots of jobs that ended."""
        self._store = store
        self._artefacts = artefacts
        self._catalogue = catalogue
        self._scheduler = scheduler
        self._limits = limits or Limits()
        self._quotas = quotas or Quotas()
        self._steering = threading.Lock()  # what is committed last is also told last
        wanted = {record.id for record in store.artefacts()} | {job.id for job in store.unfinished()}
        for orphan in artefacts.ids() - wanted:
            artefacts.remove(orphan)

    def of(self, tenant: str) -> "JobService":
        """The same service as a tenant sees it: others' files, jobs and checkpoints are not there."""
        service = copy.copy(self)
        service._store = self._store.of(tenant)
        return service

    def recover(self) -> None:
        """Hands over all jobs that a stop of the server left unfinished, oldest first; paused ones stay paused, and so
        does a job whose base model is not what it began on. Artefacts that are not here are told by name.
        """
        jobs = self._store.unfinished()
        self._check_artefacts(jobs)
        for job in jobs:
            if job.status == JobStatus.PAUSED:
                continue
            if (error := _raised(self._check_base, job)) is not None:
                log.error("job is held", job=job.id, problem=error.message)
                event = f"Paused: {error.message}. Resume the job once that is put right."
                self._store.transition(job.id, JobStatus.PAUSED, event=event, level="error")
                continue
            if job.status == JobStatus.RUNNING:
                event = "The server was started again; the job goes on from its last snapshot."
                self._store.transition(job.id, JobStatus.QUEUED, event=event, level="warn")
            self._scheduler.submit(job)

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """As `JobStore.subscribe`."""
        return self._store.subscribe(callback)

    # --- jobs -------------------------------------------------------------------------------------------------------

    def create(self, spec: JobSpec, idempotency_key: str | None = None) -> Job:
        """A new job, or the one that this key made before. Nothing is made where anything is wrong with it.

        Reads the files once: takes seconds where they are large.

        Raises: `ColaError`: UNKNOWN_MODEL, UNKNOWN_FILE, UNKNOWN_CHECKPOINT, INVALID_JOB, INVALID_DATASET,
        QUOTA_EXCEEDED, and what the catalogue finds.
        """
        if idempotency_key is not None and (job := self._store.job_by_key(spec, idempotency_key)) is not None:
            return job
        self._check(spec)
        self._catalogue.check(spec)
        most = self._quotas.of(self._store.tenant).max_queued
        digest = self._catalogue.digest(spec.model)
        job = self._store.create_job(spec, idempotency_key, base_digest=digest, most=most)
        if job.status == JobStatus.VALIDATING_FILES:
            self._scheduler.submit(job)
        return job

    def estimate(self, spec: JobSpec) -> Estimate:
        """What such a job would take; makes nothing. Raises: as `create`, but for QUOTA_EXCEEDED and JOB_TOO_LARGE."""
        survey = self._check(spec)
        return self._catalogue.estimate(spec, survey.examples, [str(label) for label in survey.labels or ()])

    def retrieve(self, id: str) -> Job:
        """Raises: `ColaError(UNKNOWN_JOB)`."""
        return self._placed(self._store.job(id))

    def jobs(self, after: str | None = None, limit: int = 20) -> list[Job]:
        """As `JobStore.jobs`."""
        return [self._placed(job) for job in self._store.jobs(after, limit)]

    def cancel(self, id: str) -> Job:
        """Ends a job; a step under way is not waited for. Raises: `ColaError(UNKNOWN_JOB | ILLEGAL_TRANSITION)`."""
        return self._stop(id, JobStatus.CANCELLED, "Cancelled.", self._scheduler.cancel)

    def pause(self, id: str) -> Job:
        """Holds a job. Raises: `ColaError(UNKNOWN_JOB | ILLEGAL_TRANSITION)`."""
        return self._stop(id, JobStatus.PAUSED, "Paused.", self._scheduler.pause)

    def resume(self, id: str) -> Job:
        """Puts a paused job back into the queue.

        Raises: `ColaError`: UNKNOWN_JOB, ILLEGAL_TRANSITION, and UNKNOWN_MODEL or BASE_MODEL_CHANGED where its base
        model is not what it began on.
        """
        if (job := self._store.job(id)).status == JobStatus.PAUSED:
            self._check_base(job)
        with self._steering:
            try:
                job = self._store.transition(id, JobStatus.QUEUED, source=JobStatus.PAUSED, event="Resumed.")
            except ColaError:
                if (job := self._store.job(id)).status not in (JobStatus.QUEUED, JobStatus.RUNNING):
                    raise
                return job
            self._scheduler.resume(job)
        return job

    def events(self, job: str, after: int = 0, limit: int = 100) -> list[JobEvent]:
        """As `JobStore.events`."""
        return self._store.events(job, after, limit)

    def metrics(self, job: str, after_step: int = 0) -> list[StepMetrics]:
        """As `JobStore.metrics`."""
        return self._store.metrics(job, after_step)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoints(self, job: str, after: str | None = None, limit: int = 20) -> list[Checkpoint]:
        """As `JobStore.checkpoints`."""
        return self._store.checkpoints(job, after, limit)

    def checkpoint_files(self, id: str) -> list[tuple[str, Path]]:
        """A checkpoint's files: name within its folder, with slashes, and where it lies.

        Raises: `ColaError(UNKNOWN_CHECKPOINT)`; `ColaError(INVALID_FILE)` for weights that are not what was written.
        """
        return _files_in(self._artefacts.verify_checkpoint(self._store.checkpoint(id)))

    @contextmanager
    def merged_files(self, id: str) -> Iterator[list[tuple[str, Path]]]:
        """A checkpoint merged into its whole base model, as `checkpoint_files`; gone when the block ends.

        Raises: `ColaError`: UNKNOWN_CHECKPOINT, INVALID_FILE, NOT_MERGEABLE, and UNKNOWN_MODEL or BASE_MODEL_CHANGED
        where the base model is not what the adapter was made on.
        """
        checkpoint = self._store.checkpoint(id)
        job = self._store.job(checkpoint.job)
        self._check_base(job)
        adapter = self._artefacts.verify_checkpoint(checkpoint)
        with self._artefacts.scratch() as folder:
            self._catalogue.write_merged(job.spec, adapter, folder)
            yield _files_in(folder)

    # --- files ------------------------------------------------------------------------------------------------------

    def upload(self, filename: str, purpose: str, idempotency_key: str | None = None) -> Upload:
        """A file to send: `with service.upload(…) as upload: upload.write(chunk) …; file = upload.finish()`.

        Raises: as `Upload`.
        """
        return Upload(self._store, self._artefacts, filename, purpose, idempotency_key, self._limits)

    def file(self, id: str) -> FileObject:
        """Raises: `ColaError(UNKNOWN_FILE)`."""
        return self._store.file(id)

    def files(self, after: str | None = None, limit: int = 20) -> list[FileObject]:
        """As `JobStore.files`."""
        return self._store.files(after, limit)

    def file_path(self, id: str) -> Path:
        """Where a file's bytes lie. Raises: `ColaError(UNKNOWN_FILE)`."""
        return self._artefacts.file_path(self._store.file(id).id)

    def delete_file(self, id: str) -> None:
        """Raises: `ColaError(UNKNOWN_FILE)`; `ColaError(FILE_IN_USE)` while a job needs it."""
        self._store.delete_file(id)
        self._artefacts.remove(id)

    def models(self) -> list[ModelCard]:
        """The base models."""
        return list(self._catalogue.cards())

    # ----------------------------------------------------------------------------------------------------------------

    def _placed(self, job: Job) -> Job:
        """With its place in the line, which is nowhere written down."""
        place = self._scheduler.place(job.id) if job.status == JobStatus.QUEUED else None
        return job if place is None else job.model_copy(update={"queue_place": place})

    def _stop(self, id: str, status: JobStatus, event: str, tell: Callable[[Job], None]) -> Job:
        with self._steering:
            try:
                job = self._store.transition(id, status, event=event)
            except ColaError:
                if (job := self._store.job(id)).status != status:
                    raise
                return job
            tell(job)
        return job

    def _check_artefacts(self, jobs: Sequence[Job]) -> None:
        """Tells of files and checkpoints that are not here as they were: the log, and the jobs that need them."""
        for record in self._store.artefacts():
            if (error := _raised(self._artefacts.check, record)) is not None:
                log.error("artefact is damaged", artefact=record.id, problem=error.message)
                for job in jobs:
                    if record.id in sources_of(job.spec):
                        self._store.add_event(job.id, error.message, level="error")

    def _check_base(self, job: Job) -> None:
        began, current = self._store.base_digest(job.id), self._catalogue.digest(job.spec.model)
        if began not in (None, current):
            raise ColaError(Reason.BASE_MODEL_CHANGED, job=job.id, model=job.spec.model, began=began, current=current)

    def _model(self, name: str) -> ModelCard:
        cards = {card.id: card for card in self._catalogue.cards()}
        if name not in cards:
            near = difflib.get_close_matches(name, cards, n=3) or sorted(cards)
            raise ColaError(Reason.UNKNOWN_MODEL, model=name, known=", ".join(near))
        return cards[name]

    def _check(self, spec: JobSpec) -> jsonl.Survey:
        """Everything about a spec but whether its model can be adapted so. Returns: what is in its training files."""
        task = self._model(spec.model).task
        survey = self._check_data(spec, task)
        if spec.collaboration is not None and task != "causal-lm":
            problem = "groups are for causal-lm: in a classification each job has a head of its own"
            raise ColaError(Reason.INVALID_JOB, param="collaboration", problem=problem)
        if spec.adapter.init_from is not None:
            self._check_source(spec.adapter.init_from)
        return survey

    def _check_data(self, spec: JobSpec, task: str) -> jsonl.Survey:
        training = self._dataset("training_file", spec.training_file)
        files = [training, *(self._dataset("joint_files", id) for id in spec.joint_files)]
        survey = jsonl.survey_all([(self.file_path(file.id), file.filename) for file in files], task)
        if survey.labels is not None and len(survey.labels) < 2:
            problem = f"all {survey.examples} lines have one label; there is nothing to tell apart"
            raise ColaError(Reason.INVALID_DATASET, file=training.filename, line=1, problem=problem)
        if spec.validation_file is not None:
            validation = self._dataset("validation_file", spec.validation_file)
            jsonl.survey(self.file_path(validation.id), validation.filename, task, survey.labels)
        return survey

    def _dataset(self, param: str, id: str) -> FileObject:
        file = self._store.file(id)
        if file.purpose != "fine-tune":
            problem = f"{id} was uploaded with purpose '{file.purpose}'; it takes one of 'fine-tune'"
            raise ColaError(Reason.INVALID_JOB, param=param, problem=problem)
        return file

    def _check_source(self, source: str) -> None:
        if source.startswith("ftckpt-"):
            self._store.checkpoint(source)
        elif self._store.file(source).purpose != "adapter":
            problem = f"{source} was uploaded with purpose 'fine-tune'; it takes one of 'adapter'"
            raise ColaError(Reason.INVALID_JOB, param="adapter.init_from", problem=problem)


def _raised(check: Callable[[T], None], of: T) -> ColaError | None:
    """What a check finds, to be told and not to be stopped by."""
    try:
        check(of)
    except ColaError as error:
        return error
    return None


def _files_in(folder: Path) -> list[tuple[str, Path]]:
    return [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file()]
