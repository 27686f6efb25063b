"""Uploads: what may come in and what never does. Hostile files leave nothing and are never opened."""

import errno
import hashlib
import io
import json
import pickle  # noqa: TID251 — to make what must never be opened
import stat
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from cola_common.errors import ColaError, Reason
from cola_server.jobs import Artefacts, Limits, Upload
from tests.support.databases import new_store

LINE = b'{"text": "a"}\n'
PEFT = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
OWN = {"cola_adapter.json": b"{}", "cola_adapter.safetensors": b"weights"}


@pytest.fixture
def store(tmp_path):
    store = new_store(tmp_path)
    yield store
    store.close()


@pytest.fixture
def artefacts(tmp_path):
    artefacts = Artefacts(tmp_path / "data")
    yield artefacts
    artefacts.close()


@pytest.fixture
def send(store, artefacts):
    def send(content, filename="data.jsonl", purpose="fine-tune", key=None, limits=None, chunk=1 << 20):
        with Upload(store, artefacts, filename, purpose, key, limits) as upload:
            for start in range(0, len(content), chunk):
                upload.write(content[start : start + chunk])
            return upload.finish()

    return send


@pytest.fixture
def refused(send, store, artefacts, tmp_path):
    """Sends; returns the error. Nothing may stay of what was refused, inside the data folder or outside."""

    def refused(content, *args, **kwargs):
        before = listing(tmp_path)
        with pytest.raises(ColaError) as error:
            send(content, *args, **kwargs)
        assert listing(tmp_path) == before
        assert artefacts.ids() == set()
        assert store.files() == []
        return error.value

    return refused


def listing(folder):
    return {path for path in folder.rglob("*") if not path.name.startswith("cola.db")}


