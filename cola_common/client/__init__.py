"""The Python client: `Client`, and `AsyncClient` for asyncio; `cola_common.jobs` has the records that they return."""

from cola_common.client.aio import AsyncClient
from cola_common.client.jobs import JobFailedError
from cola_common.client.pages import AsyncPage, Page
from cola_common.client.sync import Client
from cola_common.errors import ColaError, Reason

__all__ = ["AsyncClient", "AsyncPage", "Client", "ColaError", "JobFailedError", "Page", "Reason"]
