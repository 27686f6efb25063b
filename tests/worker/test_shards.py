"""Optimizer state comes back exactly where it belongs, and nowhere else."""

import copy
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
import torch
from structlog.testing import capture_logs

from cola_common.adapters import Parameters
from cola_common.errors import ColaError
from cola_common.messages import OwnedShard
from cola_common.tensor import digest
from cola_worker import shards as module
from cola_worker.shard import Shard
from cola_worker.shards import KEEP_SECONDS, Shards
from cola_worker.trainer import Trainer
from tests.worker.driver import FAMILIES, PLAN, Driver, changed, parameters_of, random_batch, shard_plans

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


def reborn(driver: Driver, folder: Path) -> None:
    """A new process of the same worker, and a new epoch of the job."""
    driver.trainers = [Trainer(Shards(folder))]
    driver.epoch += 1
    driver.assign()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("end", ["revoked", "closed", "reassigned"])
@pytest.mark.parametrize("after", [0, 3])
def test_going_on_later_gives_the_bits_of_going_on(
    family: str, plan: str, end: str, after: int, tmp_path: Path
) -> None:
    plans = shard_plans(FAMILIES[family])
    undisturbed = Driver.of(PLANS[plan], plans, Trainer(Shards(tmp_path / "undisturbed")))
    driver = Driver.of(PLANS[plan], plans, Trainer(Shards(tmp_path / "shards")))
    undisturbed.assign()
    train(undisturbed, range(6))
    driver.assign()
    train(driver, range(after))
    if end == "revoked":
        driver.revoke(keep=True)
    elif end == "closed":
        driver.trainers[0].close()
    if end == "reassigned":
        driver.epoch += 1
        driver.assign()
    else:
        reborn(driver, tmp_path / "shards")
    train(driver, range(after, 6))
    assert equal(driver.parameters, undisturbed.parameters)


def test_what_is_kept_is_offered_with_step_and_digest(tmp_path: Path) -> None:
    driver = Driver.of(ADAMW, shard_plans(FAMILIES["lora"]), Trainer(Shards(tmp_path)))
    driver.assign()
    assert Shards(tmp_path).owned() == ()
    train(driver, range(2))
    driver.revoke(keep=True)
    assert set(Shards(tmp_path).owned()) == {
        OwnedShard(driver.job, p.site, 2, digest.state(driver.parameters[p.index])) for p in driver.plans
    }


def test_what_is_revoked_for_good_is_gone(tmp_path: Path) -> None:
    driver = Driver.of(ADAMW, shard_plans(FAMILIES["lora"]), Trainer(Shards(tmp_path)))
    for keep in (True, False):
        driver.epoch += 1
        driver.assign()
        driver.revoke(keep=keep)
    assert Shards(tmp_path).owned() == ()
    assert list(tmp_path.iterdir()) == []


Change = Callable[[Driver], None]
ELSEWHERE: dict[str, Change] = {
    "step": lambda d: setattr(d, "step", d.step - 1),
    "parameters": lambda d: d.parameters[1]["A"].mul_(1.5),
    "job": lambda d: setattr(d, "job", d.job[:-1] + ("0" if d.job[-1] != "0" else "1")),
}


@pytest.mark.parametrize("changed_", ELSEWHERE)
def test_state_of_anything_else_is_not_taken_up(changed_: str, tmp_path: Path) -> None:
    driver = Driver.of(ADAMW, shard_plans(FAMILIES["lora"]), Trainer(Shards(tmp_path)))
    driver.assign()
    train(driver, range(2))
    driver.revoke(keep=True)
    ELSEWHERE[changed_](driver)
    shards = Shards(tmp_path)
    shard = Shard(driver.plans[1], copy.deepcopy(driver.parameters[1]), ADAMW)
    assert not shards.restore(driver.job, driver.step, shard)
    assert shard.optimizer_state() == {}


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
    driver = Driver.of(ADAMW, shard_plans(FAMILIES["lora"]), Trainer(Shards(tmp_path)))
    driver.assign()
    train(driver, range(2))
    driver.revoke(keep=True)
    files = sorted(tmp_path.glob("*/*"))
    for path in files:
        path.write_bytes(damages()[damage](path.read_bytes()))
    with capture_logs() as logs:
        shards = Shards(tmp_path)
        assert shards.owned() == ()
        shard = Shard(driver.plans[0], copy.deepcopy(driver.parameters[0]), ADAMW)
        assert not shards.restore(driver.job, driver.step, shard)
    assert {entry["path"] for entry in logs} == {str(path) for path in files}
    reborn(driver, tmp_path)
    train(driver, range(2, 3))


def test_a_full_disk_costs_no_more_than_the_memory_of_an_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver.of(ADAMW, shard_plans(FAMILIES["lora"]), Trainer(Shards(tmp_path)))
    driver.assign()
    train(driver, range(2))

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(module, "_replace", full)
        driver.revoke(keep=True)
    assert [entry["error"] for entry in logs if entry["log_level"] == "warning"] == [
        "[Errno 28] No space left on device"
    ]
    assert Shards(tmp_path).owned() == ()
    reborn(driver, tmp_path)
    train(driver, range(2, 3))


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
    for call in (lambda: shards.keep(job, 0, shard), lambda: shards.restore(job, 0, shard), lambda: shards.drop(job)):
        with pytest.raises(ColaError):
            call()
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]
