"""The one catalogue: every reason has a place, a gRPC status and a text that its details fill."""

import re
from pathlib import Path
from string import Formatter

import grpc
import pytest

from cola_common.errors import CATALOGUE, ColaError, Reason

ROOT = Path(__file__).parents[2]
SOURCES = [path for package in ("cola_common", "cola_server", "cola_worker") for path in (ROOT / package).rglob("*.py")]


def fields(reason: Reason) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(CATALOGUE[reason].text) if name is not None]


def test_every_reason_is_catalogued() -> None:
    assert set(CATALOGUE) == set(Reason)


@pytest.mark.parametrize("reason", list(Reason))
def test_status_is_an_error_of_grpc(reason: Reason) -> None:
    assert grpc.StatusCode[CATALOGUE[reason].status] is not grpc.StatusCode.OK


@pytest.mark.parametrize("reason", list(Reason))
def test_text_names_its_fields_and_tells_them(reason: Reason) -> None:
    details = {name: f"<{name}>" for name in fields(reason)}
    error = ColaError(reason, **details)
    assert all(value in error.message for value in details.values())
    assert error.details == details
    assert str(error) == error.message


@pytest.mark.parametrize("reason", [reason for reason in Reason if fields(reason)])
def test_missing_detail_is_a_bug_of_the_caller(reason: Reason) -> None:
    with pytest.raises(KeyError):
        ColaError(reason)


@pytest.mark.parametrize("reason", list(Reason))
def test_value_is_the_name_that_travels(reason: Reason) -> None:
    assert reason.value == reason.name


def test_every_reason_is_used() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES if path.name != "errors.py")
    used = set(re.findall(r"\bReason\.([A-Z_]+)\b", text))
    assert {reason.name for reason in Reason} - used == set()
