"""Where plaintext may go, and what TLS accepts."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from cola_common.errors import ColaError, Reason
from cola_common.rpc import malloc
from cola_common.rpc.addresses import is_loopback, split
from cola_common.rpc.auth import header
from cola_common.rpc.channels import connect
from cola_common.rpc.limits import SERVER_OPTIONS
from cola_common.rpc.status import from_rpc


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:50051", True),
        ("127.8.9.10:1", True),
        ("[::1]:50051", True),
        ("localhost:0", True),
        ("0.0.0.0:50051", False),
        ("[::]:50051", False),
        ("10.0.0.1:50051", False),
        ("localhost.example.org:443", False),
        ("127.0.0.1.example.org:443", False),
    ],
)
async def test_plaintext_stays_on_this_machine_unless_asked_for(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback
    if loopback:
        await connect(address).close()
    else:
        with pytest.raises(ColaError, match="not loopback"):
            connect(address)
    await connect(address, insecure=True).close()


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:x", "host:-1", "host:65536", "::1:80", "host:٣"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ColaError) as refused:
        split(address)
    assert refused.value.reason is Reason.INVALID_CONFIG


# Self-signed for 127.0.0.1, until 2125. `other.pem` is a certificate that nobody holds the key of any more.
TLS = Path(__file__).parent / "tls"


@asynccontextmanager
async def serving(credentials: grpc.ServerCredentials) -> AsyncIterator[str]:
    async def behaviour(_request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return dict(context.invocation_metadata() or ()).get("authorization", "none").encode()

    server = grpc.aio.server(options=SERVER_OPTIONS)
    handlers = {"Call": grpc.unary_unary_rpc_method_handler(behaviour)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@pytest.fixture
def credentials() -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([((TLS / "server.key").read_bytes(), (TLS / "server.pem").read_bytes())])


async def test_tls_takes_the_given_roots_and_no_others(credentials: grpc.ServerCredentials) -> None:
    async with serving(credentials) as address:
        async with connect(address, root_certificates=TLS / "server.pem") as channel:
            assert await channel.unary_unary("/test/Call")(b"", metadata=(header("t"),)) == b"Bearer t"
        for roots in (TLS / "other.pem", None):
            async with connect(address, root_certificates=roots) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await channel.unary_unary("/test/Call")(b"")
                assert from_rpc(failed.value, address).reason is Reason.UNAVAILABLE


def test_roots_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ColaError, match=r"missing\.pem") as refused:
        connect("127.0.0.1:1", root_certificates=tmp_path / "missing.pem")
    assert refused.value.reason is Reason.INVALID_CONFIG


async def test_a_second_server_on_one_port_is_refused() -> None:
    first, second = grpc.aio.server(options=SERVER_OPTIONS), grpc.aio.server(options=SERVER_OPTIONS)
    port = first.add_insecure_port("127.0.0.1:0")
    await first.start()
    with pytest.raises(RuntimeError):
        second.add_insecure_port(f"127.0.0.1:{port}")
    await first.stop(0)
    await second.stop(0)


async def test_a_compressed_request_is_refused() -> None:
    async def behaviour(request: bytes, _context: object) -> bytes:
        return request

    server = grpc.aio.server(options=SERVER_OPTIONS)
    handlers = {"Call": grpc.unary_unary_rpc_method_handler(behaviour)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connect(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/test/Call")
            assert await call(bytes(1000)) == bytes(1000)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(bytes(1 << 20), compression=grpc.Compression.Gzip)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop(0)


def test_malloc_takes_every_setting() -> None:
    assert malloc.tune() is True
