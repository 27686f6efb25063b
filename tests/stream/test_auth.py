"""Who may call what, over every kind of call."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from google.protobuf.descriptor import ServiceDescriptor

from cola_common.errors import ColaError, Reason
from cola_common.messages import Draining, ToServer, ToWorker
from cola_common.rpc import auth
from cola_common.rpc.auth import Access, Holder, TokenAuth, header
from cola_common.rpc.channels import connect
from cola_common.rpc.duplex import Duplex, StreamBroken, StreamEnded, StreamFinished
from cola_common.rpc.fleet import Context, add_fleet, attend
from cola_common.rpc.status import from_rpc
from cola_common.wire import checkpoints_pb2, files_pb2, fleet_pb2, jobs_pb2, models_pb2, workers_pb2

CLIENT, WORKER, OTHER = "client-token", "worker-token", "other-token"
ACCESS = Access({CLIENT: Holder(auth.OPERATOR), OTHER: Holder(auth.CLIENT, "other"), WORKER: Holder(auth.WORKER)})
FILES = (checkpoints_pb2, files_pb2, fleet_pb2, jobs_pb2, models_pb2, workers_pb2)
SERVICES = [service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()]
KINDS = ("unary_unary", "unary_stream", "stream_unary")


class Parser:
    """Counts the bodies that were parsed."""

    def __init__(self) -> None:
        self.parsed = 0

    def __call__(self, body: bytes) -> bytes:
        self.parsed += 1
        return body


@asynccontextmanager
async def serving(parser: Parser, access: Access = ACCESS) -> AsyncIterator[str]:
    async def unary(_request: object, _context: object) -> bytes:
        return b"yes"

    async def stream(_request: object, _context: object) -> AsyncIterator[bytes]:
        yield b"yes"

    async def fleet(duplex: Duplex[ToWorker, ToServer], _context: Context) -> None:
        await duplex.receive()
        await duplex.goodbye("yes")

    handlers = {
        "unary_unary": grpc.unary_unary_rpc_method_handler(unary, parser),
        "unary_stream": grpc.unary_stream_rpc_method_handler(stream, parser),
        "stream_unary": grpc.stream_unary_rpc_method_handler(unary, parser),
    }
    server = grpc.aio.server(interceptors=[TokenAuth(access)])
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler("cola.v1.Jobs", handlers),
            grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handlers["unary_unary"]}),
        )
    )
    add_fleet(server, fleet)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def call(address: str, kind: str, token: str | None, path: str | None = None) -> bytes | ColaError:
    async def requests() -> AsyncIterator[bytes]:
        yield b"body"

    metadata = () if token is None else (header(token),)
    async with connect(address) as channel:
        method = getattr(channel, kind)(path or f"/cola.v1.Jobs/{kind}")
        try:
            made = method(requests() if kind == "stream_unary" else b"body", metadata=metadata)
            if kind == "unary_stream":
                return b"".join([part async for part in made])
            return await made
        except grpc.aio.AioRpcError as error:
            return from_rpc(error)


async def attends(address: str, token: str | None) -> ColaError | None:
    async with connect(address) as channel:
        duplex = attend(channel, token=token)

        async def talk() -> None:
            await duplex.send(Draining())
            await duplex.receive()

        with pytest.raises(StreamEnded) as ended:
            await talk()
        if isinstance(ended.value, StreamFinished):
            return None
        assert isinstance(ended.value, StreamBroken)
        return ended.value.error


def reason(answer: bytes | ColaError | None) -> Reason | None:
    return answer.reason if isinstance(answer, ColaError) else None


@pytest.mark.parametrize("kind", KINDS)
async def test_a_clients_call_needs_the_clients_token_before_its_body_is_parsed(kind: str) -> None:
    parser = Parser()
    async with serving(parser) as address:
        assert reason(await call(address, kind, None)) is Reason.UNAUTHENTICATED
        assert reason(await call(address, kind, "forged")) is Reason.UNAUTHENTICATED
        assert reason(await call(address, kind, CLIENT + "x")) is Reason.UNAUTHENTICATED
        assert reason(await call(address, kind, WORKER)) is Reason.PERMISSION_DENIED
        assert parser.parsed == 0
        assert await call(address, kind, CLIENT) == b"yes"
        assert await call(address, kind, OTHER) == b"yes"


async def test_the_fleet_needs_the_workers_token() -> None:
    async with serving(Parser()) as address:
        assert reason(await attends(address, None)) is Reason.UNAUTHENTICATED
        assert reason(await attends(address, "forged")) is Reason.UNAUTHENTICATED
        for token in (CLIENT, OTHER):
            assert reason(await attends(address, token)) is Reason.PERMISSION_DENIED
        assert await attends(address, WORKER) is None


async def test_a_server_without_tokens_is_open() -> None:
    async with serving(Parser(), Access({})) as address:
        assert await call(address, "unary_unary", None) == b"yes"
        assert await call(address, "unary_unary", "any") == b"yes"
        assert await attends(address, None) is None


async def test_unknown_methods_are_not_told_apart_without_a_token() -> None:
    async with serving(Parser()) as address:
        assert reason(await call(address, "unary_unary", None, "/cola.v1.Nothing/Here")) is Reason.UNAUTHENTICATED
        assert reason(await call(address, "unary_unary", CLIENT, "/cola.v1.Nothing/Here")) is Reason.INTERNAL


async def test_a_probe_of_health_needs_no_token() -> None:
    async with serving(Parser()) as address:
        assert await call(address, "unary_unary", None, "/grpc.health.v1.Health/Check") == b"yes"


@pytest.mark.parametrize(
    "metadata",
    [
        (("authorization", CLIENT),),
        (("authorization", f"Basic {CLIENT}"),),
        (("authorization", f"Bearer  {CLIENT}"),),
        (("authorization", "Bearer "),),
        (("authorization", f"Bearer {CLIENT}"), ("authorization", "Bearer forged")),
    ],
)
async def test_a_header_of_another_form_is_no_token(metadata: tuple[tuple[str, str], ...]) -> None:
    async with serving(Parser()) as address, connect(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary("/cola.v1.Jobs/unary_unary")(b"", metadata=metadata)
    assert from_rpc(refused.value).reason is Reason.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("method", "may"),
    [
        ("/cola.v1.Jobs/Create", {CLIENT, OTHER}),
        ("/cola.v1.Workers/List", {CLIENT, OTHER}),
        ("/cola.v1.Workers/Drain", {CLIENT}),
        ("/cola.v1.Fleet/Attend", {WORKER}),
        ("/grpc.health.v1.Health/Check", {CLIENT, OTHER, WORKER, None}),
        ("/x/Y", {CLIENT, OTHER}),
    ],
)
def test_who_may_call_what(method: str, may: set[str | None]) -> None:
    def refused(token: str | None) -> ColaError | None:
        return ACCESS.refusal(method, [] if token is None else [header(token)])

    assert {token for token in (CLIENT, OTHER, WORKER, None) if refused(token) is None} == may


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_every_call_of_every_service_is_in_the_table(service: ServiceDescriptor) -> None:
    starts = [start for start, _, _ in auth.RULES if start != "/"]
    for method in service.methods:
        assert any(f"/{service.full_name}/{method.name}".startswith(start) for start in starts)


def test_a_token_is_its_tenants_and_an_open_server_has_one_tenant() -> None:
    assert ACCESS.tenant([("x-request", "1"), header(OTHER)]) == "other"
    assert ACCESS.tenant([header(CLIENT)]) == "default"
    for metadata in (None, [], [header("forged")], [header(OTHER), header(CLIENT)]):
        with pytest.raises(ColaError) as refused:
            ACCESS.tenant(metadata)
        assert refused.value.reason is Reason.UNAUTHENTICATED
    assert Access({}).tenant(None) == Access({}).tenant([header("any")]) == "default"
