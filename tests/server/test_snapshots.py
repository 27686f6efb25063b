"""A job's snapshots: what is read is what was written, to the bit, or it is not read."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from cola_common.errors import ColaError, Reason
from cola_common.tensor import digest
from cola_server.jobs import Artefacts
from cola_server.training.snapshots import Snapshot, Snapshots

JOB = "ftjob-" + "0" * 24
SITES = ("layers.0.q", "layers.0.k")


def prepared(job: str = JOB, base: str = "digest of the base", sites: tuple[str, ...] = SITES) -> Any:
    """What `Snapshots` needs to know of a job."""
    named = [SimpleNamespace(name=site) for site in sites]
    return SimpleNamespace(job=job, base=SimpleNamespace(name="tiny", digest=base), sites=named)


def snapshot(step: int, epoch: int = 1) -> Snapshot:
    """With values that differ from step to step; the second shard was never stepped. Odd values must survive too."""
    made = torch.Generator().manual_seed(step)
    parameters = [{"A": torch.randn(2, 3, generator=made), "B": torch.zeros(3, 2)} for _ in SITES]
    parameters[0]["B"][0] = torch.tensor([-0.0, float("nan")])
    state = {
        f"{name}.{entry}": torch.randn(shape, generator=made)
        for name, shape in (("A", (2, 3)), ("B", (3, 2)))
        for entry, shape in (("step", ()), ("exp_avg", shape))
    }
    optimizer = [state, {}]
    digests = [digest.state({**p, **o}) for p, o in zip(parameters, optimizer, strict=True)]
    return Snapshot(epoch, step, 100 * step, parameters, optimizer, digests)


def bits(of: Snapshot) -> list[dict[str, bytes]]:
    return [
        {name: values.numpy().tobytes() for name, values in shard.items()} for shard in (*of.parameters, *of.optimizer)
    ]


def same(left: Snapshot | None, right: Snapshot) -> bool:
    assert left is not None
    told = [(s.epoch, s.step, s.trained_tokens, list(s.digests)) for s in (left, right)]
    return told[0] == told[1] and bits(left) == bits(right)


@pytest.fixture
def artefacts(tmp_path: Path) -> Iterator[Artefacts]:
    artefacts = Artefacts(tmp_path / "data")
    yield artefacts
    artefacts.close()


@pytest.fixture
def snapshots(artefacts: Artefacts) -> Snapshots:
    return Snapshots(prepared(), artefacts)


def test_a_job_without_one_has_none(snapshots: Snapshots) -> None:
    assert snapshots.newest() == (None, [])


def test_a_snapshot_comes_back_to_the_bit(snapshots: Snapshots, artefacts: Artefacts) -> None:
    written = snapshot(50, epoch=3)
    snapshots.write(written)
    for reader in (snapshots, Snapshots(prepared(), artefacts)):
        read, damaged = reader.newest()
        assert same(read, written)
        assert damaged == []


def test_what_was_read_stays_when_later_ones_take_its_place(snapshots: Snapshots) -> None:
    snapshots.write(snapshot(1))
    read, _ = snapshots.newest()
    for step in (2, 3, 4):
        snapshots.write(snapshot(step))
    assert same(read, snapshot(1))


def test_the_newest_is_read_and_the_one_before_it_is_kept(snapshots: Snapshots, artefacts: Artefacts) -> None:
    for step, epoch in ((9, 1), (50, 1), (100, 2), (1000, 2), (1000, 12)):
        snapshots.write(snapshot(step, epoch))
        assert same(snapshots.newest()[0], snapshot(step, epoch))
    assert [path.name for path in artefacts.snapshots(JOB)] == [
        "0000001000-000012.safetensors",
        "0000001000-000002.safetensors",
    ]


def test_jobs_do_not_see_each_others_snapshots(snapshots: Snapshots, artefacts: Artefacts) -> None:
    other = Snapshots(prepared(JOB[:-1] + "1"), artefacts)
    snapshots.write(snapshot(1))
    assert other.newest() == (None, [])


def retold(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Metadata that say something else, under their own checksum."""

    def damage(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        about = json.loads(header["__metadata__"]["about"])
        change(about)
        header["__metadata__"]["about"] = json.dumps(about)
        header["__metadata__"]["checksum"] = digest.combine([header["__metadata__"]["about"]])
        encoded = json.dumps(header).encode()
        return len(encoded).to_bytes(8, "little") + encoded + data[8 + size :]

    return damage


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "torn in its tensors": lambda data: data[:-5],
    "torn in its header": lambda data: data[:100],
    "with more behind it": lambda data: data + b"\0",
    "zeroed": lambda data: bytes(len(data)),
    "a flipped bit in the tensors": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "a flipped bit in the metadata": lambda data: data.replace(b"trained_tokens", b"trained_tokenr"),
    "another step": lambda data: data.replace(rb"\"step\": 2", rb"\"step\": 3"),
    "a header that is too long": lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
    "foreign": lambda _: b"PK\x03\x04" + bytes(1000),
    "no metadata": lambda _: save({"0.A": torch.zeros(2)}),
    "of another job": retold(lambda about: about.update(job=JOB[:-1] + "1")),
    "of other sites": retold(lambda about: about.update(sites=["a", "b"])),
    "other digests": retold(lambda about: about.update(digests=about["digests"][::-1])),
    "a digest too few": retold(lambda about: about["digests"].pop()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_snapshot_is_named_and_set_aside_and_the_one_before_it_is_used(
    damage: str, snapshots: Snapshots, artefacts: Artefacts
) -> None:
    for step in (1, 2):
        snapshots.write(snapshot(step))
    newest = artefacts.snapshots(JOB)[0]
    before = newest.read_bytes()
    newest.write_bytes(DAMAGES[damage](before))
    assert newest.read_bytes() != before
    read, damaged = snapshots.newest()
    assert same(read, snapshot(1))
    assert damaged == [newest.name] == ["0000000002-000001.safetensors"]
    assert newest.with_name(newest.name + ".damaged").read_bytes() == DAMAGES[damage](before)
    read, damaged = snapshots.newest()
    assert same(read, snapshot(1)) and damaged == []
    snapshots.write(snapshot(2, epoch=2))
    assert same(snapshots.newest()[0], snapshot(2, epoch=2))


def test_no_flipped_bit_anywhere_is_taken_for_the_truth(snapshots: Snapshots, artefacts: Artefacts) -> None:
    snapshots.write(snapshot(2))
    (path,) = artefacts.snapshots(JOB)
    data = path.read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        read, damaged = snapshots.newest()
        assert (read is None and damaged == [path.name]) or same(read, snapshot(2)), position


def test_where_all_are_damaged_the_job_has_none_and_all_are_named(snapshots: Snapshots, artefacts: Artefacts) -> None:
    for step in (1, 2):
        snapshots.write(snapshot(step))
    names = [path.name for path in artefacts.snapshots(JOB)]
    for path in artefacts.snapshots(JOB):
        path.write_bytes(b"")
    assert snapshots.newest() == (None, names)


def test_a_snapshot_that_cannot_be_written_leaves_the_one_before_it(
    snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots.write(snapshot(1))

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ColaError) as refused:
        patch.setattr(Path, "write_bytes", full)
        snapshots.write(snapshot(2))
    assert refused.value.reason == Reason.STORAGE_FULL
    read, damaged = snapshots.newest()
    assert same(read, snapshot(1)) and damaged == []


def test_another_base_model_is_refused_by_name_and_nothing_is_set_aside(
    snapshots: Snapshots, artefacts: Artefacts
) -> None:
    snapshots.write(snapshot(1))
    with pytest.raises(ColaError, match="tiny") as refused:
        Snapshots(prepared(base="another digest"), artefacts).newest()
    assert refused.value.reason == Reason.BASE_MODEL_CHANGED
    assert "digest of the base" in str(refused.value) and "another digest" in str(refused.value)
    assert same(snapshots.newest()[0], snapshot(1))
