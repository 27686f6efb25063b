"""Artefacts: there whole or not at all, named by ids alone, in one process's folder."""

import errno
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from safetensors import SafetensorError

from cola_common import ids
from cola_common.errors import ColaError, Reason
from cola_common.jobs import Checkpoint, FileObject
from cola_server.jobs import Artefacts


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def artefacts(folder):
    artefacts = Artefacts(folder)
    yield artefacts
    artefacts.close()


def everything(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def write_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")


def test_a_file_is_there_once_it_is_published(artefacts, folder):
    id = ids.new("file")
    with artefacts.new_file(id) as staged:
        staged.path.write_bytes(b"abc")
        with pytest.raises(ColaError) as error:
            artefacts.file_path(id)
        assert error.value.reason == Reason.UNKNOWN_FILE
        staged.publish()
    assert artefacts.file_path(id).read_bytes() == b"abc"
    assert everything(folder) == {f"files/{id}"}


def test_a_checkpoint_is_a_folder_with_the_digest_of_its_weights(artefacts, folder):
    id = ids.new("ftckpt")
    assert artefacts.write_checkpoint(id, write_adapter) == hashlib.sha256(b"weights").hexdigest()
    assert everything(folder) == {
        f"checkpoints/{id}/adapter_config.json",
        f"checkpoints/{id}/adapter_model.safetensors",
    }
    assert artefacts.checkpoint_path(id) == artefacts.adapter_path(id) == folder / "checkpoints" / id


def test_an_uploaded_adapter_is_beside_its_upload(artefacts):
    id = ids.new("file")
    with artefacts.new_adapter(id) as staged:
        write_adapter(staged.path)
        staged.publish()
    assert (artefacts.adapter_path(id) / "adapter_config.json").is_file()
    artefacts.remove(id)
    assert artefacts.ids() == set()


def test_what_raises_leaves_nothing(artefacts, folder):
    def fails(folder: Path) -> None:
        write_adapter(folder)
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        artefacts.write_checkpoint(ids.new("ftckpt"), fails)
    with pytest.raises(RuntimeError), artefacts.new_file(ids.new("file")) as staged:
        staged.path.write_bytes(b"abc")
        raise RuntimeError
    assert everything(folder) == set()
    assert list((folder / "tmp").iterdir()) == []


FULL = {
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "a quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "a full disk under safetensors": SafetensorError("I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL.keys())
def test_a_full_disk_is_told_by_what_was_written_and_leaves_nothing(artefacts, folder, error):
    def fails(folder: Path) -> None:
        write_adapter(folder)
        raise error

    id = ids.new("ftckpt")
    with pytest.raises(ColaError) as told:
        artefacts.write_checkpoint(id, fails)
    assert (told.value.reason, told.value.details) == (Reason.STORAGE_FULL, {"file": f"checkpoints/{id}"})
    with pytest.raises(ColaError) as told, artefacts.scratch() as scratch:
        fails(scratch)
    assert told.value.reason == Reason.STORAGE_FULL
    assert everything(folder) == set()
    assert list((folder / "tmp").iterdir()) == []


@pytest.mark.parametrize("error", [SafetensorError("header too large"), SafetensorError("(os error 5)")])
def test_what_is_no_full_disk_is_not_told_as_one(artefacts, error):
    with pytest.raises(SafetensorError) as raised, artefacts.scratch():
        raise error
    assert raised.value is error


def test_bytes_are_on_the_disk_before_the_name_is(artefacts, folder, monkeypatch):
    order = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda self, target: (order.append("rename"), rename(self, target)))
    artefacts.write_checkpoint(ids.new("ftckpt"), write_adapter)
    at = order.index("rename")
    assert {Path(path).name for path in order[: at - 1]} == {"adapter_config.json", "adapter_model.safetensors"}
    assert Path(order[at - 1]).parent == folder / "tmp"
    assert order[at + 1 :] == [str(folder / "checkpoints")]


# --- snapshots ------------------------------------------------------------------------------------------------------

NAMES = ["0000000050-000001.safetensors", "0000000100-000001.safetensors", "0000000100-000002.safetensors"]


