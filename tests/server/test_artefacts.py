"""Artefacts: there whole or not at all, named by ids alone, in one process's folder."""

import errno
import hashlib
import os
from functools import partial
from pathlib import Path

import pytest

from cola_common import ids
from cola_common.errors import ColaError, Reason
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
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match="disk full"):
        artefacts.write_checkpoint(ids.new("ftckpt"), fails)
    with pytest.raises(RuntimeError), artefacts.new_file(ids.new("file")) as staged:
        staged.path.write_bytes(b"abc")
        raise RuntimeError
    assert everything(folder) == set()
    assert list((folder / "tmp").iterdir()) == []


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
    "file-../" + "0" * 21, "FILE-" + "0" * 24,
]  # fmt: skip


@pytest.mark.parametrize("id", HOSTILE)
def test_what_is_no_id_names_nothing(artefacts, folder, id):
    (folder.parent / "secret").mkdir()
    for call in (artefacts.file_path, artefacts.adapter_path, artefacts.checkpoint_path):
        with pytest.raises(ColaError) as error:
            call(id)
        assert error.value.reason in (Reason.UNKNOWN_FILE, Reason.UNKNOWN_CHECKPOINT)
    for make in (artefacts.new_file, artefacts.new_adapter, partial(artefacts.write_checkpoint, write=write_adapter)):
        with pytest.raises(ColaError):
            make(id)
    artefacts.remove(id)
    assert (folder.parent / "secret").is_dir()
    assert {path.name for path in folder.iterdir()} == {"files", "adapters", "checkpoints", "tmp", "lock"}
    assert list((folder / "tmp").iterdir()) == []
