"""The base models of a server, and whether a job's spec fits one of them."""

import difflib
import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from cola_common.adapters import Parameters, peft_format
from cola_common.errors import ColaError, Reason
from cola_common.jobs import Estimate, JobSpec, ModelCard, WirePlan
from cola_server.fleet import FASTEST, Load
from cola_server.jobs import Artefacts
from cola_server.model import BaseModel, JobAdapter, Site, export_merged, probe
from cola_server.training import data, planner
from cola_server.training.estimate import Bounds, Room, Sizes, heaviest_plan, parameter_bytes, sizes
from cola_server.training.numerics import Numerics
from cola_server.training.observed import Observed
from cola_server.training.traffic import capture_bytes, delta_bytes

SAMPLE = 256
"""Examples at the beginning of a file that tell how long its examples are."""


class Catalogue:
    """Models by name, with what the probe found of each (model, adapter, fold)."""

    def __init__(
        self,
        models: Mapping[str, BaseModel],
        numerics: Numerics,
        artefacts: Artefacts,
        *,
        buffer_bytes: int,
        window_bytes: int,
        room: Room,
        observed: Observed,
    ) -> None:
        self._models = models
        self._numerics = numerics
        self._artefacts = artefacts
        self._bounds = Bounds(buffer_bytes, window_bytes)
        self._room = room
        self._observed = observed
        self._sites: dict[tuple[str, str, str, int | None], tuple[Site, ...]] = {}
        self._lock = threading.Lock()

    def cards(self) -> list[ModelCard]:
        """What clients see of the models."""
        times = self._numerics.idle.times()
        return [
            ModelCard(
                id=name,
                task=m.task,
                dtype=str(m.dtype).removeprefix("torch."),
                device=str(m.device),
                parameters=m.parameters,
                busy_seconds=times.busy,
                waiting_seconds=times.waiting,
                jobless_seconds=times.jobless,
            )
            for name, m in self._models.items()
        ]

    def model(self, name: str) -> BaseModel:
        """Raises: `ColaError(UNKNOWN_MODEL)` with the names that there are, nearest first."""
        if name not in self._models:
            near = difflib.get_close_matches(name, self._models, n=3) or sorted(self._models)
            raise ColaError(Reason.UNKNOWN_MODEL, model=name, known=", ".join(near))
        return self._models[name]

    def digest(self, name: str) -> str:
        """The digest of a model's weights. Raises: `ColaError(UNKNOWN_MODEL)`."""
        return self.model(name).digest

    def sites(self, spec: JobSpec, labels: int | None) -> tuple[Site, ...]:
        """The sites that a job adapts. May wait for the numerics thread: not for the event loop, not for that thread.

        Raises: `ColaError` (UNKNOWN_MODEL, UNKNOWN_TARGET, RANK_TOO_LARGE, UNKNOWN_LAYOUT, TIED_WEIGHTS,
        NOT_MERGEABLE).
        """
        base = self.model(spec.model)
        key = (spec.model, spec.adapter.model_dump_json(exclude={"init_from"}), spec.fold, labels)
        with self._lock:
            if key not in self._sites:
                self._sites[key] = self._numerics.call(probe, base, spec.adapter, labels=labels, fold=spec.fold)
            return self._sites[key]

    def check(self, spec: JobSpec) -> None:
        """What can be known of a job before its data is read.

        Raises: as `sites` and `start`, and `ColaError` (INVALID_JOB, BATCH_TOO_LARGE, JOB_TOO_LARGE).
        """
        base = self.model(spec.model)
        labels = 2 if base.task == "sequence-classification" else None  # any count will do: the head is small
        sites = self.sites(spec, labels)
        self._check_wire(spec, sites)
        self.need(spec, sites)
        if spec.adapter.init_from is not None and base.task == "causal-lm":  # a head's labels are in the data
            start = self.start(spec, sites)
            JobAdapter.initial(sites, spec.seed, torch.device("cpu"), start, source=spec.adapter.init_from)

    def need(self, spec: JobSpec, sites: Sequence[Site]) -> int:
        """The memory that admission counts for a job.

        Raises: `ColaError(JOB_TOO_LARGE)` where it would not have that with no other job beside it.
        """
        need = self._sizes(spec, sites).server
        if need > self._room.job_bytes:
            raise ColaError(Reason.JOB_TOO_LARGE, bytes=need, limit=self._room.job_bytes)
        return need

    def estimate(self, spec: JobSpec, examples: int, labels: Sequence[str]) -> Estimate:
        """What such a job would take, on files with so many examples and these labels.

        Raises: as `check`, but for JOB_TOO_LARGE; `ColaError(INVALID_DATASET)`.
        """
        base, h = self.model(spec.model), spec.hyperparameters
        sites = self.sites(spec, len(labels) or None)
        self._check_wire(spec, sites)
        of_job = self._sizes(spec, sites)
        paths = [self._artefacts.file_path(id) for id in (spec.training_file, *spec.joint_files)]
        rows = data.read_one_by_one(paths, base.task, base.tokenizer, h.max_length, labels)
        sample = list(itertools.islice(rows, SAMPLE))
        batch = min(h.batch_size, examples)
        tokens = batch * sum(len(example.ids) for example in sample) / len(sample)
        padded = [data.padded_length(sample[i : i + batch]) for i in range(0, len(sample), batch)]
        batches, steps = data.total_batches(examples, h), data.total_steps(examples, h)
        passing = batches * batch * sum(padded) / len(padded)

        def sent_by(plan: WirePlan) -> int:
            return capture_bytes(sites, plan, tokens=round(tokens), examples=batch)

        plan = self._plan(spec, sites, passing / batches, sent_by)
        sent, received = sent_by(plan) * batches // steps, delta_bytes(sites, plan.deltas)
        return Estimate(
            examples=examples,
            total_steps=steps,
            trainable_parameters=parameter_bytes(sites) // 4,
            server_bytes=of_job.server,
            server_limit_bytes=self._room.job_bytes,
            adapter_bytes=of_job.adapter,
            capture_bytes=of_job.captures,
            pass_bytes=of_job.passing,
            worker_bytes=of_job.worker,
            snapshot_bytes=of_job.snapshot,
            sent_bytes=sent,
            received_bytes=received,
            seconds=self._observed.seconds(spec.model, passing, steps, sent + received),
            wire_plan=plan,
        )

    def _plan(
        self, spec: JobSpec, sites: Sequence[Site], tokens: float, sent_by: Callable[[WirePlan], int]
    ) -> WirePlan:
        """What would travel, with batches of so many padded tokens, to a worker as the last jobs have found one."""
        interval = spec.hyperparameters.adaptation_interval

        def load(plan: WirePlan) -> Load:
            return Load(nbytes=sent_by(plan) + delta_bytes(sites, plan.deltas) / interval)

        conditions = planner.Conditions(
            interval=interval,
            pass_seconds=self._observed.pass_seconds(spec.model, tokens),
            rate=self._observed.rate or FASTEST,
            speed=math.inf,
            sketching=planner.sketching(sites, self.model(spec.model).parameters),
        )
        return planner.choose(spec.wire, sites, load, conditions)

    def _sizes(self, spec: JobSpec, sites: Sequence[Site]) -> Sizes:
        return sizes(spec, sites, self._room, heaviest_plan(spec, sites), self._bounds)

    def _check_wire(self, spec: JobSpec, sites: Sequence[Site]) -> None:
        """Raises: `ColaError` (INVALID_JOB, BATCH_TOO_LARGE)."""
        planner.check(spec.wire, sites)
        problem = self._bounds.problem(spec, sites, heaviest_plan(spec, sites))
        if problem is not None:
            raise problem

    def write_merged(self, spec: JobSpec, adapter: Path, folder: Path) -> None:
        """Writes the whole model with the adapter of the folder `adapter` in its weights, as transformers reads it.

        Raises: `ColaError` (NOT_MERGEABLE, TIED_WEIGHTS).
        """
        imported = peft_format.load(adapter)
        labels = None if imported.head is None else len(imported.head.parameters["W"])
        sites = self.sites(spec.model_copy(update={"fold": "merged"}), labels)
        export_merged(self.model(spec.model), sites, imported.parameters, folder)

    def start(self, spec: JobSpec, sites: Sequence[Site]) -> Mapping[str, Parameters] | None:
        """Where the job's adapter starts, by site, if it continues from another.

        Raises: `ColaError` (UNKNOWN_FILE, UNKNOWN_CHECKPOINT, INVALID_ADAPTER).
        """
        source = spec.adapter.init_from
        if source is None:
            return None
        imported = peft_format.load(self._artefacts.adapter_path(source))
        if imported.family != sites[0].family:
            problem = f"it is {imported.family}, the job asks for {sites[0].family}"
            raise ColaError(Reason.INVALID_ADAPTER, source=source, problem=problem)
        return imported.parameters
