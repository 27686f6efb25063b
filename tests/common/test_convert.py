"""Domain and wire hold the same: what goes through `to_wire`, bytes and `from_wire` comes out as it was."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_common import convert, families, jobs, messages
from cola_common.errors import ColaError, Reason
from cola_common.wire import fleet_pb2, types_pb2

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
COUNT = st.integers(0, 2**63 - 1)
NUMBER = st.floats(allow_nan=False)


# --- records --------------------------------------------------------------------------------------------------------

TARGETS = st.one_of(
    st.lists(TEXT.filter(bool), min_size=1, max_size=3).map(tuple), st.just("all-linear"), st.just(r".*\.q")
)
ADAPTERS = st.one_of(
    st.builds(jobs.LoraAdapter, target_modules=TARGETS, init_from=st.none() | TEXT, r=st.integers(1, 64)),
    st.builds(jobs.LinearAdapter, target_modules=TARGETS, scale=st.floats(0.1, 9)),
    st.builds(
        jobs.MlpAdapter, target_modules=TARGETS, hidden_sizes=st.lists(st.integers(1, 99), min_size=1).map(tuple)
    ),
)
HYPERPARAMETERS = st.one_of(
    st.builds(
        jobs.Hyperparameters,
        max_steps=st.none() | st.integers(1, 2**40),
        learning_rate=st.floats(0, 1),
        optimizer=st.just("adamw"),
        momentum=st.just(0.0),
        nesterov=st.just(False),
        max_grad_norm=st.sampled_from([0.0, 1.0]),
        shuffle=st.booleans(),
    ),
    st.just(jobs.Hyperparameters(optimizer="sgd", momentum=0.9, nesterov=True, warmup_ratio=0.0, weight_decay=0.1)),
)
CODECS = st.sampled_from(typing.get_args(jobs.Codec))
WIRES = st.builds(
    jobs.Wire,
    rows=st.sampled_from([*typing.get_args(jobs.Rows), "auto"]),
    values=CODECS | st.just("auto"),
    deltas=CODECS | st.just("auto"),
    sketch_rows=st.integers(1, 2**40),
    max_error=st.floats(0, 1),
)
SPECS = st.builds(
    jobs.JobSpec,
    model=TEXT,
    training_file=TEXT,
    joint_files=st.lists(TEXT, max_size=2).map(tuple),
    collaboration=st.none() | st.builds(jobs.Collaboration, group=st.just("g-1"), size=st.integers(2, 1024)),
    validation_file=st.none() | TEXT,
    seed=COUNT,
    suffix=st.none() | st.just("my-model.1"),
    metadata=st.dictionaries(TEXT, TEXT, max_size=3),
    adapter=ADAPTERS,
    hyperparameters=HYPERPARAMETERS,
    fold=st.just("unmerged"),
    wire=WIRES,
)
PLANS = st.builds(
    jobs.WirePlan,
    rows=st.sampled_from(typing.get_args(jobs.Rows)),
    values=CODECS,
    deltas=CODECS,
    sketch_rows=COUNT,
    max_error=NUMBER,
    error=NUMBER,
    reason=TEXT,
)
JOBS = st.builds(
    jobs.Job,
    id=TEXT,
    created_at=NUMBER,
    started_at=st.none() | NUMBER,
    finished_at=st.none() | NUMBER,
    estimated_finish=st.none() | NUMBER,
    status=st.sampled_from(jobs.JobStatus),
    spec=SPECS,
    error=st.none() | st.builds(jobs.JobFailure, code=TEXT, message=TEXT, param=st.none() | TEXT),
    fine_tuned_model=st.none() | TEXT,
    trained_tokens=COUNT,
    step=COUNT,
    total_steps=st.none() | COUNT,
    epoch=COUNT,
    waiting_for_workers=st.booleans(),
    tenant=TEXT,
    queue_place=st.none() | COUNT,
    group_id=st.none() | TEXT,
    wire_plan=st.none() | PLANS,
)
EVENTS = st.builds(
    jobs.JobEvent,
    id=COUNT,
    job=TEXT,
    created_at=NUMBER,
    message=TEXT,
    data=st.dictionaries(TEXT, NUMBER | TEXT, max_size=4),
)
CHECKPOINTS = st.builds(
    jobs.Checkpoint,
    id=TEXT,
    job=TEXT,
    step_number=COUNT,
    created_at=NUMBER,
    metrics=st.dictionaries(TEXT, NUMBER, max_size=3),
    digest=TEXT,
)
FILES = st.builds(jobs.FileObject, id=TEXT, filename=TEXT, bytes=COUNT, created_at=NUMBER, digest=TEXT)
CARDS = {"task": st.sampled_from(["causal-lm", "sequence-classification"]), "dtype": TEXT, "device": TEXT}
TIMES = dict.fromkeys(("busy_seconds", "waiting_seconds", "jobless_seconds"), NUMBER)
MODELS = st.builds(jobs.ModelCard, id=TEXT, parameters=COUNT, **TIMES, **CARDS)
ESTIMATES = st.builds(
    jobs.Estimate,
    seconds=st.none() | NUMBER,
    wire_plan=PLANS,
    **{name: COUNT for name, field in jobs.Estimate.model_fields.items() if field.annotation is int},
)
WORKERS = st.builds(
    jobs.WorkerCard,
    id=TEXT,
    cores=COUNT,
    memory_bytes=COUNT,
    device=TEXT,
    gflops=NUMBER,
    shards=COUNT,
    last_seen=NUMBER,
)
METRICS = st.builds(
    jobs.StepMetrics,
    valid_loss=st.none() | NUMBER,
    **{
        name: COUNT if field.annotation is int else NUMBER
        for name, field in jobs.StepMetrics.model_fields.items()
        if field.annotation in (int, float)
    },
)
RECORDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "spec": (SPECS, convert.spec_to_wire, convert.spec_from_wire),
    "job": (JOBS, convert.job_to_wire, convert.job_from_wire),
    "estimate": (ESTIMATES, convert.estimate_to_wire, convert.estimate_from_wire),
    "event": (EVENTS, convert.event_to_wire, convert.event_from_wire),
    "metrics": (METRICS, convert.metrics_to_wire, convert.metrics_from_wire),
    "file": (FILES, convert.file_to_wire, convert.file_from_wire),
    "checkpoint": (CHECKPOINTS, convert.checkpoint_to_wire, convert.checkpoint_from_wire),
    "model": (MODELS, convert.model_to_wire, convert.model_from_wire),
    "worker": (WORKERS, convert.worker_to_wire, convert.worker_from_wire),
}


BASE: dict[str, Any] = {"model": "m", "training_file": "f"}


def through_bytes(wire: Any) -> Any:
    return type(wire).FromString(wire.SerializeToString())


@pytest.mark.parametrize("name", RECORDS)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_record_comes_back_as_it_went(name: str, data: st.DataObject) -> None:
    strategy, to_wire, from_wire = RECORDS[name]
    record = data.draw(strategy)
    assert from_wire(through_bytes(to_wire(record))) == record


@pytest.mark.parametrize(
    ("domain", "wire"),
    [
        (jobs.JobSpec, types_pb2.JobSpec),
        (jobs.Hyperparameters, types_pb2.Hyperparameters),
        (jobs.Wire, types_pb2.Wire),
        (jobs.WirePlan, types_pb2.WirePlan),
        (jobs.Method, types_pb2.Method),
        (jobs.JobFailure, types_pb2.JobFailure),
        (jobs.Job, types_pb2.Job),
        (jobs.JobEvent, types_pb2.JobEvent),
        (jobs.StepMetrics, types_pb2.StepMetrics),
        (jobs.FileObject, types_pb2.FileObject),
        (jobs.Checkpoint, types_pb2.Checkpoint),
        (jobs.Estimate, types_pb2.Estimate),
        (jobs.ModelCard, types_pb2.ModelCard),
        (jobs.WorkerCard, types_pb2.WorkerCard),
    ],
    ids=lambda kind: kind.__name__,
)
def test_domain_and_wire_have_the_same_fields(domain: Any, wire: Any) -> None:
    assert set(domain.model_fields) - {"object"} == {field.name for field in wire.DESCRIPTOR.fields}


def test_what_is_not_sent_takes_the_default() -> None:
    least = jobs.JobSpec(model="m", training_file="f")
    assert convert.spec_from_wire(types_pb2.JobSpec(model="m", training_file="f")) == least
    empty = types_pb2.JobSpec(model="m", training_file="f", adapter={}, hyperparameters={}, wire={}, method={})
    assert convert.spec_from_wire(empty) == least
    mlp = types_pb2.JobSpec(model="m", training_file="f", adapter={"mlp": {}, "target_modules": ["q"]})
    assert convert.spec_from_wire(mlp).adapter == jobs.MlpAdapter(target_modules=("q",))


def test_a_zero_that_is_sent_is_not_a_default() -> None:
    sent = types_pb2.JobSpec(model="m", training_file="f", hyperparameters={"max_grad_norm": 0.0, "shuffle": False})
    spec = convert.spec_from_wire(through_bytes(sent))
    assert spec.hyperparameters.max_grad_norm == 0.0
    assert spec.hyperparameters.shuffle is False


def test_a_client_that_knows_of_no_reductions_and_deltas_gets_what_it_asks_for() -> None:
    sent = types_pb2.JobSpec(**BASE, wire={"rows": "all", "values": "bf16"})
    wire = convert.spec_from_wire(through_bytes(sent)).wire
    assert (wire.rows, wire.values, wire.deltas, wire.max_error) == ("all", "bf16", "auto", 0.0)


def test_what_an_older_server_does_not_count_is_nothing() -> None:
    known = jobs.StepMetrics(**dict.fromkeys(jobs.StepMetrics.model_fields, 1))
    sent = convert.metrics_to_wire(known)
    for name in ("reduce_seconds", "decode_seconds", "rows", "sent_rows", "raw_bytes", "raw_delta_bytes"):
        sent.ClearField(name)
    received = convert.metrics_from_wire(through_bytes(sent))
    assert (received.seconds, received.sent_bytes) == (1, 1)
    assert (received.reduce_seconds, received.decode_seconds, received.rows, received.sent_rows) == (0, 0, 0, 0)
    assert (received.raw_bytes, received.raw_delta_bytes) == (0, 0)
    job = jobs.Job(id="j", created_at=1.0, status=jobs.JobStatus.QUEUED, spec=jobs.JobSpec(**BASE))
    assert convert.job_from_wire(through_bytes(convert.job_to_wire(job))).wire_plan is None


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"training_file": "f"}, "model"),
        ({**BASE, "hyperparameters": {"n_epochs": 0}}, r"hyperparameters\.n_epochs.*got 0\)"),
        ({**BASE, "hyperparameters": {"optimizer": "lion"}}, "lion"),
        ({**BASE, "adapter": {"lora": {"r": -1}}}, "got -1"),
        ({**BASE, "adapter": {"target_pattern": "["}}, "regular expression"),
        ({**BASE, "adapter": {"target_pattern": "q", "target_modules": ["q"]}}, "not both"),
        ({**BASE, "fold": "half"}, "half"),
        ({**BASE, "seed": -1}, "seed"),
        ({**BASE, "wire": {"rows": "some"}}, r"wire\.rows.*some"),
        ({**BASE, "wire": {"deltas": "int2"}}, r"wire\.deltas.*int2"),
        ({**BASE, "wire": {"sketch_rows": 0}}, r"wire\.sketch_rows.*got 0\)"),
        ({**BASE, "wire": {"max_error": 1.5}}, r"wire\.max_error.*got 1\.5\)"),
        ({**BASE, "wire": {"max_error": math.nan}}, r"wire\.max_error"),
    ],
    ids=str,
)
def test_a_wrong_spec_is_refused_by_its_field(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ColaError, match=problem) as refused:
        convert.spec_from_wire(through_bytes(types_pb2.JobSpec(**fields)))
    assert refused.value.reason is Reason.INVALID_JOB


@pytest.mark.parametrize(
    "spec",
    [jobs.JobSpec(**BASE, adapter=jobs.LoraAdapter(r=2**70)), jobs.JobSpec(model="\ud800", training_file="f")],
    ids=["an integer over 64 bits", "a lone surrogate"],
)
def test_what_the_wire_cannot_carry_is_an_invalid_job(spec: jobs.JobSpec) -> None:
    with pytest.raises(ColaError) as refused:
        convert.spec_to_wire(spec)
    assert refused.value.reason is Reason.INVALID_JOB


def test_a_wrong_record_from_the_server_is_a_violation_by_its_field() -> None:
    with pytest.raises(ColaError, match=r"FileObject\.purpose") as refused:
        convert.file_from_wire(types_pb2.FileObject(id="file-1", purpose="fun"))
    assert refused.value.reason is Reason.PROTOCOL_VIOLATION


def test_metrics_that_are_not_numbers_travel() -> None:
    values = dict.fromkeys(jobs.StepMetrics.model_fields, 1) | {"train_loss": math.nan, "grad_norm": math.inf}
    metrics = convert.metrics_from_wire(through_bytes(convert.metrics_to_wire(jobs.StepMetrics(**values))))
    assert math.isnan(metrics.train_loss)
    assert metrics.grad_norm == math.inf


# --- what a stream says ---------------------------------------------------------------------------------------------

TENSORS = st.lists(
    st.builds(
        messages.EncodedTensor,
        codec=TEXT,
        shape=st.lists(COUNT, max_size=3).map(tuple),
        exponent=st.integers(-(2**31), 2**31 - 1),
        nbytes=COUNT,
        checksum=st.integers(0, 2**64 - 1),
        data=st.just(b""),
    ),
    max_size=3,
).map(tuple)
FAMILIES = st.one_of(
    st.builds(families.Lora, r=COUNT, scale=NUMBER),
    st.builds(families.Linear, scale=NUMBER),
    st.builds(families.Mlp, hidden_sizes=st.lists(COUNT, max_size=3).map(tuple), scale=NUMBER),
    st.builds(families.Head, bias=st.booleans()),
)


NEVER_EMPTY = {
    (messages.Hello, "reductions"): st.lists(TEXT, min_size=1, max_size=3).map(tuple),
    (messages.ShardPlan, "rows"): TEXT.filter(bool),
    (messages.Assign, "deltas"): TEXT.filter(bool),
}
"""What an older peer leaves empty has a meaning of its own."""


def strategy_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a message's type, field by field; tensors and what names them stay empty."""
    known = {str: TEXT, int: COUNT, float: NUMBER, bool: st.booleans(), families.Family: FAMILIES}
    if kind in known:
        return known[kind]
    if dataclasses.is_dataclass(kind):
        fields = {
            name: st.just(())
            if name in ("tensors", "names", "parts")
            else NEVER_EMPTY.get((kind, name), strategy_of(hint))
            for name, hint in typing.get_type_hints(kind).items()
        }
        return st.builds(kind, **fields)
    inner = typing.get_args(kind)
    if inner[-1] is ...:
        return st.lists(strategy_of(inner[0]), max_size=3).map(tuple)
    return st.tuples(*map(strategy_of, inner))


