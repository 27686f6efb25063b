"""The committed code in cola_common/wire is what the protos give."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOS = sorted((ROOT / "protos").glob("cola_common/wire/*.proto"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    plugin = Path(sys.executable).parent / "protoc-gen-mypy_grpc"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos")]
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python", "mypy_grpc")]
    paths = [str(path) for path in PROTOS]
    subprocess.run([*command, f"--plugin={plugin}", *outputs, *paths], check=True, capture_output=True)
    return folder / "cola_common" / "wire"


def test_every_proto_has_fresh_code_and_there_is_no_other(fresh: Path) -> None:
    committed = ROOT / "cola_common" / "wire"
    names = {path.name for path in committed.iterdir() if path.suffix in (".py", ".pyi")} - {"__init__.py"}
    assert names == {path.name for path in fresh.iterdir()}
    stale = [name for name in sorted(names) if (committed / name).read_text() != (fresh / name).read_text()]
    assert not stale, "run `make protos`"


@pytest.mark.parametrize("path", PROTOS, ids=[path.name for path in PROTOS])
def test_every_proto_is_of_one_package_in_the_folder_of_its_code(path: Path) -> None:
    assert "package cola.v1;" in path.read_text()
    assert path.parent.relative_to(ROOT / "protos") == Path("cola_common/wire")
