"""Dated records of benchmarks, with the machine that they ran on."""

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

RECORDS = Path(__file__).parent / "records"
PACKAGES = ("grpcio", "protobuf", "torch", "transformers", "xxhash")


def machine() -> dict[str, str | int | None]:
    """Processor, cores, system and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def write_record(benchmark: str, fields: Mapping[str, object]) -> Path:
    """Writes `<benchmark>-<date>.json`, in place of an earlier one of the day. Prints and returns its path."""
    record = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        **fields,
    }
    path = RECORDS / f"{benchmark}-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(path)
    return path
