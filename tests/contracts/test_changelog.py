"""The changelog's newest entry is the version that is built."""

import re
from pathlib import Path

import cola_common

ROOT = Path(__file__).parents[2]


def test_newest_entry_is_the_version() -> None:
    versions = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert versions[0] == cola_common.__version__


def test_each_version_has_one_entry() -> None:
    versions = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(set(versions)) == len(versions)
