"""Optimizer state comes back exactly where it belongs, and nowhere else."""

import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
import torch
from structlog.testing import capture_logs

from cola_common.adapters import Parameters
from cola_common.errors import ColaError, Reason
from cola_common.messages import Assign, OwnedShard, SnapshotRequest
from cola_common.tensor import decode, digest, encode
from cola_worker import shards as module
from cola_worker.shard import Shard
from cola_worker.shards import KEEP_SECONDS, Shards
from cola_worker.trainer import Trainer
from tests.worker.driver import FAMILIES, PLAN, Driver, changed, parameters_of, random_batch, refused, shard_plans

PLANS = {
    "sgd": PLAN,
    "momentum": changed(momentum=0.9),
    "adamw": changed(optimizer="adamw", learning_rate=0.02, weight_decay=0.1),
}
ADAMW = PLANS["adamw"]


@pytest.fixture(autouse=True)
def _fresh_loggers() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def train(driver: Driver, steps: range) -> None:
    for step in steps:
        driver.train([random_batch(driver.plans, step)])


def equal(left: dict[int, Parameters], right: dict[int, Parameters]) -> bool:
    return all(torch.equal(left[i][name], right[i][name]) for i in left for name in left[i])


def trained(folder: Path, *, steps: int = 2) -> Driver:
    """An AdamW job on a worker with its shards in `folder`, at a snapshot."""
    driver = Driver.of(ADAMW, shard_plans(FAMILIES["lora"]), Trainer(Shards(folder)))
    driver.assign()
    train(driver, range(steps))
    driver.snapshot()
    return driver


Way = Callable[[Driver, Path], None]
ALL = frozenset({0, 1, 2})
WAYS: dict[str, Way] = {
    "another worker": lambda d, folder: d.go_on(Trainer(Shards(folder / "another"))),
    "two other workers": lambda d, folder: d.go_on(*(Trainer(Shards(folder / name)) for name in ("one", "two"))),
    "the same process": lambda d, _: d.go_on(owned=ALL),
    "the same process without its disk": lambda d, _: d.go_on(),
    "a new process": lambda d, folder: d.go_on(Trainer(Shards(folder / "shards")), owned=ALL),
    "the owner of a part": lambda d, folder: d.go_on(Trainer(Shards(folder / "shards")), owned={1}),
}


@pytest.mark.parametrize(
    ("family", "rows", "deltas"),
    [*((family, "all", "fp32") for family in FAMILIES), ("lora", "exact", "int8"), ("mlp", "all", "int4")],
)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("after", [0, 3])
def test_going_on_from_a_snapshot_gives_the_bits_of_going_on(
    family: str, rows: str, deltas: str, plan: str, way: str, after: int, tmp_path: Path
) -> None:
    plans = shard_plans(FAMILIES[family], rows)
    undisturbed = Driver.of(PLANS[plan], plans, Trainer(Shards(tmp_path / "undisturbed")), deltas=deltas)
    driver = Driver.of(PLANS[plan], plans, Trainer(Shards(tmp_path / "shards")), deltas=deltas)
    undisturbed.assign()
    train(undisturbed, range(6))
    driver.assign()
    train(driver, range(after))
    driver.snapshot()
    train(driver, range(10, 12))  # steps that are lost, and must leave nothing behind: neither here nor on the disk
    WAYS[way](driver, tmp_path)
    assert driver.step == after
    train(driver, range(after, 6))
    assert equal(driver.parameters, undisturbed.parameters)


def test_without_the_state_of_its_optimizer_a_job_would_have_other_bits(tmp_path: Path) -> None:
    """The tests of going on see what they are there to see."""
    undisturbed, driver = trained(tmp_path / "undisturbed"), trained(tmp_path / "shards")
    train(undisturbed, range(2, 4))
    assert driver.kept is not None
    driver.kept.optimizer.clear()
    driver.kept.digests.update({i: digest.state(parameters) for i, parameters in driver.parameters.items()})
    driver.go_on()
    train(driver, range(2, 4))
    assert not equal(driver.parameters, undisturbed.parameters)


def test_what_is_kept_is_offered_with_step_and_digest(tmp_path: Path) -> None:
    driver = trained(tmp_path)
    assert driver.kept is not None
    assert set(Shards(tmp_path).owned()) == {
        OwnedShard(driver.job, p.site, 2, driver.kept.digests[p.index]) for p in driver.plans
    }


def test_what_is_kept_is_the_last_snapshot_and_nothing_between(tmp_path: Path) -> None:
    driver = Driver.of(ADAMW, shard_plans(FAMILIES["lora"]), Trainer(Shards(tmp_path)))
    driver.assign()
    train(driver, range(2))
    assert Shards(tmp_path).owned() == ()
    driver.snapshot()
    offered = Shards(tmp_path).owned()
    train(driver, range(2, 4))
    driver.revoke(keep=True)
    assert Shards(tmp_path).owned() == offered != ()
    driver.go_on()
    train(driver, range(2, 4))
    driver.snapshot()
    assert {owned.step for owned in Shards(tmp_path).owned()} == {4}


