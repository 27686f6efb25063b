"""A job's snapshots: everything that it needs to go on exactly, after one step, in one file.

    <shard>.<parameter>            the server's own copy
    <shard>.<parameter>.<entry>    what its owner's optimizer keeps of it

All fp32. The metadata hold the step, the epoch, each shard's digest of both, and the base model's digest. A file is
there whole or not at all; one that does not match its digests is set aside and the generation before it is used.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cola_common.adapters import Parameters
from cola_common.errors import ColaError, Reason
from cola_common.tensor import digest
from cola_server.jobs import Artefacts
from cola_server.training.prepared import Prepared


@dataclass(frozen=True)
class Snapshot:
    """A job after `step` steps; parameters, optimizer state and digests in site order."""

    epoch: int
    step: int
    trained_tokens: int
    parameters: list[Parameters]
    optimizer: list[Parameters]
    digests: Sequence[str]
    """Of each shard's parameters and optimizer state together."""

    def let_go(self) -> None:
        """Drops the tensors: a job that has gone on from here needs to know no more than which step it was."""
        self.parameters.clear()
        self.optimizer.clear()


class Snapshots:
    """The snapshots of one job. Synchronous, for any thread."""

    def __init__(self, prepared: Prepared, artefacts: Artefacts) -> None:
        self._job = prepared.job
        self._model = prepared.base.name
        self._base = prepared.base.digest
        self._sites = [site.name for site in prepared.sites]
        self._artefacts = artefacts

    def newest(self) -> tuple[Snapshot | None, list[str]]:
        """The newest whole snapshot, if there is one, and the names of damaged ones, which were set aside.

        Raises: `ColaError(BASE_MODEL_CHANGED)`.
        """
        return self._first_whole(self._artefacts.snapshots(self._job))

    def steps(self) -> set[int]:
        """The steps that there are snapshots of, whole or not; 0 needs none."""
        return {0, *(_step(path) for path in self._artefacts.snapshots(self._job))}

    def at(self, step: int) -> tuple[Snapshot | None, list[str]]:
        """As `newest`, of the snapshots of that step alone."""
        return self._first_whole([path for path in self._artefacts.snapshots(self._job) if _step(path) == step])

    def rewind(self, step: int) -> None:
        """Removes the snapshots of later steps: the job goes on from this one."""
        for path in self._artefacts.snapshots(self._job):
            if _step(path) > step:
                self._artefacts.discard(path)

    def _first_whole(self, paths: Sequence[Path]) -> tuple[Snapshot | None, list[str]]:
        damaged: list[str] = []
        for path in paths:
            try:
                return self._read(path), damaged
            except (SafetensorError, OSError, LookupError, ValueError):
                self._artefacts.set_aside(path)
                damaged.append(path.name)
        return None, damaged

    def write(self, snapshot: Snapshot) -> None:
        """Writes a snapshot; of the earlier ones the newest stays. Raises: `ColaError(STORAGE_FULL)`."""
        about = json.dumps(
            {
                "job": self._job,
                "epoch": snapshot.epoch,
                "step": snapshot.step,
                "trained_tokens": snapshot.trained_tokens,
                "base": self._base,
                "sites": self._sites,
                "digests": snapshot.digests,
            }
        )
        tensors: dict[str, torch.Tensor] = {}
        for index, (parameters, optimizer) in enumerate(zip(snapshot.parameters, snapshot.optimizer, strict=True)):
            tensors |= {f"{index}.{name}": values for name, values in {**parameters, **optimizer}.items()}
        data = save(tensors, {"about": about, "checksum": digest.combine([about])})
        name = f"{snapshot.step:010d}-{snapshot.epoch:06d}.safetensors"
        self._artefacts.write_snapshot(self._job, name, data)

    def _read(self, path: Path) -> Snapshot:
        with safe_open(path, "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        if digest.combine([metadata["about"]]) != metadata["checksum"]:
            raise ValueError("its metadata are damaged")
        about = json.loads(metadata["about"])
        if about["job"] != self._job or about["sites"] != self._sites:
            raise ValueError("it is of another job")
        if about["base"] != self._base:
            raise ColaError(
                Reason.BASE_MODEL_CHANGED, job=self._job, model=self._model, began=about["base"], current=self._base
            )
        parameters: list[Parameters] = [{} for _ in self._sites]
        optimizer: list[Parameters] = [{} for _ in self._sites]
        for key, values in tensors.items():
            index, _, name = key.partition(".")
            (optimizer if "." in name else parameters)[int(index)][name] = values
        states = [digest.state({**p, **o}) for p, o in zip(parameters, optimizer, strict=True)]
        if states != about["digests"]:
            raise ValueError("its tensors do not match their digests")
        return Snapshot(about["epoch"], about["step"], about["trained_tokens"], parameters, optimizer, states)


def _step(path: Path) -> int:
    return int(path.name.partition("-")[0])
