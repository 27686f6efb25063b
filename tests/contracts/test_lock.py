"""requirements.lock pins every direct dependency, and holds nothing that belongs to one machine."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = [
    line
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
DIRECT = [
    requirement
    for text in PROJECT["dependencies"] + [one for extra in PROJECT["optional-dependencies"].values() for one in extra]
    if (requirement := Requirement(text)).name != PROJECT["name"]
]


@pytest.mark.parametrize("line", LINES)
def test_line_is_a_name_and_a_public_version(line: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_direct_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    pins = {canonicalize_name(name): Version(version) for name, _, version in (line.partition("==") for line in LINES)}
    assert pins[canonicalize_name(requirement.name)] in requirement.specifier


def test_each_package_is_pinned_once() -> None:
    names = [canonicalize_name(line.partition("==")[0]) for line in LINES]
    assert sorted(set(names)) == sorted(names)
