"""What separate machines need: TLS and tokens, checked before anything is parsed; and nothing off loopback without."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cola_common.client import Client
from cola_common.errors import ColaError, Reason
from tests.end_to_end.jobs import finish, submit, until
from tests.support.cluster import Cluster

TLS = Path(__file__).parents[1] / "stream" / "tls"
CLIENT, WORKER = "client-token-0123456789", "worker-token-0123456789"


@pytest.fixture(scope="module")
def secured(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server with TLS and tokens, and a worker that has what it takes."""
    root = tmp_path_factory.mktemp("secured")
    (root / "tokens.toml").write_text(f'client = "{CLIENT}"\nworker = "{WORKER}"\n')
    (root / "worker-token").write_text(WORKER)
    flags = [f"--tls-cert={TLS / 'server.pem'}", f"--tls-key={TLS / 'server.key'}"]
    cluster = Cluster(root, {"llama": models["llama"]}, workers=0, flags=[*flags, f"--token-file={root}/tokens.toml"])
    with cluster:
        cluster.start_worker(
            "worker", [f"--root-certificates={TLS / 'server.pem'}", f"--token-file={root / 'worker-token'}"]
        )
        yield cluster


def client(cluster: Cluster, token: str | None = CLIENT, roots: Path | None = TLS / "server.pem") -> Client:
    return Client(cluster.address, token=token, root_certificates=roots)


def test_a_job_runs_over_tls_with_the_right_tokens(secured: Cluster) -> None:
    with client(secured) as user:
        until(lambda: [worker.status for worker in user.workers.list()] == ["attending"], 40)
        assert finish(user, submit(user)).status == "succeeded"


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (None, Reason.UNAUTHENTICATED),
        ("client-token-012345678X", Reason.UNAUTHENTICATED),
        (WORKER, Reason.PERMISSION_DENIED),
    ],
)
def test_a_call_without_its_token_is_refused_and_makes_nothing(
    token: str | None, reason: Reason, secured: Cluster
) -> None:
    with client(secured) as user:
        before = [file.id for file in user.files.list()]
    with client(secured, token) as stranger:
        for call in (stranger.models.list, lambda: submit(stranger)):
            with pytest.raises(ColaError) as refused:
                call()
            assert refused.value.reason == reason
    with client(secured) as user:
        assert [file.id for file in user.files.list()] == before


@pytest.mark.parametrize("token", [None, CLIENT])
def test_a_worker_without_its_token_is_told_and_stops(token: str | None, secured: Cluster, tmp_path: Path) -> None:
    flags = [f"--root-certificates={TLS / 'server.pem'}"]
    if token is not None:
        (tmp_path / "token").write_text(token)
        flags.append(f"--token-file={tmp_path / 'token'}")
    intruder = secured.start_worker(f"intruder-{token}", flags)
    secured.workers.remove(intruder)
    assert intruder.process.wait(40) != 0
    assert "token" in intruder.tail()


def test_a_server_with_another_certificate_is_not_talked_to(secured: Cluster) -> None:
    with client(secured, roots=TLS / "other.pem") as user, pytest.raises(ColaError) as refused:
        user.models.list()
    assert refused.value.reason == Reason.UNAVAILABLE


@pytest.mark.parametrize("extra", [[], ["--tls"], ["--tokens"]], ids=["nothing", "tls only", "tokens only"])
def test_off_loopback_the_server_refuses_to_start_without_both(
    extra: list[str], models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "tokens.toml").write_text(f'client = "{CLIENT}"\nworker = "{WORKER}"\n')
    flags = {
        "--tls": [f"--tls-cert={TLS / 'server.pem'}", f"--tls-key={TLS / 'server.key'}"],
        "--tokens": [f"--token-file={tmp_path / 'tokens.toml'}"],
    }
    command = [sys.executable, "-m", "cola_server", f"--model=llama={models['llama']}", "--listen=0.0.0.0:0"]
    command += [f"--data-dir={tmp_path / 'data'}", *[flag for name in extra for flag in flags[name]]]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=40, env=os.environ, check=False)
    assert ended.returncode == 2
    assert "0.0.0.0:0 is not loopback" in ended.stderr
    assert not (tmp_path / "data").exists()
