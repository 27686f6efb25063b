"""The error tree and its one catalogue: reason -> gRPC status name -> text.

Everything that a user or a peer can be told has a `Reason` here. `cola_common.rpc.status` translates a
`ColaError` to a `google.rpc.Status` with `ErrorInfo` and back; nothing else does.
"""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a call, a job or a session was refused or failed."""

    INVALID_JOB = "INVALID_JOB"
    INVALID_DATASET = "INVALID_DATASET"
    INVALID_FILE = "INVALID_FILE"
    INVALID_ADAPTER = "INVALID_ADAPTER"
    UNSAFE_FORMAT = "UNSAFE_FORMAT"
    UNSAFE_NAME = "UNSAFE_NAME"
    FILE_TOO_LARGE = "FILE_TOO_LARGE"
    FILE_IN_USE = "FILE_IN_USE"
    UNKNOWN_MODEL = "UNKNOWN_MODEL"
    UNKNOWN_TARGET = "UNKNOWN_TARGET"
    UNKNOWN_FILE = "UNKNOWN_FILE"
    UNKNOWN_JOB = "UNKNOWN_JOB"
    UNKNOWN_CHECKPOINT = "UNKNOWN_CHECKPOINT"
    UNKNOWN_WORKER = "UNKNOWN_WORKER"
    RANK_TOO_LARGE = "RANK_TOO_LARGE"
    UNKNOWN_LAYOUT = "UNKNOWN_LAYOUT"
    TIED_WEIGHTS = "TIED_WEIGHTS"
    NOT_MERGEABLE = "NOT_MERGEABLE"
    BATCH_TOO_LARGE = "BATCH_TOO_LARGE"
    JOB_TOO_LARGE = "JOB_TOO_LARGE"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    GROUP_BROKEN = "GROUP_BROKEN"
    ILLEGAL_TRANSITION = "ILLEGAL_TRANSITION"
    NON_FINITE_LOSS = "NON_FINITE_LOSS"
    NON_FINITE_CAPTURE = "NON_FINITE_CAPTURE"
    NON_FINITE_GRADIENT = "NON_FINITE_GRADIENT"
    NON_FINITE_DELTA = "NON_FINITE_DELTA"
    DELTA_MISMATCH = "DELTA_MISMATCH"
    NOT_OWNER = "NOT_OWNER"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    STALE_EPOCH = "STALE_EPOCH"
    STATE_MISSING = "STATE_MISSING"
    BASE_MODEL_CHANGED = "BASE_MODEL_CHANGED"
    STORAGE_FULL = "STORAGE_FULL"
    PROTOCOL_VERSION = "PROTOCOL_VERSION"
    PROTOCOL_VIOLATION = "PROTOCOL_VIOLATION"
    UNSUPPORTED_CODEC = "UNSUPPORTED_CODEC"
    DUPLICATE_WORKER = "DUPLICATE_WORKER"
    WORKER_QUARANTINED = "WORKER_QUARANTINED"
    WORKER_LOST = "WORKER_LOST"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    INSECURE_LISTEN = "INSECURE_LISTEN"
    INVALID_CONFIG = "INVALID_CONFIG"
    SERVER_DRAINING = "SERVER_DRAINING"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue."""

    status: str  # name of a grpc.StatusCode
    text: str  # str.format template; its fields are the error's details


