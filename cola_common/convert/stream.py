"""What a stream says: domain <-> first envelope.

Tensors' data do not pass here: `cola_common.rpc.duplex` moves them beside the envelope. The domain types check nothing
themselves, so what a peer may get wrong is checked here.
"""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import Message as WireMessage

from cola_common import families, messages
from cola_common.errors import ColaError, Reason
from cola_common.wire import fleet_pb2

T = TypeVar("T")

# Messages whose fields are all scalars, with equal names on both sides: domain type -> name in the envelope.
_FLAT: dict[type[Any], str] = {
    messages.Heartbeat: "heartbeat",
    messages.Goodbye: "goodbye",
    messages.Refusal: "refusal",
    messages.Credit: "credit",
    messages.Draining: "draining",
    messages.Welcome: "welcome",
    messages.NormTotal: "norm_total",
    messages.Ack: "ack",
    messages.SnapshotRequest: "snapshot_request",
    messages.Revoke: "revoke",
    messages.Drain: "drain",
}
_FLAT_TYPES = {name: kind for kind, name in _FLAT.items()}


def _flat(kind: type[T], wire: WireMessage) -> T:
    return kind(**{field.name: getattr(wire, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def _violation(problem: str) -> ColaError:
    return ColaError(Reason.PROTOCOL_VIOLATION, problem=problem)


def to_server_to_wire(message: messages.ToServer) -> fleet_pb2.FromWorker:
    """The first envelope of a message, without its tensors' data."""
    match message:
        case messages.Hello():
            hello = {**vars(message), "capacity": vars(message.capacity), "owned": [vars(o) for o in message.owned]}
            return fleet_pb2.FromWorker(hello=fleet_pb2.Hello(**hello))
        case messages.Norm():
            norm = {**vars(message), "squares": _squares_to_wire(message.squares)}
            return fleet_pb2.FromWorker(norm=fleet_pb2.Norm(**norm))
        case messages.Delta():
            delta = {
                **vars(message),
                "names": _names_to_wire(message.names),
                "squares": _squares_to_wire(message.squares),
            }
            tensors = delta.pop("tensors")
            return fleet_pb2.FromWorker(delta=fleet_pb2.Delta(**delta), tensors=_headers_to_wire(tensors))
        case messages.Snapshot():
            snapshot = {
                **vars(message),
                "names": _names_to_wire(message.names),
                "digests": _digests_to_wire(message.digests),
            }
            tensors = snapshot.pop("tensors")
            return fleet_pb2.FromWorker(snapshot=fleet_pb2.Snapshot(**snapshot), tensors=_headers_to_wire(tensors))
        case _:
            return fleet_pb2.FromWorker(**{_FLAT[type(message)]: vars(message)})  # type: ignore[arg-type]


def to_server_from_wire(envelope: fleet_pb2.FromWorker) -> messages.ToServer:
    """The message of a first envelope; its tensors have empty data yet.

    Raises: `ColaError(PROTOCOL_VIOLATION)`.
    """
    name = envelope.WhichOneof("message")
    tensors = _headers_from_wire(envelope.tensors)
    if tensors and name not in ("delta", "snapshot"):
        raise _violation(f"{name} carries no tensors")
    match name:
        case None:
            raise _violation("an envelope without a message")
        case "hello":
            hello = envelope.hello
            return messages.Hello(
                hello.protocol_min,
                hello.protocol_max,
                hello.worker,
                hello.boot,
                _flat(messages.Capacity, hello.capacity),
                tuple(hello.codecs),
                tuple(_flat(messages.OwnedShard, owned) for owned in hello.owned),
                tuple(hello.reductions) or ("all",),  # all that a worker takes which does not name any
            )
        case "norm":
            norm = envelope.norm
            return messages.Norm(norm.job, norm.epoch, norm.step, _squares_from_wire(norm.squares))
        case "delta":
            delta = envelope.delta
            return messages.Delta(
                delta.job,
                delta.epoch,
                delta.step,
                _names_from_wire(delta.names, tensors),
                _squares_from_wire(delta.squares),
                delta.digest,
                delta.worker_seconds,
                tensors,
                delta.decode_seconds,
            )
        case "snapshot":
            snapshot = envelope.snapshot
            return messages.Snapshot(
                snapshot.job,
                snapshot.epoch,
                snapshot.step,
                _names_from_wire(snapshot.names, tensors),
                _digests_from_wire(snapshot.digests),
                snapshot.kept,
                tensors,
            )
        case _:
            flat: messages.ToServer = _flat(_FLAT_TYPES[name], getattr(envelope, name))
            return flat


def to_worker_to_wire(message: messages.ToWorker) -> fleet_pb2.FromServer:
    """The first envelope of a message, without its tensors' data."""
    match message:
        case messages.Assign():
            assign = {
                **vars(message),
                "plan": vars(message.plan),
                "shards": [_shard_to_wire(shard) for shard in message.shards],
                "digests": _digests_to_wire(message.digests),
                "names": _names_to_wire(message.names),
            }
            tensors = assign.pop("tensors")
            return fleet_pb2.FromServer(assign=fleet_pb2.Assign(**assign), tensors=_headers_to_wire(tensors))
        case messages.Capture():
            parts = [fleet_pb2.Part(**vars(part)) for part in message.parts]
            capture = fleet_pb2.Capture(job=message.job, epoch=message.epoch, batch=message.batch, parts=parts)
            return fleet_pb2.FromServer(capture=capture, tensors=_headers_to_wire(message.tensors))
        case messages.StepEnd():
            step_end = {**vars(message), "calls": [vars(calls) for calls in message.calls]}
            return fleet_pb2.FromServer(step_end=fleet_pb2.StepEnd(**step_end))
        case _:
            return fleet_pb2.FromServer(**{_FLAT[type(message)]: vars(message)})  # type: ignore[arg-type]


def to_worker_from_wire(envelope: fleet_pb2.FromServer) -> messages.ToWorker:
    """The message of a first envelope; its tensors have empty data yet.

    Raises: `ColaError(PROTOCOL_VIOLATION)`.
    """
    name = envelope.WhichOneof("message")
    tensors = _headers_from_wire(envelope.tensors)
    if tensors and name not in ("assign", "capture"):
        raise _violation(f"{name} carries no tensors")
    match name:
        case None:
            raise _violation("an envelope without a message")
        case "assign":
            assign = envelope.assign
            return messages.Assign(
                assign.job,
                assign.epoch,
                assign.step,
                _flat(messages.OptimizerPlan, assign.plan),
                assign.values,
                assign.max_rows,
                tuple(_shard_from_wire(shard) for shard in assign.shards),
                _digests_from_wire(assign.digests),
                _names_from_wire(assign.names, tensors),
                tensors,
                assign.deltas or "fp32",  # all that a server takes which does not name one
            )
        case "capture":
            capture = envelope.capture
            parts = tuple(_flat(messages.Part, part) for part in capture.parts)
            if len(parts) != len(tensors):
                raise _violation(f"{len(parts)} parts for {len(tensors)} tensors")
            if any(part.kind not in ("x", "g", "w") for part in parts):
                raise _violation("a part is neither x nor g nor a gradient")
            return messages.Capture(capture.job, capture.epoch, capture.batch, parts, tensors)
        case "step_end":
            end = envelope.step_end
            calls = tuple(_flat(messages.Calls, calls) for calls in end.calls)
            return messages.StepEnd(end.job, end.epoch, end.batch, end.step, end.batches, calls)
        case _:
            flat: messages.ToWorker = _flat(_FLAT_TYPES[name], getattr(envelope, name))
            return flat


def _headers_to_wire(tensors: Iterable[messages.EncodedTensor]) -> list[fleet_pb2.TensorHeader]:
    return [
        fleet_pb2.TensorHeader(
            codec=tensor.codec,
            shape=tensor.shape,
            exponent=tensor.exponent,
            nbytes=tensor.nbytes,
            checksum=tensor.checksum,
        )
        for tensor in tensors
    ]


def _headers_from_wire(headers: Iterable[fleet_pb2.TensorHeader]) -> tuple[messages.EncodedTensor, ...]:
    return tuple(
        messages.EncodedTensor(h.codec, tuple(h.shape), h.exponent, h.nbytes, h.checksum, b"") for h in headers
    )


def _names_to_wire(names: Iterable[tuple[int, str]]) -> list[fleet_pb2.TensorName]:
    return [fleet_pb2.TensorName(index=index, name=name) for index, name in names]


def _names_from_wire(
    names: Iterable[fleet_pb2.TensorName], tensors: tuple[messages.EncodedTensor, ...]
) -> tuple[tuple[int, str], ...]:
    named = tuple((name.index, name.name) for name in names)
    if len(named) != len(tensors):
        raise _violation(f"{len(named)} names for {len(tensors)} tensors")
    return named


def _digests_to_wire(digests: Iterable[tuple[int, str]]) -> list[fleet_pb2.ShardDigest]:
    return [fleet_pb2.ShardDigest(index=index, digest=digest) for index, digest in digests]


def _digests_from_wire(digests: Iterable[fleet_pb2.ShardDigest]) -> tuple[tuple[int, str], ...]:
    return tuple((digest.index, digest.digest) for digest in digests)


def _squares_to_wire(squares: Iterable[tuple[int, float]]) -> list[fleet_pb2.Square]:
    return [fleet_pb2.Square(index=index, square=square) for index, square in squares]


def _squares_from_wire(squares: Iterable[fleet_pb2.Square]) -> tuple[tuple[int, float], ...]:
    return tuple((square.index, square.square) for square in squares)


_FAMILIES: dict[type[families.Family], str] = {
    families.Lora: "lora",
    families.Linear: "linear",
    families.Mlp: "mlp",
    families.Head: "head",
}


def _shard_to_wire(shard: messages.ShardPlan) -> fleet_pb2.ShardPlan:
    values = vars(shard).copy()
    family = values.pop("family")
    return fleet_pb2.ShardPlan(**values, **{_FAMILIES[type(family)]: vars(family)})


def _shard_from_wire(shard: fleet_pb2.ShardPlan) -> messages.ShardPlan:
    family: families.Family
    match shard.WhichOneof("family"):
        case "lora":
            family = _flat(families.Lora, shard.lora)
        case "linear":
            family = _flat(families.Linear, shard.linear)
        case "mlp":
            family = families.Mlp(tuple(shard.mlp.hidden_sizes), shard.mlp.scale)
        case "head":
            family = _flat(families.Head, shard.head)
        case _:
            raise _violation(f"shard {shard.site} has no family")
    # Of a server that does not know of reductions: it sends all rows.
    rows = shard.rows or "all"
    return messages.ShardPlan(shard.index, shard.site, family, shard.d_in, shard.d_out, shard.group, rows)
