"""A header is believed only as far as its assignment allows, before any memory is taken."""

import math
from dataclasses import replace

import pytest

from cola_common.errors import ColaError, Reason
from cola_common.messages import Assign, Capture, EncodedTensor, Part, ShardPlan
from cola_common.tensor import CODECS, nbytes
from cola_worker.expected import MAX_CALLS, Admission, Expected
from tests.worker.driver import FAMILIES, PLAN, Driver, parameters_of, random_batch, shard_plans

WINDOW = 1 << 20


def header(codec: str, *shape: int, size: int | None = None) -> EncodedTensor:
    """A tensor as its header tells of it."""
    return EncodedTensor(codec, shape, 0, nbytes(codec, shape) if size is None else size, 0, b"")


def with_state(assign: Assign, *entries: tuple[int, str, EncodedTensor]) -> Assign:
    """The assignment with optimizer state behind its parameters."""
    names = tuple((index, entry) for index, entry, _ in entries)
    return replace(assign, names=assign.names + names, tensors=assign.tensors + tuple(t for *_, t in entries))


def assignment(family: str = "lora", values: str = "bf16", max_rows: int = 64, rows: str = "all") -> Assign:
    plans = shard_plans(FAMILIES[family], rows)
    driver = Driver(PLAN, plans, [], {p.index: 0 for p in plans}, parameters_of(plans), values, max_rows)
    assign = driver.assignment()
    return replace(assign, tensors=tuple(replace(t, data=b"") for t in assign.tensors))


def capture(assign: Assign, parts: list[Part], *tensors: EncodedTensor) -> Capture:
    return Capture(assign.job, assign.epoch, 0, tuple(parts), tensors)


def admission(memory: int = 1 << 30, window: int = WINDOW) -> Admission:
    return Admission(memory_bytes=memory, window_bytes=window)


def refused(judge: Admission, message: Assign | Capture) -> Reason:
    with pytest.raises(ColaError) as caught:
        judge.admit(message)
    return caught.value.reason


X, G = Part("x", 0, 0), Part("g", 1, 0)  # widths 6 and 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("values", CODECS)
@pytest.mark.parametrize("rows", [0, 1, 64])
@pytest.mark.parametrize("reduced", ["all", "sketch"])
def test_what_was_assigned_is_admitted(family: str, values: str, rows: int, reduced: str) -> None:
    assign, judge = assignment(family, values, rows=reduced), admission()
    judge.admit(assign)
    judge.admit(capture(assign, [X, G], header(values, rows, 6), header(values, rows, 4)))


@pytest.mark.parametrize("codec", ["fp32", "fp16", "zip"])
@pytest.mark.parametrize("shape", [(9, 6), (9, 4)])
def test_another_codec_is_not_admitted(codec: str, shape: tuple[int, int]) -> None:
    assign, judge = assignment(), admission()
    judge.admit(assign)
    tensor = EncodedTensor(codec, shape, 0, 2 * math.prod(shape), 0, b"")
    assert refused(judge, capture(assign, [X if shape[1] == 6 else G], tensor)) == Reason.PROTOCOL_VIOLATION


@pytest.mark.parametrize(
    "tensor",
    [
        header("bf16", 65, 6),
        header("bf16", 1 << 40, 6),
        header("bf16", 9, 7),
        header("bf16", 6),
        header("bf16"),
        header("bf16", 3, 3, 6),
        header("bf16", 9, 6, size=107),
        header("bf16", 9, 6, size=1 << 40),
        header("bf16", -1, 6),
    ],
    ids=lambda t: f"{t.shape}-{t.nbytes}",
)
def test_another_size_is_not_admitted(tensor: EncodedTensor) -> None:
    assign, judge = assignment(), admission()
    judge.admit(assign)
    assert refused(judge, capture(assign, [X], tensor)) == Reason.PROTOCOL_VIOLATION


