"""Files through the SDK: what is sent is what the server holds, whatever it came from and whatever breaks."""

import asyncio
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cola_common.client import AsyncClient, ColaError, Reason
from cola_common.client.uploads import FileSource
from cola_common.rpc.limits import CHUNK_BYTES
from tests.support.fake_server import PAGE, Running, running


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture
async def client(served: Running):
    async with AsyncClient(served.address) as client:
        yield client


def sources(tmp_path: Path, content: bytes) -> dict[str, tuple[FileSource, str]]:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    return {
        "path": (path, "train.jsonl"),
        "text": (str(path), "train.jsonl"),
        "bytes": (content, "upload"),
        "named": (("mine.jsonl", content), "mine.jsonl"),
        "memory": (named(content), "read.jsonl"),
    }


def named(content: bytes) -> io.BytesIO:
    file = io.BytesIO(b"skipped" + content)
    file.name = "/a/folder/read.jsonl"
    file.seek(len(b"skipped"))
    return file


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES - 7])
@pytest.mark.parametrize("source", ["path", "text", "bytes", "named", "memory"])
async def test_an_upload_arrives_whole_under_its_name(client, tmp_path, source, size):
    content = os.urandom(size)
    given, name = sources(tmp_path, content)[source]
    file = await client.files.create(file=given, purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose) == (name, size, "fine-tune")
    assert await client.files.content(file.id) == content
    assert await client.files.retrieve(file.id) == file


async def test_an_open_file_is_sent_as_the_usual_idiom_has_it(client, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"row\n")
    with path.open("rb") as opened:
        file = await client.files.create(file=opened, purpose="fine-tune")
    assert await client.files.content(file.id) == b"row\n"


@pytest.mark.parametrize("reason", [Reason.SERVER_DRAINING, Reason.UNAVAILABLE])
async def test_an_upload_whose_answer_is_lost_is_repeated_and_makes_one_file(client, served, reason):
    served.state.faults["Files.Create"] = [reason, reason]
    before = set(served.state.files)
    file = await client.files.create(file=named(b"row\n"), purpose="fine-tune")
    assert set(served.state.files) - before == {file.id}
    assert await client.files.content(file.id) == b"row\n"


async def test_one_key_makes_one_file(client, served):
    before = set(served.state.files)
    one, two = [
        await client.files.create(file=b"row\n", purpose="fine-tune", idempotency_key="nightly") for _ in range(2)
    ]
    assert one == two
    assert set(served.state.files) - before == {one.id}


async def test_two_uploads_of_the_same_bytes_are_two_files(client):
    one = await client.files.create(file=b"row\n", purpose="fine-tune")
    two = await client.files.create(file=b"row\n", purpose="fine-tune")
    assert one.id != two.id


@pytest.mark.parametrize("token", [None, "secret"])
async def test_a_file_that_the_server_refuses_midway_fails_with_its_reason_and_leaves_no_task(token):
    tasks = asyncio.all_tasks()
    with running(token) as served:
        served.state.largest_file = CHUNK_BYTES
        async with AsyncClient(served.address, token) as client:
            for _ in range(20):
                with pytest.raises(ColaError) as caught:
                    await client.files.create(file=bytes(20 * CHUNK_BYTES), purpose="fine-tune")
                assert caught.value.reason is Reason.FILE_TOO_LARGE
        await asyncio.sleep(0.05)
    assert asyncio.all_tasks() == tasks


async def test_a_file_that_changed_on_the_way_is_told(client, served, monkeypatch):
    monkeypatch.setattr(served.state, "flip_uploads", True)
    with pytest.raises(ColaError) as caught:
        await client.files.create(file=b"row\n", purpose="fine-tune")
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH


async def test_a_missing_file_is_an_os_error_and_nothing_is_sent(client, served, tmp_path):
    calls = served.state.calls["Files.Create"]
    with pytest.raises(FileNotFoundError):
        await client.files.create(file=tmp_path / "none.jsonl", purpose="fine-tune")
    assert served.state.calls["Files.Create"] == calls


LAYOUTS = [
    ("adapter_config.json", "adapter_model.safetensors"),
    ("cola_adapter.json", "cola_adapter.safetensors"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_a_folder_is_sent_as_a_stored_archive_of_its_adapter_alone(client, tmp_path, layout):
    contents = {layout[0]: json.dumps({"r": 8}).encode(), layout[1]: os.urandom(5000)}
    for name, content in (contents | {"README.md": b"not part of it"}).items():
        (tmp_path / name).write_bytes(content)
    file = await client.files.create(file=tmp_path, purpose="adapter")
    archive = await client.files.content(file.id)
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        assert {member.filename: packed.read(member) for member in packed.infolist()} == contents
        assert {member.compress_type for member in packed.infolist()} == {zipfile.ZIP_STORED}
    again = await client.files.create(file=tmp_path, purpose="adapter")
    assert again.digest == file.digest
    assert file.filename == f"{tmp_path.name}.zip"


@pytest.mark.parametrize("files", [[], ["adapter_config.json", "adapter_model.bin"], ["cola_adapter.json"]])
async def test_a_folder_without_an_adapter_is_refused(client, tmp_path, files):
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ColaError, match=r"adapter_model\.safetensors") as caught:
        await client.files.create(file=tmp_path, purpose="adapter")
    assert caught.value.reason is Reason.INVALID_ADAPTER


@pytest.mark.parametrize("limit", [None, 1, 2, 100])
async def test_iterating_a_list_gives_every_file_once_in_order(client, served, limit):
    for _ in range(2 * PAGE + 1 - len(served.state.files)):
        await client.files.create(file=b"", purpose="fine-tune")
    page = await client.files.list(limit=limit)
    assert [file.id async for file in page] == list(served.state.files)
    assert page.has_more == (len(page.data) < len(served.state.files))
    second = page.data[0].id
    later = await client.files.list(after=second, limit=limit)
    assert [file.id async for file in later] == list(served.state.files)[1:]


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_page_of_nothing_is_refused(client, limit):
    with pytest.raises(ValueError, match="1 or more"):
        await client.files.list(limit=limit)


async def test_a_deleted_file_is_unknown_and_a_delete_is_never_repeated(client, served):
    file = await client.files.create(file=b"", purpose="fine-tune")
    other = await client.files.create(file=b"", purpose="fine-tune")
    await client.files.delete(file.id)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(ColaError) as caught:
            await call(file.id)
        assert caught.value.reason is Reason.UNKNOWN_FILE
        assert caught.value.details == {"file": file.id}
    served.state.faults["Files.Delete"] = [Reason.SERVER_DRAINING]
    with pytest.raises(ColaError) as caught:
        await client.files.delete(other.id)
    assert caught.value.reason is Reason.SERVER_DRAINING