def test_a_job_keeps_its_two_newest_snapshots(artefacts, folder):
    job, other = ids.new("ftjob"), ids.new("ftjob")
    assert artefacts.snapshots(job) == []
    artefacts.write_snapshot(other, NAMES[0], b"other")
    for count, name in enumerate(NAMES, start=1):
        artefacts.write_snapshot(job, name, memoryview(name.encode()))
        newest = NAMES[max(0, count - 2) : count][::-1]
        assert [(path.name, path.read_text()) for path in artefacts.snapshots(job)] == [(name, name) for name in newest]
    assert artefacts.ids() == {job, other}
    artefacts.remove_snapshots(job)
    artefacts.remove_snapshots(job)
    assert everything(folder) == {f"snapshots/{other}/{NAMES[0]}"}


def test_snapshots_that_two_remove_at_once_are_removed(artefacts, folder):
    for _ in range(20):
        job = ids.new("ftjob")
        for number in range(2):
            artefacts.write_snapshot(job, f"{number}.safetensors", b"x")
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(artefacts.remove_snapshots, [job] * 4))
    assert everything(folder) == set()


def test_a_damaged_snapshot_is_out_of_the_way_of_the_one_before_it(artefacts):
    job = ids.new("ftjob")
    for name in NAMES[:2]:
        artefacts.write_snapshot(job, name, b"x")
    damaged = artefacts.snapshots(job)[0]
    artefacts.set_aside(damaged)
    assert [path.name for path in artefacts.snapshots(job)] == [NAMES[0]]
    assert damaged.with_name(f"{damaged.name}.damaged").read_bytes() == b"x"
    artefacts.write_snapshot(job, NAMES[2], b"y")
    assert [path.name for path in artefacts.snapshots(job)] == [NAMES[2], NAMES[0]]


def test_a_snapshot_that_finds_no_room_leaves_those_that_are_there(artefacts, folder, monkeypatch):
    job = ids.new("ftjob")
    for name in NAMES[:2]:
        artefacts.write_snapshot(job, name, b"x")
    before = everything(folder)

    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(ColaError) as error:
        artefacts.write_snapshot(job, NAMES[2], b"y")
    assert (error.value.reason, error.value.details["file"]) == (Reason.STORAGE_FULL, f"{job}/{NAMES[2]}")
    assert everything(folder) == before


def test_a_snapshot_s_bytes_are_on_the_disk_before_its_name_is_and_an_old_one_goes_last(artefacts, folder, monkeypatch):
    job, order = ids.new("ftjob"), []
    fsync, rename, unlink = os.fsync, Path.rename, Path.unlink
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda self, target: (order.append("rename"), rename(self, target)))
    monkeypatch.setattr(Path, "unlink", lambda self: (order.append("unlink"), unlink(self)))
    home = folder / "snapshots" / job
    artefacts.write_snapshot(job, NAMES[0], b"x")
    assert order[0] == str(home.parent)
    assert order[2:] == ["rename", str(home)]
    assert Path(order[1]).is_relative_to(folder / "tmp")
    artefacts.write_snapshot(job, NAMES[1], b"x")
    order.clear()
    artefacts.write_snapshot(job, NAMES[2], b"x")
    assert order[1:] == ["rename", str(home), "unlink"]


# --- whether they are what they were --------------------------------------------------------------------------------


def uploaded(artefacts, content=b"abc", purpose="fine-tune"):
    id = ids.new("file")
    with artefacts.new_file(id) as staged:
        staged.path.write_bytes(content)
        staged.publish()
    if purpose == "adapter":
        with artefacts.new_adapter(id) as staged:
            write_adapter(staged.path)
            staged.publish()
    digest = hashlib.sha256(content).hexdigest()
    return FileObject(id=id, filename="a.jsonl", purpose=purpose, bytes=len(content), created_at=1.0, digest=digest)


def checkpoint(artefacts):
    id = ids.new("ftckpt")
    digest = artefacts.write_checkpoint(id, write_adapter)
    return Checkpoint(id=id, job=ids.new("ftjob"), step_number=1, created_at=1.0, digest=digest)


def test_what_is_whole_passes(artefacts):
    for file in (uploaded(artefacts), uploaded(artefacts, purpose="adapter"), uploaded(artefacts, b"")):
        artefacts.verify_file(file)
    record = checkpoint(artefacts)
    artefacts.check(record)
    assert artefacts.verify_checkpoint(record) == artefacts.checkpoint_path(record.id)