@pytest.mark.parametrize(
    "part", [Part("x", 2, 0), Part("g", 3, 0), Part("h", 0, 0), Part("x", 0, -1), Part("x", 0, MAX_CALLS)], ids=str
)
def test_another_part_is_not_admitted(part: Part) -> None:
    assign, judge = assignment(), admission()
    judge.admit(assign)
    assert refused(judge, capture(assign, [part], header("bf16", 9, 6))) == Reason.PROTOCOL_VIOLATION


def test_parts_and_tensors_belong_together_one_to_one() -> None:
    assign, judge = assignment(), admission()
    judge.admit(assign)
    x = header("bf16", 9, 6)
    for parts, tensors in (([X], [x, x]), ([X, G], [x]), ([X, X], [x, x])):
        assert refused(judge, capture(assign, parts, *tensors)) == Reason.PROTOCOL_VIOLATION


def test_a_frame_is_bounded_by_the_window_and_one_tensor() -> None:
    assign, judge = assignment(max_rows=100), admission(window=10_000)
    judge.admit(assign)
    x = header("bf16", 100, 6)  # 1,200 bytes, the largest that this assignment allows
    for count in range(1, 12):
        message = capture(assign, [Part("x", 0, call) for call in range(count)], *[x] * count)
        if count * 1200 <= 11_200:
            judge.admit(message)
        else:
            assert refused(judge, message) == Reason.PROTOCOL_VIOLATION


# --- gradients in place of rows ---------------------------------------------------------------------------------------


def mixed(values: str = "bf16") -> Assign:
    """Of two shards with one input, the first is sent gradients and the second rows."""
    assign = assignment(values=values)
    first, *others = assign.shards
    return replace(assign, shards=(replace(first, rows="exact"), *others))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("values", CODECS)
@pytest.mark.parametrize("call", [0, MAX_CALLS - 1])
def test_gradients_of_exact_shards_are_admitted(family: str, values: str, call: int) -> None:
    plans, judge = shard_plans(FAMILIES[family], "exact"), admission()
    driver = Driver(PLAN, plans, [], dict.fromkeys(range(3), 0), parameters_of(plans), values)
    judge.admit(driver.assignment())
    batch = [replace(c, call=call) for c in random_batch(plans, 1)]
    frames = driver.captures(batch)
    assert {part.kind for frame in frames for part in frame.parts} == {"w"}
    for frame in frames:
        judge.admit(frame)


A, B = Part("w", 1, 0, "A"), Part("w", 1, 0, "B")  # 3×6 and 4×3


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        (replace(A, name="C"), header("bf16", 3, 6)),
        (replace(A, name=""), header("bf16", 3, 6)),
        (replace(A, name="A.exp_avg"), header("bf16", 3, 6)),
        (replace(A, name="B"), header("bf16", 3, 6)),
        (A, header("bf16", 3, 7)),
        (A, header("bf16", 6, 3)),
        (A, header("bf16", 1, 3, 6)),
        (A, header("bf16", 18)),
        (A, header("bf16")),
        (A, header("bf16", 1 << 40, 6)),
        (A, header("bf16", 3, 6, size=35)),
        (A, header("bf16", 3, 6, size=1 << 40)),
        (A, header("fp32", 3, 6)),
        (A, EncodedTensor("zip", (3, 6), 0, 36, 0, b"")),
        (replace(A, index=3), header("bf16", 3, 6)),
        (replace(A, index=-1), header("bf16", 3, 6)),
        (replace(A, call=-1), header("bf16", 3, 6)),
        (replace(A, call=MAX_CALLS), header("bf16", 3, 6)),
        (replace(A, kind="x"), header("bf16", 3, 6)),
        (Part("g", 1, 0), header("bf16", 9, 4)),
        (Part("g", 1, 0), header("bf16", 3, 6)),
        (Part("x", 0, 0), header("bf16", 9, 6)),
    ],
    ids=str,
)
def test_another_gradient_and_rows_in_its_place_are_not_admitted(part: Part, tensor: EncodedTensor) -> None:
    assign, judge = assignment(rows="exact"), admission()
    judge.admit(assign)
    assert refused(judge, capture(assign, [part], tensor)) == Reason.PROTOCOL_VIOLATION
    judge.admit(capture(assign, [A, B], header("bf16", 3, 6), header("bf16", 4, 3)))