def test_a_snapshot_says_whether_it_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full costs a way from the server some day, and nothing else."""
    driver, undisturbed = trained(tmp_path / "shards"), trained(tmp_path / "undisturbed")
    assert [half.kept for half in driver.snapshot()] == [True]

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(module, "_replace", full)
        assert [half.kept for half in driver.snapshot()] == [False]
    assert [entry["error"] for entry in logs if entry["log_level"] == "warning"] == [
        "[Errno 28] No space left on device"
    ]
    assert Shards(tmp_path / "shards").owned() == ()
    assert refused(driver.trainers[0].handle(next_assignment(driver, owned=ALL))).reason == Reason.STATE_MISSING
    driver.go_on()
    for each in (driver, undisturbed):
        train(each, range(2, 4))
    assert equal(driver.parameters, undisturbed.parameters)


def next_assignment(driver: Driver, *, owned: Collection[int]) -> Assign:
    driver.go_back()
    return driver.assignment(owned=owned)


def test_what_is_revoked_for_good_is_gone(tmp_path: Path) -> None:
    driver = trained(tmp_path)
    driver.revoke(keep=True)
    assert len(Shards(tmp_path).owned()) == 3
    driver.go_on()
    driver.revoke(keep=False)
    assert Shards(tmp_path).owned() == ()
    assert list(tmp_path.iterdir()) == []


Change = Callable[[Assign], Assign]
ELSEWHERE: dict[str, Change] = {
    "an earlier step": lambda a: replace(a, step=a.step - 1),
    "a later step": lambda a: replace(a, step=a.step + 1),
    "other parameters": lambda a: replace(a, tensors=(encode(decode(a.tensors[0]) * 1.5, "fp32"), *a.tensors[1:])),
    "another state": lambda a: replace(a, digests=((0, "0" * 32), *a.digests[1:])),
    "another job": lambda a: replace(a, job=a.job[:-1] + ("0" if a.job[-1] != "0" else "1")),
    "another site": lambda a: replace(a, shards=(replace(a.shards[0], site="elsewhere"), *a.shards[1:])),
}


@pytest.mark.parametrize("change", ELSEWHERE)
def test_state_of_anything_else_is_missing_and_the_server_can_send_it(change: str, tmp_path: Path) -> None:
    undisturbed, driver = trained(tmp_path / "undisturbed"), trained(tmp_path / "shards")
    trainer = Trainer(Shards(tmp_path / "shards"))
    wrong = ELSEWHERE[change](next_assignment(driver, owned=ALL))
    refusal = refused(trainer.handle(wrong))
    assert (refusal.reason, refusal.job, refusal.epoch) == (Reason.STATE_MISSING, wrong.job, wrong.epoch)
    stale = refused(trainer.handle(SnapshotRequest(wrong.job, wrong.epoch, wrong.step)))
    assert stale.reason == Reason.STALE_EPOCH  # it was not assigned
    driver.go_on(trainer)
    for each in (driver, undisturbed):
        train(each, range(2, 4))
    assert equal(driver.parameters, undisturbed.parameters)


def damages() -> dict[str, Callable[[bytes], bytes]]:
    return {
        "empty": lambda _: b"",
        "torn": lambda data: data[: len(data) // 2],
        "flipped": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        "foreign": lambda _: b"PK\x03\x04" + bytes(100),
        "huge header": lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_file_is_told_of_and_not_used(damage: str, tmp_path: Path) -> None:
    driver, undisturbed = trained(tmp_path / "shards"), trained(tmp_path / "undisturbed")
    files = sorted(tmp_path.glob("shards/*/*"))
    for path in files:
        path.write_bytes(damages()[damage](path.read_bytes()))
    with capture_logs() as logs:
        shards = Shards(tmp_path / "shards")
        assert shards.owned() == ()
    assert {entry["path"] for entry in logs} == {str(path) for path in files}
    trainer = Trainer(shards)
    assert refused(trainer.handle(next_assignment(driver, owned={0}))).reason == Reason.STATE_MISSING
    driver.go_on(trainer)
    for each in (driver, undisturbed):
        train(each, range(2, 4))
    assert equal(driver.parameters, undisturbed.parameters)


def test_old_and_half_written_files_go_when_the_worker_starts(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    plans = shard_plans(FAMILIES["lora"])
    jobs = ["ftjob-" + digit * 24 for digit in "ab"]
    for job in jobs:
        for plan in plans:
            shards.keep(job, 0, Shard(plan, parameters_of(plans)[plan.index], ADAMW))
    long_ago = time.time() - KEEP_SECONDS - 60
    for path in (tmp_path / jobs[0]).iterdir():
        os.utime(path, (long_ago, long_ago))
    (tmp_path / jobs[1] / "half.partial").write_bytes(b"half")
    assert {o.job for o in Shards(tmp_path).owned()} == {jobs[1]}
    assert sorted(p.name for p in tmp_path.iterdir()) == [jobs[1]]
    assert not (tmp_path / jobs[1] / "half.partial").exists()


@pytest.mark.parametrize(
    "job", ["", "..", "../ftjob-" + "0" * 24, "ftjob-" + "0" * 23, "ftjob-" + "0" * 24 + "\x00", "/"]
)
def test_a_name_that_is_no_job_id_names_no_file(job: str, tmp_path: Path) -> None:
    plans = shard_plans(FAMILIES["lora"])
    shard = Shard(plans[0], parameters_of(plans)[0], ADAMW)
    shards = Shards(tmp_path / "shards")
    for call in (
        lambda: shards.keep(job, 0, shard),
        lambda: shards.restore(job, 0, shard, ""),
        lambda: shards.drop(job),
    ):
        with pytest.raises(ColaError):
            call()
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]
