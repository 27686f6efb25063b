"""What packages offer. A change here is a change for their users: with the client, for everyone's programs."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FACES = {
    "cola_common.adapters": {"Adapter", "Cost", "Parameters", "build"},
    "cola_common.client": {
        "AsyncClient",
        "AsyncPage",
        "Client",
        "ColaError",
        "JobFailedError",
        "Page",
        "Reason",
    },
    "cola_common.convert": {
        "checkpoint_from_wire",
        "checkpoint_to_wire",
        "estimate_from_wire",
        "estimate_to_wire",
        "event_from_wire",
        "event_to_wire",
        "file_from_wire",
        "file_to_wire",
        "job_from_wire",
        "job_to_wire",
        "metrics_from_wire",
        "metrics_to_wire",
        "model_from_wire",
        "model_to_wire",
        "spec_from_wire",
        "spec_to_wire",
        "to_server_from_wire",
        "to_server_to_wire",
        "to_worker_from_wire",
        "to_worker_to_wire",
        "worker_from_wire",
        "worker_to_wire",
    },
    "cola_common.jobs": {
        "DEFAULT_TENANT",
        "TRANSITIONS",
        "AdapterSpec",
        "Checkpoint",
        "Codec",
        "Collaboration",
        "Estimate",
        "FileObject",
        "Hyperparameters",
        "Job",
        "JobEvent",
        "JobFailure",
        "JobSpec",
        "JobStatus",
        "LinearAdapter",
        "LoraAdapter",
        "Method",
        "MlpAdapter",
        "ModelCard",
        "Rows",
        "StepMetrics",
        "Wire",
        "WirePlan",
        "WorkerCard",
        "check_transition",
    },
    "cola_common.tensor": {
        "CODECS",
        "decode",
        "decode_parameter",
        "digest",
        "encode",
        "encode_parameter",
        "encoded_shape",
        "is_finite",
        "nbytes",
    },
    "cola_server.fleet": {
        "DeltaForm",
        "FASTEST",
        "Attendance",
        "Candidate",
        "Exchange",
        "Fleet",
        "FleetLimits",
        "Load",
        "Outbox",
        "OutboxClosed",
        "ShardLoad",
        "WorkerBlamed",
        "WorkerLost",
        "WorkerSlow",
        "carried",
        "place",
    },
    "cola_server.jobs": {
        "Artefacts",
        "Catalogue",
        "JobService",
        "JobStore",
        "Limits",
        "Scheduler",
        "Upload",
    },
    "cola_server.model": {
        "BaseModel",
        "BatchResult",
        "Captured",
        "JobAdapter",
        "JobBatch",
        "Mean",
        "Merging",
        "Sink",
        "Site",
        "evaluate",
        "export_merged",
        "load",
        "probe",
        "train",
    },
    "cola_server.reduce": {"exact", "keep", "sketch"},
    "cola_server.rpc": {"Listener", "Pending"},
}

PACKAGES = sorted(
    ".".join(path.parent.relative_to(ROOT).parts)
    for package in ("cola_common", "cola_server", "cola_worker")
    for path in (ROOT / package).rglob("__init__.py")
)


@pytest.mark.parametrize("package", list(FACES))
def test_face_is_pinned(package: str) -> None:
    assert set(importlib.import_module(package).__all__) == FACES[package]


@pytest.mark.parametrize("package", list(FACES))
def test_face_is_there_and_in_order(package: str) -> None:
    module = importlib.import_module(package)
    # Constants, then classes, then the rest, as ruff has it.
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert all(name in vars(module) for name in module.__all__)


def test_every_package_with_a_face_is_pinned() -> None:
    assert {package for package in PACKAGES if "__all__" in vars(importlib.import_module(package))} == set(FACES)


@pytest.mark.parametrize("package", PACKAGES)
def test_init_re_exports_and_nothing_else(package: str) -> None:
    tree = ast.parse((ROOT / Path(*package.split(".")) / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for statement in tree.body[1:]:
        if isinstance(statement, ast.Assign):
            assert [ast.unparse(target) for target in statement.targets] in (["__all__"], ["__version__"])
        else:
            assert isinstance(statement, ast.Import | ast.ImportFrom)
