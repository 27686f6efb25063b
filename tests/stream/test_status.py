"""An error is the same error on the other side of a call."""

import string
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import pytest

from cola_common.errors import CATALOGUE, ColaError, Reason
from cola_common.rpc.channels import connect
from cola_common.rpc.status import from_rpc, to_rpc, translated

Behaviour = Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]


@asynccontextmanager
async def calling(behaviour: Behaviour) -> AsyncIterator[Callable[[], Awaitable[ColaError]]]:
    server = grpc.aio.server()
    handlers = {"Call": grpc.unary_unary_rpc_method_handler(behaviour)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connect(f"127.0.0.1:{port}") as channel:

            async def call() -> ColaError:
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await channel.unary_unary("/test/Call")(b"")
                return from_rpc(failed.value, "here")

            yield call
    finally:
        await server.stop(0)


def example(reason: Reason, value: str = "some'thing") -> ColaError:
    names = {name.removesuffix("!r") for _, name, _, _ in string.Formatter().parse(CATALOGUE[reason].text) if name}
    return ColaError(reason, **dict.fromkeys(names, value))


async def test_every_entry_of_the_catalogue_arrives_as_it_was_raised() -> None:
    errors = iter(Reason)
    raised: list[ColaError] = []

    async def behaviour(_request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async with translated(context):
            raised.append(example(next(errors)))
            raise raised[-1]
        return b""

    async with calling(behaviour) as call:
        for reason in Reason:
            arrived = await call()
            assert arrived.reason is reason
            assert arrived.message == raised[-1].message
            assert arrived.details == raised[-1].details
            assert arrived.status == raised[-1].status


async def test_long_details_are_clipped_so_that_the_error_still_arrives() -> None:
    async def behaviour(_request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async with translated(context):
            raise ColaError(Reason.INVALID_JOB, param="adapter", problem="ü" * 100_000)
        return b""

    async with calling(behaviour) as call:
        arrived = await call()
    assert arrived.reason is Reason.INVALID_JOB
    assert arrived.details["param"] == "adapter"
    assert 300 < len(arrived.details["problem"]) <= 400


async def test_an_unexpected_error_is_internal_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def behaviour(_request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async with translated(context):
            raise ZeroDivisionError("secret")
        return b""

    async with calling(behaviour) as call:
        arrived = await call()
    assert arrived.reason is Reason.INTERNAL
    assert "secret" not in arrived.message
    assert "secret" in caplog.text


async def test_an_abort_within_a_translated_body_stays_as_it_is() -> None:
    async def behaviour(_request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async with translated(context):
            code, text, metadata = to_rpc(ColaError(Reason.UNKNOWN_JOB, job="ftjob-1"))
            await context.abort(code, text, metadata)
        return b""

    async with calling(behaviour) as call:
        assert (await call()).details == {"job": "ftjob-1"}


FOREIGN = {
    grpc.StatusCode.UNAVAILABLE: (Reason.UNAVAILABLE, "here cannot be reached: odd"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (Reason.UNAVAILABLE, "here cannot be reached: odd"),
    grpc.StatusCode.UNAUTHENTICATED: (Reason.UNAUTHENTICATED, "a valid token"),
    grpc.StatusCode.UNKNOWN: (Reason.INTERNAL, "odd"),
}


@pytest.mark.parametrize(("code", "expected"), FOREIGN.items(), ids=[code.name for code in FOREIGN])
async def test_a_status_from_elsewhere_becomes_the_nearest_reason(
    code: grpc.StatusCode, expected: tuple[Reason, str]
) -> None:
    async def behaviour(_request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        await context.abort(code, "odd")

    async with calling(behaviour) as call:
        arrived = await call()
    assert arrived.reason is expected[0]
    assert arrived.message.startswith(expected[1])


@pytest.mark.parametrize("change", ["unknown reason", "lost detail", "another domain", "garbage"])
async def test_what_another_version_says_is_told_in_its_own_words(change: str) -> None:
    async def behaviour(_request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        code, _, ((key, packed),) = to_rpc(ColaError(Reason.FILE_TOO_LARGE, file="f", limit="9"))
        assert isinstance(packed, bytes)
        swaps = {
            "unknown reason": (b"FILE_TOO_LARGE", b"FILE_TOO_HEAVY"),
            "lost detail": (b"limit", b"bound"),
            "another domain": (b"cola", b"pola"),
            "garbage": (packed, b"\xff\xff\xff"),
        }
        await context.abort(code, "in its own words", ((key, packed.replace(*swaps[change])),))

    async with calling(behaviour) as call:
        arrived = await call()
    assert arrived.reason is Reason.INTERNAL
    assert arrived.message == "in its own words"