def test_a_gradient_in_place_of_rows_is_not_admitted() -> None:
    for rows in ("all", "sketch"):
        assign, judge = assignment(rows=rows), admission()
        judge.admit(assign)
        assert refused(judge, capture(assign, [A], header("bf16", 3, 6))) == Reason.PROTOCOL_VIOLATION


def test_a_matrix_that_int8_lays_down_is_admitted_lying_and_not_standing() -> None:
    assign, judge = assignment(values="int8", rows="exact"), admission()
    judge.admit(assign)
    judge.admit(capture(assign, [A, B], header("int8", 3, 6), header("int8", 3, 4)))
    assert refused(judge, capture(assign, [B], header("int8", 4, 3))) == Reason.PROTOCOL_VIOLATION


def test_shards_of_one_input_may_be_sent_different_things() -> None:
    assign, judge = mixed(), admission()
    judge.admit(assign)
    judge.admit(
        capture(assign, [Part("w", 0, 0, "A"), Part("w", 0, 0, "B")], header("bf16", 3, 6), header("bf16", 5, 3))
    )
    judge.admit(capture(assign, [X, G], header("bf16", 9, 6), header("bf16", 9, 4)))
    for part, tensor in ((Part("g", 0, 0), header("bf16", 9, 5)), (A, header("bf16", 3, 6))):
        assert refused(judge, capture(assign, [part], tensor)) == Reason.PROTOCOL_VIOLATION


def test_one_gradient_twice_in_a_frame_is_not_admitted() -> None:
    assign, judge = assignment(rows="exact"), admission()
    judge.admit(assign)
    message = capture(assign, [A, A], header("bf16", 3, 6), header("bf16", 3, 6))
    assert refused(judge, message) == Reason.PROTOCOL_VIOLATION


@pytest.mark.parametrize(
    ("assign", "largest"),
    [
        (assignment(max_rows=100), 100 * 6 * 2),
        (assignment(max_rows=100, values="int8"), 100 * (6 + 4)),
        (assignment(max_rows=1 << 40, rows="exact"), 3 * 6 * 2),  # rows, of which none come, do not count
        (assignment(max_rows=1 << 40, rows="exact", values="int8"), 3 * 6 + 3 * 4),
        (assignment(max_rows=1, rows="exact", family="linear"), 6 * 5 * 2),
        (replace(mixed(), max_rows=100), 100 * 6 * 2),
        (replace(mixed(), max_rows=2), 3 * 6 * 2),
        (replace(assignment(), shards=(), names=(), tensors=()), 0),
    ],
    ids=["rows", "int8", "gradients", "int8 gradients", "linear", "mixed", "mixed, few rows", "nothing"],
)
def test_the_largest_tensor_is_known_from_the_assignment_and_bounds_a_frame(assign: Assign, largest: int) -> None:
    assert Expected(assign).largest_bytes == largest


def test_a_frame_of_gradients_is_bounded_by_the_window_and_one_of_them() -> None:
    assign, judge = assignment(max_rows=1 << 40, rows="exact"), admission(window=100)
    judge.admit(assign)
    gradient = header("bf16", 3, 6)  # 36 bytes
    for count in range(1, 6):
        message = capture(assign, [replace(A, call=call) for call in range(count)], *[gradient] * count)
        if count * 36 <= 136:
            judge.admit(message)
        else:
            assert refused(judge, message) == Reason.PROTOCOL_VIOLATION


# --- epochs and state -------------------------------------------------------------------------------------------------


def test_captures_of_another_epoch_or_job_are_stale_and_not_read() -> None:
    first, judge = assignment(), admission()
    x = header("bf16", 9, 6)
    assert refused(judge, capture(first, [X], x)) == Reason.STALE_EPOCH
    judge.admit(first)
    second = replace(first, epoch=2)
    assert refused(judge, capture(second, [X], x)) == Reason.STALE_EPOCH
    judge.admit(second)
    assert refused(judge, capture(first, [X], x)) == Reason.STALE_EPOCH
    judge.admit(capture(second, [X], x))
    judge.forget(first.job, 1)
    judge.admit(capture(second, [X], x))
    judge.forget(first.job, 2)
    assert refused(judge, capture(second, [X], x)) == Reason.STALE_EPOCH