def with_tensors(message: Any, tensors: tuple[messages.EncodedTensor, ...]) -> Any:
    if isinstance(message, messages.Capture):
        parts = tuple(messages.Part("xgw"[index % 3], index, index, "ABé"[index]) for index in range(len(tensors)))
        return dataclasses.replace(message, parts=parts, tensors=tensors)
    if isinstance(message, messages.Delta | messages.Assign | messages.Snapshot):
        names = tuple((index, f"p{index}") for index in range(len(tensors)))
        return dataclasses.replace(message, names=names, tensors=tensors)
    return message


SIDES: list[tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]] = [
    *((kind, convert.to_server_to_wire, convert.to_server_from_wire) for kind in typing.get_args(messages.ToServer)),
    *((kind, convert.to_worker_to_wire, convert.to_worker_from_wire) for kind in typing.get_args(messages.ToWorker)),
]


@pytest.mark.parametrize(("kind", "to_wire", "from_wire"), SIDES, ids=[kind.__name__ for kind, _, _ in SIDES])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_message_comes_back_as_it_went(
    kind: Any, to_wire: Callable[[Any], Any], from_wire: Callable[[Any], Any], data: st.DataObject
) -> None:
    message = with_tensors(data.draw(strategy_of(kind)), data.draw(TENSORS))
    assert from_wire(through_bytes(to_wire(message))) == message


