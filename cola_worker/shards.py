"""What a worker keeps on disk: its shards' optimizer state as of a job's last snapshot, with the digest of the whole.

It is a cache: the server's snapshots hold the same, and what is kept here saves the way. A shard's parameters always
come with its `Assign`; the optimizer's state is taken up from here at the same step of the same state, and at no other.
"""

import hashlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cola_common import ids
from cola_common.errors import ColaError, Reason
from cola_common.messages import OwnedShard
from cola_common.tensor import digest
from cola_worker.shard import Shard

KEEP_SECONDS = 7 * 24 * 3600.0  # a job paused for longer starts its optimizer afresh: the disk must not fill for good
OFFERED = 10_000  # shards named in one Hello: at some 130 bytes each they stay well below a message's 4 MiB

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Kept:
    about: OwnedShard
    state: dict[str, torch.Tensor]


class Shards:
    """The files under `folder`: `<job>/<hash of the site>.safetensors`, each replaced as a whole.

    A damaged file is told of in the log and taken for absent.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._clean()

    def owned(self) -> tuple[OwnedShard, ...]:
        """What is kept, for `Hello`."""
        kept = (_read(path) for path in sorted(self._folder.glob("*/*.safetensors"))[:OFFERED])
        return tuple(k.about for k in kept if k is not None)

    def restore(self, job: str, step: int, shard: Shard, state: str) -> bool:
        """Gives a shard that was just assigned at `step` the optimizer state that makes its digest `state`.

        Returns: whether it was here.
        """
        path = self._path(job, shard.plan.site)
        kept = _read(path) if path.exists() else None
        if kept is None or kept.about != OwnedShard(job, shard.plan.site, step, state):
            return False
        shard.take_up(kept.state)
        return True

    def keep(self, job: str, step: int, shard: Shard) -> None:
        """Writes a shard's optimizer state after `step` steps, in place of an earlier one. Raises: `OSError`."""
        state = shard.optimizer_state()
        about = {
            "job": job,
            "site": shard.plan.site,
            "step": str(step),
            "digest": shard.state_digest(),
            "checksum": digest.state(state),
        }
        path = self._path(job, shard.plan.site)
        path.parent.mkdir(exist_ok=True)
        _replace(path, save(state, about))

    def drop(self, job: str) -> None:
        """Forgets a job."""
        shutil.rmtree(self._job_folder(job), ignore_errors=True)

    def _path(self, job: str, site: str) -> Path:
        # The site's hash: its name comes from a peer, and may be longer than a file's.
        return self._job_folder(job) / f"{hashlib.sha256(site.encode()).hexdigest()[:32]}.safetensors"

    def _job_folder(self, job: str) -> Path:
        if not ids.valid("ftjob", job):
            raise ColaError(Reason.PROTOCOL_VIOLATION, problem=f"{job!r} is no job id")
        return self._folder / job

    def _clean(self) -> None:
        oldest = time.time() - KEEP_SECONDS
        for job in list(self._folder.iterdir()):
            for path in list(job.iterdir()):
                if path.suffix != ".safetensors" or path.stat().st_mtime < oldest:  # half-written, or too old
                    path.unlink()
            if not any(job.iterdir()):
                job.rmdir()


def _read(path: Path) -> _Kept | None:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Cloned: what the file gives may be its mapped pages, and an optimizer writes in place.
            state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a mapping
        about = OwnedShard(metadata["job"], metadata["site"], int(metadata["step"]), metadata["digest"])
        if digest.state(state) != metadata["checksum"]:
            raise ValueError("the tensors do not match their checksum")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        log.warning("a shard's file is damaged and is not used", path=str(path), error=str(error))
        return None
    return _Kept(about, state)


def _replace(path: Path, data: bytes) -> None:
    """A file is the old one or the new one. It is not synced: one that a power cut damages fails its checksum."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(path)