MOMENTS = (
    (0, "A.step", header("fp32")),
    (0, "A.exp_avg", header("fp32", 3, 6)),
    (0, "A.exp_avg_sq", header("fp32", 3, 6)),
    (2, "B.momentum_buffer", header("fp32", 6, 3)),
    (2, "B.remainder", header("fp32", 6, 3)),
)


def test_optimizer_state_may_follow_the_parameters() -> None:
    assign, judge = with_state(assignment(), *MOMENTS), admission()
    judge.admit(assign)
    judge.admit(capture(assign, [X], header("bf16", 9, 6)))
    parameters = sum(t.nbytes for t in assignment().tensors)
    judge = admission(memory=parameters + sum(t.nbytes for *_, t in MOMENTS) - 1)
    judge.admit(assignment())
    assert refused(judge, assign) == Reason.PROTOCOL_VIOLATION


def wrong_assignments() -> dict[str, Assign]:
    good = assignment()
    shards = good.shards
    moment = header("fp32", 3, 6)
    swapped = (good.names[1], good.names[0], *good.names[2:])
    huge = ShardPlan(index=0, site="s", family=FAMILIES["linear"], d_in=1 << 40, d_out=1 << 40, group=0)
    return {
        "no job id": replace(good, job="../../etc"),
        "unknown codec": replace(good, values="int3"),
        "unknown codec of deltas": replace(good, deltas="int3"),
        "no codec of deltas": replace(good, deltas=""),
        "unknown rows": replace(good, shards=(replace(shards[0], rows="some"), *shards[1:])),
        "no rows": replace(good, shards=(replace(shards[0], rows=""), *shards[1:])),
        "a parameter too few": replace(good, names=good.names[:-1], tensors=good.tensors[:-1]),
        "a name too few": replace(good, names=good.names[:-1]),
        "order": replace(good, names=swapped),
        "shape": replace(good, tensors=(header("fp32", 3, 7), *good.tensors[1:])),
        "codec": replace(good, tensors=(header("bf16", 3, 6), *good.tensors[1:])),
        "size": replace(good, tensors=(header("fp32", 3, 6, size=1 << 50), *good.tensors[1:])),
        "one shard twice": replace(good, shards=(*shards, shards[0])),
        "a group of two widths": replace(good, shards=(replace(shards[0], group=1), *shards[1:])),
        "more than memory": replace(
            good, shards=(huge,), names=((0, "W"),), tensors=(header("fp32", 1 << 40, 1 << 40),)
        ),
        "state before its parameters": replace(
            good, names=((0, "A.exp_avg"), *good.names), tensors=(moment, *good.tensors)
        ),
        "state of another shape": with_state(good, (0, "A.exp_avg", header("fp32", 6, 3))),
        "state in another codec": with_state(good, (0, "A.exp_avg", header("bf16", 3, 6))),
        "state of another size": with_state(good, (0, "A.exp_avg", header("fp32", 3, 6, size=1 << 50))),
        "state with one name twice": with_state(good, (0, "A.exp_avg", moment), (0, "A.exp_avg", moment)),
        "state of no parameter": with_state(good, (0, "Z.exp_avg", moment)),
        "a number of no parameter": with_state(good, (0, "Z.step", header("fp32"))),
        "state of a shard of another worker": with_state(good, (9, "A.exp_avg", moment)),
        "a number of a shard of another worker": with_state(good, (9, "A.step", header("fp32"))),
        "a parameter behind the others": with_state(good, (0, "Z", header("fp32"))),
    }


@pytest.mark.parametrize("wrong", wrong_assignments())
def test_an_assignment_that_contradicts_itself_is_not_admitted(wrong: str) -> None:
    assign, judge = wrong_assignments()[wrong], admission()
    assert refused(judge, assign) in (Reason.PROTOCOL_VIOLATION, Reason.UNSUPPORTED_CODEC)
    good = assignment()
    judge.admit(good)