@pytest.mark.parametrize(
    ("purpose", "damage", "told"),
    [
        ("fine-tune", lambda file, _: file.unlink(), "gone"),
        ("fine-tune", lambda file, _: file.write_bytes(b"ab"), "it was 3 bytes, and 2 are here"),
        ("adapter", lambda _, adapter: shutil.rmtree(adapter), "unpacked"),
        ("adapter", lambda _, adapter: (adapter / "adapter_model.safetensors").unlink(), "unpacked"),
    ],
)
def test_a_file_that_is_not_whole_is_told_by_its_id_and_name(artefacts, folder, purpose, damage, told):
    file = uploaded(artefacts, purpose=purpose)
    damage(artefacts.file_path(file.id), folder / "adapters" / file.id)
    for call in (artefacts.check, artefacts.verify_file):
        with pytest.raises(ColaError) as error:
            call(file)
        assert error.value.reason == Reason.INVALID_FILE
        for words in (file.id, file.filename, told):
            assert words in error.value.message


def test_torn_bytes_are_found_when_they_are_read(artefacts):
    file, made = uploaded(artefacts), checkpoint(artefacts)
    artefacts.file_path(file.id).write_bytes(b"abd")
    (artefacts.checkpoint_path(made.id) / "adapter_model.safetensors").write_bytes(b"weightz")
    for verify, record in ((artefacts.verify_file, file), (artefacts.verify_checkpoint, made)):
        artefacts.check(record)
        with pytest.raises(ColaError) as error:
            verify(record)
        assert error.value.reason == Reason.INVALID_FILE
        assert record.id in error.value.message


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda path: (path / "adapter_model.safetensors").unlink()])
def test_a_checkpoint_that_is_gone_is_told(artefacts, damage):
    record = checkpoint(artefacts)
    damage(artefacts.checkpoint_path(record.id))
    for call in (artefacts.check, artefacts.verify_checkpoint):
        with pytest.raises(ColaError) as error:
            call(record)
        assert (error.value.reason, error.value.details["file"]) == (Reason.INVALID_FILE, record.id)


# --- the folder -----------------------------------------------------------------------------------------------------


def test_what_a_crash_left_unfinished_goes_at_the_next_start(artefacts, folder):
    artefacts.new_file(ids.new("file")).path.write_bytes(b"half")
    write_adapter(artefacts.new_adapter(ids.new("file")).path)
    kept = ids.new("ftckpt")
    artefacts.write_checkpoint(kept, write_adapter)
    assert len(everything(folder)) == 5
    artefacts.close()
    again = Artefacts(folder)
    assert again.ids() == {kept}
    assert len(everything(folder)) == 2
    again.close()


def test_a_folder_belongs_to_one_process_at_a_time(artefacts, folder):
    with pytest.raises(ColaError) as error:
        Artefacts(folder)
    assert error.value.reason == Reason.INVALID_CONFIG
    assert str(folder) in error.value.message
    artefacts.close()
    Artefacts(folder).close()


HOSTILE = [
    "", ".", "..", "/etc/passwd", "../../secret", "file-", "file-" + "0" * 23, "file-" + "0" * 25, "file-" + "G" * 24,
    "file-" + "0" * 24 + "\n", "file-" + "0" * 24 + "/..", "file-" + "0" * 24 + "\0", "ftckpt-../../secret",
    "ftjob-../../secret", "file-../" + "0" * 21, "FILE-" + "0" * 24,
]  # fmt: skip


@pytest.mark.parametrize("id", HOSTILE)
def test_what_is_no_id_names_nothing(artefacts, folder, id):
    (folder.parent / "secret").mkdir()
    for call in (artefacts.file_path, artefacts.adapter_path, artefacts.checkpoint_path):
        with pytest.raises(ColaError) as error:
            call(id)
        assert error.value.reason in (Reason.UNKNOWN_FILE, Reason.UNKNOWN_CHECKPOINT)
    for make in (
        artefacts.new_file,
        artefacts.new_adapter,
        partial(artefacts.write_checkpoint, write=write_adapter),
        partial(artefacts.write_snapshot, name="x.safetensors", data=b""),
        artefacts.snapshots,
        artefacts.remove_snapshots,
    ):
        with pytest.raises(ColaError):
            make(id)
    artefacts.remove(id)
    assert (folder.parent / "secret").is_dir()
    assert {path.name for path in folder.iterdir()} == {"files", "adapters", "checkpoints", "snapshots", "tmp", "lock"}
    assert list((folder / "tmp").iterdir()) == []
