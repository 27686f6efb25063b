"""Folding: the workers' deltas into the server's copy of an adapter, with the proof that both sides hold the same."""

from collections.abc import Mapping

from cola_common.errors import ColaError, Reason
from cola_common.messages import Delta, EncodedTensor
from cola_common.tensor import encoded_shape, nbytes
from cola_server.fleet import DeltaForm, WorkerBlamed
from cola_server.model import JobAdapter


def delta_form(shape: tuple[int, ...], codec: str) -> DeltaForm:
    """How a parameter of that shape comes."""
    shape = encoded_shape(shape, codec)
    return DeltaForm(codec, shape, nbytes(codec, shape))


def fold(adapter: JobAdapter, owners: Mapping[int, str], deltas: Mapping[str, Delta], step: int) -> dict[str, str]:
    """Returns: digests by worker, as `deltas` are; `owners` is the worker of each shard.

    Raises: `WorkerBlamed`; what was folded before it goes with the attempt.
    """
    digests = {}
    for worker, delta in deltas.items():
        try:
            _fold_one(adapter, delta)
            digests[worker] = adapter.digest([i for i, owner in owners.items() if owner == worker])
            if digests[worker] != delta.digest:
                raise ColaError(Reason.DIGEST_MISMATCH, job=delta.job, step=step + 1)
        except ColaError as error:
            raise WorkerBlamed(worker, step, error) from None
    return digests


def _fold_one(adapter: JobAdapter, delta: Delta) -> None:
    shards: dict[int, tuple[list[str], list[EncodedTensor]]] = {}
    for (index, name), tensor in zip(delta.names, delta.tensors, strict=True):
        names, tensors = shards.setdefault(index, ([], []))
        names.append(name)
        tensors.append(tensor)
    for index, (names, tensors) in shards.items():
        adapter.fold(index, names, tensors)
