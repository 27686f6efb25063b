"""Downloads: a folder is there whole and as it was sent, or it is not there."""

import os
from collections.abc import Callable

import pytest

from cola_common import ids
from cola_common.client import AsyncClient, ColaError, Reason
from cola_common.client.downloads import IncomingFolder
from cola_common.wire.checkpoints_pb2 import CheckpointChunk
from tests.support.fake_server import PAGE, chunk, running

FILES = {
    "adapter_config.json": b'{"r": 8}',
    "adapter_model.safetensors": os.urandom(4500),
    "empty.json": b"",
    "exact.bin": os.urandom(2000),
}


@pytest.fixture(scope="module")
def served():
    with running() as server:
        yield server


@pytest.fixture
async def client(served):
    async with AsyncClient(served.address) as client:
        yield client


@pytest.fixture
async def job(client):
    return await client.fine_tuning.jobs.create(model="tiny", training_file=ids.new("file"))


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("target", ["new", "a/deep/one", "empty"])
async def test_a_download_is_what_the_server_sent(client, served, job, tmp_path, target):
    (tmp_path / "empty").mkdir()
    checkpoint = served.state.checkpoint(job.id, FILES)
    folder = await client.fine_tuning.jobs.checkpoints.download(checkpoint.id, tmp_path / target)
    assert folder == tmp_path / target
    assert held(folder) == FILES
    assert [path.name for path in folder.parent.iterdir() if path.name.endswith(".partial")] == []


async def test_a_download_that_breaks_is_made_again(client, served, job, tmp_path):
    checkpoint = served.state.checkpoint(job.id, FILES)
    served.state.faults["Checkpoints.Download"] = [Reason.UNAVAILABLE]
    folder = await client.fine_tuning.jobs.checkpoints.download(checkpoint.id, tmp_path / "out")
    assert held(folder) == FILES


async def test_a_folder_with_content_is_refused_and_left_alone(client, served, job, tmp_path):
    checkpoint = served.state.checkpoint(job.id, FILES)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="new folder"):
        await client.fine_tuning.jobs.checkpoints.download(checkpoint.id, tmp_path)
    assert held(tmp_path) == {"mine.txt": b"mine"}


async def test_an_unknown_checkpoint_leaves_nothing_behind(client, tmp_path):
    with pytest.raises(ColaError) as caught:
        await client.fine_tuning.jobs.checkpoints.download(ids.new("ftckpt"), tmp_path / "out")
    assert caught.value.reason is Reason.UNKNOWN_CHECKPOINT
    assert list(tmp_path.iterdir()) == []


async def test_checkpoints_are_listed_over_all_pages(client, served, job):
    made = [served.state.checkpoint(job.id, FILES) for _ in range(PAGE + 1)]
    page = await client.fine_tuning.jobs.checkpoints.list(job.id)
    assert [checkpoint async for checkpoint in page] == made
    later = await client.fine_tuning.jobs.checkpoints.list(job.id, after=made[0].id, limit=1)
    assert [checkpoint async for checkpoint in later] == made[1:]


def damaged(content: bytes, **fields: object) -> CheckpointChunk:
    part = chunk("a.bin", content, 0, content)
    for name, value in fields.items():
        setattr(part, name, value)
    return part


def streams() -> dict[str, tuple[list[CheckpointChunk], Reason]]:
    data = b"0123456789"
    half, rest = chunk("a.bin", data, 0, data[:5]), chunk("a.bin", data, 5, data[5:])
    other = chunk("b.bin", data, 0, data)
    names = ["../a.bin", "/etc/a.bin", "a/b.bin", "..", ".", "", ".hidden", "a\0b", "a\\b", "a" * 200, "é"]
    return {
        "wrong checksum": ([damaged(data, checksum=1)], Reason.CHECKSUM_MISMATCH),
        "wrong bytes": ([damaged(data, data=b"0123456780")], Reason.CHECKSUM_MISMATCH),
        "no files": ([], Reason.PROTOCOL_VIOLATION),
        "cut short": ([half], Reason.PROTOCOL_VIOLATION),
        "next file too soon": ([half, other], Reason.PROTOCOL_VIOLATION),
        "a gap": ([rest], Reason.PROTOCOL_VIOLATION),
        "twice the same": ([half, half], Reason.PROTOCOL_VIOLATION),
        "too long": ([damaged(data, file_bytes=9)], Reason.PROTOCOL_VIOLATION),
        "another size": ([half, damaged(b"56789", offset=5, file_bytes=11)], Reason.PROTOCOL_VIOLATION),
        "the file again": ([half, rest, other, half, rest], Reason.PROTOCOL_VIOLATION),
        **{f"name {name!r}": ([damaged(data, path=name)], Reason.PROTOCOL_VIOLATION) for name in names},
    }


@pytest.mark.parametrize("case", streams())
def test_what_is_not_a_checkpoint_is_refused_and_leaves_nothing(tmp_path, case):
    chunks, reason = streams()[case]
    incoming = IncomingFolder(tmp_path / "out")

    def receive(take: Callable[..., None]) -> None:
        for part in chunks:
            take(part.path, part.file_bytes, part.offset, part.data, part.checksum)
        incoming.finish()

    with pytest.raises(ColaError) as caught:
        receive(incoming.take)
    incoming.discard()
    assert caught.value.reason is reason
    assert list(tmp_path.iterdir()) == []