def test_what_an_older_peer_leaves_empty_is_all_that_it_knew() -> None:
    hello = fleet_pb2.FromWorker(hello={"worker": "wkr-1", "codecs": ["fp32"]})
    greeted = convert.to_server_from_wire(through_bytes(hello))
    assert isinstance(greeted, messages.Hello)
    assert greeted.reductions == ("all",)
    assign = fleet_pb2.FromServer(assign={"values": "bf16", "shards": [{"site": "q", "lora": {"r": 2}}]})
    assigned = convert.to_worker_from_wire(through_bytes(assign))
    assert isinstance(assigned, messages.Assign)
    assert (assigned.deltas, [shard.rows for shard in assigned.shards]) == ("fp32", ["all"])
    delta = convert.to_server_from_wire(through_bytes(fleet_pb2.FromWorker(delta={"worker_seconds": 2.0})))
    assert isinstance(delta, messages.Delta)
    assert (delta.worker_seconds, delta.decode_seconds) == (2.0, 0.0)


def test_every_message_of_the_envelopes_is_a_domain_message_and_the_other_way() -> None:
    for union, wire in ((messages.ToServer, fleet_pb2.FromWorker), (messages.ToWorker, fleet_pb2.FromServer)):
        assert isinstance(union, types.UnionType)
        names = {field.message_type.name for field in wire.DESCRIPTOR.oneofs_by_name["message"].fields}
        assert names == {kind.__name__ for kind in typing.get_args(union)}


