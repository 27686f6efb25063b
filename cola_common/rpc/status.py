"""Errors <-> gRPC statuses, the one place: `google.rpc.Status` with `ErrorInfo{reason, domain: "cola"}`."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from cola_common.errors import CATALOGUE, ColaError, Reason

DOMAIN = "cola"
_DETAILS_KEY = "grpc-status-details-bin"
# Statuses travel in HTTP/2 trailers, of which gRPC drops more than 8 KiB; a detail may quote what a user sent.
_MAX_DETAIL_CHARACTERS = 400

Metadata = tuple[tuple[str, str | bytes], ...]

_log = logging.getLogger(__name__)


def to_rpc(error: ColaError) -> tuple[grpc.StatusCode, str, Metadata]:
    """Status code, text and trailing metadata of an error."""
    code = grpc.StatusCode[error.status]
    details = {key: _clip(value) for key, value in error.details.items()}
    text = _clip(error.message)
    status = status_pb2.Status(code=code.value[0], message=text)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=details))
    return code, text, ((_DETAILS_KEY, status.SerializeToString()),)


def from_rpc(error: grpc.aio.AioRpcError, address: str = "the server") -> ColaError:
    """The error that a call failed with. A failure that is not from ColA's catalogue, such as a connection that cannot
    be made, becomes the nearest entry of it.
    """
    told = _told(error)
    if told is not None:
        return told
    problem = error.details() or error.code().name.lower().replace("_", " ")
    match error.code():
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
            return ColaError(Reason.UNAVAILABLE, address=address, problem=problem)
        case grpc.StatusCode.UNAUTHENTICATED:
            return ColaError(Reason.UNAUTHENTICATED)
        case _:
            return ColaError(Reason.INTERNAL, problem=problem)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ColaError) -> NoReturn:
    """Ends a call with an error."""
    code, text, metadata = to_rpc(error)
    await context.abort(code, text, metadata)


@asynccontextmanager
async def translated(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """A servicer's body: a `ColaError` that leaves it becomes the call's status; any other error is logged, and the
    caller learns no more than that there was one.
    """
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except ColaError as error:
        await abort(context, error)
    except Exception:  # noqa: BLE001 — the boundary of a call, which logs it
        _log.exception("a call failed")
        await abort(context, ColaError(Reason.INTERNAL, problem="an unexpected error; the server's log has it"))


def _told(error: grpc.aio.AioRpcError) -> ColaError | None:
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        info = error_details_pb2.ErrorInfo()
        try:
            details = status_pb2.Status.FromString(value).details
            if not any(detail.Unpack(info) for detail in details):
                return None
        except DecodeError:
            return None
        if info.domain != DOMAIN or info.reason not in CATALOGUE:
            return None  # a newer peer's reason: its text is still in the status
        try:
            return ColaError(Reason(info.reason), **info.metadata)
        except KeyError:
            return None  # another version's details
    return None


def _clip(text: str) -> str:
    return text if len(text) <= _MAX_DETAIL_CHARACTERS else text[: _MAX_DETAIL_CHARACTERS - 1] + "…"