CATALOGUE: dict[Reason, Entry] = {
    Reason.INVALID_JOB: Entry("INVALID_ARGUMENT", "{param}: {problem}"),
    Reason.INVALID_DATASET: Entry("INVALID_ARGUMENT", "{file}, line {line}: {problem}"),
    Reason.INVALID_FILE: Entry("INVALID_ARGUMENT", "{file}: {problem}"),
    Reason.INVALID_ADAPTER: Entry("INVALID_ARGUMENT", "{source} cannot be continued from: {problem}"),
    Reason.UNSAFE_FORMAT: Entry(
        "INVALID_ARGUMENT", "{file} is a {format}, which is never opened; send JSONL or a safetensors adapter"
    ),
    Reason.UNSAFE_NAME: Entry("INVALID_ARGUMENT", "{name!r} is no plain file name; send a name without folders"),
    Reason.FILE_TOO_LARGE: Entry("RESOURCE_EXHAUSTED", "{file} is larger than the limit of {limit} bytes"),
    Reason.FILE_IN_USE: Entry("FAILED_PRECONDITION", "{file} is used by job {job}; cancel the job first"),
    Reason.UNKNOWN_MODEL: Entry("NOT_FOUND", "no model {model!r} here; there is {known}"),
    Reason.UNKNOWN_TARGET: Entry(
        "INVALID_ARGUMENT", "target {target!r} matches no module that can be adapted; nearest: {nearest}"
    ),
    Reason.UNKNOWN_FILE: Entry("NOT_FOUND", "no file {file!r}"),
    Reason.UNKNOWN_JOB: Entry("NOT_FOUND", "no job {job!r}"),
    Reason.UNKNOWN_CHECKPOINT: Entry("NOT_FOUND", "no checkpoint {checkpoint!r}"),
    Reason.UNKNOWN_WORKER: Entry("NOT_FOUND", "no worker {worker!r} attends"),
    Reason.RANK_TOO_LARGE: Entry(
        "INVALID_ARGUMENT", "r={r} is larger than site {site} allows ({d_in} in, {d_out} out)"
    ),
    Reason.UNKNOWN_LAYOUT: Entry("INVALID_ARGUMENT", "site {site} has inputs of a layout that is not known: {problem}"),
    Reason.TIED_WEIGHTS: Entry(
        "INVALID_ARGUMENT", "site {site} shares its weight with {other}; it cannot be merged, use fold='unmerged'"
    ),
    Reason.NOT_MERGEABLE: Entry(
        "INVALID_ARGUMENT", "{family} adapters are not linear in x and cannot be merged, use fold='unmerged'"
    ),
    Reason.BATCH_TOO_LARGE: Entry(
        "RESOURCE_EXHAUSTED",
        "a batch of this job is {bytes} bytes on the wire, the limit is {limit}; lower batch_size or max_length",
    ),
    Reason.JOB_TOO_LARGE: Entry(
        "RESOURCE_EXHAUSTED",
        "this job needs {bytes} bytes of the server's memory, and all of it is {limit}; "
        "lower batch_size or max_length, or take a smaller adapter",
    ),
    Reason.QUOTA_EXCEEDED: Entry(
        "RESOURCE_EXHAUSTED",
        "tenant {tenant} has {limit} unfinished jobs, as many as it may have; wait until one ends, or cancel one",
    ),
    Reason.GROUP_BROKEN: Entry(
        "FAILED_PRECONDITION", "the group {group!r} is broken: its member {job} {status}; create its jobs again"
    ),
    Reason.ILLEGAL_TRANSITION: Entry("FAILED_PRECONDITION", "job {job} is {status} and cannot become {wanted}"),
    Reason.NON_FINITE_LOSS: Entry(
        "FAILED_PRECONDITION", "the loss of step {step} is not finite; lower the learning rate"
    ),
    Reason.NON_FINITE_CAPTURE: Entry(
        "FAILED_PRECONDITION",
        "{tensor} at site {site} is not finite in step {step}; lower the learning rate, or send wider values",
    ),
    Reason.NON_FINITE_GRADIENT: Entry(
        "FAILED_PRECONDITION", "the gradient of site {site} is not finite in step {step}"
    ),
    Reason.NON_FINITE_DELTA: Entry("INVALID_ARGUMENT", "the delta of site {site} is not finite in step {step}"),
    Reason.DELTA_MISMATCH: Entry("INVALID_ARGUMENT", "the delta of step {step} is not what was assigned: {problem}"),
    Reason.NOT_OWNER: Entry("PERMISSION_DENIED", "worker {worker} does not own shard {site} of job {job}"),
    Reason.CHECKSUM_MISMATCH: Entry("DATA_LOSS", "the bytes of {what} do not match their checksum"),
    Reason.DIGEST_MISMATCH: Entry(
        "DATA_LOSS", "server and worker hold different parameters of job {job} after step {step}"
    ),
    Reason.STALE_EPOCH: Entry("FAILED_PRECONDITION", "epoch {epoch} of job {job} is over; it is at epoch {current}"),
    Reason.STATE_MISSING: Entry(
        "FAILED_PRECONDITION", "the state of shard {site} of job {job} at step {step} is not here"
    ),
    Reason.BASE_MODEL_CHANGED: Entry(
        "FAILED_PRECONDITION",
        "model {model!r} is another one now: job {job} began on {began}, here is {current}; "
        "start the server with the model that the job began on",
    ),
    Reason.STORAGE_FULL: Entry("RESOURCE_EXHAUSTED", "{file}: no space left; make room, then resume the job"),
    Reason.PROTOCOL_VERSION: Entry(
        "FAILED_PRECONDITION", "peer speaks protocol {theirs}, this side {ours}; upgrade the older one"
    ),
    Reason.PROTOCOL_VIOLATION: Entry("INVALID_ARGUMENT", "the peer broke the protocol: {problem}"),
    Reason.UNSUPPORTED_CODEC: Entry("INVALID_ARGUMENT", "codec {codec!r} is not known here; there is {known}"),
    Reason.DUPLICATE_WORKER: Entry(
        "ABORTED",
        "another process attended as worker {worker} after this one; give each worker a data folder of its own",
    ),
    Reason.WORKER_QUARANTINED: Entry(
        "PERMISSION_DENIED", "worker {worker} sent a bad delta that another worker did not reproduce: {problem}"
    ),
    Reason.WORKER_LOST: Entry("UNAVAILABLE", "worker {worker} is gone: {problem}"),
    Reason.UNAUTHENTICATED: Entry("UNAUTHENTICATED", "a valid token is needed; pass token=… or --token-file"),
    Reason.PERMISSION_DENIED: Entry("PERMISSION_DENIED", "this token may not call {method}"),
    Reason.INSECURE_LISTEN: Entry(
        "FAILED_PRECONDITION",
        "{address} is not loopback: give --tls-cert, --tls-key and --token-file, or ask for --insecure",
    ),
    Reason.INVALID_CONFIG: Entry("INVALID_ARGUMENT", "{setting}: {problem}"),
    Reason.SERVER_DRAINING: Entry("UNAVAILABLE", "the server is shutting down; try again soon"),
    Reason.UNAVAILABLE: Entry("UNAVAILABLE", "{address} cannot be reached: {problem}"),
    Reason.INTERNAL: Entry("INTERNAL", "{problem}"),
}


class ColaError(Exception):
    """An error with a place in the catalogue.

    `details` fill the catalogue's text and travel as `ErrorInfo.metadata`; a field that the text needs and the
    details lack is a bug and raises `KeyError` here.
    """

    def __init__(self, reason: Reason, **details: object) -> None:
        self.reason = reason
        self.details: dict[str, str] = {key: str(value) for key, value in details.items()}
        self.message = CATALOGUE[reason].text.format(**details)
        super().__init__(self.message)

    @classmethod
    def told(cls, reason: Reason, message: str) -> "ColaError":
        """An error in the words of the peer that raised it, where its details did not travel."""
        error = cls.__new__(cls)
        Exception.__init__(error, message)
        error.reason, error.details, error.message = reason, {}, message
        return error

    @property
    def status(self) -> str:
        """The name of the gRPC status that this error travels under."""
        return CATALOGUE[self.reason].status