HEADER = fleet_pb2.TensorHeader(codec="fp32", shape=[1], nbytes=4)


@pytest.mark.parametrize(
    "envelope",
    [
        fleet_pb2.FromServer(),
        fleet_pb2.FromServer(ack={}, tensors=[HEADER]),
        fleet_pb2.FromServer(capture={"parts": [{"kind": "x"}]}),
        fleet_pb2.FromServer(capture={"parts": [{"kind": "y"}]}, tensors=[HEADER]),
        fleet_pb2.FromServer(assign={"names": [{"name": "A"}]}),
        fleet_pb2.FromServer(assign={"shards": [{"site": "q"}]}),
        fleet_pb2.FromWorker(),
        fleet_pb2.FromWorker(hello={}, tensors=[HEADER]),
        fleet_pb2.FromWorker(delta={}, tensors=[HEADER]),
        fleet_pb2.FromWorker(snapshot={}, tensors=[HEADER]),
        fleet_pb2.FromWorker(snapshot={"names": [{"name": "A.step"}]}),
    ],
    ids=lambda envelope: " ".join(str(envelope).split()) or "empty",
)
def test_an_envelope_that_makes_no_message_is_a_violation(envelope: Any) -> None:
    server = isinstance(envelope, fleet_pb2.FromServer)
    with pytest.raises(ColaError) as refused:
        (convert.to_worker_from_wire if server else convert.to_server_from_wire)(envelope)
    assert refused.value.reason is Reason.PROTOCOL_VIOLATION
