"""The records that users see: domain <-> wire.

Field names are equal on both sides (`cola_common/jobs.py` and types.proto), so records convert by name, and the domain
type checks what comes from outside.
"""

from typing import Any, TypeVar

from google.protobuf.message import Message as WireMessage
from pydantic import BaseModel, ValidationError

from cola_common import jobs
from cola_common.errors import ColaError, Reason
from cola_common.wire import types_pb2

R = TypeVar("R", bound=BaseModel)


def _fields(message: WireMessage) -> dict[str, Any]:
    """A message's fields as plain values, without those that were not sent and without empty lists and maps.

    Not `json_format.MessageToDict`: that turns 64-bit integers into strings and refuses NaN.
    """
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            if value:
                values[field.name] = dict(value)
        elif field.is_repeated:
            if value:
                values[field.name] = tuple(value)
        elif not field.has_presence or message.HasField(field.name):
            values[field.name] = _fields(value) if field.message_type is not None else value
    return values


def _record(kind: type[R], values: dict[str, Any]) -> R:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ColaError(Reason.PROTOCOL_VIOLATION, problem=f"{kind.__name__}.{where}: {first['msg']}") from None


def _dump(record: BaseModel) -> dict[str, Any]:
    return record.model_dump(exclude={"object"})


def spec_to_wire(spec: jobs.JobSpec) -> types_pb2.JobSpec:
    """A spec, with its adapter's `type` as the wire's oneof.

    Raises: `ColaError(INVALID_JOB)` for a value that the wire cannot carry: an integer over 64 bits, a lone surrogate.
    """
    values = spec.model_dump()
    adapter = values["adapter"]
    kind, targets, init_from = adapter.pop("type"), adapter.pop("target_modules"), adapter.pop("init_from")
    targets_field = "target_pattern" if isinstance(targets, str) else "target_modules"
    values["adapter"] = {kind: adapter, targets_field: targets, "init_from": init_from}
    try:
        return types_pb2.JobSpec(**values)
    except ValueError as error:
        raise ColaError(Reason.INVALID_JOB, param="job", problem=error) from None


def spec_from_wire(spec: types_pb2.JobSpec) -> jobs.JobSpec:
    """A spec; fields that were not sent take their defaults.

    Raises: `ColaError(INVALID_JOB)` that names the first wrong field.
    """
    values = _fields(spec)
    if "adapter" in values:
        kind = spec.adapter.WhichOneof("type") or jobs.LoraAdapter().type
        adapter = {**values["adapter"].pop(kind, {}), **values["adapter"], "type": kind}
        pattern = adapter.pop("target_pattern", None)
        if pattern is not None and "target_modules" in adapter:
            raise ColaError(
                Reason.INVALID_JOB, param="adapter.target_modules", problem="send a list or a pattern, not both"
            )
        if pattern is not None:
            adapter["target_modules"] = pattern
        values["adapter"] = adapter
    return jobs.JobSpec.parse(values)


def job_to_wire(job: jobs.Job) -> types_pb2.Job:
    """A job as its user sees it."""
    return types_pb2.Job(**{**_dump(job), "spec": spec_to_wire(job.spec)})


def job_from_wire(job: types_pb2.Job) -> jobs.Job:
    """A job as its user sees it. Raises: `ColaError(PROTOCOL_VIOLATION)` for a wrong field."""
    return _record(jobs.Job, {**_fields(job), "spec": spec_from_wire(job.spec)})


def estimate_to_wire(estimate: jobs.Estimate) -> types_pb2.Estimate:
    """What a job would take."""
    return types_pb2.Estimate(**_dump(estimate))


def estimate_from_wire(estimate: types_pb2.Estimate) -> jobs.Estimate:
    """What a job would take. Raises: `ColaError(PROTOCOL_VIOLATION)` for a wrong field."""
    return _record(jobs.Estimate, {"seconds": None, **_fields(estimate)})


def event_to_wire(event: jobs.JobEvent) -> types_pb2.JobEvent:
    """One line of a job's log."""
    data = {
        key: types_pb2.EventDatum(text=value) if isinstance(value, str) else types_pb2.EventDatum(number=value)
        for key, value in event.data.items()
    }
    return types_pb2.JobEvent(**{**_dump(event), "data": data})


def event_from_wire(event: types_pb2.JobEvent) -> jobs.JobEvent:
    """One line of a job's log. Raises: `ColaError(PROTOCOL_VIOLATION)` for a wrong field."""
    data = {
        key: datum.text if datum.WhichOneof("value") == "text" else datum.number for key, datum in event.data.items()
    }
    return _record(jobs.JobEvent, {**_fields(event), "data": data})


def metrics_to_wire(metrics: jobs.StepMetrics) -> types_pb2.StepMetrics:
    """What one step cost and gave."""
    return types_pb2.StepMetrics(**_dump(metrics))


def metrics_from_wire(metrics: types_pb2.StepMetrics) -> jobs.StepMetrics:
    """What one step cost and gave. Raises: `ColaError(PROTOCOL_VIOLATION)` for a wrong field."""
    return _record(jobs.StepMetrics, _fields(metrics))


def file_to_wire(file: jobs.FileObject) -> types_pb2.FileObject:
    """An uploaded file."""
    return types_pb2.FileObject(**_dump(file))


def file_from_wire(file: types_pb2.FileObject) -> jobs.FileObject:
    """An uploaded file. Raises: `ColaError(PROTOCOL_VIOLATION)` for a wrong field."""
    return _record(jobs.FileObject, _fields(file))


def checkpoint_to_wire(checkpoint: jobs.Checkpoint) -> types_pb2.Checkpoint:
    """A job's adapter at a step."""
    return types_pb2.Checkpoint(**_dump(checkpoint))


def checkpoint_from_wire(checkpoint: types_pb2.Checkpoint) -> jobs.Checkpoint:
    """A job's adapter at a step. Raises: `ColaError(PROTOCOL_VIOLATION)` for a wrong field."""
    return _record(jobs.Checkpoint, _fields(checkpoint))


def model_to_wire(model: jobs.ModelCard) -> types_pb2.ModelCard:
    """A base model that the server holds."""
    return types_pb2.ModelCard(**_dump(model))


def model_from_wire(model: types_pb2.ModelCard) -> jobs.ModelCard:
    """A base model that the server holds. Raises: `ColaError(PROTOCOL_VIOLATION)` for a wrong field."""
    return _record(jobs.ModelCard, _fields(model))


def worker_to_wire(worker: jobs.WorkerCard) -> types_pb2.WorkerCard:
    """A worker as the server knows it."""
    return types_pb2.WorkerCard(**_dump(worker))


def worker_from_wire(worker: types_pb2.WorkerCard) -> jobs.WorkerCard:
    """A worker as the server knows it. Raises: `ColaError(PROTOCOL_VIOLATION)` for a wrong field."""
    return _record(jobs.WorkerCard, _fields(worker))
