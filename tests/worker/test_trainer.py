"""What a trainer makes of captures is what ordinary training makes, and nothing that it is sent can change that."""

import copy
import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cola_common import schedules
from cola_common.errors import Reason
from cola_common.messages import (
    Ack,
    Capture,
    Credit,
    Delta,
    Norm,
    NormTotal,
    Part,
    Revoke,
    Snapshot,
    SnapshotRequest,
    StepEnd,
)
from cola_common.tensor import CODECS, decode, encode
from cola_worker.shards import Shards
from cola_worker.trainer import Trainer
from tests.worker.driver import FAMILIES, PLAN, Driver, Oracle, changed, only, random_batch, refused, shard_plans

PLANS = {
    "sgd": changed(learning_rate=0.05, weight_decay=0.1),
    "nesterov": changed(learning_rate=0.05, momentum=0.9, nesterov=True),
    "adamw": changed(optimizer="adamw", learning_rate=0.02, weight_decay=0.1),
    "adamw-cosine": changed(optimizer="adamw", learning_rate=0.05, lr_scheduler_type="cosine", warmup_steps=2),
}
STEPS = 6


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(Shards(tmp_path / "shards"))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("limit", [0.0, 0.7, 1e6])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("calls", [1, 2])
def test_steps_are_those_of_autograd_and_torch(
    family: str, plan: str, limit: float, interval: int, calls: int, trainer: Trainer
) -> None:
    full = changed(PLANS[plan], max_grad_norm=limit, total_steps=STEPS)
    driver = Driver.of(full, shard_plans(FAMILIES[family]), trainer)
    oracle = Oracle(full, driver.plans, driver.parameters)
    driver.assign()
    for step in range(STEPS):
        n = interval if step < STEPS - 1 else 1  # the job's last interval may be short
        batches = [random_batch(driver.plans, 10 * step + i, calls=calls) for i in range(n)]
        (delta,) = driver.train(batches)
        norm = oracle.train(batches, schedules.learning_rate(full, step))
        assert sum(s for _, s in delta.squares) ** 0.5 == pytest.approx(norm, rel=1e-5)
    for index, parameters in driver.parameters.items():
        for name, value in parameters.items():
            assert close(value, oracle.parameters[index][name].detach()), (index, name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("limit", [0.0, 0.7])
def test_bits_do_not_depend_on_who_owns_a_shard(family: str, limit: float, tmp_path: Path) -> None:
    plan = changed(PLANS["adamw"], max_grad_norm=limit)
    final = []
    for workers in (1, 2):
        trainers = [Trainer(Shards(tmp_path / f"{workers}-{i}")) for i in range(workers)]
        driver = Driver.of(plan, shard_plans(FAMILIES[family]), *trainers)
        driver.assign()
        for step in range(STEPS):
            driver.train([random_batch(driver.plans, 7 * step + i) for i in range(2)])
        final.append(driver.parameters)
    assert all(torch.equal(final[0][i][n], final[1][i][n]) for i in final[0] for n in final[0][i])


@pytest.mark.parametrize("values", CODECS)
def test_every_codec_is_understood_and_its_bytes_are_credited(values: str, trainer: Trainer) -> None:
    driver = Driver.of(PLAN, shard_plans(FAMILIES["lora"]), trainer, values=values)
    oracle = Oracle(PLAN, driver.plans, driver.parameters)
    driver.assign()
    batch = random_batch(driver.plans, 1)
    driver.train([batch])
    rounded = [replace(c, x_ND=decode(encode(c.x_ND, values)), g_NO=decode(encode(c.g_NO, values))) for c in batch]
    oracle.train([rounded], PLAN.learning_rate)
    for index, parameters in driver.parameters.items():
        assert all(close(p, oracle.parameters[index][name].detach()) for name, p in parameters.items())
    assert driver.credited == driver.captured > 0


@pytest.mark.parametrize("deltas", CODECS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", ["sgd", "adamw"])
def test_both_sides_hold_the_same_bits_in_every_codec_of_deltas(
    deltas: str, family: str, plan: str, trainer: Trainer
) -> None:
    driver = Driver.of(changed(PLANS[plan], max_grad_norm=0.7), shard_plans(FAMILIES[family]), trainer, deltas=deltas)
    driver.assign()
    for step in range(3):
        (delta,) = driver.train([random_batch(driver.plans, step)])  # the digests of each step are compared in it
        assert {tensor.codec for tensor in delta.tensors} == {deltas}
    (half,) = driver.snapshot()  # and here those of the whole state, with the server's parameters
    owed = {(index, name) for index, of_shard in driver.parameters.items() for name in of_shard}
    owing = {(index, entry.removesuffix(".remainder")) for index, entry in half.names if entry.endswith(".remainder")}
    assert owing == (set() if deltas == "fp32" else owed)


@pytest.mark.parametrize("plan", PLANS)
def test_a_shard_that_was_not_called_is_not_stepped(plan: str, trainer: Trainer) -> None:
    driver = Driver.of(PLANS[plan], shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    driver.train([random_batch(driver.plans, 1)])
    before = copy.deepcopy(driver.parameters)
    (delta,) = driver.train([[c for c in random_batch(driver.plans, 2) if c.index != 1]])
    assert {index for index, _ in delta.names} == {index for index, _ in delta.squares} == {0, 2}
    assert all(torch.equal(before[1][n], p) for n, p in driver.parameters[1].items())
    driver.train([random_batch(driver.plans, 3)])


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_step_that_called_none_of_the_shards_has_an_empty_delta(limit: float, trainer: Trainer) -> None:
    driver = Driver.of(changed(max_grad_norm=limit), shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    (delta,) = driver.train([[]])
    assert (delta.names, delta.tensors, delta.squares) == ((), (), ())


def test_a_batch_of_zero_gradients_counts_in_the_mean(trainer: Trainer) -> None:
    driver = Driver.of(PLAN, shard_plans(FAMILIES["linear"]), trainer)
    oracle = Oracle(PLAN, driver.plans, driver.parameters)
    driver.assign()
    batches = [random_batch(driver.plans, 1), random_batch(driver.plans, 2)]
    batches[1] = [replace(c, g_NO=torch.zeros_like(c.g_NO)) for c in batches[1]]
    driver.train(batches)
    oracle.train(batches, PLAN.learning_rate)
    for index, parameters in driver.parameters.items():
        assert all(close(p, oracle.parameters[index][name].detach()) for name, p in parameters.items())


def test_jobs_do_not_touch_each_other(trainer: Trainer, tmp_path: Path) -> None:
    plans = shard_plans(FAMILIES["lora"])
    alone = Driver.of(PLANS["adamw"], plans, Trainer(Shards(tmp_path / "alone")))
    one, other = (Driver.of(PLANS["adamw"], plans, trainer) for _ in range(2))
    for driver in (alone, one, other):
        driver.assign()
    for step in range(3):
        alone.train([random_batch(plans, step)])
        batch = random_batch(plans, step)
        one.send_batch(batch, 0)
        other.train([random_batch(plans, 100 + step)])
        answers = one.trainers[0].handle(replace(one.step_end([], 1)))
        one.batch += 1
        one.fold([only(answers, Delta)])
    assert all(torch.equal(alone.parameters[i][n], one.parameters[i][n]) for i in (0, 1, 2) for n in ("A", "B"))


def test_seconds_are_those_of_one_step_and_of_them_those_that_read_captures(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # from one look at it to the next: a second
    driver = Driver.of(changed(max_grad_norm=1.0), shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    deltas = [driver.train([random_batch(driver.plans, s)])[0] for s in range(3)]
    captures, others = len(driver.plans), 3  # the batch's end with the norms, the clipping, the optimizer
    assert [delta.decode_seconds for delta in deltas] == [captures] * 3
    # Of a capture, one second before it is read, one in which it is, and one behind.
    assert [delta.worker_seconds for delta in deltas] == [3 * captures + others] * 3


def test_a_site_of_a_shared_input_may_be_left_out_of_a_batch(trainer: Trainer) -> None:
    """Its x then has waited in vain, and is of no use to the next batch."""
    driver = Driver.of(PLAN, shard_plans(FAMILIES["lora"]), trainer)
    oracle = Oracle(PLAN, driver.plans, driver.parameters)
    driver.assign()
    batches = [[c for c in random_batch(driver.plans, 1) if c.index != 1], random_batch(driver.plans, 2)]
    driver.train(batches)
    oracle.train(batches, PLAN.learning_rate)
    for index, parameters in driver.parameters.items():
        assert all(close(p, oracle.parameters[index][name].detach()) for name, p in parameters.items())


# --- what is said twice, late, or wrongly -----------------------------------------------------------------------------


def test_what_is_said_twice_changes_nothing(trainer: Trainer, tmp_path: Path) -> None:
    """StepEnd, NormTotal and Ack come again whenever they like."""
    plan = changed(PLANS["adamw"], max_grad_norm=0.5)
    plans = shard_plans(FAMILIES["lora"])
    undisturbed = Driver.of(plan, plans, Trainer(Shards(tmp_path / "undisturbed")))
    driver = Driver.of(plan, plans, trainer)
    undisturbed.assign()
    driver.assign()
    for step in range(3):
        batch = random_batch(plans, step)
        undisturbed.train([batch])
        (answers,) = driver.send_batch(batch, 1)
        norm = only(answers, Norm)
        driver.batch -= 1
        assert trainer.handle(driver.step_end(batch, 1)) == []
        driver.batch += 1
        total = NormTotal(driver.job, 1, step, sum(s for _, s in norm.squares) ** 0.5)
        delta = only(trainer.handle(total), Delta)
        assert trainer.handle(total) == []
        driver.fold([delta])
        assert trainer.handle(Ack(driver.job, 1, step, driver.digest())) == []
    assert all(torch.equal(undisturbed.parameters[i][n], driver.parameters[i][n]) for i in (0, 1, 2) for n in "AB")


@pytest.mark.parametrize("epoch", [1, 3])
def test_another_epoch_is_stale_and_changes_nothing(epoch: int, trainer: Trainer) -> None:
    driver = Driver.of(PLAN, shard_plans(FAMILIES["lora"]), trainer)
    driver.epoch = 2
    driver.assign()
    batch = random_batch(driver.plans, 1)
    late = [
        *driver.captures(batch),
        driver.step_end(batch, 1),
        NormTotal(driver.job, 2, 0, 1.0),
        Ack(driver.job, 2, 0, "a digest"),
        SnapshotRequest(driver.job, 2, 0),
    ]
    if epoch < 2:
        late += [driver.assignment(), Revoke(driver.job, 2, "late", keep=False)]
    for message in late:
        answers = trainer.handle(replace(message, epoch=epoch))
        assert (refused(answers).reason, refused(answers).epoch) == (Reason.STALE_EPOCH, epoch)
        credits_ = [a.bytes for a in answers if isinstance(a, Credit)]
        assert credits_ == ([sum(t.nbytes for t in message.tensors)] if isinstance(message, Capture) else [])
    driver.train([batch])


def test_a_revoked_job_is_gone(trainer: Trainer) -> None:
    driver = Driver.of(PLAN, shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    driver.revoke(keep=True)
    assert refused(trainer.handle(driver.step_end([], 1))).reason == Reason.STALE_EPOCH


def test_a_new_epoch_goes_back_to_what_it_says(trainer: Trainer, tmp_path: Path) -> None:
    plans = shard_plans(FAMILIES["lora"])
    driver = Driver.of(PLAN, plans, trainer)
    driver.assign()
    driver.train([random_batch(plans, 1)])
    snapshot, step = copy.deepcopy(driver.parameters), driver.step
    driver.train([random_batch(plans, 2)])
    driver.send_batch(random_batch(plans, 3), 0)  # and half a step
    ahead = copy.deepcopy(driver.parameters)
    driver.parameters, driver.step, driver.epoch, driver.batch = snapshot, step, 2, 1
    driver.assign()
    driver.train([random_batch(plans, 2)])
    assert all(torch.equal(ahead[i][n], driver.parameters[i][n]) for i in (0, 1, 2) for n in "AB")


Wrong = Callable[[Capture], Capture]


def _tensor(capture: Capture, at: int, **fields: object) -> Capture:
    tensors = list(capture.tensors)
    tensors[at] = replace(tensors[at], **fields)  # type: ignore[arg-type]
    return replace(capture, tensors=tuple(tensors))


def _part(capture: Capture, at: int, part: Part) -> Capture:
    parts = list(capture.parts)
    parts[at] = part
    return replace(capture, parts=tuple(parts))


def _values(capture: Capture, at: int, tensor: torch.Tensor, codec: str = "fp32") -> Capture:
    tensors = list(capture.tensors)
    tensors[at] = encode(tensor, codec)
    return replace(capture, tensors=tuple(tensors))


WRONG: dict[str, tuple[Wrong, Reason]] = {
    "flipped bit": (lambda c: _tensor(c, 0, checksum=c.tensors[0].checksum ^ 1), Reason.CHECKSUM_MISMATCH),
    "shard of another": (lambda c: _part(c, 0, Part("g", 7, 0)), Reason.PROTOCOL_VIOLATION),
    "group of another": (lambda c: _part(c, 1, Part("x", 7, 0)), Reason.PROTOCOL_VIOLATION),
    "no such kind": (lambda c: _part(c, 0, Part("y", 2, 0)), Reason.PROTOCOL_VIOLATION),
    "negative call": (lambda c: _part(_part(c, 0, Part("g", 2, -1)), 1, Part("x", 1, -1)), Reason.PROTOCOL_VIOLATION),
    "endless calls": (lambda c: _part(c, 0, Part("g", 2, 1 << 40)), Reason.PROTOCOL_VIOLATION),
    "g without x": (lambda c: replace(c, parts=c.parts[:1], tensors=c.tensors[:1]), Reason.PROTOCOL_VIOLATION),
    "a part without tensor": (lambda c: replace(c, tensors=c.tensors[:1]), Reason.PROTOCOL_VIOLATION),
    "a part twice": (
        lambda c: replace(c, parts=(*c.parts, c.parts[0]), tensors=(*c.tensors, c.tensors[0])),
        Reason.PROTOCOL_VIOLATION,
    ),
    "other codec": (lambda c: _values(c, 0, decode(c.tensors[0]), "bf16"), Reason.PROTOCOL_VIOLATION),
    "other width": (lambda c: _values(c, 0, torch.zeros(9, 7)), Reason.PROTOCOL_VIOLATION),
    "one dimension": (lambda c: _values(c, 0, torch.zeros(6)), Reason.PROTOCOL_VIOLATION),
    "no dimension": (lambda c: _values(c, 0, torch.zeros(())), Reason.PROTOCOL_VIOLATION),
    "too many rows": (lambda c: _values(c, 0, torch.zeros(65, 6)), Reason.PROTOCOL_VIOLATION),
    "more rows than x": (lambda c: _values(c, 0, torch.zeros(10, 6)), Reason.PROTOCOL_VIOLATION),
    "other size": (lambda c: _tensor(c, 0, nbytes=c.tensors[0].nbytes + 4), Reason.PROTOCOL_VIOLATION),
    "missing bytes": (lambda c: _tensor(c, 0, data=bytes(c.tensors[0].data)[:-4]), Reason.PROTOCOL_VIOLATION),
    "a batch behind": (lambda c: replace(c, batch=0), Reason.PROTOCOL_VIOLATION),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_capture_is_refused_by_name_and_another_epoch_goes_on(wrong: str, trainer: Trainer) -> None:
    change, reason = WRONG[wrong]
    driver = Driver.of(PLANS["adamw"], shard_plans(FAMILIES["linear"]), trainer)
    driver.assign()
    driver.train([random_batch(driver.plans, 1)])
    batch = random_batch(driver.plans, 2)
    capture = change(driver.captures(batch)[0])
    answers = trainer.handle(capture)
    assert refused(answers).reason == reason
    assert [a.bytes for a in answers if isinstance(a, Credit)] == [sum(t.nbytes for t in capture.tensors)]
    assert refused(trainer.handle(driver.step_end(batch, 1))).reason == Reason.PROTOCOL_VIOLATION
    driver.epoch += 1
    driver.assign()
    driver.train([batch])


def test_captures_of_two_batches_do_not_mix(trainer: Trainer) -> None:
    driver = Driver.of(PLAN, shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    first, second = driver.captures(random_batch(driver.plans, 1))[:2]
    trainer.handle(first)
    assert refused(trainer.handle(replace(second, batch=1))).reason == Reason.PROTOCOL_VIOLATION


def test_no_capture_is_taken_while_the_norm_is_awaited(trainer: Trainer) -> None:
    driver = Driver.of(changed(max_grad_norm=1.0), shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    batch = random_batch(driver.plans, 1)
    driver.send_batch(batch, 1)
    assert refused(trainer.handle(driver.captures(batch)[0])).reason == Reason.PROTOCOL_VIOLATION


def test_x_is_needed_once_for_a_group_and_not_beyond(trainer: Trainer) -> None:
    driver = Driver.of(PLAN, shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    batch = random_batch(driver.plans, 1)
    frames = driver.captures(batch)
    for frame in frames:
        trainer.handle(frame)
    again = refused(trainer.handle(frames[-1]))  # the g of shard 0, whose group has had its x and is complete
    assert again.reason == Reason.PROTOCOL_VIOLATION


@pytest.mark.parametrize("missing", ["a call", "rows", "a shard", "nothing announced"])
def test_a_batch_that_is_not_what_was_announced_is_refused(missing: str, trainer: Trainer) -> None:
    driver = Driver.of(PLAN, shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    batch = random_batch(driver.plans, 1, calls=2)
    for frame in driver.captures(batch):
        trainer.handle(frame)
    end = driver.step_end(batch, 1)
    first, *rest = end.calls
    wrong = {
        "a call": (replace(first, calls=3), *rest),
        "rows": (replace(first, rows=first.rows + 1), *rest),
        "a shard": tuple(rest),
        "nothing announced": (),
    }
    assert refused(trainer.handle(replace(end, calls=wrong[missing]))).reason == Reason.PROTOCOL_VIOLATION


@pytest.mark.parametrize(
    "message",
    [
        StepEnd("", 1, 0, 1, 1, ()),
        NormTotal("", 1, 0, 1.0),
        NormTotal("", 1, 4, 1.0),
        Ack("", 1, 0, ""),
        SnapshotRequest("", 1, 1),
    ],
    ids=["step ahead", "norm not asked for", "norm ahead", "acknowledgement ahead", "snapshot ahead"],
)
def test_what_is_out_of_order_is_refused(
    message: StepEnd | NormTotal | Ack | SnapshotRequest, trainer: Trainer
) -> None:
    driver = Driver.of(PLAN, shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    assert refused(trainer.handle(replace(message, job=driver.job))).reason == Reason.PROTOCOL_VIOLATION
    driver.train([random_batch(driver.plans, 1)])


@pytest.mark.parametrize("total", [float("nan"), -1.0])
def test_a_norm_that_is_none_is_refused(total: float, trainer: Trainer) -> None:
    driver = Driver.of(changed(max_grad_norm=1.0), shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    driver.send_batch(random_batch(driver.plans, 1), 1)
    assert refused(trainer.handle(NormTotal(driver.job, 1, 0, total))).reason == Reason.PROTOCOL_VIOLATION


# --- snapshots ------------------------------------------------------------------------------------------------------


def test_a_snapshot_belongs_between_two_steps_and_is_refused_within_one(trainer: Trainer, tmp_path: Path) -> None:
    plan = changed(PLANS["adamw"], max_grad_norm=0.5)
    plans = shard_plans(FAMILIES["lora"])
    undisturbed = Driver.of(plan, plans, Trainer(Shards(tmp_path / "undisturbed")))
    driver = Driver.of(plan, plans, trainer)
    for each in (undisturbed, driver):
        each.assign()
        each.train([random_batch(plans, 0)])

    def ask(step: int) -> None:
        refusal = refused(trainer.handle(SnapshotRequest(driver.job, 1, step)))
        assert (refusal.reason, refusal.step) == (Reason.PROTOCOL_VIOLATION, step)

    batch = random_batch(plans, 1)
    ask(0)  # the step before
    trainer.handle(driver.captures(batch)[0])
    ask(1)
    for capture in driver.captures(batch)[1:]:
        trainer.handle(capture)
    ask(1)
    norm = only(trainer.handle(driver.step_end(batch, 1)), Norm)
    ask(1)
    total = NormTotal(driver.job, 1, 1, sum(s for _, s in norm.squares) ** 0.5)
    delta = only(trainer.handle(total), Delta)
    ask(1)
    driver.fold([delta])
    driver.batch += 1
    undisturbed.train([batch])
    assert driver.snapshot() == driver.snapshot()
    for each in (undisturbed, driver):
        each.train([random_batch(plans, 2)])
    assert all(torch.equal(undisturbed.parameters[i][n], driver.parameters[i][n]) for i in (0, 1, 2) for n in "AB")


@pytest.mark.parametrize("plan", PLANS)
def test_a_snapshot_has_what_the_optimizer_keeps_of_the_shards_that_were_stepped(plan: str, trainer: Trainer) -> None:
    driver = Driver.of(PLANS[plan], shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    driver.train([[c for c in random_batch(driver.plans, 1) if c.index != 1]])
    (half,) = driver.snapshot()
    entries = {"sgd": [], "nesterov": ["momentum_buffer"]}.get(plan, ["step", "exp_avg", "exp_avg_sq"])
    assert set(half.names) == {(i, f"{name}.{entry}") for i in (0, 2) for name in "AB" for entry in entries}
    assert [index for index, _ in half.digests] == [0, 1, 2]
    assert {tensor.codec for tensor in half.tensors} <= {"fp32"}
    driver.go_on()
    driver.train([random_batch(driver.plans, 2)])


def test_what_a_snapshot_says_stays_while_the_optimizer_goes_on(trainer: Trainer) -> None:
    driver = Driver.of(PLANS["adamw"], shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    driver.train([random_batch(driver.plans, 0)])
    half = only(trainer.handle(SnapshotRequest(driver.job, 1, 1)), Snapshot)
    before = [bytes(tensor.data) for tensor in half.tensors]
    driver.train([random_batch(driver.plans, 1)])
    assert [bytes(tensor.data) for tensor in half.tensors] == before
    later = only(trainer.handle(SnapshotRequest(driver.job, 1, 2)), Snapshot)
    assert [bytes(tensor.data) for tensor in later.tensors] != before


def test_a_digest_of_a_shard_that_is_not_assigned_is_refused(trainer: Trainer) -> None:
    driver = Driver.of(PLAN, shard_plans(FAMILIES["lora"]), trainer)
    answers = trainer.handle(replace(driver.assignment(), digests=((7, "0" * 32),)))
    assert refused(answers).reason == Reason.PROTOCOL_VIOLATION
    driver.assign()


@pytest.mark.parametrize(("taken", "wanted"), [("adamw", "nesterov"), ("nesterov", "adamw")])
def test_the_state_of_another_optimizer_is_refused(taken: str, wanted: str, trainer: Trainer) -> None:
    driver = Driver.of(PLANS[taken], shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    driver.train([random_batch(driver.plans, 0)])
    driver.snapshot()
    driver.go_back()
    driver.plan = PLANS[wanted]
    assert refused(trainer.handle(driver.assignment())).reason == Reason.PROTOCOL_VIOLATION


# --- what else is wrong -----------------------------------------------------------------------------------------------


def test_other_bits_on_the_server_are_told(trainer: Trainer) -> None:
    driver = Driver.of(PLAN, shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    driver.send_batch(random_batch(driver.plans, 1), 1)
    assert refused(trainer.handle(Ack(driver.job, 1, 0, "0" * 32))).reason == Reason.DIGEST_MISMATCH


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_that_is_not_finite_is_refused_with_its_site(family: str, trainer: Trainer) -> None:
    driver = Driver.of(PLAN, shard_plans(FAMILIES[family]), trainer)
    driver.assign()
    batch = [
        replace(c, x_ND=c.x_ND * 1e30, g_NO=c.g_NO * 1e30) if c.index == 2 else c for c in random_batch(driver.plans, 1)
    ]
    (answers,) = driver.send_batch(batch, 1)
    assert refused(answers).reason == Reason.NON_FINITE_GRADIENT
    assert "layers.0.o" in refused(answers).message
    driver.epoch, driver.step = 2, 0
    driver.assign()
    driver.train([random_batch(driver.plans, 1)])


WRONG_ASSIGNMENTS: dict[str, dict[str, object]] = {
    "codec": {"values": "fp7"},
    "codec of deltas": {"deltas": "fp7"},
    "rows": {"shards": shard_plans(FAMILIES["lora"], "some")},
    "optimizer": {"plan": replace(PLAN, optimizer="lion")},
    "job": {"job": "../../etc"},
}


@pytest.mark.parametrize("wrong", WRONG_ASSIGNMENTS)
def test_an_assignment_that_cannot_be_followed_is_refused(wrong: str, trainer: Trainer) -> None:
    driver = Driver.of(PLAN, shard_plans(FAMILIES["lora"]), trainer)
    answers = trainer.handle(replace(driver.assignment(), **WRONG_ASSIGNMENTS[wrong]))  # type: ignore[arg-type]
    assert refused(answers).reason in (Reason.PROTOCOL_VIOLATION, Reason.UNSUPPORTED_CODEC)
    driver.assign()


def test_an_input_is_freed_with_the_last_g_of_its_group(trainer: Trainer) -> None:
    driver = Driver.of(PLAN, shard_plans(FAMILIES["lora"]), trainer)
    driver.assign()
    held = []
    for frame in driver.captures(random_batch(driver.plans, 1, rows=61)):  # the output projection, then k, then q
        trainer.handle(frame)
        held.append(sum(type(o) is torch.Tensor and o.shape == (61, 6) for o in gc.get_objects()))
    assert held[1] - held[0] == 1
    assert held[2] == held[0]