def zipped(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members if isinstance(members, list) else members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


# --- what comes in --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 1000, 1 << 20])
def test_bytes_are_kept_as_they_were_sent(send, artefacts, store, chunk):
    content = LINE * 100
    file = send(content, "mine é.jsonl", chunk=chunk)
    assert artefacts.file_path(file.id).read_bytes() == content
    assert (file.filename, file.purpose, file.bytes) == ("mine é.jsonl", "fine-tune", len(content))
    assert file.digest == hashlib.sha256(content).hexdigest()
    assert store.file(file.id) == file


@pytest.mark.parametrize("members", [PEFT, OWN])
@pytest.mark.parametrize("reverse", [False, True])
def test_an_adapter_is_unpacked(send, artefacts, members, reverse):
    content = zipped(sorted(members.items(), reverse=reverse))
    file = send(content, "adapter.zip", "adapter")
    assert {path.name: path.read_bytes() for path in artefacts.adapter_path(file.id).iterdir()} == members
    assert artefacts.file_path(file.id).read_bytes() == content


def test_a_name_means_nothing_to_the_disk(send, tmp_path):
    for name in ("CON", "-rf", "~", "$HOME", "a" * 255, "file.jsonl", "file.jsonl"):
        file = send(LINE, name)
        assert file.filename == name
    assert {path.name[:5] for path in (tmp_path / "data" / "files").iterdir()} == {"file-"}


def test_the_same_key_keeps_one_file(send, artefacts):
    first = send(LINE, key="key")
    assert send(LINE, key="key") == first
    assert artefacts.ids() == {first.id}
    with pytest.raises(ColaError) as error:
        send(LINE * 2, key="key")
    assert error.value.reason == Reason.INVALID_FILE
    assert artefacts.ids() == {first.id}


def test_an_upload_that_breaks_off_leaves_nothing(store, artefacts, tmp_path):
    before = listing(tmp_path)
    with Upload(store, artefacts, "a.jsonl", "fine-tune") as upload:
        upload.write(LINE)
    assert listing(tmp_path) == before
    assert store.files() == []


def test_a_full_disk_leaves_nothing(store, artefacts, tmp_path, monkeypatch):
    before = listing(tmp_path)
    with pytest.raises(ColaError) as error, Upload(store, artefacts, "a.jsonl", "fine-tune") as upload:
        upload.write(LINE)

        def fsync(_):
            raise OSError(errno.ENOSPC, "disk full")

        monkeypatch.setattr("os.fsync", fsync)
        upload.finish()
    assert error.value.reason == Reason.STORAGE_FULL
    assert error.value.details["file"].startswith("files/file-")
    assert listing(tmp_path) == before
    assert store.files() == []


# --- what does not --------------------------------------------------------------------------------------------------

NAMES = [
    "", ".", "..", "/", "/etc/passwd", "../a.jsonl", "a/../../b", "a/b.jsonl", "..\\a.jsonl", "C:\\a.jsonl",
    "a.jsonl\0.txt", "\0", "a\nb", "a\tb", "a\x1b[2Jb", "\u202eljson.a", "\ud800", "a" * 256, "é" * 128,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_with_a_path_in_it_is_refused(refused, name):
    error = refused(LINE, name)
    assert error.reason == Reason.UNSAFE_NAME
    error.message.encode()


class Bomb:
    """Says so if it is ever unpickled."""

    def __reduce__(self):
        return (pytest.exit, ("an upload was unpickled",))


def saved(save, *args):
    buffer = io.BytesIO()
    save(buffer, *args)
    return buffer.getvalue()


FORMATS = {
    **{f"pickle {protocol}": pickle.dumps(Bomb(), protocol) for protocol in range(6)},
    "torch": saved(lambda out: torch.save({"w": torch.zeros(3)}, out)),
    "torch, old": saved(lambda out: torch.save({"w": torch.zeros(3)}, out, _use_new_zipfile_serialization=False)),
    "npz": saved(np.savez, np.zeros(3)),
    "npy": saved(np.save, np.zeros(3)),
    "npy of objects": saved(lambda out: np.save(out, np.array([{}], dtype=object), allow_pickle=True)),
    "zip": zipped({"a.jsonl": LINE}),
    "empty zip": zipped({}),
    "gzip": bytes.fromhex("1f8b0800000000000003"),
    "zstd": bytes.fromhex("28b52ffd04580000"),
    "xz": b"\xfd7zXZ\x00\x00",
    "bzip2": b"BZh91AY&SY",
    "hdf5": b"\x89HDF\r\n\x1a\n\x00",
    "gguf": b"GGUF\x03\x00\x00\x00",
}


@pytest.mark.parametrize("purpose", ["fine-tune", "adapter"])
@pytest.mark.parametrize("format", FORMATS)
def test_formats_that_run_code_or_expand_are_refused_whatever_their_name(refused, format, purpose):
    for chunk in (1, 1 << 20):
        error = refused(FORMATS[format], "innocent.jsonl", purpose, chunk=chunk)
        if format in ("pickle 0", "pickle 1"):  # text: they are refused as no JSON and no zip
            assert error.reason in (Reason.INVALID_DATASET, Reason.INVALID_FILE)
        elif purpose == "adapter" and format in ("torch", "npz", "zip", "empty zip"):  # zips, of the wrong members
            assert error.reason in (Reason.INVALID_FILE, Reason.UNSAFE_FORMAT)
        else:
            assert error.reason == Reason.UNSAFE_FORMAT
        assert error.status == "INVALID_ARGUMENT"


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pt", "PTH", "bin", "npz", "npy", "ckpt", "joblib", "gz"])
def test_names_of_such_formats_are_refused_before_any_byte(store, artefacts, suffix):
    with pytest.raises(ColaError) as error:
        Upload(store, artefacts, f"model.{suffix}", "fine-tune")
    assert error.value.reason == Reason.UNSAFE_FORMAT


def test_a_format_is_refused_at_its_first_bytes(store, artefacts):
    with Upload(store, artefacts, "a.jsonl", "fine-tune") as upload:
        upload.write(b"\x80")
        with pytest.raises(ColaError) as error:
            upload.write(b"\x04")
    assert error.value.reason == Reason.UNSAFE_FORMAT


def test_unknown_purposes_are_refused(refused):
    assert refused(LINE, purpose="assistants").reason == Reason.INVALID_FILE


@pytest.mark.parametrize("purpose", ["fine-tune", "adapter"])
def test_sizes_are_bounded_while_bytes_come_in(refused, purpose):
    limits = Limits(fine_tune=1000, adapter=1000)
    content = LINE * 100 if purpose == "fine-tune" else zipped({**PEFT, "adapter_model.safetensors": b"w" * 2000})
    error = refused(content, purpose=purpose, limits=limits, chunk=10)
    assert error.reason == Reason.FILE_TOO_LARGE
    assert error.status == "RESOURCE_EXHAUSTED"


def test_bad_lines_are_told_with_file_and_line(refused):
    error = refused(LINE * 3 + b"{broken\n", "mine.jsonl")
    assert error.reason == Reason.INVALID_DATASET
    assert (error.details["file"], error.details["line"]) == ("mine.jsonl", "4")


def symlink():
    info = zipfile.ZipInfo("adapter_config.json")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return zipped([(info, b"/etc/passwd"), ("adapter_model.safetensors", b"w")])


def encrypted():
    content = bytearray(zipped(PEFT))
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1
    return bytes(content)


def lies_about_size():
    content = bytearray(zipped(PEFT))
    for at in (content.index(b"PK\x01\x02") + 20, content.index(b"PK\x01\x02") + 24):
        content[at : at + 4] = struct.pack("<L", 2**31)
    return bytes(content)


def damaged():
    content = bytearray(zipped(PEFT))
    content[content.index(b"weights")] ^= 1
    return bytes(content)


def of_4_gib():
    content = zipped(PEFT)
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 1)
    return content[:-22] + locator + content[-22:]


ARCHIVES = {
    "traversal": zipped({"../adapter_config.json": b"{}", "adapter_model.safetensors": b"w"}),
    "absolute": zipped({"/tmp/adapter_config.json": b"{}", "adapter_model.safetensors": b"w"}),
    "in a folder": zipped({"a/adapter_config.json": b"{}", "a/adapter_model.safetensors": b"w"}),
    "symlink": symlink(),
    "three members": zipped({**PEFT, "README.md": b""}),
    "one member": zipped({"adapter_config.json": b"{}"}),
    "none": zipped({}),
    "mixed formats": zipped({"adapter_config.json": b"{}", "cola_adapter.safetensors": b"w"}),
    "weights as .bin": zipped({"adapter_config.json": b"{}", "adapter_model.bin": b"w"}),
    "weights as pickle": zipped({"adapter_config.json": b"{}", "data.pkl": pickle.dumps(Bomb())}),
    "compressed": zipped({**PEFT, "adapter_config.json": b" " * 10_000}, zipfile.ZIP_DEFLATED),
    "bomb": zipped({**PEFT, "adapter_model.safetensors": b"\0" * (8 << 20)}, zipfile.ZIP_DEFLATED),
    "bzip2": zipped(PEFT, zipfile.ZIP_BZIP2),
    "encrypted": encrypted(),
    "lies about its size": lies_about_size(),
    "damaged": damaged(),
    "cut short": zipped(PEFT)[:-30],
    "comment": zipped(PEFT)[:-2] + b"\x05\x00hello",
    "of 4 GiB": of_4_gib(),
    "large config": zipped({**PEFT, "adapter_config.json": b" " * (2 << 20)}),
    "JSON": b'{"text": "a"}',
    "empty": b"",
}


@pytest.mark.parametrize("archive", ARCHIVES)
def test_an_adapters_zip_holds_its_two_files_stored_and_nothing_else(refused, archive):
    error = refused(ARCHIVES[archive], "adapter.zip", "adapter")
    assert error.reason in (Reason.INVALID_FILE, Reason.UNSAFE_FORMAT, Reason.UNSAFE_NAME)
    assert error.status == "INVALID_ARGUMENT"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_may_be_in_a_zip_once(refused):
    twice = zipped([("adapter_config.json", b"{}"), ("adapter_config.json", b"[]")])
    assert refused(twice, "adapter.zip", "adapter").reason == Reason.INVALID_FILE


def test_a_table_of_contents_takes_no_memory(refused):
    many = zipped([(f"{number:05}" + "x" * 200, b"") for number in range(20_000)])
    claims_two = bytearray(many)
    claims_two[-14:-10] = struct.pack("<HH", 2, 2)
    tracemalloc.start()
    for content in (many, bytes(claims_two)):
        started = time.perf_counter()
        assert refused(content, "adapter.zip", "adapter").reason == Reason.INVALID_FILE
        assert time.perf_counter() - started < 5
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


def test_an_adapters_json_is_not_a_dataset(refused):
    assert refused(json.dumps({"r": 8}).encode(), "adapter_config.json").reason == Reason.INVALID_DATASET
