"""Settings, identity, capacity, and the command itself."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cola_common import ids
from cola_common.errors import ColaError, Reason
from cola_common.messages import Draining
from cola_worker import capacity
from cola_worker.config import WorkerConfig
from cola_worker.identity import identity
from tests.worker.stand_in import WELCOME, Stream, serving, until, welcome

# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in list(os.environ):
        if key.startswith("COLA_"):
            monkeypatch.delenv(key)


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "worker.toml"
    file.write_text('server = "file:1"\ndata_dir = "/file"\nthreads = 1\nlog_format = "json"\n')
    monkeypatch.setenv("COLA_WORKER_SERVER", "environment:2")
    monkeypatch.setenv("COLA_WORKER_THREADS", "2")
    config = WorkerConfig.read(file, {"server": "flag:3"})
    assert (config.server, config.threads, config.data_dir, config.log_format) == ("flag:3", 2, Path("/file"), "json")
    assert config.insecure is False


WRONG = {
    "server": {"server": "nowhere"},
    "threads": {"threads": 0},
    "log_format": {"log_format": "xml"},
    "sevrer": {"sevrer": "x:1"},
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_wrong_setting_is_named(setting: str) -> None:
    with pytest.raises(ColaError) as caught:
        WorkerConfig.read(None, {"server": "here:1", "data_dir": "d", **WRONG[setting]})
    assert (caught.value.reason, caught.value.details["setting"]) == (Reason.INVALID_CONFIG, setting)


@pytest.mark.parametrize("missing", ["server", "data_dir"])
def test_a_missing_setting_is_named(missing: str) -> None:
    given = {"server": "here:1", "data_dir": "d"}
    del given[missing]
    with pytest.raises(ColaError) as caught:
        WorkerConfig.read(None, given)
    assert caught.value.details["setting"] == missing


@pytest.mark.parametrize("text", [None, "no toml", 'colour = "red"'])
def test_a_file_that_cannot_be_used_is_told_of(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ColaError) as caught:
        WorkerConfig.read(file, {"server": "here:1", "data_dir": "d"})
    assert caught.value.reason == Reason.INVALID_CONFIG


@pytest.mark.parametrize("text", ["s3cret", " s3cret\n"])
def test_the_token_is_the_text_of_its_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    assert WorkerConfig.read(None, {"server": "h:1", "data_dir": "d", "token_file": file}).token() == "s3cret"
    assert WorkerConfig.read(None, {"server": "h:1", "data_dir": "d"}).token() is None


@pytest.mark.parametrize("data", [None, b"", b"\n", b"two tokens", b'client = "a"\nworker = "b"', b"\xff\xfe"])
def test_a_token_file_without_a_token_is_told_of(data: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "token"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(ColaError) as caught:
        WorkerConfig.read(None, {"server": "h:1", "data_dir": "d", "token_file": file}).token()
    assert caught.value.details["setting"] == "token_file"


# --- identity ---------------------------------------------------------------------------------------------------------


def test_an_identity_lasts_as_long_as_its_folder(tmp_path: Path) -> None:
    first = identity(tmp_path / "a" / "b")
    assert ids.valid("wkr", first)
    assert identity(tmp_path / "a" / "b") == first
    assert identity(tmp_path / "c") != first


@pytest.mark.parametrize("data", [b"", b"wkr-", b"ftjob-" + b"0" * 24, b"\xff", b"wkr-" + b"0" * 24 + b"/../x"])
def test_a_file_that_is_no_identity_is_not_replaced_in_silence(data: bytes, tmp_path: Path) -> None:
    identity(tmp_path)
    (tmp_path / "worker-id").write_bytes(data)
    with pytest.raises(ColaError) as caught:
        identity(tmp_path)
    assert caught.value.reason == Reason.INVALID_CONFIG
    assert (tmp_path / "worker-id").read_bytes() == data


def test_a_folder_that_is_none_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ColaError) as caught:
        identity(tmp_path / "file")
    assert caught.value.details["setting"] == "data_dir"


# --- capacity ---------------------------------------------------------------------------------------------------------


def test_capacity_is_measured_in_a_moment() -> None:
    start = time.monotonic()
    measured = capacity.measure(torch.get_num_threads())
    assert time.monotonic() - start < 2
    assert measured.cores == torch.get_num_threads()
    assert measured.gflops > 0
    assert 0 < measured.memory_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + 1
    assert 1 <= capacity.available_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("limit", "expected"), [(None, 2048), ("max\n", 2048), ("1024\n", 1024), ("9999999\n", 2048)])
def test_memory_is_what_the_container_allows(limit: str | None, expected: int, tmp_path: Path) -> None:
    meminfo, file = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:   4 kB\nMemAvailable:   2 kB\n")
    if limit is not None:
        file.write_text(limit)
    assert capacity.memory_bytes(meminfo, (file,)) == expected


# --- the command ------------------------------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cola_worker", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


async def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = await asyncio.to_thread(process.communicate, timeout=40)
    return process.returncode, out


async def test_sigterm_drains_and_the_command_ends_well(tmp_path: Path) -> None:
    process: list[subprocess.Popen[str]] = []
    said = []

    async def script(stream: Stream) -> None:
        said.append(await welcome(stream))
        process[0].send_signal(signal.SIGTERM)
        said.append(await until(stream, Draining))
        await stream.goodbye("drained")

    async with serving(script) as address:
        process.append(start(f"--server={address}", f"--data-dir={tmp_path}", "--threads=1", "--log-format=json"))
        code, out = await finished(process[0])
    assert (code, len(said)) == (0, 2), out
    assert all(line.startswith("{") for line in out.splitlines())


async def test_a_second_signal_ends_the_command_at_once(tmp_path: Path) -> None:
    process: list[subprocess.Popen[str]] = []

    async def script(stream: Stream) -> None:
        await welcome(stream)
        process[0].send_signal(signal.SIGTERM)
        await until(stream, Draining)
        process[0].send_signal(signal.SIGTERM)
        await until(stream, Draining)

    async with serving(script) as address:
        process.append(start(f"--server={address}", f"--data-dir={tmp_path}", "--threads=1"))
        code, out = await finished(process[0])
    assert code == 1, out


async def test_a_worker_that_was_frozen_and_goes_on_is_back_in_a_moment(tmp_path: Path) -> None:
    """Although nobody told it that its stream is over: a server that is cut off cannot."""
    process: list[subprocess.Popen[str]] = []
    said = []
    continued = back = 0.0

    async def first(stream: Stream) -> None:
        nonlocal continued
        said.append(await welcome(stream, replace(WELCOME, lease_seconds=1)))
        process[0].send_signal(signal.SIGSTOP)
        await asyncio.sleep(2)
        process[0].send_signal(signal.SIGCONT)
        continued = time.monotonic()
        await until(stream, Draining)

    async def second(stream: Stream) -> None:
        nonlocal back
        said.append(await welcome(stream))
        back = time.monotonic()
        process[0].send_signal(signal.SIGTERM)
        await until(stream, Draining)
        await stream.goodbye("drained")

    async with serving(first, second) as address:
        process.append(start(f"--server={address}", f"--data-dir={tmp_path}", "--threads=1"))
        code, out = await finished(process[0])
    assert code == 0, out
    assert said[0] == said[1]
    assert 0 < back - continued < 3
    assert "it was silent for 1 s" in out


async def test_a_worker_that_is_not_wanted_says_why_and_fails(tmp_path: Path) -> None:
    async def script(stream: Stream) -> None:
        raise ColaError(Reason.UNAUTHENTICATED)

    async with serving(script) as address:
        code, out = await finished(start(f"--server={address}", f"--data-dir={tmp_path}"))
    assert code == 1
    assert out.splitlines()[-1] == "cola-worker: a valid token is needed; pass token=… or --token-file"


async def test_plaintext_to_another_machine_must_be_asked_for(tmp_path: Path) -> None:
    code, out = await finished(start("--server=192.0.2.1:50051", f"--data-dir={tmp_path}"))
    assert code == 1
    assert "192.0.2.1:50051 is not loopback" in out.splitlines()[-1]
