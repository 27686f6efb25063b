"""What an import loads, seen in a fresh interpreter."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "safetensors", "sqlalchemy", "matplotlib")


def loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(answer.stdout.split())


@pytest.mark.parametrize(
    "module", ["cola_common.client", "cola_common.client.cli", "cola_common.client.demo", "cola_common.convert"]
)
def test_client_is_light(module: str) -> None:
    assert loaded_by(module) & {*HEAVY, "cola_server", "cola_worker"} == set()


@pytest.mark.parametrize("module", ["cola_server.cli", "cola_server.app"])
def test_server_listens_before_it_loads_torch(module: str) -> None:
    assert loaded_by(module) & {"torch", "transformers"} == set()


def test_worker_needs_no_transformers() -> None:
    assert loaded_by("cola_worker.app") & {"transformers", "peft", "sqlalchemy", "cola_server"} == set()


def test_wire_and_rpc_need_no_torch() -> None:
    assert loaded_by("cola_common.rpc") & {"torch", "numpy"} == set()
